"""COCO and Flickr30k: figures against counting, images that are lost, CLIP, and the same through Lightning."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import open_clip
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from pycocoevalcap import eval as cocos
from pycocoevalcap.rouge.rouge import Rouge
from pycocotools.coco import COCO

from fromage.errors import UserError
from fromage.evals import coco
from fromage.evals.caption_sets import CaptionSet, read_caption_set
from fromage.evals.captioning import caption_figures
from fromage.evals.coco import both_ways, evaluate, gallery_of
from fromage.evals.coco_lightning import CocoCaptions, CocoModule
from fromage.evals.options import Options
from fromage.evals.report import markdown, table
from fromage.generation.generate import caption
from fromage.images.open import open_image
from fromage.models.encode_files import encode_files
from fromage.models.vision.open_clip import OpenClipTower, load_clip
from fromage.models.vision.open_clip import _projection as projection


@pytest.fixture
def data(world):
    return read_caption_set(world / "coco" / "annotations" / "captions_val2017.json", world / "coco" / "val2017")


def counted(scores, owner, k):
    """Recall@k both ways by sorting, ties against: nothing clever."""
    found = {"text_to_image": [], "image_to_text": []}
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j == owner[i]))
        found["text_to_image"].append(owner[i] in order[:k])
    for j in range(len(scores[0])):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i][j], owner[i] == j))
        found["image_to_text"].append(any(owner[i] == j for i in order[:k]))
    return {way: 100 * sum(hits) / len(hits) for way, hits in found.items()}


def test_both_ways_are_as_counted():
    generator = torch.Generator().manual_seed(2)
    texts, images = (torch.randint(-1, 2, (n, 4), generator=generator).float() for n in (33, 12))
    owner = torch.arange(33) % 12
    system, scores = both_ways(texts, images, owner), (texts @ images.T).tolist()
    for k in (1, 5, 10):
        want = counted(scores, owner.tolist(), k)
        assert {way: figures[f"r{k}"] for way, figures in system.items()} == pytest.approx(want)


def test_from_two_thousand_on_there_are_galleries_of_a_thousand(monkeypatch):
    monkeypatch.setattr(coco, "FOLD", 10)
    images = F.normalize(torch.randn(25, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    owner = torch.arange(25).repeat_interleave(2)
    texts = images[owner] + 0.5 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    system = both_ways(texts, images, owner)
    parts = [both_ways(texts[2 * i : 2 * i + 20], images[i : i + 10], owner[:20]) for i in (0, 10)]
    for way in ("text_to_image", "image_to_text"):
        assert system[f"{way}_1k"]["r1"] == pytest.approx(sum(part[way]["r1"] for part in parts) / 2)
    assert gallery_of("text_to_image_1k", 25, 2) == (10, 1) and gallery_of("image_to_text_1k", 25, 2) == (20, 2)
    assert gallery_of("text_to_image", 25, 2) == (25, 1) and gallery_of("image_to_text", 25, 2) == (50, 2)
    assert "text_to_image_1k" not in both_ways(texts[:20], images[:10], owner[:20])


def test_a_report_has_everything_and_chance_is_beaten_by_clip(toy_model, data, monkeypatch):
    assert not evaluate(toy_model, data, Options(clip=False))["paper"], "of other images"
    monkeypatch.setattr(coco, "WHOLE", 60)
    report = evaluate(toy_model, data)
    assert report["gallery"] == 60 and report["queries"] == 300 and not any(report["skipped"].values())
    assert report["clip"]["text_to_image"]["r1"] > 50 > 10 > report["chance"]["text_to_image"]["r1"]
    assert report["checkpoint"] == toy_model.fingerprint() and torch.__version__.startswith(report["versions"]["torch"])
    assert report["paper"]["fromage"]["image_to_text"] == {"r1": 26.8}
    assert report["fromage"].keys() == report["clip"].keys() == report["chance"].keys()
    lines = table(report).splitlines()
    assert any(line.startswith("text_to_image  clip") for line in lines) and "(23.4)" in table(report)
    flickr = evaluate(toy_model, replace(data, dataset="flickr30k"))
    assert "third party's" in table(report) and "third party's" not in table(flickr)
    head, _, *rows = markdown(report).splitlines()
    assert len(rows) == 3 and len({line.count("|") for line in (head, *rows)}) == 1
    assert "clip" not in evaluate(toy_model, data, options=Options(clip=False))


def test_the_coco_sample_is_evaluated(toy_model, shared_data):
    sample = shared_data / "coco_sample"
    data = read_caption_set(sample / "captions_val2017_sample.json", sample / "val2017", limit=24)
    report = evaluate(toy_model, data)
    assert report["gallery"] == 24 and report["queries"] == sum(map(len, data.captions))


def test_images_that_are_missing_or_broken_are_counted_named_and_bounded(toy_model, data, tmp_path):
    for path in data.images[:20]:
        shutil.copy(path, tmp_path)
    images = [tmp_path / path.name for path in data.images[:20]]
    images[3].write_bytes(images[3].read_bytes()[:300])
    images[5].unlink()
    some = CaptionSet("some", images, data.captions[:20])
    report = evaluate(toy_model, some, options=Options(max_lost=0.1))
    assert report["skipped"]["images missing"] == report["skipped"]["images broken"] == 1
    assert report["gallery"] == 18 and report["queries"] == 90
    assert {line.split()[0] for line in report["lost"]} == {str(images[3]), str(images[5])}
    whole = CaptionSet("whole", [p for p in images if p not in (images[3], images[5])],
                       [c for i, c in enumerate(data.captions[:20]) if i not in (3, 5)])  # fmt: skip
    assert evaluate(toy_model, whole)["fromage"] == report["fromage"]
    with pytest.raises(UserError, match=rf"2 of 20 images.*{images[3].name}.*--max-lost"):
        evaluate(toy_model, some, options=Options(max_lost=0.05))
    with pytest.raises(UserError, match="20 of 20"):
        evaluate(toy_model, CaptionSet("none", [tmp_path / "no" / p.name for p in images], data.captions[:20]))


def test_workers_and_batches_change_nothing(toy_model, data):
    paths = [*data.images[:9], *data.images[:4]]
    plain, other = (encode_files(toy_model, paths, options) for options in (Options(), Options(4, workers=1)))
    torch.testing.assert_close(plain.features, other.features)
    assert len(plain.features) == 9 and plain.row == other.row
    torch.testing.assert_close(plain.of(paths[9:]), plain.features[:4])


def test_clip_by_its_projection_is_clip_whole(toy_model, data):
    whole, transform, tokenize = load_clip("toy")
    pixels = torch.stack([transform(open_image(str(path))) for path in data.images[:4]])
    clip = toy_model.vision.text_tower()
    torch.testing.assert_close(
        clip.embed_features(toy_model.vision(pixels)), F.normalize(whole.encode_image(pixels), dim=-1), atol=1e-5, rtol=1e-4
    )
    texts = ["a red star.", "words " * 500]
    torch.testing.assert_close(clip.embed_text(texts), F.normalize(whole.encode_text(tokenize(texts)), dim=-1))


@torch.no_grad()
def test_the_projection_of_a_vit():
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    clip = open_clip.CLIP(24, vision, {"layers": 1, "width": 32, "heads": 2, "vocab_size": 100}).eval()
    pixels, after = torch.randn(3, 3, 32, 32), projection(clip.visual)
    want = clip.encode_image(pixels)
    torch.testing.assert_close(after(OpenClipTower(clip, None, "small")(pixels)), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "width"), [("ViT-B-16-SigLIP", 768), ("convnext_tiny", 768)])
def test_towers_of_timm_and_their_projections(name, width):
    config = open_clip.get_model_config(name)
    visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"]).eval()
    pixels = torch.randn(2, 3, 224, 224)
    want, after = visual(pixels), projection(visual)
    tower = OpenClipTower(SimpleNamespace(visual=visual), None, name)
    assert tower.width == width
    torch.testing.assert_close(after(tower(pixels)), want, atol=1e-5, rtol=1e-4)


def test_captioning_says_what_is_not_installed(toy_model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match=r"pip install '\.\[evals\]' in FROMAGe's folder, or leave them out"):
        evaluate(toy_model, data, captioning=True)


def test_captioning_hands_captions_to_the_scorers(toy_model, data, monkeypatch):
    """Stand-ins for pycocoevalcap's scorers, with its calling conventions."""
    seen = {}

    class Tokenizer:
        def tokenize(self, listed):
            return {i: [entry["caption"].lower() for entry in entries] for i, entries in listed.items()}

    class Scorer:
        def __init__(self, n=0):
            self.n = n

        def compute_score(self, wanted, given):
            seen.update(wanted=wanted, given=given)
            print("ratio: 1.0")
            return ([0.4, 0.3, 0.2, 0.1] if self.n else 0.25), None

    names = {"bleu": "Bleu", "cider": "Cider", "meteor": "Meteor", "rouge": "Rouge"}
    for module, name in names.items():
        fake = ModuleType(f"pycocoevalcap.{module}.{module}")
        setattr(fake, name, Scorer)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    fake = ModuleType("pycocoevalcap.tokenizer.ptbtokenizer")
    fake.PTBTokenizer = Tokenizer
    for name in ("pycocoevalcap", "pycocoevalcap.tokenizer", *(f"pycocoevalcap.{module}" for module in names)):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    few = CaptionSet("few", data.images[:3], data.captions[:3])
    monkeypatch.setattr(toy_model, "config", replace(toy_model.config, input_prompt="a red"))
    monkeypatch.setattr(toy_model, "generation", {"decoding": {"stop": [";"]}})
    report = evaluate(toy_model, few, options=Options(clip=False), captioning=True)
    figures = report["fromage"]["captioning"]
    made = [texts[0] for texts in seen["given"].values()]
    assert (
        made == [text.lower() for text in caption(toy_model, few.images)] and "'a red'" in report["protocol"]["captioning"]
    )
    assert "at most 32 tokens, which end at ';', '\\n'," in report["protocol"]["captioning"]
    assert "captioning" not in evaluate(toy_model, few, options=Options(clip=False))["protocol"]
    assert figures == {"bleu1": 40, "bleu2": 30, "bleu3": 20, "bleu4": 10, "meteor": 25, "rouge_l": 25, "cider": 25}
    assert [len(texts) for texts in seen["wanted"].values()] == [5, 5, 5] and len(seen["given"]) == 3
    caption_figures(["a\rstar\u2028 "], [["a\x85ring"]])  # lines are what its tokenizer pairs texts by
    assert seen == {"wanted": {0: ["a ring"]}, "given": {0: ["a star"]}}
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="Java"):
        caption_figures([], [])


def test_figures_of_captions_are_those_of_cocos_own_evaluation(shared_data, monkeypatch, capsys):
    if shutil.which("java") is None:
        pytest.skip("there is no Java")
    seen = theirs(shared_data)
    said = [[note["caption"] for note in seen.imgToAnns[i]] for i in sorted(seen.imgs)][:40]
    made, wanted = [texts[0] for texts in said], [texts[1:] for texts in said]
    notes = [{"image_id": i, "id": 9 * i + n, "caption": t} for i, texts in enumerate(wanted) for n, t in enumerate(texts)]
    seen.dataset = {"images": [{"id": i} for i in range(len(said))], "annotations": notes, "info": {}}
    seen.createIndex()
    monkeypatch.setattr(cocos, "Spice", Rouge)  # wants a download
    judge = cocos.COCOEvalCap(seen, seen.loadRes([{"image_id": i, "caption": text} for i, text in enumerate(made)]))
    judge.evaluate()
    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
    want = {name.lower().replace("bleu_", "bleu"): 100 * judge.eval[name] for name in names}
    assert caption_figures(made, wanted) == pytest.approx(want)


@torch.no_grad()
def test_recalls_of_the_coco_sample_are_those_of_pycocotools_view(toy_model, shared_data, capsys):
    seen, sample = theirs(shared_data), shared_data / "coco_sample"
    report = evaluate(toy_model, read_caption_set(sample / "captions_val2017_sample.json", sample / "val2017"))
    ids = sorted(seen.imgs)
    features = encode_files(toy_model, [sample / "val2017" / seen.imgs[i]["file_name"] for i in ids], Options()).features
    notes = [note for i in ids for note in seen.imgToAnns[i][:5]]
    assert report["gallery"] == 128 and len(notes) == 640 and len(seen.anns) == 641
    texts = toy_model.embed_text([note["caption"].strip() for note in notes])
    scores = texts.double() @ toy_model.embed_images(features).double().T
    own = torch.tensor([[note["image_id"] == i for i in ids] for note in notes])  # (641, 128)
    for k in (1, 5, 10):
        best = torch.zeros_like(own).scatter(1, scores.topk(k).indices, True)
        assert report["fromage"]["text_to_image"][f"r{k}"] == pytest.approx(
            100 * (best & own).any(1).float().mean().item(), abs=1e-3
        )
        best = torch.zeros_like(own).scatter(0, scores.topk(k, 0).indices, True)
        assert report["fromage"]["image_to_text"][f"r{k}"] == pytest.approx(
            100 * (best & own).any(0).float().mean().item(), abs=1e-3
        )


def theirs(shared_data):
    """The COCO sample as pycocotools reads it."""
    return COCO(str(shared_data / "coco_sample" / "captions_val2017_sample.json"))


def test_lightning_gives_the_same_figures(data, world):
    model = {"lm": "toy", "vision": "toy", "vision_weights": None, "dtype": "float32", "k": 2, "q": 32}
    module = CocoModule(**model)
    folder = world / "coco"
    given = CocoCaptions(
        str(folder / "annotations" / "captions_val2017.json"), str(folder / "val2017"), batch_size=7, workers=0
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (got,) = trainer.test(module, given, verbose=False)
    want = evaluate(module.model, data, options=Options(clip=False))["fromage"]
    assert got["test/gallery"] == 60 and got["test/images_lost"] == 0
    for setting, figures in want.items():
        assert {name: got[f"test/{setting}_{name}"] for name in figures} == pytest.approx(figures, abs=1e-3)


def test_lightning_refuses_images_that_are_not_there(world, tmp_path):
    given = CocoCaptions(str(world / "coco" / "annotations" / "captions_val2017.json"), str(tmp_path), workers=0)
    module = CocoModule(lm="toy", vision="toy", vision_weights=None, dtype="float32")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(UserError, match="60 of 60 images"):
        trainer.test(module, given, verbose=False)
    assert Path(given.images) == tmp_path
