"""Verbs of conversation: in the terminal, in a browser, over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fromage.cli.verb import DEVICE, Option, Verbs, option


def chat(args: argparse.Namespace) -> None:
    """Talk in the terminal, with images by path."""
    from fromage.apps.terminal import talk

    talk(_conversation(args))


def demo(args: argparse.Namespace) -> None:
    """Talk and search in a browser."""
    from fromage.apps.web.demo import launch

    model, index, style = _opened(args)
    launch(model, index, style, args.host, args.port, _octopus(args))


def _octopus(args: argparse.Namespace) -> Any:
    """The one that is named; beside the toy FROMAGe the toy one, if it was trained already; or None."""
    from fromage.apps.octopus_demo import HOME, trained
    from fromage.octopus.module import load_octopus

    path = args.octopus or (None if args.index or args.ckpt else trained(Path(HOME)))
    return load_octopus(str(path), args.device) if path else None


def serve(args: argparse.Namespace) -> None:
    """Answer programs over HTTP."""
    from fromage.serving.app import Capacity, serve

    model, index, style = _opened(args)
    serve(model, index, style, args.host, args.port, Capacity(args.batch_size, args.queue, args.timeout))


def _opened(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """Model, index (or None) and style of conversation: as named, else those of the toy world."""
    from fromage.models.fromage import load_model
    from fromage.retrieval.open_index import open_index

    if args.index:
        return *open_index(args.index, args.ckpt, args.device), args.style or "dialogue"
    if args.ckpt:
        return load_model(args.ckpt, args.device), None, args.style or "dialogue"
    from fromage.apps.toy_demo import conversation_index

    return *open_index(conversation_index(Path("runs/demo")), None, args.device), args.style or "alone"


def _conversation(args: argparse.Namespace) -> Any:
    from fromage.generation.chat import Chat
    from fromage.generation.decoding import Decoding

    model, index, style = _opened(args)
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        ret_bias=args.ret_bias,
        images_per_ret=args.images,
    )
    return Chat(model, index, decoding, style, args.system or ())


MODEL: list[Option] = [
    option("--ckpt", help="checkpoint, folder or hub name; without it and --index, the toy world, made on first use"),
    option("--index", type=Path, help="folder of `fromage index build`, where images are found"),
    option("--style", choices=("dialogue", "plain", "alone"), help="how turns stand in the prompt (dialogue; toy: alone)"),
    DEVICE,
]
ADDRESS: list[Option] = [
    option("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in"),
    option("--port", type=int, default=7860, help="port to listen at"),
]
VERBS: Verbs = {
    ("chat",): (
        chat,
        [
            *MODEL,
            option("--system", help="text in front of everything"),
            option("--max-new-tokens", type=int, default=32, help="length of an answer at most, tokens"),
            option("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy"),
            option("--ret-bias", type=float, default=0.0, help="added to the logit of [RET]: more images, or fewer"),
            option("--images", type=int, default=1, help="images for each [RET]"),
        ],
    ),
    ("demo",): (
        demo,
        [*MODEL, option("--octopus", help="checkpoint of Octopus, for a tab in which it points at what is meant"), *ADDRESS],
    ),
    ("serve",): (
        serve,
        [
            *MODEL,
            *ADDRESS,
            option("--batch-size", type=int, default=16, help="requests answered together"),
            option("--queue", type=int, default=64, help="requests that may wait; beyond it the answer is 429"),
            option("--timeout", type=float, default=60.0, help="seconds a request may take"),
        ],
    ),
}
