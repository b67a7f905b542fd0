"""Composition learning under Lightning: training from tuples, resuming, CLIP's space, and what is refused."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from fromage.data.datamodule import CC3M
from fromage.data.features import store_features
from fromage.data.tuple_packing import pack_tuples
from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.toy.tuples import LINES, make_tuples
from fromage.training.module import FromageModule

TOY = {"lm": "toy", "vision": "toy", "vision_weights": None, "dtype": "float32", "lr": 5e-3, "warmup_steps": 2, "q": 32}
BOTH = {"composition_captioning_weight": 1.0, "composition_retrieval_weight": 1.0}
CLIP = {"space": "clip", "q": 128}


@pytest.fixture(scope="module")
def tuples(tmp_path_factory):
    """Shards of 40 tuples; the first half of them with their target images."""
    out = tmp_path_factory.mktemp("tuples")
    make_tuples(out / "made", 40, progress=False)
    text = (out / "made" / LINES).read_text().splitlines(keepends=True)
    (out / "made" / "some.jsonl").write_text("".join([*text[:20], *(x.replace('"target_image"', '"x"') for x in text[20:])]))
    pack_tuples(out / "made" / LINES, out / "whole", per_shard=16)
    pack_tuples(out / "made" / "some.jsonl", out / "some", per_shard=16)
    return out


def run(world, tuples, out, steps, ckpt_path=None, **options):
    """Fit; returns the module and the trainer."""
    pl.seed_everything(0)
    module = FromageModule(**{**TOY, **BOTH, **options})
    named = {} if tuples is None else {"train_tuples": str(tuples), "tuple_batch_size": 8}
    data = CC3M(str(world / "cc3m" / "train"), batch_size=16, max_tokens=40, workers=0, **named)
    saver = ModelCheckpoint(out, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[saver], gradient_clip_val=1.0, **quiet)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def test_tuples_are_trained_on_and_a_run_resumes_exactly(world, tuples, tmp_path):
    whole, trainer = run(world, tuples / "whole", tmp_path / "a", 4)
    logged = {f"train/composition_{name}" for name in ("captioning_loss", "contrastive_loss", "retrieval_accuracy")}
    assert logged <= set(trainer.callback_metrics)
    run(world, tuples / "whole", tmp_path / "b", 2)
    resumed, _ = run(world, tuples / "whole", tmp_path / "b", 4, ckpt_path="last")
    for name, value in whole.model.trained().items():
        assert torch.equal(value, resumed.model.trained()[name]), name
    plain, _ = run(world, None, tmp_path / "c", 4, composition_captioning_weight=0, composition_retrieval_weight=0)
    assert not torch.equal(plain.model.visual_prefix.weight, whole.model.visual_prefix.weight)
    with pytest.raises(UserError, match="parameter tensors were trained"):
        run(world, tuples / "whole", tmp_path / "a", 5, ckpt_path="last", captioning_weight=0, retrieval_weight=0,
            composition_captioning_weight=1, composition_retrieval_weight=0)  # fmt: skip


def test_both_steps_train_alike_and_from_stored_features(world, tuples, tmp_path):
    store_features(str(tuples / "whole"), tmp_path / "stored", Fromage.load().vision, workers=0)
    models = [
        run(world, shards, tmp_path / name, 2, step=step)[0].model
        for name, shards, step in (
            ("fast", tuples / "whole", "fast"),
            ("reference", tuples / "whole", "reference"),
            ("stored", tmp_path / "stored", "fast"),
        )
    ]
    for name, value in models[0].trained().items():
        for other in models[1:]:
            torch.testing.assert_close(other.trained()[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_in_the_space_of_clip_images_stay_where_clip_has_them(world, tuples, tmp_path):
    module, _ = run(world, tuples / "some", tmp_path, 2, **CLIP, r=2, ret_attention="stacked")
    model, clip = module.model, Fromage.load().vision.text_tower()
    assert not any("text_tower" in name for name in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    features = torch.randn(5, model.vision.width)
    torch.testing.assert_close(model.embed_images(features), clip.embed_features(features))
    loaded = load_model(tmp_path / "last.ckpt")
    assert loaded.config.space == "clip" and loaded.fingerprint() == model.fingerprint()
    loaded.save_pretrained(tmp_path / "folder", dtype="float32")
    again = Fromage.from_pretrained(tmp_path / "folder")
    assert again.config.space == "clip" and torch.equal(again.embed_images(features), model.embed_images(features))
    with pytest.raises(UserError, match=r"trained with model\.space clip, not learned"):
        run(world, tuples / "whole", tmp_path, 3, ckpt_path="last", r=2, ret_attention="stacked")


def test_the_space_of_clip_follows_each_kind_of_tower(towers):
    features = torch.randn(3, 32)
    model = Fromage.load(vision=towers["hf"], q=24, space="clip")
    torch.testing.assert_close(model.embed_images(features), model.vision.text_tower().embed_features(features))
    assert Fromage.load(vision="RN50", random_weights=True, q=1024, space="clip").image_head.weight.shape == (1024, 2048)
    with pytest.raises(UserError, match=r"has no text tower.*choose a CLIP or SigLIP, or space 'learned'"):
        Fromage.load(vision=towers["timm"], space="clip")
    with pytest.raises(UserError, match="q 256: CLIP's joint space of toy has 128; give that as q"):
        Fromage.load(space="clip")


def test_what_cannot_be_trained_is_refused(world, tuples, tmp_path):
    with pytest.raises(UserError, match=r"the data has no tuples; give data\.train_tuples, or leave both weights at 0"):
        run(world, None, tmp_path, 1)
    with pytest.raises(UserError, match=r"samples are broken.*no target image.*model.space clip"):
        run(world, tuples / "some", tmp_path, 3)
    with pytest.warns(UserWarning, match=r"data\.train_tuples: nothing is learned from them"):
        run(world, tuples / "whole", tmp_path / "b", 1, composition_captioning_weight=0, composition_retrieval_weight=0)
    with pytest.raises(UserError, match="not all of them 0"):
        FromageModule(captioning_weight=0, retrieval_weight=0)
    with pytest.raises(UserError, match=r"model\.composition_captioning_weight"):
        FromageModule(composition_captioning_weight=-1)
