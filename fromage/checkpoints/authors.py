"""The authors' released files, read and written: a torch pickle of the trained parameters beside model_args.json.

What their training writes, with towers, optimiser and a scheduler in it, is read too: only its tensors are looked at.
Tensors are renamed and otherwise left as they are, dtype included, so that a file comes through both ways bit for bit. No
tower is loaded for it. Their format ties [RET]'s two rows: a model with a second row at the output does not fit.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromage.checkpoints.format import (
    FORMAT,
    GENERATION,
    LAYOUTS,
    Saved,
    differences,
    dtype_name,
    parameter_shapes,
    read_generation,
)
from fromage.checkpoints.safe_pickle import read_pickle
from fromage.data.tokenizer import IMAGE, RET
from fromage.errors import UserError, first_line
from fromage.io import as_json, check_new, read_json, write_files

PICKLE, ARGS = "pretrained_ckpt.pth.tar", "model_args.json"
NAMES = {
    "visual_prefix": "model.visual_embeddings",  # W_c
    "text_head": "model.text_hidden_fcs.0.0",  # W_t
    "image_head": "model.visual_fc",  # W_i
}
THEIRS = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in NAMES.items() for part in ("weight", "bias")}
THEIRS |= {"ret.input": "ret_input_embeddings.weight", "logit_scale": "model.logit_scale"}
FROZEN = ("model.lm.", "model.visual_model.", "model.input_embeddings.")  # copies of the towers, where they were left in
TABLES = ("model.input_embeddings.weight", "model.lm.model.decoder.embed_tokens.weight")  # the row of [RET] is in them too
GILL = {"gen_emb_dim", "ret_emb_dim", "num_clip_tokens", "gen_token_idx"}  # keys of its model_args.json
GILL_HEADS = ("model.gen_text_hidden_fcs.", "model.ret_text_hidden_fcs.")
# Hugging Face's CLIPs compute with QuickGELU, as towers of these names do whatever file their weights come from; load_clip
# builds the plain names so for the tag 'openai' only.
CLIPS = {
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu",
}
# What their loader asks for besides; it has no counterpart here, or no other value.
UNUSED = {"freeze_lm": True, "freeze_vm": True, "image_embed_dropout_prob": 0.0, "text_embed_dropout_prob": 0.0}


def read_authors(
    path: str | Path,
    lm: str | None = None,
    vision: str | None = None,
    vision_weights: str | None = None,
    dtype: str = "bfloat16",
) -> Saved:
    """The authors' files: the folder of both, or the pickle with model_args.json beside it.

    lm, vision, vision_weights: the towers, where they go by other names here than in model_args.json. dtype: the one the
    towers will be held in. Raises UserError for files that are missing, damaged or of another layout.
    """
    file = _find_pickle(Path(path))
    args = _read_args(file.parent / ARGS)
    ret = args["retrieval_token_idx"]
    if vision is None and args["visual_encoder"] not in CLIPS:
        raise UserError(f"{file.parent / ARGS}: unknown image tower {args['visual_encoder']}; name it by --vision")
    clip: dict[str, Any] = {"vision": vision, "vision_weights": vision_weights}
    if vision is None:
        clip = {"vision": CLIPS[args["visual_encoder"]], "vision_weights": vision_weights or "openai"}
    sizes = {"k": args["n_visual_tokens"], "q": args["shared_emb_dim"]}
    settings = {"lm": lm or args["opt_version"], **clip, **sizes, "dtype": dtype_name(dtype)}
    settings |= {"input_prompt": args["input_prompt"]}
    tensors, generation = _read_tensors(file, **sizes, ret=ret), read_generation(file.parent)
    return Saved(str(file), tensors, settings, {IMAGE: ret - 1, RET: ret}, generation=generation)


def _find_pickle(path: Path) -> Path:
    if path.is_file() or (path / PICKLE).is_file():
        return path if path.is_file() else path / PICKLE
    found = sorted(p for p in path.glob("*") if p.name.endswith((".pth.tar", ".pth", ".pt", ".bin")))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{path}: wanted one pickle of trained parameters ({PICKLE}), found {names}; give the file")
    return found[0]


def _read_args(path: Path) -> dict[str, Any]:
    """model_args.json, its fields checked; retrieval_token_idx as a number."""
    try:
        args = read_json(path, "the file that came with the weights")
        if isinstance(args, dict) and args.keys() & GILL:
            raise _gill(path)
        ret = args["retrieval_token_idx"]
        args["retrieval_token_idx"] = ret[0] if isinstance(ret, list) and len(ret) == 1 else ret
        args["input_prompt"] = args.get("input_prompt") or ""
        kinds = {"opt_version": str, "visual_encoder": str, "n_visual_tokens": int, "shared_emb_dim": int}
        for name, kind in (kinds | {"retrieval_token_idx": int, "input_prompt": str}).items():
            if not isinstance(args[name], kind):
                raise ValueError(f"{name} cannot be {args[name]!r}")
        if args.get("text_emb_layers", [-1]) != [-1]:
            raise ValueError(f"text_emb_layers {args['text_emb_layers']}: only the last layer, [-1], is supported")
    except (ValueError, KeyError, TypeError) as error:
        said = {KeyError: f"no {error} in it", TypeError: "no object"}
        reason = said.get(type(error)) or first_line(error)
        raise UserError(f"{path}: of another layout ({reason}); fetch it again") from error
    return args


def _gill(path: Path) -> UserError:
    return UserError(
        f"{path}: is of GILL, not of FROMAGe: it asks for images by several [IMG] tokens, which heads of its own read "
        "(ret_text_hidden_fcs, gen_text_hidden_fcs), and has no [RET]; no part of it makes a FROMAGe: import FROMAGe's files"
    )


def _read_tensors(file: Path, k: int, q: int, ret: int) -> dict[str, Tensor]:
    """The pickle's trained parameters under our names, in their dtypes. Raises UserError unless just these are there.

    ret: number of the row of [RET] in the embedding, where the file has the embedding in place of the row.
    """
    content = read_pickle(file, foreign=True)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: not a checkpoint of the authors: no 'state_dict' of tensors in it")
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith(GILL_HEADS) for name in state):
        raise _gill(file)
    row, scale = THEIRS["ret.input"], THEIRS["logit_scale"]
    table = next((state[name] for name in TABLES if name in state), None)  # (V, d)
    if row not in state and table is not None:
        if not (table.ndim == 2 and 0 <= ret < len(table)):
            raise UserError(f"{file}: its embedding of {tuple(table.shape)} has no row {ret} for [RET], which {ARGS} names")
        state[row] = table[ret : ret + 1].clone()  # (1, d)
    state = {name: value for name, value in state.items() if not name.startswith(FROZEN)}
    if row in state and state[row].ndim == 1:
        state[row] = state[row].unsqueeze(0)  # (d) -> (1, d)
    if scale in state and state[scale].shape == (1,):
        state[scale] = state[scale].squeeze(0)  # (1) -> ()
    ours = {name: state[theirs] for name, theirs in THEIRS.items() if theirs in state}
    want = {THEIRS[name]: shape for name, shape in parameter_shapes(ours, k, q).items()}
    if differs := differences(state, want):
        raise UserError(f"{file}: not of the layout that {ARGS} describes ({differs})")
    if odd := {str(v.dtype) for v in state.values()} - {"torch.float32", "torch.bfloat16", "torch.float16"}:
        raise UserError(f"{file}: holds {', '.join(sorted(odd))}; save it in float32, bfloat16 or float16")
    if wrong := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{file}: {wrong[0]} holds numbers that are not finite; fetch it again, or train anew")
    return {ours: state[theirs].contiguous() for ours, theirs in THEIRS.items()}


def write_authors(saved: Saved, folder: str | Path, visual_encoder: str | None = None, overwrite: bool = False) -> None:
    """Write pretrained_ckpt.pth.tar and model_args.json into a folder, in the dtypes saved holds.

    visual_encoder: the image tower's name on the Hugging Face hub; known for OpenAI's CLIPs. Raises UserError for a model
    the format has no room for, for an image tower without such a name, and where such files are there already, unless
    overwrite is true.
    """
    if saved.format != FORMAT:
        name = LAYOUTS[saved.format].name
        raise UserError(f"{saved.source}: is of {name}, and the authors' files are of FROMAGe; export it with --format ours")
    for name in (PICKLE, ARGS):
        check_new(Path(folder) / name, overwrite)
    if saved.tensors.keys() != THEIRS.keys():
        raise UserError(
            f"{saved.source}: the head of {saved.settings['lm']} is not tied to its embedding; the authors' format has no "
            "room for the second row of [RET]; export it with --format ours"
        )
    if saved.settings.get("pooling", "ret") != "ret":
        raise UserError(
            f"{saved.source}: reads texts at their last word, the authors' at [RET]; export it with --format ours"
        )
    args = {"opt_version": saved.settings["lm"], "visual_encoder": visual_encoder or _clip_name(saved.settings)}
    args |= {"n_visual_tokens": saved.settings["k"], "shared_emb_dim": saved.settings["q"], "text_emb_layers": [-1]}
    args |= {"retrieval_token_idx": saved.added_tokens[RET], **UNUSED}
    args |= {"input_prompt": prompt} if (prompt := saved.settings.get("input_prompt")) else {}
    content = io.BytesIO()
    torch.save({"state_dict": {THEIRS[name]: value for name, value in saved.tensors.items()}}, content)
    files = {PICKLE: content.getvalue(), ARGS: as_json(args)}
    write_files(Path(folder), files | ({GENERATION: as_json(saved.generation)} if saved.generation else {}))


def _clip_name(settings: dict[str, Any]) -> str:
    """The Hugging Face name of one of OpenAI's CLIPs."""
    ours = settings["vision"].removesuffix("-quickgelu") + "-quickgelu"
    for theirs, name in CLIPS.items():
        if name == ours and settings["vision_weights"] == "openai":
            return theirs
    shown = f"{settings['vision']} ({settings['vision_weights']})"
    raise UserError(f"image tower {shown}: has no name the authors' code could load; give one by --visual-encoder")
