"""The authors' released files, read and written: a torch pickle of the trained parameters beside model_args.json.

What their training writes, with towers, optimiser and a scheduler in it, is read too: only its tensors are looked at.
Tensors are renamed and otherwise left as they are, dtype included, so that a file comes through both ways bit for bit. No
tower is loaded for it. Their format ties [RET]'s two rows: a model with a second row at the output does not fit.

Files of GILL, their next system, are read as far as they are FROMAGe's: the rows of its r [IMG] tokens, which stand where
[RET] does, and the heads of retrieval. The rows are the embedding's last, or, where it was pruned, all of it. The state at
the first [IMG] alone embeds a text: its head maps all r states, and keeps the first. What generates images is left out.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fromage.checkpoints.format import (
    FROMAGE,
    GENERATION,
    LAYOUTS,
    Saved,
    differences,
    dtype_name,
    parameter_shapes,
    read_generation,
)
from fromage.checkpoints.safe_pickle import read_pickle
from fromage.config import FromageConfig
from fromage.data.tokenizer import IMAGE_TOKEN, RET_TOKEN, ret_tokens
from fromage.errors import UserError, first_line
from fromage.io import as_json, check_new, read_json, write_files

PICKLE, ARGS = "pretrained_ckpt.pth.tar", "model_args.json"


class System(NamedTuple):
    """One of their systems, and where its files have what it has of its own.

    Attributes:
        text_head: W_t in the pickle.
        q: key of q in model_args.json.
        fusion: how the states at its [RET] tokens become one, as fromage.models.fusion names it.
    """

    name: str
    text_head: str
    q: str
    fusion: str

    @property
    def theirs(self) -> dict[str, str]:
        """Names in their pickle, by ours."""
        heads = {"visual_prefix": "model.visual_embeddings", "image_head": "model.visual_fc"}  # W_c, W_i
        heads |= {"text_head": self.text_head}  # W_t
        names = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in heads.items() for part in ("weight", "bias")}
        return names | {"ret.input": "ret_input_embeddings.weight", "logit_scale": "model.logit_scale"}


FROMAGE_FILES = System("FROMAGe", "model.text_hidden_fcs.0.0", "shared_emb_dim", "mean")
GILL_FILES = System("GILL", "model.ret_text_hidden_fcs.0.model", "ret_emb_dim", "first")
FROZEN = ("model.lm.", "model.visual_model.", "model.input_embeddings.")  # copies of the towers, where they were left in
TABLES = ("model.input_embeddings.weight", "model.lm.model.decoder.embed_tokens.weight")  # the row of [RET] is in them too
OF_GILL = {"gen_emb_dim", "ret_emb_dim", "num_clip_tokens", "gen_token_idx"}  # keys of its model_args.json
GENERATES = "model.gen_text_hidden_fcs."  # of GILL: states at [IMG] -> the text encoder's space of Stable Diffusion
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
    """The authors' files, of FROMAGe or GILL: the folder of both, or the pickle with model_args.json beside it.

    lm, vision, vision_weights: the towers, where they go by other names here than in model_args.json. dtype: the one the
    towers will be held in. Warns of what is left out of GILL's. Raises UserError for files that are missing, damaged or of
    another layout.
    """
    file = _find_pickle(Path(path))
    args, system = _read_args(file.parent / ARGS)
    ret = args["retrieval_token_idx"]
    if vision is None and args["visual_encoder"] not in CLIPS:
        raise UserError(f"{file.parent / ARGS}: unknown vision tower {args['visual_encoder']}; name it by --vision")
    clip: dict[str, Any] = {"vision": vision, "vision_weights": vision_weights}
    if vision is None:
        clip = {"vision": CLIPS[args["visual_encoder"]], "vision_weights": vision_weights or "openai"}
    sizes = {"k": args["n_visual_tokens"], "q": args[system.q]}
    settings = {"lm": lm or args["opt_version"], **clip, **sizes, "dtype": dtype_name(dtype)}
    settings |= {"input_prompt": args["input_prompt"]}
    settings |= {"r": len(ret), "ret_attention": "sequential", "ret_fusion": system.fusion}
    tensors, generation = _read_tensors(file, system, **sizes, ret=ret), read_generation(file.parent)
    if system is GILL_FILES:
        warnings.warn(f"{file}: is of GILL; what generates images is left out, its [IMG] tokens become [RET]", stacklevel=2)
    added = {IMAGE_TOKEN: ret[0] - 1, **dict(zip(ret_tokens(len(ret)), ret, strict=True))}
    about = {"source": f"files of the released code of {system.name}, which do not say what they were trained on"}
    return Saved(str(file), tensors, settings, added, generation=generation, about=about)


def _find_pickle(path: Path) -> Path:
    if path.is_file() or (path / PICKLE).is_file():
        return path if path.is_file() else path / PICKLE
    found = sorted(p for p in path.glob("*") if p.name.endswith((".pth.tar", ".pth", ".pt", ".bin")))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{path}: wanted one pickle of trained parameters ({PICKLE}), found {names}; give the file")
    return found[0]


def _read_args(path: Path) -> tuple[dict[str, Any], System]:
    """model_args.json, its fields checked, retrieval_token_idx as a list; and whose it is."""
    try:
        args = read_json(path, "the file that came with the weights")
        system = GILL_FILES if isinstance(args, dict) and args.keys() & OF_GILL else FROMAGE_FILES
        ret = args["retrieval_token_idx"]
        args["retrieval_token_idx"] = ret = [ret] if type(ret) is int else ret
        args["input_prompt"] = args.get("input_prompt") or ""
        kinds = {"opt_version": str, "visual_encoder": str, "n_visual_tokens": int, system.q: int, "input_prompt": str}
        for name, kind in kinds.items():
            if not isinstance(args[name], kind):
                raise ValueError(f"{name} cannot be {args[name]!r}")
        consecutive = isinstance(ret, list) and ret and type(ret[0]) is int and ret == [ret[0] + i for i in range(len(ret))]
        if not consecutive or (system is FROMAGE_FILES and len(ret) > 1):
            raise ValueError(f"retrieval_token_idx cannot be {ret!r}")
        for name, only in (("text_emb_layers", [-1]), ("ret_text_fc_mode", "linear")):
            if args.get(name, only) != only:
                raise ValueError(f"{name} {args[name]}: only {only} is supported")
    except (ValueError, KeyError, TypeError) as error:
        said = {KeyError: f"no {error} in it", TypeError: "no object"}
        reason = said.get(type(error)) or first_line(error)
        raise UserError(f"{path}: of another layout ({reason}); fetch it again") from error
    return args, system


def _read_tensors(file: Path, system: System, k: int, q: int, ret: list[int]) -> dict[str, Tensor]:
    """The pickle's trained parameters under our names, in their dtypes. Raises UserError unless just these are there.

    ret: numbers of the rows of [RET] in the embedding, where the file has the embedding in place of the rows.
    """
    content = read_pickle(file, foreign=True)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: not a checkpoint of the authors: no 'state_dict' of tensors in it")
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    for other in (FROMAGE_FILES, GILL_FILES):
        if other is not system and f"{other.text_head}.weight" in state:
            raise UserError(f"{file}: is of {other.name}, and {ARGS} beside it of {system.name}; give the one it came with")
    theirs = system.theirs
    row, scale = theirs["ret.input"], theirs["logit_scale"]
    table = next((state[name] for name in TABLES if name in state), None)  # (V, d), or of GILL (r, d) where it was pruned
    if row not in state and table is not None:
        pruned = system is GILL_FILES and table.ndim == 2 and len(table) == len(ret)
        if not pruned and not (table.ndim == 2 and 0 <= ret[0] <= ret[-1] < len(table)):
            has = f"its embedding of {tuple(table.shape)} has no row {ret[-1]}"
            raise UserError(f"{file}: {has} for [RET], which {ARGS} names")
        state[row] = (table if pruned else table[ret[0] : ret[-1] + 1]).clone()  # (r, d)
    unused = FROZEN + (GENERATES,) * (system is GILL_FILES)
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    if row in state and state[row].ndim == 1:
        state[row] = state[row].unsqueeze(0)  # (d) -> (1, d)
    if scale in state and state[scale].shape == (1,):
        state[scale] = state[scale].squeeze(0)  # (1) -> ()
    ours = {name: state[known] for name, known in theirs.items() if known in state}
    want = {theirs[name]: shape for name, shape in parameter_shapes(ours, k, q, len(ret)).items()}
    if differs := differences(state, want):
        raise UserError(f"{file}: not of the layout that {ARGS} describes ({differs})")
    if odd := {str(v.dtype) for v in state.values()} - {"torch.float32", "torch.bfloat16", "torch.float16"}:
        raise UserError(f"{file}: holds {', '.join(sorted(odd))}; save it in float32, bfloat16 or float16")
    if wrong := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{file}: {wrong[0]} holds numbers that are not finite; fetch it again, or train again")
    return {name: state[known].contiguous() for name, known in theirs.items()}


def write_authors(saved: Saved, folder: str | Path, visual_encoder: str | None = None, overwrite: bool = False) -> None:
    """Write pretrained_ckpt.pth.tar and model_args.json into a folder, in the dtypes saved holds.

    visual_encoder: the vision tower's name on the Hugging Face hub; known for OpenAI's CLIPs. Raises UserError for a model
    the format has no room for, for a vision tower without such a name, and where such files are there already, unless
    overwrite is true.
    """
    if saved.kind != FROMAGE:
        name = LAYOUTS[saved.kind].name
        raise UserError(f"{saved.source}: is of {name}, and the authors' files are of FROMAGe; export it with --format ours")
    for name in (PICKLE, ARGS):
        check_new(Path(folder) / name, overwrite)
    if saved.settings.get("r", 1) > 1 or saved.settings.get("ret_fusion", "mean") == "transformer":
        has = f"its [RET] is {saved.settings['r']} tokens, fused by {saved.settings['ret_fusion']}"
        raise UserError(f"{saved.source}: {has}, the authors' one as it is; export it with --format ours")
    theirs = FROMAGE_FILES.theirs
    if saved.tensors.keys() != theirs.keys():
        raise UserError(
            f"{saved.source}: the head of {saved.settings['lm']} is not tied to its embedding; the authors' format has no "
            "room for the second row of [RET]; export it with --format ours"
        )
    if saved.settings.get("pooling", "ret") != "ret":
        raise UserError(
            f"{saved.source}: reads texts at their last word, the authors' at [RET]; export it with --format ours"
        )
    if saved.settings.get("start", FromageConfig.start) != FromageConfig.start:
        raise UserError(
            f"{saved.source}: its start token stands before an image, the authors' after it; export it with --format ours"
        )
    args = {"opt_version": saved.settings["lm"], "visual_encoder": visual_encoder or _clip_name(saved.settings)}
    args |= {"n_visual_tokens": saved.settings["k"], "shared_emb_dim": saved.settings["q"], "text_emb_layers": [-1]}
    args |= {"retrieval_token_idx": saved.added_tokens[RET_TOKEN], **UNUSED}
    args |= {"input_prompt": prompt} if (prompt := saved.settings.get("input_prompt")) else {}
    content = io.BytesIO()
    torch.save({"state_dict": {theirs[name]: value for name, value in saved.tensors.items()}}, content)
    files = {PICKLE: content.getvalue(), ARGS: as_json(args)}
    write_files(Path(folder), files | ({GENERATION: as_json(saved.generation)} if saved.generation else {}))


def _clip_name(settings: dict[str, Any]) -> str:
    """The Hugging Face name of one of OpenAI's CLIPs."""
    ours = settings["vision"].removesuffix("-quickgelu") + "-quickgelu"
    for theirs, name in CLIPS.items():
        if name == ours and settings["vision_weights"] == "openai":
            return theirs
    shown = f"{settings['vision']} ({settings['vision_weights']})"
    raise UserError(f"vision tower {shown}: has no name the authors' code could load; give one by --visual-encoder")
