"""Stories: what a query shows, what is in the gallery, what is left out."""

import pytest
import torch
import torch.nn.functional as F

from fromage.errors import UserError
from fromage.evals.clip import load_clip_baseline
from fromage.evals.vist import KEPT, SETTINGS, Stories, evaluate, read_stories, story_prompt
from fromage.models.prompts import RET, START, prompt_ids
from fromage.retrieval.encode import Options, encode_files


@pytest.fixture
def data(world):
    return read_stories(world / "vist" / "sis" / "val.story-in-sequence.json", world / "vist" / "images" / "val")


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
def test_recalls_are_as_counted_with_the_context_excluded_and_kept(toy_model, data):
    report = evaluate(toy_model, data)
    assert report["gallery"] == 25 and report["queries"] == 5
    encoded = encode_files(toy_model, data.images, Options())
    gallery, clip = toy_model.embed_images(encoded.features), load_clip_baseline(toy_model)
    theirs = clip.embed_features(encoded.features)
    for name, setting in SETTINGS.items():
        said, shown, authors = setting
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
            assert (at in report["clip"]) is not authors
            if not authors:
                want = by_hand(rows, theirs, data.stories, encoded, kept)
                assert report["clip"][at]["r5"] == pytest.approx(want)
    assert all(report["paper"]["fromage"]["5_captions_4_images" + way]["r1"] == 18.2 for way in ("", "_authors"))


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
