"""FROMAGe as a module of sentence-transformers: texts, images and interleaved lists of both -> rows of the retrieval space.

    model = SentenceTransformer("FOLDER", trust_remote_code=True)  # of `fromage export --format sentence-transformers`
    model.encode(["a red star", Image.open("star.png"), ["like", Image.open("star.png"), "but blue"]])

The rows are those of fromage.retrieval.queries.embed_queries. The module encodes; it is not trained through this library.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.models.prompts import ImageInput, Part, is_text, path_or_url
from fromage.retrieval.queries import embed_queries

try:
    from sentence_transformers.base.modality import is_image_url_or_path
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise UserError(
        f"this needs sentence-transformers 5.4 or newer ({error.name}): {pip_install('sentence-transformers')}"
    ) from error

IMAGES = ("image", "image_url")  # keys of a dictionary, and types of a message's content parts, that hold an image
OPTIONS = {"dtype", "quantize", "lm", "vision", "vision_weights"}  # of Fromage.from_pretrained, within model_kwargs


class FromageEncoder(InputModule):
    """Encodes what sentence-transformers passes: one input is one row.

    An input is a text, a PIL image, a list or tuple of both in any order, a dictionary {"text": ..., "image": ...} in the
    order of its keys, or messages with "role" and "content". A text is never read as a path or an address; an image by
    path or address is {"image": "cat.jpg"}. An image alone is embedded as in an index, all else with [RET] after it.
    """

    def __init__(self, model: Fromage) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer.hf

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> FromageEncoder:  # type: ignore[override]
        """The module of a folder or a name on the hub. model_kwargs: dtype, quantize, lm, vision and vision_weights.

        Raises UserError for missing or damaged files and for other model_kwargs.
        """
        given = dict(options.get("model_kwargs") or {})
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        if unknown := sorted(given.keys() - OPTIONS):
            raise UserError(f"model_kwargs: {unknown[0]} is not known; give some of {', '.join(sorted(OPTIONS))}")
        place = Path(model_name_or_path, subfolder) if subfolder else model_name_or_path
        hub = {"token": "token", "cache_folder": "cache_dir", "revision": "revision", "local_files_only": "local_files_only"}
        given |= {ours: options[name] for name, ours in hub.items() if options.get(name) is not None}
        return cls(load_model(place, **given))

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write the trained parameters, see fromage.checkpoints.format."""
        self.model.save_pretrained(output_path)

    @property
    def modalities(self) -> list[Any]:
        """What an input may be."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int | None:
        """Longest sequence the language model has positions for, in tokens; None if it sets no limit."""
        return self.model.lm.max_length

    def get_embedding_dimension(self) -> int:
        """q, the width of the retrieval space."""
        return self.model.q

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Inputs -> prompts, which `forward` encodes.

        prompt: put in front of the first text of each; an image alone has none. Raises UserError for inputs of other types.
        """
        rows = [list(_parts(one)) for one in inputs]
        return {"prompts": [_after(prompt, row) for row in rows] if prompt else rows}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Prompts of `preprocess` -> sentence_embedding: (B, q) unit rows. Raises UserError as embed_queries does."""
        return {"sentence_embedding": embed_queries(self.model, features["prompts"])}


def _parts(one: Any) -> Iterator[Part]:
    """The parts of a prompt, in order."""
    if isinstance(one, Mapping):
        if "content" in one:
            yield from _parts(one["content"])
            return
        kind = one.get("type")
        held = {key: value for key, value in one.items() if key in (*IMAGES, "text") and kind in (None, key)}
        if not held or (kind is None and len(held) < len(one)):
            raise UserError(f"an input holds {', '.join(map(str, one))[:80]}; give 'text' and 'image'")
        for key, value in held.items():
            content: Any = value.get("url") if isinstance(value, Mapping) else value  # OpenAI's image_url
            for each in content if isinstance(content, list | tuple) else [content]:
                yield _image(each) if key in IMAGES else each
    elif isinstance(one, list | tuple):
        for each in one:
            yield from _parts(each)
    else:
        if isinstance(one, str) and is_image_url_or_path(one):
            told = "is taken as a text; pass an image by path or address as {'image': ...}"
            warnings.warn(f"{one[:80]!r} {told}", stacklevel=2)
        yield one


def _image(named: Any) -> ImageInput:
    return path_or_url(named) if isinstance(named, str) else named


def _after(prompt: str, parts: list[Part]) -> list[Part]:
    """Parts with a prompt in front of their first text."""
    first = next((i for i, part in enumerate(parts) if is_text(part)), None)
    return parts if first is None else [*parts[:first], prompt + str(parts[first]), *parts[first + 1 :]]
