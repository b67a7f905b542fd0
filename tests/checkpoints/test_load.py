"""Trained parameters on disk: what comes back, from where, and what is refused."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import fromage.checkpoints.load
from fromage.checkpoints.format import CARD, CONFIG, GENERATION, WEIGHTS, read_folder
from fromage.checkpoints.lightning import read_checkpoint
from fromage.checkpoints.load import read_saved
from fromage.cli.main import main
from fromage.config import FromageConfig
from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.models.frozen import TOY
from fromage.models.pretrained import from_saved, to_saved

TEXTS = ["a red star on the left.", "a ring"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Fromage.load(k=2, q=16)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def lightning_checkpoint(model, path):
    """A checkpoint as `lightning fit` leaves it, optimiser aside."""
    state = {f"model.{name}": p.detach() for name, p in model.trained().items()}
    torch.save({"state_dict": state, "hyper_parameters": {**vars(model.config), "lr": 1e-3}}, path)
    return path


def lm_folder(kind, out):
    """A tiny random language model in a folder, with the toy tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "opt":
        lm = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=24, ffn_dim=48, max_position_embeddings=64))
    else:
        lm = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False))
    lm.save_pretrained(out)
    for name in ("merges.txt", "vocab.json", "tokenizer_config.json"):
        shutil.copy(TOY / "opt" / name, out)
    return str(out)


def altered(folder, without=None, **changes):
    """The folder with other entries in its configuration, or one fewer."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name != without}))
    return folder


def test_a_float32_folder_gives_the_model_back_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", dtype="float32")
    loaded = Fromage.from_pretrained(tmp_path / "saved")
    for name, p in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p), name
    assert loaded.fingerprint() == model.fingerprint() == read_folder(tmp_path / "saved").fingerprint
    assert torch.equal(loaded.embed_text(TEXTS), model.embed_text(TEXTS)) and not loaded.training
    assert loaded.stored_dtype == "float32"


def test_a_bfloat16_folder_rounds_once(model, folder, tmp_path):
    loaded = load_model(folder)
    for name, p in model.trained().items():
        assert torch.equal(loaded.trained()[name], p.bfloat16().float()), name
    assert loaded.fingerprint() == read_folder(folder).fingerprint != model.fingerprint()
    loaded.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, CONFIG, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_holds_the_trained_parameters_and_how_to_build_around_them(model, folder):
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, CARD}
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(model.trained())
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    config = json.loads((folder / CONFIG).read_text())
    tokens = {"<|image|>": model.tokenizer.image_id, "[RET]": model.tokenizer.ret_id}
    wanted = {"format": "fromage", "version": 1, "lm": "toy", "vision": "toy", "k": 2, "q": 16, "dtype": "float32"}
    assert config.items() >= (wanted | {"added_tokens": tokens}).items()
    assert f"{sum(p.numel() for p in model.trained().values()):,}" in (folder / CARD).read_text()


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_any_causal_lm_comes_back_with_all_its_rows(kind, tmp_path):
    model = Fromage.load(lm=lm_folder(kind, tmp_path / "lm"), q=8)
    model.save_pretrained(tmp_path / "saved", dtype="float32")
    loaded = load_model(tmp_path / "saved")
    assert torch.equal(loaded.ret.output, model.ret.output)
    assert (loaded.ret.output.data_ptr() == loaded.ret.input.data_ptr()) == (kind == "opt")
    hidden = torch.randn(3, 24)
    assert torch.equal(loaded.lm.logits(hidden), model.lm.logits(hidden))


SEVERAL = {"r": 3, "ret_attention": "stacked", "ret_fusion": "transformer"}


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_several_ret_tokens_come_back_and_no_other_number_of_them_does(kind, tmp_path, capsys):
    lm = lm_folder(kind, tmp_path / "lm")
    model, texts = Fromage.load(lm=lm, q=8, **SEVERAL), ["a red star", ""]
    model.save_pretrained(tmp_path / "saved", dtype="float32")
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert config.items() >= SEVERAL.items() and list(config["added_tokens"])[1:] == ["[RET]", "[RET2]", "[RET3]"]
    loaded = load_model(tmp_path / "saved")
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.embed_text(texts), model.eval().embed_text(texts))
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt")
    assert load_model(checkpoint).fingerprint() == model.fingerprint()
    for path in (tmp_path / "saved", checkpoint):
        for r in (1, 4):
            with pytest.raises(UserError, match=rf"ret.input is \(3, 24\), wanted \({r}, 24\).*give .* r and"):
                load_model(path, r=r)
    with pytest.raises(UserError, match=r"fusion.layer.* wanted none"):
        load_model(tmp_path / "saved", ret_fusion="mean")
    one = lightning_checkpoint(Fromage.load(lm=lm, q=8), tmp_path / "one.ckpt")
    with pytest.raises(UserError, match=r"ret.input is \(1, 24\), wanted \(3, 24\)"):
        load_model(one, r=3)
    assert main(["export", "--ckpt", str(tmp_path / "saved"), "--format", "authors", "--out", str(tmp_path / "theirs")]) == 2
    said = capsys.readouterr().err
    assert "its [RET] is 3 tokens, fused by transformer" in said and said.splitlines()[-1].endswith(
        "export it with --format ours"
    )


def test_a_folder_and_a_checkpoint_from_before_have_one_ret_token(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    (tmp_path / "saved" / CONFIG).write_text(json.dumps({name: config[name] for name in config if name not in SEVERAL}))
    loaded = load_model(tmp_path / "saved")
    assert (loaded.r, loaded.config.ret_attention, loaded.config.ret_fusion) == (1, "sequential", "mean")
    assert loaded.fingerprint() == config["fingerprint"]


def test_ret_options_that_mean_nothing_are_named(tmp_path):
    saved = to_saved(Fromage.load(q=8))
    for name in ("ret_attention", "ret_fusion"):
        with pytest.raises(UserError, match=f"{name} odd: must be "):
            from_saved(Fromage, replace(saved, settings=saved.settings | {name: "odd"}))
    with pytest.raises(UserError, match=r"r 2: with pooling 'last'.*use r 1"):
        Fromage.load(q=8, r=2, pooling="last")


def test_an_untied_head_needs_its_row_and_has_no_place_in_the_authors_format(tmp_path, capsys):
    tied, untied = lm_folder("opt", tmp_path / "opt"), lm_folder("llama", tmp_path / "llama")
    Fromage.load(lm=tied, q=8).save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match=r"ret.output_rows is missing.*llama does not tie its head"):
        Fromage.from_pretrained(tmp_path / "tied", lm=untied)
    Fromage.load(lm=untied, q=8).save_pretrained(tmp_path / "untied")
    words = ["export", "--ckpt", str(tmp_path / "untied"), "--format", "authors", "--out", str(tmp_path / "theirs")]
    assert main([*words, "--visual-encoder", "openai/clip-vit-base-patch32"]) == 2
    assert "llama is not tied" in capsys.readouterr().err and not (tmp_path / "theirs").exists()


def test_load_model_takes_a_lightning_checkpoint_a_folder_and_a_hub_name(model, folder, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(fromage.checkpoints.load, "snapshot_download", snapshot_download)
    monkeypatch.setattr(fromage.checkpoints.load, "stay_offline_without_hub", lambda: None)
    run = load_model(lightning_checkpoint(model, tmp_path / "last.ckpt"))
    assert run.fingerprint() == model.fingerprint()
    there, hub = load_model(str(folder)), Fromage.from_pretrained("someone/fromage-toy", revision="v1")
    assert there.fingerprint() == hub.fingerprint()
    assert asked == {"name": "someone/fromage-toy", "revision": "v1", "allow_patterns": [CONFIG, WEIGHTS, GENERATION]}


def test_a_name_that_is_nowhere_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no-one/no-model.*hub"):
        load_model("no-one/no-model")
    for name in ("runs/last.ckpt", tmp_path / "a" / "b", "./nothing"):
        with pytest.raises(UserError, match="no such file"):
            load_model(name)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_towers_may_be_held_otherwise_than_they_were_trained_under(folder, dtype):
    loaded = Fromage.from_pretrained(folder, dtype=dtype)
    assert loaded.lm.dtype == loaded.vision.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.trained().values()} == {torch.float32}
    with pytest.raises(UserError, match="fp8"):
        Fromage.from_pretrained(folder, dtype="fp8")


def test_towers_may_lie_elsewhere(model, folder):
    loaded = Fromage.from_pretrained(folder, lm=str(TOY / "opt"), vision=f"local-dir:{TOY / 'clip'}")
    assert torch.equal(loaded.embed_text(TEXTS), load_model(folder).embed_text(TEXTS))
    assert loaded.config.lm == str(TOY / "opt")


@pytest.mark.parametrize("name", ["torch_dtype", "device_map", "trust_remote_code", "subfolder"])
def test_an_option_of_other_libraries_is_refused_in_one_line(folder, name):
    with pytest.raises(UserError, match=f"^{name}: no option of Fromage.from_pretrained; there are ") as told:
        Fromage.from_pretrained(folder, **{name: "auto"})
    named = {*re.split(r"[ ,]+", str(told.value))}
    assert {"device", "dtype", "quantize", "revision", "lm"} <= named and "self" not in named


def test_a_tower_of_another_width_is_refused(folder):
    told = r"visual_prefix.weight is \(384, 768\), wanted \(384, 64\)\); give the lm, vision"
    with pytest.raises(UserError, match=told) as error:
        load_model(folder, vision="timm:test_vit", vision_weights=None, random_weights=True)
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(UserError, match="device warp: PyTorch cannot use it"):
        load_model(folder, "warp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_model_runs_on_cuda_as_on_the_cpu(folder):
    there, here = Fromage.from_pretrained(folder, device="cuda"), Fromage.from_pretrained(folder)
    torch.testing.assert_close(there.embed_text(TEXTS).cpu(), here.embed_text(TEXTS), atol=1e-4, rtol=1e-3)
    assert there.fingerprint() == here.fingerprint()


def test_another_image_tower_than_the_one_saved_with_is_warned_of(folder):
    with pytest.warns(UserWarning, match="vision tower"):
        load_model(altered(folder, fingerprint="0" * 16))


def test_another_vocabulary_is_refused(folder):
    with pytest.raises(UserError, match=r"50266.*toy has"):
        load_model(altered(folder, added_tokens={"<|image|>": 50265, "[RET]": 50266}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "other"}, "another format"), ({"version": 2}, "another format"), ({"k": "1"}, "k cannot be '1'"),
        ({"without": "lm"}, "no 'lm'"), ({"without": "sha256"}, "no 'sha256'"), ({"added_tokens": []}, "added_tokens"),
        ({"random_weights": True}, "the setting 'random_weights'.*remove that line"),
        ({"dtype": "int8"}, "int8"), ({"k": 4}, r"visual_prefix.bias is \(384,\), wanted \(768,\)"),
    ],
)  # fmt: skip
def test_an_altered_configuration_is_named(changes, named, folder):
    with pytest.raises(UserError, match=named):
        load_model(altered(folder, **changes))


def test_push_to_hub_uploads_the_folder(model, monkeypatch):
    seen = {}

    def create_repo(api, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path, **options):
        loaded = load_model(folder_path)
        seen.update(repo=repo_id, files={path.name for path in Path(folder_path).iterdir()}, model=loaded.fingerprint())
        return "the commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("someone/fromage-toy") == "the commit"
    rounded = {name: p.bfloat16() for name, p in model.trained().items()}
    files = {WEIGHTS, CONFIG, CARD}
    assert seen == {"repo": "someone/fromage-toy", "files": files, "model": model.fingerprint(rounded)}


def test_an_upload_that_fails_is_named(model, monkeypatch):
    def create_repo(api, repo_id, **options):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    with pytest.raises(UserError, match=r"someone/fromage-toy.*offline"):
        model.push_to_hub("someone/fromage-toy")


def test_towers_without_a_name_cannot_be_saved(model, tmp_path):
    for nameless in (Fromage(model.lm, model.vision, FromageConfig(q=8)), Fromage.load(random_weights=True)):
        with pytest.raises(UserError, match="cannot be loaded by name"):
            nameless.save_pretrained(tmp_path / "saved")


def test_a_lightning_checkpoint_is_exported_as_ours_and_as_theirs(model, tmp_path, capsys):
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt")
    words = ["export", "--ckpt", str(checkpoint), "--out"]
    assert main([*words, str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    assert load_model(tmp_path / "ours").fingerprint() == model.fingerprint()
    assert main([*words, str(tmp_path / "short")]) == 0
    rounded = {name: p.bfloat16() for name, p in model.trained().items()}
    assert read_folder(tmp_path / "short").fingerprint == model.fingerprint(rounded)
    theirs = str(tmp_path / "theirs")
    assert main([*words, theirs, "--format", "authors"]) == 2
    assert "--visual-encoder" in capsys.readouterr().err
    assert main([*words, theirs, "--format", "authors", "--visual-encoder", "someone/toy"]) == 0
    towers = ["--lm", "toy", "--vision", "toy", "--dtype", "float32"]
    assert main(["import", theirs, *towers, "--out", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "short" / WEIGHTS).read_bytes()
    assert load_model(tmp_path / "back").fingerprint() == model.fingerprint(rounded)


def test_a_folder_is_exported_in_another_dtype(model, folder, tmp_path):
    for dtype, same in (("float32", True), ("float16", False)):
        assert main(["export", "--ckpt", str(folder), "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
        saved = read_folder(tmp_path / dtype)
        assert {str(value.dtype) for value in saved.tensors.values()} == {f"torch.{dtype}"}
        assert (saved.fingerprint == read_folder(folder).fingerprint) == same or saved.fingerprint is None
    assert load_model(tmp_path / "float32").fingerprint() == load_model(folder).fingerprint()


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_pickle_is_refused_or_whole(seed, model, tmp_path):
    """A flipped bit outside of what is read (a zip's dates) changes nothing; any other is found."""
    path = lightning_checkpoint(model, tmp_path / "last.ckpt")
    whole = read_checkpoint(path)["state_dict"]
    content, draw = bytearray(path.read_bytes()), random.Random(seed)
    place = draw.randrange(len(content)) if seed % 2 else len(content) - 1 - draw.randrange(2000)
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    try:
        state = read_checkpoint(path)["state_dict"]
    except UserError as error:
        assert "last.ckpt" in str(error)
    else:
        assert all(torch.equal(state[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [("k", 4000), ("k", 10**9), ("k", -1), ("q", 10**9), ("k", "1"), ("q", None), ("r", 8), ("r", 10**9), ("r", 0)],
)
def test_what_a_file_claims_is_compared_with_its_tensors_before_it_is_built(saved_model, key, value, monkeypatch):
    monkeypatch.setattr("fromage.models.fromage.load_vision", lambda *_: pytest.fail("built"))
    wrong = replace(saved_model, settings=saved_model.settings | {key: value})
    with pytest.raises(
        UserError,
        match=r"this model: ([kqr] is -?\d+; it must be a whole number from 1 on|[kqr] cannot be|of another architecture)",
    ):
        from_saved(Fromage, wrong)


@pytest.mark.parametrize(
    "spoil", [lambda v: v * float("nan"), lambda v: v.to(torch.int8), lambda v: v.bool(), lambda v: v.cfloat()]
)
def test_weights_are_finite_floating_point_numbers(saved_model, spoil):
    with pytest.raises(UserError, match="holds no finite numbers"):
        from_saved(Fromage, replace(saved_model, tensors={name: spoil(v) for name, v in saved_model.tensors.items()}))


@pytest.fixture(scope="module")
def saved_model():
    return to_saved(Fromage.load(q=8))


def test_a_checkpoint_whose_tensor_claims_more_numbers_than_it_holds_is_refused_before_they_are_made(model, tmp_path):
    path = lightning_checkpoint(model, tmp_path / "a.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.image_head.weight"] = torch.zeros(1).expand(16, 1 << 40)
    content["state_dict"]["model.visual_prefix.weight"] = torch.zeros(1).expand(2 * 192, 1 << 40)
    torch.save(content, path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="claims more numbers than are stored"):
        load_model(path)


def test_a_checkpoint_says_its_kind_and_an_older_one_is_known_by_its_stage(model, tmp_path):
    checkpoint = torch.load(lightning_checkpoint(model, tmp_path / "last.ckpt"), weights_only=True)
    for kind, stage, want in ((None, {}, "fromage"), (None, {"stage": 2}, "octopus"), ("octopus", {}, "octopus")):
        options = checkpoint["hyper_parameters"] | stage
        torch.save(checkpoint | {"hyper_parameters": options} | ({"kind": kind} if kind else {}), tmp_path / "a.ckpt")
        assert read_saved(tmp_path / "a.ckpt").kind == want
    torch.save(checkpoint | {"kind": "squid"}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt: a model of kind 'squid'.*update fromage"):
        read_saved(tmp_path / "a.ckpt")
