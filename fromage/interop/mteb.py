"""FROMAGe under mteb and MIEB: their retrieval tasks over texts, images, and images with a text.

import mteb
results = mteb.evaluate(FromageMteb(load_model("FOLDER")), mteb.get_tasks(tasks=["Flickr30kT2IRetrieval"]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from fromage.distribution import pip_install, versions
from fromage.errors import UserError, first_few, first_line
from fromage.models.fromage import Fromage
from fromage.models.prompts import Part
from fromage.retrieval.queries import query_rows

try:
    import mteb
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise UserError(f"this needs mteb 2 or newer ({error.name}): {pip_install('mteb')}") from error

MODALITIES: set[Any] = {"text", "image"}


class FromageMteb(AbsEncoder):
    """The encoder that mteb asks for. An item with an image and a text is the image with the text after it."""

    def __init__(self, model: Fromage) -> None:
        self.model = model
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"fromage/{model.fingerprint()}",
            revision=model.fingerprint(),
            release_date=None,
            languages=None,
            n_parameters=sum(p.numel() for p in model.parameters()),
            memory_usage_mb=None,
            max_tokens=model.lm.max_length,
            embed_dim=model.q,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=sorted(MODALITIES),
        )

    def encode(self, inputs: Iterable[Mapping[str, Sequence[Any]]], **options: Any) -> np.ndarray:  # type: ignore[override]
        """Batches of items, {"text": ..., "image": ...} in lists -> (N, q) unit rows. Raises UserError as embed_queries."""
        rows = [query_rows(self.model, items(batch)) for batch in inputs]  # (b, q) each
        return np.concatenate([np.empty((0, self.model.q), np.float32), *rows])  # (N, q)


def items(batch: Mapping[str, Sequence[Any]]) -> list[list[Part]]:
    """The items of a batch as prompts. Raises UserError for a batch without texts and images."""
    there = [batch[name] for name in ("image", "text") if name in batch]
    if not there:
        raise UserError(f"a batch of {', '.join(map(str, batch))[:80]}: FROMAGe reads text and image alone")
    images, texts = (batch.get(name, repeat(None, len(there[0]))) for name in ("image", "text"))
    return [[part for part in (image, text) if part is not None] for image, text in zip(images, texts, strict=True)]


def find_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks by name. Raises UserError for a name that it has not, and for tasks of other modalities."""
    tasks: list[Any] = []
    for name in names:
        try:
            tasks += mteb.get_tasks(tasks=[name])
        except KeyError as error:
            told = str(error.args[0]) if error.args else first_line(error)
            raise UserError(f"task {name}: {told.splitlines()[0]}; mteb.get_tasks() has the names") from error
    if odd := [each.metadata.name for each in tasks if not set(each.metadata.modalities) <= MODALITIES]:
        raise UserError(f"{first_few(odd)}: FROMAGe reads text and images alone; name other tasks")
    return tasks


def evaluate(model: Fromage, tasks: Sequence[Any], batch_size: int = 64) -> dict[str, Any]:
    """Run tasks; the report holds mteb's scores by task, and its table as `table`.

    Raises UserError where the data of a task cannot be had.
    """
    for task in tasks:
        try:
            if not task.data_loaded:
                task.load_data()
        except Exception as error:  # of datasets, the hub, the network, the disk
            told = f"its data cannot be had ({first_line(error)})"
            raise UserError(f"task {task.metadata.name}: {told}; fetch it where there is a network") from error
    encoder: Any = FromageMteb(model)
    results = mteb.evaluate(encoder, tasks, cache=None, encode_kwargs={"batch_size": batch_size})
    frame = results.to_dataframe()
    return {
        "evaluation": "mteb",
        "checkpoint": model.fingerprint(),
        "versions": versions(["fromage", "mteb", "torch", "transformers"]),
        "scores": {result.task_name: result.scores for result in results.task_results},
        "main_scores": {result.task_name: float(result.get_score()) for result in results.task_results},
        "table": {"head": list(map(str, frame.columns)), "rows": frame.values.tolist()},
    }
