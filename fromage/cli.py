"""One command line under two names, `lightning` and `fromage`.

    fit, validate, test, predict     Lightning's own verbs; a configuration is found as given, else in lightning_configs/
    toy make, toy demo               the synthetic world, and the tour of `make demo`
    shards tsv, shards coco          pairs on disk -> webdataset shards
    features                         shards -> shards with stored image features
    plan                             what a run will need: parameters, memory, work, time
    index build, search              an image index, and questions to it

What a user can mend is one line on stderr and exit code 2; --debug shows the traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fromage.errors import UserError

FITTING = ("fit", "validate", "test", "predict")


def config_folder() -> Path:
    """lightning_configs/: within the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "lightning_configs"
    return inside if inside.is_dir() else package.parent / "lightning_configs"


def find_config(name: str) -> str:
    """A configuration as given, else in lightning_configs/. Raises UserError where there is none, or it is no YAML."""
    for path in (Path(name), config_folder() / name, config_folder() / f"{name}.yaml"):
        if path.is_file():
            _check_yaml(path)
            return str(path)
    known = ", ".join(sorted(p.name for p in config_folder().glob("*.yaml")))
    raise UserError(f"configuration {name}: no such file, neither here nor among {known}")


def _check_yaml(path: Path) -> None:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"configuration {path}: not a mapping of trainer, model and data; see {config_folder()}")


def _with_configs_found(argv: list[str]) -> list[str]:
    out = list(argv)
    for i, word in enumerate(out):
        if word in ("--config", "-c") and i + 1 < len(out):
            out[i + 1] = find_config(out[i + 1])
        elif word.startswith("--config="):
            out[i] = "--config=" + find_config(word.removeprefix("--config="))
    return out


def fitting(argv: list[str]) -> None:
    """fit, validate, test, predict: LightningCLI over any module and data module, configured by files and options."""
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningCLI

    from fromage.checkpoint import read_checkpoint

    class CLI(LightningCLI):
        """Looks at the checkpoint before anything is loaded, and lets options count, not the checkpoint's own ones."""

        def _parse_ckpt_path(self) -> None:
            pass

        def before_instantiate_classes(self) -> None:
            path = self.config[self.subcommand].get("ckpt_path")
            if path and path not in ("last", "best", "hpc", "registry"):
                read_checkpoint(path)

    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LightningCLI's args parameter|in eval mode).*")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    try:
        CLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={name: {"exit_on_error": False} for name in FITTING} | {"exit_on_error": False},
            args=_with_configs_found(argv),
        )
    except argparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())[:500] + " (fromage " + argv[0] + " --help)") from error


def toy_make(args: argparse.Namespace) -> None:
    """Write the toy world."""
    from fromage.toy.world import make_world

    print(make_world(args.out, args.seed, args.train, args.val))


def toy_demo(args: argparse.Namespace) -> None:
    """Make a world, train on it, evaluate, index and search."""
    from fromage.toy.demo import demo

    demo(args.out)


def shards_tsv(args: argparse.Namespace) -> None:
    """Pack a TSV of caption and picture."""
    from fromage.packing import pack_tsv

    print(pack_tsv(args.tsv, args.out, args.images, args.per_shard))


def shards_coco(args: argparse.Namespace) -> None:
    """Pack a COCO caption file and its pictures."""
    from fromage.packing import pack_coco

    print(pack_coco(args.annotations, args.images, args.out, args.per_shard, args.captions))


def features(args: argparse.Namespace) -> None:
    """Store each picture's pooled features in place of it, or beside it."""
    from fromage.backbones import load_vision
    from fromage.features import store_features

    vision = load_vision(args.vision, args.vision_weights, args.dtype).to(args.device)
    print(f"{store_features(args.shards, args.out, vision, args.batch_size, args.keep_pictures)} samples -> {args.out}")


def plan(args: argparse.Namespace) -> None:
    """Count a run's parameters, memory, work and time, without weights."""
    from fromage.plan import as_json, plan, read_run, report

    options = {name: getattr(args, name) for name in ("batch_size", "max_tokens", "tokens", "step", "dtype", "lm", "vision")}
    counted = plan(read_run(find_config(args.config), stored_features=args.stored_features, **options))
    print(report(counted, args.device_tflops, args.share))
    if args.json:
        args.json.write_text(json.dumps(as_json(counted, args.device_tflops, args.share), indent=1) + "\n")


def index_build(args: argparse.Namespace) -> None:
    """Embed pictures with a checkpoint and save an index of them."""
    from fromage.checkpoint import load_model
    from fromage.index import build_index

    model = load_model(args.ckpt, args.device)
    build_index(model, args.images, args.out, args.batch_size, args.workers, args.captions, args.ckpt)
    print(f"index -> {args.out}")


def search(args: argparse.Namespace) -> None:
    """Print the pictures found for each text, and draw them."""
    from fromage.index import draw_hits, open_index, search_index

    model, index = open_index(args.index, args.ckpt, args.device)
    hits = search_index(model, index, args.text, args.k)
    for text, found in zip(args.text, hits, strict=True):
        print(text)
        for hit in found:
            print(f"  {hit.rank:3d}  {hit.score:.3f}  {hit.path}  {hit.caption}")
    if args.png:
        draw_hits(args.text, hits).save(args.png)
        print(f"drawn: {args.png}")


def _option(*names: str, **settings: object) -> tuple[tuple[str, ...], dict]:
    return names, settings


_OUT = _option("--out", type=Path, required=True, help="folder to write")
_DEVICE = _option("--device", default="cpu", help="cpu, cuda or mps")
_PER_SHARD = _option("--per-shard", type=int, default=1000, help="pairs per shard")

VERBS: dict[tuple[str, ...], tuple[Callable[[argparse.Namespace], None], list[tuple[tuple[str, ...], dict]]]] = {
    ("toy", "make"): (
        toy_make,
        [
            _OUT,
            _option("--seed", type=int, default=0),
            _option("--train", type=int, default=8192, help="training pairs"),
            _option("--val", type=int, default=1000, help="validation pairs, scenes never seen in training"),
        ],
    ),
    ("toy", "demo"): (toy_demo, [_option("--out", type=Path, default=Path("runs/demo"), help="run folder")]),
    ("shards", "tsv"): (
        shards_tsv,
        [
            _option("tsv", type=Path, help="lines of caption, tab, picture"),
            _OUT,
            _option("--images", type=Path, help="folder the pictures' paths start from (the TSV's own)"),
            _PER_SHARD,
        ],
    ),
    ("shards", "coco"): (
        shards_coco,
        [
            _option("annotations", type=Path, help="COCO caption JSON"),
            _option("--images", type=Path, required=True, help="folder of its pictures"),
            _OUT,
            _option("--captions", choices=("all", "first"), default="all", help="captions used per picture"),
            _PER_SHARD,
        ],
    ),
    ("features",): (
        features,
        [
            _option("shards", help="folder, pattern or brace expression of shards"),
            _OUT,
            _option("--vision", default="ViT-L-14", help="image tower, as in a configuration"),
            _option("--vision-weights", default=None, help="its weights, as in a configuration"),
            _option("--dtype", default="float32", choices=("float32", "bfloat16", "float16")),
            _option("--batch-size", type=int, default=256, help="pictures per batch"),
            _option("--keep-pictures", action="store_true", help="keep the pictures beside their features"),
            _DEVICE,
        ],
    ),
    ("plan",): (
        plan,
        [
            _option("--config", "-c", required=True, help="configuration, as for fit"),
            _option("--lm", help="language model, in place of the configuration's"),
            _option("--vision", help="image tower, likewise"),
            _option("--dtype", choices=("float32", "bfloat16", "float16"), help="of the towers, likewise"),
            _option("--step", choices=("fast", "plain"), help="way of training, likewise"),
            _option("--batch-size", type=int, help="pairs per step and device, likewise"),
            _option("--max-tokens", type=int, help="tokens of the longest caption, </s> and [RET] included, likewise"),
            _option("--tokens", type=float, help="tokens of the mean caption, </s> included, [RET] not (13)"),
            _option("--stored-features", action="store_true", help="train on features from `fromage features`"),
            _option("--device-tflops", type=float, default=150, help="the device's rate in TFLOP/s; 150: an A6000 in bf16"),
            _option("--share", type=float, default=0.5, help="share of that rate which training is assumed to reach"),
            _option("--json", type=Path, help="write all figures into this file"),
        ],
    ),
    ("index", "build"): (
        index_build,
        [
            _option("--ckpt", type=Path, required=True, help="checkpoint of `lightning fit`"),
            _option("--images", required=True, help="folder of pictures, or shards"),
            _OUT,
            _option("--captions", type=Path, help="COCO caption JSON, or {file name: caption}, for a folder"),
            _option("--batch-size", type=int, default=64, help="pictures per batch"),
            _option("--workers", type=int, default=0, help="processes that decode pictures"),
            _DEVICE,
        ],
    ),
    ("search",): (
        search,
        [
            _option("text", nargs="+", help="what to look for; several texts make several rows"),
            _option("--index", type=Path, required=True, help="folder of `fromage index build`"),
            _option("--ckpt", type=Path, help="checkpoint, when it has moved since the index was built"),
            _option("-k", type=int, default=5, help="pictures per text"),
            _option("--png", type=Path, help="draw the pictures into this file"),
            _DEVICE,
        ],
    ),
}


def parser() -> argparse.ArgumentParser:
    """The parser of our own verbs."""
    root = argparse.ArgumentParser(prog="fromage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    levels: dict[tuple[str, ...], Any] = {(): root.add_subparsers(required=True, metavar="VERB")}
    for name in FITTING:
        levels[()].add_parser(name, help=f"Lightning's {name}", add_help=False)
    for words, (run, options) in VERBS.items():
        if len(words) == 2 and words[:1] not in levels:
            levels[words[:1]] = levels[()].add_parser(words[0]).add_subparsers(required=True, metavar="VERB")
        summary = (run.__doc__ or "").rstrip(".")
        verb = levels[words[:-1]].add_parser(words[-1], help=summary, description=summary)
        for names, settings in options:
            verb.add_argument(*names, **settings)
        verb.set_defaults(run=run)
    return root


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if words and words[0] in FITTING:
            fitting(words)
        else:
            args = parser().parse_args(words)
            args.run(args)
    except UserError as error:
        if debug:
            raise
        print(f"fromage: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
