"""Stories: what a query shows, what is in the gallery, what is left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from fromage.errors import UserError
from fromage.evals import vist
from fromage.evals.options import Options
from fromage.evals.vist import KEPT, SETTINGS, Stories, Story, evaluate, read_stories, story_prompt
from fromage.models.encode_files import encode_files
from fromage.models.prompts import RET, START, prompt_ids


@pytest.fixture
def data(world):
    return read_stories(world / "vist" / "sis" / "val.story-in-sequence.json", world / "vist" / "images" / "val")


def test_few_stories_search_all_images(data, world):
    few = read_stories(world / "vist" / "sis" / data.name, world / "vist" / "images" / "val", limit=2)
    assert few.stories == data.stories[:2] and few.images == data.images and len(data.stories) > 2


def test_prompts_are_in_the_order_of_the_story(toy_model):
    said = ["one", "two", "three", "four", "five"]
    assert story_prompt(SETTINGS["1_caption"], said, "ABCD") == ["five"]
    assert story_prompt(SETTINGS["5_captions"], said, "ABCD") == ["one", " two", " three", " four", " five"]
    assert story_prompt(SETTINGS["5_captions_4_images"], said, "ABCD") == [
        "one",
        "A",
        " two",
        "B",
        " three",
        "C",
        " four",
        "D",
        " five",
    ]
    assert story_prompt(SETTINGS["4_images"], said, "ABCD") == ["A", "B", "C", "D"]
    full = story_prompt(SETTINGS["5_captions_4_images_authors"], said, "ABCD")
    assert [part for part in full if part is not START] == ["one", "A", "two", "B", "three", "C", "four", "D", "five"]
    parts = story_prompt(SETTINGS["5_captions_4_images_authors"], said, list(torch.zeros(4, toy_model.vision.width)))
    ids, tokenizer = prompt_ids(toy_model, [*parts, RET]), toy_model.tokenizer
    want = [
        i for n in range(5) for i in [*tokenizer.start(), *tokenizer.encode(said[n]), *[tokenizer.image_id] * 2 * (n < 4)]
    ]
    assert ids == [*want, tokenizer.ret_id]


def by_hand(queries, gallery, stories, encoded, kept):
    """R@5 by sorting, story by story."""
    hits = 0
    for query, story in zip(queries, stories, strict=True):
        own = [encoded.row[path] for path in story.images]
        left = [row for row in range(len(gallery)) if kept or row not in own[:-1]]
        order = sorted(left, key=lambda row: -float(query @ gallery[row]))
        hits += own[-1] in order[:5]
    return 100 * hits / len(stories)


@torch.no_grad()
def test_recalls_are_as_counted_with_the_context_excluded_and_kept(toy_model, data, monkeypatch):
    report = evaluate(toy_model, data)
    assert report["gallery"] == 25 and report["queries"] == 5
    encoded = encode_files(toy_model, data.images, Options())
    gallery, clip = toy_model.embed_images(encoded.features), toy_model.vision.text_tower()
    theirs = clip.embed_features(encoded.features)
    for name, setting in SETTINGS.items():
        said, shown, _ = setting
        prompts = [story_prompt(setting, s.sentences, encoded.of(s.images)) for s in data.stories]
        queries = toy_model.embed_text(prompts)
        rows = []
        for story in data.stories:
            parts = [clip.embed_text([" ".join(story.sentences[i] for i in said)])] if said else []
            parts += [clip.embed_features(encoded.of([story.images[i]])) for i in shown]
            rows.append(F.normalize(torch.cat(parts).mean(0), dim=0))
        for kept in (False, True):
            at = name + KEPT * kept
            want = by_hand(queries, gallery, data.stories, encoded, kept)
            assert report["fromage"][at]["r5"] == pytest.approx(want)
            assert report["chance"][at]["r5"] == pytest.approx(100 * 5 / (25 if kept else 21), abs=1e-3)
            want = by_hand(rows, theirs, data.stories, encoded, kept)
            assert report["clip"][at]["r5"] == pytest.approx(want)
    assert not report["paper"], "these are other stories"
    monkeypatch.setattr(vist, "STORIES", range(100))
    paper = evaluate(toy_model, replace(data, name=vist.PUBLISHED), Options(clip=False))["paper"]
    assert paper["fromage"]["5_captions_4_images_authors"]["r1"] == 18.2
    assert "5_captions_4_images" not in paper["fromage"], "by the released code's protocol alone"


def test_a_story_with_a_lost_image_is_skipped_and_its_other_images_stay(toy_model, data, tmp_path):
    gone = tmp_path / "gone.jpg"
    stories = [data.stories[0], *data.stories[1:]]
    lost = stories[0].images[2]
    stories[0] = type(stories[0])(stories[0].sentences, [gone if path == lost else path for path in stories[0].images])
    images = [gone if path == lost else path for path in data.images]
    report = evaluate(toy_model, Stories("some", stories, images, 3), Options(clip=False))
    assert report["gallery"] == 24 and report["queries"] == 4 and report["lost"] == [f"{gone} (missing)"]
    assert report["skipped"]["stories with a lost image"] == 1 and report["skipped"]["stories of other lengths"] == 3
    with pytest.raises(UserError, match="some: no entry has all its images"):
        evaluate(toy_model, Stories("some", stories[:1], images, 0), Options(clip=False))


@pytest.fixture
def wide(data, tmp_path):
    """The stories with images that are twice as wide as high, told backwards in their file."""
    rng = np.random.default_rng(0)

    def drawn(path):
        if not (out := tmp_path / f"{path.stem}.png").exists():
            Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)).resize((130, 65)).save(out)
        return out

    stories = [Story(s.sentences, [drawn(path) for path in s.images], (4, 3, 2, 1, 0)) for s in data.stories]
    return Stories("wide", stories, [drawn(path) for path in data.images], 0)


@torch.no_grad()
def test_the_authors_protocol_has_squares_in_the_order_of_the_file_for_both_systems(toy_model, wide, monkeypatch):
    asked = {}

    def note(queries, gallery, right, scope):
        asked.setdefault(gallery.shape[1], []).append((gallery, right, scope))
        return torch.ones(len(queries), 1, dtype=torch.long)

    monkeypatch.setattr("fromage.evals.contextual.places", note)
    evaluate(toy_model, wide)
    vision, clip = toy_model.vision, toy_model.vision.text_tower()
    squares = torch.stack([pil_to_tensor(Image.open(path).resize(vision.image_size[::-1])) for path in wide.images])
    pixels = {"own": torch.stack([vision.transform(Image.open(path)) for path in wide.images]), "square": squares}
    number = {path: i for i, path in enumerate(wide.images)}
    for embed in (toy_model.embed_images, clip.embed_features):
        galleries = {how: embed(vision(some).float()) for how, some in pixels.items()}
        assert (galleries["own"] - galleries["square"]).abs().amax() > 1e-2
        seen = asked.pop(galleries["own"].shape[1])
        for at, (name, setting) in enumerate(SETTINGS.items()):
            authors = name.endswith("_authors")
            gallery, right, scope = seen[2 * at]
            torch.testing.assert_close(gallery, galleries["square" if authors else "own"])
            order = [story.images[::-1] if authors else story.images for story in wide.stories]
            assert right == [[number[images[-1]]] for images in order] and scope.own_stays is not authors
            assert scope.excluded == [[number[path] for path in images[:-1]] for images in order]
            assert setting.protocol.start_each is authors and seen[2 * at + 1][2].excluded is None


def test_a_right_image_that_was_shown_before_is_barred_by_the_authors_protocol_alone(toy_model, wide):
    again = [Story(s.sentences, [s.images[4], *s.images[1:4], s.images[4]]) for s in wide.stories]
    images = [path for story in again for path in story.images[:4]]
    report = evaluate(toy_model, Stories("again", again, images, 0))
    for who in ("fromage", "clip"):
        for at in SETTINGS:
            assert (report[who][at]["median_rank"] == 20) is at.endswith("_authors")
            assert report[who][at + KEPT]["median_rank"] < 20
    said = report["protocol"]["..._authors"]
    assert all(word in said for word in ("square", "order of the file", "barred", "</s> before every sentence"))
