"""Commands that generate: captions, and conversation in the terminal, in a browser, over HTTP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from fromage.cli.command import Result
from fromage.config import CAPTION_LENGTH, AsLoaded
from fromage.errors import UserError, first_few
from fromage.generation.options import DEFAULTS, HELP, LIMITS, Decoding, StyleName
from fromage.serving.batching import Capacity
from fromage.serving.ports import listen


@dataclass(kw_only=True)
class Opening:
    """The model to talk with.

    Attributes:
        ckpt: checkpoint, folder or hub name (default: with no --index either, the toy world, made on first use)
        index: folder of `fromage index build`, where images are found
        style: how turns stand in the prompt (default: as the model's generation.json says, else by the tokenizer's chat
            template, else dialogue)
        system: text in front of everything
        images: folder of the index's images, if it has moved or the index is from elsewhere
    """

    ckpt: str | None = None
    index: Path | None = None
    images: Path | None = None
    style: StyleName | None = None
    system: str | None = None
    device: str = "auto"
    quantize: AsLoaded | None = None

    def open(self) -> tuple[Any, Any, Any]:
        """Model, index (or None) and Preset: as named, else those of the toy world."""
        from fromage.apps.toy_demo import PRESET
        from fromage.generation.preset import read_preset

        model, index = self._open()
        toy = not self.index and not self.ckpt and model.generation is None  # of a run before there was generation.json
        return model, index, (PRESET if toy else read_preset(model.generation)).over(self.style, self.system)

    def _open(self) -> tuple[Any, Any]:
        from fromage.models.fromage import load_model
        from fromage.retrieval.open_index import open_index

        if self.images and not self.index:
            raise UserError("--images: names where the images of an index are; give --index too")
        if self.index:
            return open_index(self.index, self.ckpt, self.device, self.images, quantize=self.quantize)
        if self.ckpt:
            return load_model(self.ckpt, self.device, quantize=self.quantize), None
        from fromage.apps.toy_demo import conversation_index

        return open_index(conversation_index(TOY), None, self.device, quantize=self.quantize)

    def octopus(self, ckpt: str | None) -> Any:
        """The one that is named; beside the toy FROMAGe the toy one, if it was trained already; or None."""
        from fromage.apps.octopus_demo import HOME, trained
        from fromage.octopus.model import load_octopus

        path = ckpt or (None if self.index or self.ckpt else trained(Path(HOME)))
        quantize = self.quantize if ckpt else None  # the toy one's language model was trained itself, and stays as it is
        return load_octopus(str(path), self.device, quantize=quantize) if path else None


@dataclass(kw_only=True)
class ServerAddress:
    """Where a server listens.

    Attributes:
        host: address to listen at; 0.0.0.0 lets other machines in
        port: port to listen at
    """

    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self) -> None:
        """Raise UserError where nothing can listen there, before a model is loaded."""
        listen(self.host, self.port).close()


TOY = Path("runs/demo")  # where the toy world and its models are made, in minutes


def caption(
    image: Sequence[str],
    *,
    ckpt: str | None = None,
    max_new_tokens: int = CAPTION_LENGTH,
    batch_size: int = 32,
    device: str = "auto",
    quantize: AsLoaded | None = None,
) -> Iterator[Result]:
    """Caption images, a line for each.

    Args:
        image: files, folders of images, and URLs
        ckpt: checkpoint, folder or hub name (default: the toy world's, made on first use)
        max_new_tokens: length of a caption, in tokens, at most
    """
    from fromage.images.codec import image_files

    names = [name for each in image for name in (map(str, image_files(Path(each))) if Path(each).is_dir() else [each])]
    if not names:
        raise UserError(f"{', '.join(image)}: holds no image; name images, or folders of them")
    from fromage.generation.generate import caption_files

    lost, model = [], Opening(ckpt=ckpt, device=device, quantize=quantize).open()[0]
    for name, made in caption_files(model, names, max_new_tokens, batch_size):
        if isinstance(made, str):
            yield Result.of([f"{name}\t{made}"], {"image": name, "caption": made})
        else:
            lost.append(str(made))
            yield Result.of([f"{name}\t"], {"image": name, "caption": None, "error": str(made)})
    if lost:
        told = f"{len(lost)} of {len(names)} images have no caption: {first_few(lost, '; ')}"
        if len(lost) == len(names):
            raise UserError(told)
        warnings.warn(told, stacklevel=2)


class _Given:
    """Options of an answer where they were given; the model's generation.json says the others."""

    def __post_init__(self) -> None:
        Decoding(**self.options())  # what means nothing is refused before any work

    def options(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: value for name, value in vars(self).items() if value not in (None, [], _UNSAID[name])}


def _told(name: str) -> str:
    """What --help says of an option of an answer."""
    if name not in LIMITS or DEFAULTS[name] is None:
        return HELP[name]
    return f"{HELP[name].rstrip('.')} (default: the model's generation.json, else {DEFAULTS[name]:g})"


_UNSAID = {name: value if isinstance(value, (bool, tuple)) else None for name, value in DEFAULTS.items()}
if TYPE_CHECKING:
    Given = _Given
else:
    Given = make_dataclass(
        "Given",
        [
            (name, kind if isinstance(_UNSAID[name], (bool, tuple)) else kind | None, _UNSAID[name])
            for name, kind in get_type_hints(Decoding).items()
        ],
        bases=(_Given,),
        kw_only=True,
        namespace={"__doc__": "\n    ".join(["Options.\n\nAttributes:", *(f"{name}: {_told(name)}" for name in DEFAULTS)])},
    )


def chat(*, opening: Opening, decoding: Given) -> None:
    """Talk in the terminal, with images by path."""
    from fromage.apps.terminal import talk
    from fromage.generation.chat import Chat

    model, index, preset = opening.open()
    preset = preset.over(decoding=decoding.options())
    talk(Chat(model, index, preset.decoding, preset.style, preset.system))


def tune_ret(
    ckpt: str, messages: Path, *, style: StyleName | None = None,
    system: str | None = None, device: str = "auto",
) -> Result:  # fmt: skip
    """Choose the [RET] bias by messages that ask for an image and others, and store it beside the checkpoint.

    Half of the messages choose it, the others judge it. chat, demo and serve begin with what generation.json says then:
    this bias, and style and system prompt where they are given here, since the bias holds for them alone.

    Args:
        messages: JSON {"images": [message that asks for an image, ...], "words": [other message, ...]}
        style: how turns stand in the prompt (default: as the model's generation.json says, else by the tokenizer's chat
            template, else dialogue)
        system: text in front of everything
    """
    from fromage.checkpoints.format import GENERATION
    from fromage.checkpoints.load import folder_beside
    from fromage.generation import ret_tuning
    from fromage.generation.preset import read_preset
    from fromage.io import write_json
    from fromage.models.fromage import load_model

    told, place = ret_tuning.read_messages(messages), folder_beside(ckpt) / GENERATION
    model = load_model(ckpt, device)
    preset = read_preset(model.generation).over(style, system)
    found = ret_tuning.tune_ret(model, told, preset)
    if found.accuracy <= 50:
        raise UserError(f"no [RET] bias parts the messages of {messages}; try another --style. {place} stays as it is")
    write_json(place, preset.over(decoding={"ret_bias": found.bias}).stored())
    lines = [
        f"[RET] bias {found.bias:g}, right for {found.accuracy:.0f} % of the messages that chose it (mean of both kinds)"
    ]
    lines += [
        f"answers to the others with images, {name}: {shown['images']:.0f} % where asked for, {shown['words']:.0f} % else"
        for name, shown in (("without a bias", found.before), ("with it", found.after))
    ]
    data = {"ret_bias": found.bias, "accuracy": found.accuracy, "judged": found.judged}
    return Result.of([*lines, f"stored in {place}"], data | {"before": found.before, "after": found.after})


def demo(*, opening: Opening, octopus: str | None = None, address: ServerAddress, decoding: Given) -> None:
    """Talk and search in a browser.

    Args:
        octopus: checkpoint of Octopus, for a tab in which it points at what is meant
    """
    from fromage.apps.web.demo import launch

    model, index, preset = opening.open()
    preset = preset.over(decoding=decoding.options())
    launch(model, index, preset, address.host, address.port, opening.octopus(octopus))


def serve(
    *, opening: Opening, address: ServerAddress, api_key_file: Path | None = None, cors: Sequence[str] = (),
    capacity: Capacity, decoding: Given,
) -> None:  # fmt: skip
    """Answer programs over HTTP, by a protocol of its own and by OpenAI's.

    Args:
        api_key_file: file of keys, one a line, of which a request must have one (Authorization: Bearer KEY)
        cors: origin of web pages that may use the server, such as https://chat.example; repeat it for several
    """
    from fromage.serving.access import Access, read_keys
    from fromage.serving.app import serve

    access = Access(read_keys(api_key_file) if api_key_file else (), cors)
    model, index, preset = opening.open()
    preset = preset.over(decoding=decoding.options())
    serve(model, index, preset, address.host, address.port, capacity, access)
