"""Tuples for composition learning from captions of images, written by a language model: a run that may be killed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fromage.data.caption_files import read_captions
from fromage.errors import BrokenSample, UserError
from fromage.evals.answer_file import AnswerFile
from fromage.generation.tuple_writer import EXAMPLES, Sampling, TupleWriter, Written, usable
from fromage.io import write_files, write_json
from fromage.models.language_model import load_lm
from fromage.processor import find_device

WRITTEN, LINES, REPORT = "written.jsonl", "tuples.jsonl", "report.json"
TARGET = "target"  # in a line of written.jsonl


def write_tuples(
    captions: Path,
    out: Path,
    lm: str,
    images: Path | None = None,
    sampling: Sampling | None = None,
    dtype: str = "float32",
    device: str = "auto",
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write conditions and target captions for the first caption of each image; returns what report.json holds.

    The folder `out` gets written.jsonl, what the model wrote; tuples.jsonl, what is kept of it, for `fromage shards tuples`;
    report.json, which counts the rest by cause. A run that was killed goes on with the same arguments, and ends with the
    files of an uninterrupted one.

    Args:
        captions: as fromage.data.caption_files.read_captions reads them.
        lm: as fromage.models.language_model.load_lm has it.
        images: folder of the images (default: that of the captions).
        limit: only the first so many images.

    Raises:
        UserError: no caption, another run's file in `out`, or a language model that cannot be had.
    """
    sampling, place = sampling or Sampling(), find_device(device)
    said = list(read_captions(captions, (images or captions.parent).absolute()).items())[:limit]
    if not said:
        raise UserError(f"{captions}: holds no caption; name a file of captions")
    out.mkdir(parents=True, exist_ok=True)
    known = hashlib.sha256(json.dumps([caption for _, caption in said]).encode()).hexdigest()[:16]
    about = {"captions": captions.name, "said": known, "count": len(said), "lm": lm, "dtype": dtype}
    about |= {"examples": len(EXAMPLES), **asdict(sampling)}
    with AnswerFile(out / WRITTEN, about, overwrite) as file:
        batches = [range(i, min(i + sampling.batch_size, len(said))) for i in range(0, len(said), sampling.batch_size)]
        there = {i for i, record in file.answered.items() if TARGET in record}  # lines of former versions lack it
        todo = [n for n, batch in enumerate(batches) if not there >= set(batch)]
        if todo:
            writer = TupleWriter(load_lm(lm, dtype, rows=(), places=()).to(place), sampling)
        for number in tqdm(todo, "writing", unit=" batches"):
            written = writer.write([said[i][1] for i in batches[number]], number)
            file.add([as_record(i, one) for i, one in zip(batches[number], written, strict=True)])
        entries, causes = kept(said, [of_record(file.answered[i]) for i in range(len(said))])
        report = {**about, "kept": len(entries), "left_out": dict(causes)}
        write_files(out, {LINES: "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()})
        write_json(out / REPORT, report)
        file.finish(range(len(said)))
    return report


def as_record(number: int, written: Written | None) -> dict[str, Any]:
    """A line of written.jsonl: the condition as its text, and the target caption, null where nothing was written."""
    condition, target = written or ("", None)
    return {"question_id": number, "text": condition, TARGET: target}


def of_record(record: dict[str, Any]) -> Written | None:
    """What a line of written.jsonl holds."""
    return None if record[TARGET] is None else Written(record["text"], record[TARGET])


def kept(said: list[tuple[str, str]], written: list[Written | None]) -> tuple[list[dict[str, str]], Counter[str]]:
    """The tuples that are of use, as lines of `fromage shards tuples`, and how many others there are, by cause."""
    entries, causes = [], Counter[str]()
    for (image, caption), one in zip(said, written, strict=True):
        try:
            condition, target = usable(caption, one)
        except BrokenSample as error:
            causes[str(error)] += 1
            continue
        entries.append({"image": image, "caption": caption, "condition": condition, "target_caption": target})
    return entries, causes
