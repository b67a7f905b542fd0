"""Commands of conversation: in the terminal, in a browser, over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fromage.generation.options import Decoding


@dataclass(kw_only=True)
class Opening:
    """The model to talk with.

    Attributes:
        ckpt: checkpoint, folder or hub name (default: with no --index either, the toy world, made on first use)
        index: folder of `fromage index build`, where images are found
        style: how turns stand in the prompt (default: dialogue; for the toy world alone)
    """

    ckpt: str | None = None
    index: Path | None = None
    style: Literal["dialogue", "plain", "alone"] | None = None
    device: str = "cpu"

    def open(self) -> tuple[Any, Any, str]:
        """Model, index (or None) and style of conversation: as named, else those of the toy world."""
        from fromage.models.fromage import load_model
        from fromage.retrieval.open_index import open_index

        if self.index:
            return *open_index(self.index, self.ckpt, self.device), self.style or "dialogue"
        if self.ckpt:
            return load_model(self.ckpt, self.device), None, self.style or "dialogue"
        from fromage.apps.toy_demo import conversation_index

        return *open_index(conversation_index(Path("runs/demo")), None, self.device), self.style or "alone"

    def octopus(self, ckpt: str | None) -> Any:
        """The one that is named; beside the toy FROMAGe the toy one, if it was trained already; or None."""
        from fromage.apps.octopus_demo import HOME, trained
        from fromage.octopus.module import load_octopus

        path = ckpt or (None if self.index or self.ckpt else trained(Path(HOME)))
        return load_octopus(str(path), self.device) if path else None


@dataclass(kw_only=True)
class Address:
    """Where a server listens.

    Attributes:
        host: address to listen at; 0.0.0.0 lets other machines in
        port: port to listen at
    """

    host: str = "127.0.0.1"
    port: int = 7860


def chat(*, opening: Opening, system: str | None = None, decoding: Decoding) -> None:
    """Talk in the terminal, with images by path.

    Args:
        system: text in front of everything
    """
    from fromage.apps.terminal import talk
    from fromage.generation.chat import Chat

    model, index, style = opening.open()
    talk(Chat(model, index, decoding, style, system or ()))


def demo(*, opening: Opening, octopus: str | None = None, address: Address) -> None:
    """Talk and search in a browser.

    Args:
        octopus: checkpoint of Octopus, for a tab in which it points at what is meant
    """
    from fromage.apps.web.demo import launch

    model, index, style = opening.open()
    launch(model, index, style, address.host, address.port, opening.octopus(octopus))


def serve(*, opening: Opening, address: Address, batch_size: int = 16, queue: int = 64, timeout: float = 60.0) -> None:
    """Answer programs over HTTP.

    Args:
        batch_size: requests answered together
        queue: requests that may wait; beyond it the answer is 429
        timeout: time a request may take, in seconds
    """
    from fromage.serving.app import Capacity, serve

    model, index, style = opening.open()
    serve(model, index, style, address.host, address.port, Capacity(batch_size, queue, timeout))
