"""The authors' files in and out, at full size; what does not fit is named."""

import json
import pickle
from collections import OrderedDict

import numpy as np
import open_clip
import pytest
import torch

from fromage.checkpoints.authors import ARGS, CLIPS, PICKLE, read_authors, write_authors
from fromage.checkpoints.format import CONFIG, WEIGHTS, read_folder, write_folder
from fromage.cli.main import main
from fromage.errors import UserError

PUBLISHED = {
    "opt_version": "facebook/opt-6.7b", "freeze_lm": True, "visual_encoder": "openai/clip-vit-large-patch14",
    "freeze_vm": True, "n_visual_tokens": 1, "image_embed_dropout_prob": 0.0, "text_embed_dropout_prob": 0.0,
    "shared_emb_dim": 256, "text_emb_layers": [-1], "retrieval_token_idx": 50266,
}  # fmt: skip


def published(d=4096, m=1024, q=256, k=1, dtype=torch.bfloat16):
    """A state dict of the published layout."""
    torch.manual_seed(0)
    shapes = {
        "model.logit_scale": (), "model.text_hidden_fcs.0.0.weight": (q, d), "model.text_hidden_fcs.0.0.bias": (q,),
        "model.visual_embeddings.weight": (d * k, m), "model.visual_embeddings.bias": (d * k,),
        "model.visual_fc.weight": (q, m), "model.visual_fc.bias": (q,), "ret_input_embeddings.weight": (1, d),
    }  # fmt: skip
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def write(folder, state, **args):
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": state}, folder / PICKLE)
    (folder / ARGS).write_text(json.dumps(PUBLISHED | args))
    return folder


def small(folder, state=None, **args):
    """Files of the published layout, 24 wide."""
    whole = published(d=24, m=16, q=8) if state is None else state
    return write(folder, whole, shared_emb_dim=8, **args)


@pytest.mark.parametrize(("dtype", "megabytes"), [(torch.bfloat16, 11.0), (torch.float32, 22.1)])
def test_the_published_layout_comes_through_both_ways_bit_for_bit(dtype, megabytes, tmp_path):
    state = published(dtype=dtype)
    assert sum(value.numel() for value in state.values()) == 5_513_729
    theirs, ours, back = write(tmp_path / "theirs", state), tmp_path / "ours", tmp_path / "back"
    assert main(["import", str(theirs), "--out", str(ours)]) == 0
    assert main(["export", "--ckpt", str(ours), "--format", "authors", "--out", str(back)]) == 0
    again = torch.load(back / PICKLE, weights_only=True)["state_dict"]
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == dtype and torch.equal(again[name], value), name
    assert json.loads((back / ARGS).read_text()) == PUBLISHED
    assert (ours / WEIGHTS).stat().st_size / 1e6 == pytest.approx(megabytes, abs=0.1)
    config = json.loads((ours / CONFIG).read_text())
    wanted = {"lm": "facebook/opt-6.7b", "vision": "ViT-L-14-quickgelu", "vision_weights": "openai", "k": 1, "q": 256}
    assert config.items() >= wanted.items()
    assert config["added_tokens"] == {"<|image|>": 50265, "[RET]": 50266}


def test_each_projection_gets_its_part(tmp_path):
    state = published(d=24, m=16, q=8, k=3)
    saved = read_authors(small(tmp_path / "theirs", state, n_visual_tokens=3))
    assert saved.settings["k"] == 3
    assert torch.equal(saved.tensors["visual_prefix.weight"], state["model.visual_embeddings.weight"])
    assert torch.equal(saved.tensors["image_head.weight"], state["model.visual_fc.weight"])
    assert torch.equal(saved.tensors["text_head.bias"], state["model.text_hidden_fcs.0.0.bias"])
    assert torch.equal(saved.tensors["ret.input"], state["ret_input_embeddings.weight"])


def test_variants_of_the_release_are_the_same_checkpoint(tmp_path):
    state = published(d=24, m=16, q=8)
    plain = read_authors(small(tmp_path / "plain", state))
    flat = state | {"ret_input_embeddings.weight": state["ret_input_embeddings.weight"][0]}
    flat["model.logit_scale"] = flat["model.logit_scale"].reshape(1)
    flat["model.input_embeddings.weight"] = torch.zeros(30, 24)  # the embedding itself, left in
    wrapped = {f"module.{name}": value for name, value in flat.items()}
    other = read_authors(small(tmp_path / "other", wrapped, retrieval_token_idx=[50266]) / PICKLE)
    assert other.settings == plain.settings and other.added_tokens == plain.added_tokens
    assert all(torch.equal(other.tensors[name], value) for name, value in plain.tensors.items())


def test_the_named_clips_compute_with_quick_gelu():
    for name in CLIPS.values():
        assert open_clip.get_model_config(name)["quick_gelu"]
        assert "openai" in open_clip.list_pretrained_tags_by_model(name)


def test_towers_may_be_named_otherwise_and_exported_under_a_name(tmp_path):
    theirs = small(tmp_path / "theirs", visual_encoder="someone/a-clip")
    with pytest.raises(UserError, match=r"someone/a-clip.*--vision"):
        read_authors(theirs)
    saved = read_authors(theirs, lm="toy", vision="toy", dtype="float32")
    assert (saved.settings["lm"], saved.settings["vision"], saved.settings["vision_weights"]) == ("toy", "toy", None)
    write_folder(saved, tmp_path / "ours")
    with pytest.raises(UserError, match=r"toy.*--visual-encoder"):
        write_authors(read_folder(tmp_path / "ours"), tmp_path / "back")
    write_authors(read_folder(tmp_path / "ours"), tmp_path / "back", "someone/a-clip")
    with pytest.raises(UserError, match=r"is there already.*--overwrite"):
        write_authors(read_folder(tmp_path / "ours"), tmp_path / "back", "someone/a-clip")
    assert json.loads((tmp_path / "back" / ARGS).read_text())["visual_encoder"] == "someone/a-clip"


def without(name):
    return {key: value for key, value in published(d=24, m=16, q=8).items() if key != name}


@pytest.mark.parametrize(
    ("state", "args", "named"),
    [
        (without("model.visual_fc.bias"), {}, "model.visual_fc.bias is missing"),
        (without("ret_input_embeddings.weight"), {}, "ret_input_embeddings.weight is missing"),
        (without("model.visual_fc.weight"), {}, "model.visual_fc.weight is missing"),
        (without("") | {"model.extra": torch.zeros(2)}, {}, r"model.extra is \(2,\), wanted none"),
        (without(""), {"n_visual_tokens": 4}, r"model.visual_embeddings.bias is \(24,\), wanted \(96,\)"),
        (without(""), {"n_visual_tokens": "1"}, "n_visual_tokens"),
        (without(""), {"input_prompt": ["A", "B"]}, "input_prompt cannot be"),
        (without(""), {"text_emb_layers": [-1, 12]}, "text_emb_layers"),
        (without(""), {"retrieval_token_idx": [50266, 50267]}, "retrieval_token_idx"),
        (published(d=24, m=16, q=8, dtype=torch.float64), {}, "torch.float64"),
        ({"model.logit_scale": 2.0}, {}, "state_dict"),
        ([1, 2], {}, "state_dict"),
    ],
)
def test_what_does_not_fit_is_named(state, args, named, tmp_path):
    with pytest.raises(UserError, match=named):
        read_authors(small(tmp_path / "theirs", state, **args))


def unpruned(state, ret=50266, rows=50267):
    """What the released training writes: the whole model under DDP, the optimiser, and a scheduler that holds another."""
    d = state["ret_input_embeddings.weight"].shape[1]
    table = torch.randn(rows, d).bfloat16()
    table[min(ret, rows - 1)] = state["ret_input_embeddings.weight"][0]
    trained = {name: torch.nn.Parameter(value) for name, value in state.items() if name.startswith("model.")}
    optimizer = torch.optim.AdamW(trained.values(), 1e-3)
    whole = {**trained, "model.lm.model.decoder.embed_tokens.weight": table, "model.input_embeddings.weight": table}
    whole |= {"model.lm.model.decoder.layers.0.fc1.bias": torch.zeros(3), "model.visual_model.bias": torch.zeros(2)}
    schedule = vars(torch.optim.lr_scheduler.StepLR(optimizer, 5)).copy()
    schedule |= {"after_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "total_epoch": 100}
    del schedule["optimizer"]
    named = {f"module.{name}": value.detach() for name, value in whole.items()}
    return {"epoch": 1, "state_dict": OrderedDict(named), "best_score": np.float64(3.5),
            "optimizer": optimizer.state_dict(), "scheduler": schedule}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_what_the_released_training_writes_is_read_without_pruning(zipped, tmp_path):
    state = published(d=24, m=16, q=8)
    theirs, want = small(tmp_path / "theirs", state), read_authors(small(tmp_path / "pruned", state))
    (theirs / PICKLE).unlink()
    content = unpruned(state)
    torch.save(content, theirs / "ckpt.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(theirs / "ckpt.pth.tar", weights_only=True)
    found = read_authors(theirs)
    assert found.settings == want.settings and found.added_tokens == want.added_tokens
    assert all(torch.equal(found.tensors[name], value) for name, value in want.tensors.items())
    assert main(["import", str(theirs), "--out", str(tmp_path / "ours")]) == 0
    assert (tmp_path / "ours" / WEIGHTS).stat().st_size < 5000
    torch.save(unpruned(state, rows=50266), theirs / "ckpt.pth.tar")
    with pytest.raises(UserError, match=r"\(50266, 24\) has no row 50266 for \[RET\]"):
        read_authors(theirs)


def test_the_published_file_is_preferred_among_several(tmp_path):
    theirs = small(tmp_path / "theirs")
    torch.save({"state_dict": {"1.weight": torch.zeros(2)}}, theirs / "ckpt_best.pth.tar")
    assert read_authors(theirs).source == str(theirs / PICKLE)
    assert "released code of FROMAGe" in read_authors(theirs).about["source"]
    torch.save(unpruned(published(d=24, m=16, q=8)), theirs / "ckpt.pth.tar")
    (theirs / PICKLE).unlink()
    with pytest.raises(UserError, match=r"ckpt\.pth\.tar, ckpt_best\.pth\.tar; give the file"):
        read_authors(theirs)
    read_authors(theirs / "ckpt.pth.tar")


GILL = {
    "opt_version": "facebook/opt-6.7b", "freeze_lm": True, "visual_encoder": "openai/clip-vit-large-patch14",
    "freeze_vm": True, "n_visual_tokens": 4, "ret_emb_dim": 256, "gen_emb_dim": 768, "text_emb_layers": [-1],
    "text_fc_mode": "gill_mapper", "ret_text_fc_mode": "linear", "num_tokens": 8, "num_clip_tokens": 77,
    "share_ret_gen": True, "retrieval_token_idx": list(range(50266, 50274)), "gen_token_idx": list(range(50266, 50274)),
}  # fmt: skip


def gills(d=24, m=16, q=8, k=4, r=8, table=None):
    """A state dict of the layout that GILL's training writes, pruned or with a whole embedding of so many rows."""
    state = published(d, m, q, k)
    del state["ret_input_embeddings.weight"]
    for part in ("weight", "bias"):
        state[f"model.ret_text_hidden_fcs.0.model.{part}"] = state.pop(f"model.text_hidden_fcs.0.0.{part}")
    shapes = {"fc.weight": (512, d), "fc.bias": (512,), "query_embs": (1, 77, 512), "model.weight": (768, 512)}
    shapes |= {"tfm.encoder.layers.0.linear1.weight": (32, 512)}
    state |= {f"model.gen_text_hidden_fcs.0.{name}": torch.zeros(shape).bfloat16() for name, shape in shapes.items()}
    return state | {"model.input_embeddings.weight": torch.randn(table or r, d).bfloat16()}


@pytest.mark.parametrize("table", [None, 50274])
def test_gills_files_are_read_as_far_as_they_are_fromages(table, tmp_path, capsys):
    state, theirs = gills(table=table), tmp_path / "gill"
    write(theirs, {f"module.{name}": value for name, value in state.items()})
    (theirs / ARGS).write_text(json.dumps(GILL | {"ret_emb_dim": 8}))
    torch.save({"state_dict": {"1.weight": torch.zeros(2, 24)}}, theirs / "decision_model.pth.tar")
    assert main(["import", str(theirs), "--out", str(tmp_path / "ours")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "GILL" in line]
    assert len(said) == 1 and "what generates images is left out" in said[0]
    saved = read_folder(tmp_path / "ours")
    wanted = {"k": 4, "q": 8, "r": 8, "ret_attention": "sequential", "ret_fusion": "first", "lm": "facebook/opt-6.7b"}
    assert saved.settings.items() >= wanted.items()
    numbers = {"<|image|>": 50265, "[RET]": 50266} | {f"[RET{i}]": 50265 + i for i in range(2, 9)}
    assert saved.added_tokens == numbers
    ours = {"text_head.weight": "ret_text_hidden_fcs.0.model.weight", "text_head.bias": "ret_text_hidden_fcs.0.model.bias"}
    ours |= {"visual_prefix.weight": "visual_embeddings.weight", "image_head.bias": "visual_fc.bias"}
    for name, of in ours.items():
        assert torch.equal(saved.tensors[name], state[f"model.{of}"]), name
    assert torch.equal(saved.tensors["ret.input"], state["model.input_embeddings.weight"][-8:])
    assert len(saved.tensors) == 8


@pytest.mark.parametrize(
    ("state", "args", "named"),
    [
        (gills(), {"ret_text_fc_mode": "gill_mapper"}, "ret_text_fc_mode gill_mapper: only linear"),
        (gills(), {"retrieval_token_idx": [50266, 50268]}, r"retrieval_token_idx cannot be \[50266, 50268\]"),
        (gills(table=50270), {}, r"\(50270, 24\) has no row 50273 for \[RET\]"),
        (gills() | {"model.extra": torch.zeros(2)}, {}, r"model.extra is \(2,\), wanted none"),
        (gills(q=9), {}, r"ret_text_hidden_fcs.0.model.bias is \(9,\), wanted \(8,\)"),
        (published(d=24, m=16, q=8, k=4), {}, r"\.tar: is of FROMAGe, and model_args\.json beside it of GILL"),
        ({"1.weight": torch.zeros(2, 24)}, {}, "not of the layout that model_args.json describes"),
    ],
)
def test_what_does_not_fit_gill_is_named(state, args, named, tmp_path):
    theirs = write(tmp_path / "gill", state)
    (theirs / ARGS).write_text(json.dumps(GILL | {"ret_emb_dim": 8} | args))
    with pytest.raises(UserError, match=named):
        read_authors(theirs)


def test_gills_weights_beside_fromages_arguments_are_called_so(tmp_path):
    with pytest.raises(UserError, match=r"is of GILL, and model_args\.json beside it of FROMAGe; give the one it came with"):
        read_authors(small(tmp_path / "theirs", gills()))


def test_the_prompt_of_captions_is_kept_both_ways(tmp_path):
    theirs = small(tmp_path / "theirs", input_prompt="A picture of")
    assert main(["import", str(theirs), "--out", str(tmp_path / "ours")]) == 0
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["input_prompt"] == "A picture of"
    write_authors(read_folder(tmp_path / "ours"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / ARGS).read_text())["input_prompt"] == "A picture of"
    assert read_authors(small(tmp_path / "none", input_prompt=None)).settings["input_prompt"] == ""


def test_numbers_that_are_none_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        state = published(d=24, m=16, q=8)
        state["model.visual_fc.weight"][3, 3] = value
        with pytest.raises(UserError, match=r"model.visual_fc.weight holds numbers that are not finite"):
            read_authors(small(tmp_path / "theirs", state))


def test_missing_and_damaged_files_are_named(tmp_path):
    theirs = small(tmp_path / "theirs")
    for content, named in (("{", ARGS), ("[]", ARGS), ("{}", "retrieval_token_idx")):
        (theirs / ARGS).write_text(content)
        with pytest.raises(UserError, match=named):
            read_authors(theirs)
    (theirs / ARGS).unlink()
    with pytest.raises(UserError, match=ARGS):
        read_authors(theirs)
    (theirs / PICKLE).rename(theirs / "ckpt.pth.tar")
    (theirs / "second.pt").touch()
    with pytest.raises(UserError, match=r"second\.pt"):
        read_authors(theirs)
    with pytest.raises(UserError, match="nowhere"):
        read_authors(tmp_path / "nowhere")


def test_a_flipped_bit_anywhere_in_the_numbers_is_found(tmp_path):
    theirs = small(tmp_path / "theirs")
    whole = (theirs / PICKLE).read_bytes()
    tensor = published(d=24, m=16, q=8)["model.visual_embeddings.weight"].view(torch.uint8).numpy().tobytes()
    place = whole.index(tensor) + len(tensor) // 2
    (theirs / PICKLE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match="damaged"):
        read_authors(theirs)
    (theirs / PICKLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=PICKLE):
        read_authors(theirs)


class Code:
    """Something whose unpickling would run code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed_from_a_file(zipped, tmp_path):
    theirs, trace = small(tmp_path / "theirs"), tmp_path / "executed"
    content = {"state_dict": Code(trace)}
    if zipped:
        torch.save(content, theirs / PICKLE)
    else:
        (theirs / PICKLE).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=PICKLE):
        read_authors(theirs)
    assert not trace.exists()
