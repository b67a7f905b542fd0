"""Statistics of shards before training: broken samples by cause, duplicates, captions and their lengths, sizes of images."""

from __future__ import annotations

import heapq
import io
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from fromage.data.shard_names import expand
from fromage.data.shard_records import TILE, Measure, Record, RecordReader, count_words, digest
from fromage.data.shard_sizes import total
from fromage.data.workers import WorkerLoader
from fromage.images.contact_sheet import contact_sheet

EXAMPLES = 5  # names under a heading
QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


class ShardReport:
    """Statistics of shards, and some samples drawn at random.

    Attributes:
        bad, seen: broken samples, and all samples, of each shard as training counts them; both include those that
            sizes.json promises and the shard does not hold.
    """

    def __init__(self, max_broken: float, unit: str = "words", shown: int = 20) -> None:
        self.max_broken, self.unit = max_broken, unit
        self.bad: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.causes: dict[str, list[str]] = defaultdict(list)  # the first names under each
        self.counts: Counter[str] = Counter()
        self.names: list[str] = []  # of the samples that can be used
        self.keys, self.images, self.pairs = array("Q"), array("Q"), array("Q")
        self.lengths, self.widths, self.heights = array("I"), array("I"), array("I")  # of all captions, of all images
        self.each = array("I")  # captions of each image
        self.smallest: tuple[int, str, tuple[int, int]] | None = None
        self.largest: tuple[int, str, tuple[int, int]] | None = None
        self.sheet: list[tuple[int, str, tuple[bytes, str]]] = []
        self.shown = shown

    def add(self, record: Record) -> None:
        """Count a record."""
        self.seen[record.shard] += record.lost + bool(record.key or record.broken)
        if record.lost:
            self._broken(record.shard, "fewer than sizes.json says", f"{record.shard} ({record.lost} missing)", record.lost)
        elif record.broken:
            cause, _, detail = record.broken.partition(": ")
            self._broken(record.shard, cause, f"{record.name} ({detail})" if detail else record.name, 1)
        elif record.key:
            self._usable(record)

    def _broken(self, shard: str, cause: str, name: str, count: int) -> None:
        self.bad[shard] += count
        self.counts[cause] += count
        if len(self.causes[cause]) < EXAMPLES:
            self.causes[cause].append(name)

    def _usable(self, record: Record) -> None:
        self.names.append(record.name)
        self.keys.append(digest(record.key.encode()))
        self.images.append(record.image)
        self.pairs.append(record.pair)
        self.lengths.extend(record.lengths)
        self.each.append(len(record.lengths))
        if record.size is not None:
            self.widths.append(record.size[0])
            self.heights.append(record.size[1])
            sized = (record.size[0] * record.size[1], record.name, record.size)
            self.smallest, self.largest = min(self.smallest or sized, sized), max(self.largest or sized, sized)
        if record.shown:
            self.sheet = heapq.nsmallest(self.shown, [*self.sheet, (record.draw, record.name, record.shown)])

    @property
    def share(self) -> float:
        """Share of the samples that are broken, 0 to 1."""
        return self.bad.total() / max(1, self.seen.total())

    @property
    def accepted(self) -> bool:
        """Whether training would accept the shards: few enough are broken, and one sample at least can be used."""
        return bool(self.names) and self.share <= self.max_broken

    def figures(self) -> dict[str, Any]:
        """All statistics, ready for JSON; lengths in self.unit, sizes in pixels, shares 0 to 1."""
        worst = {name: self.bad[name] / self.seen[name] for name, _ in self.bad.most_common()}
        return {
            "shards": len(self.seen),
            "samples": self.seen.total(),
            "usable": len(self.names),
            "captions": len(self.lengths),
            "broken": self.bad.total(),
            "broken_share": self.share,
            "max_broken": self.max_broken,
            "accepted": self.accepted,
            "causes": {c: {"count": n, "first": self.causes[c]} for c, n in self.counts.most_common()},
            "worst_shards": dict(sorted(worst.items(), key=lambda item: -item[1])[:EXAMPLES]),
            "twice": {
                "key": self._twice(self.keys),
                "image": self._twice(self.images),
                "image and caption": self._twice(self.pairs),
            },
            "captions_per_image": quantiles(self.each),
            f"caption_{self.unit}": quantiles(self.lengths),
            "image_width": quantiles(self.widths),
            "image_height": quantiles(self.heights),
            "smallest_image": self.smallest and {"name": self.smallest[1], "size": list(self.smallest[2])},
            "largest_image": self.largest and {"name": self.largest[1], "size": list(self.largest[2])},
        }

    def _twice(self, digests: array[int]) -> dict[str, Any]:
        """How many samples repeat an earlier one, and the first of them beside those that they repeat."""
        values = np.frombuffer(digests, np.uint64)
        order = np.argsort(values, kind="stable")
        again = np.flatnonzero(values[order[1:]] == values[order[:-1]])  # places whose digest equals the next one
        pairs = sorted((int(order[i + 1]), int(order[i])) for i in again)[:EXAMPLES]
        return {"count": len(again), "first": [f"{self.names[later]} = {self.names[earlier]}" for later, earlier in pairs]}

    def text(self) -> str:
        """The report for a terminal."""
        found = self.figures()
        lines = [f"{found['shards']} shards, {found['samples']} samples: {found['usable']} usable, {found['broken']} broken"]
        lines += [f"{found['usable']} images with {found['captions']} captions"]
        lines += [f"  {c['count']:7} {cause}: {', '.join(c['first'])}" for cause, c in found["causes"].items()]
        lines += [f"  {t['count']:7} with the {what} of another: {', '.join(t['first'])}"
                  for what, t in found["twice"].items() if t["count"]]  # fmt: skip
        if found["twice"]["image"]["count"]:
            lines.append("  copies compete in validation: pack each image once with all its captions (fromage shards)")
        measured = ("captions_per_image", f"caption_{self.unit}", "image_width", "image_height")
        rows = [[what.replace("_", " "), *found[what].values()] for what in measured if found[what]]
        lines.append(tabulate(rows, ["", *QUANTILES], tablefmt="plain"))
        for what in ("smallest_image", "largest_image"):
            if one := found[what]:
                lines.append(f"{what.replace('_', ' ')}: {one['size'][0]} x {one['size'][1]}, {one['name']}")
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """One line: whether training would accept the shards, and the worst shard."""
        broken = f"{self.share:.1%} broken, max_broken allows {self.max_broken:.1%}"
        worst = max(self.bad, key=lambda name: self.bad[name] / self.seen[name], default=None)
        by = f"; worst {worst}, {self.bad[worst] / self.seen[worst]:.1%}" if worst else ""
        return f"training would {'accept' if self.accepted else 'refuse'} these shards: {broken}{by}"

    def image(self) -> Image.Image:
        """The samples drawn at random, each with its captions."""
        tiles = [(Image.open(io.BytesIO(data)), f"{name}\n{caption}") for _, name, (data, caption) in self.sheet]
        return contact_sheet([(f"{len(tiles)} of {len(self.names)} samples, drawn at random", tiles)], TILE)


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """QUANTILES of values, each one of the values itself; an empty dictionary for no values."""
    if not values:
        return {}
    found = np.quantile(np.asarray(values), list(QUANTILES.values()), method="nearest")
    return {name: int(value) for name, value in zip(QUANTILES, found, strict=True)}


def check_shards(
    shards: str | list[str],
    max_broken: float = 0.05,
    workers: int = 0,
    shown: int = 20,
    measure: Measure = count_words,
    unit: str = "words",
) -> ShardReport:
    """Read all samples of shards, with a progress bar.

    Args:
        shards: patterns of shards, see fromage.data.shard_names.expand.
        max_broken: share of broken samples that training is to allow, 0 to 1. Training applies it to each worker's shards
            as it reads them; the report applies it to all shards together.
        workers: processes that decode; 0 decodes in this one.
        shown: samples on the contact sheet, drawn at random; the same ones with any number of workers.
        measure: gives the length of a caption.
        unit: of that length.

    Raises:
        UserError: a shard is missing.
    """
    reader = RecordReader(expand(shards), measure, shown)
    report = ShardReport(max_broken, unit, shown)
    loader = WorkerLoader(reader, None, num_workers=min(workers, len(reader.shards)), collate_fn=tuple)
    with tqdm(total=total(reader.shards), desc="shards", unit=" samples") as bar:
        for record in (Record(*row) for row in loader):
            report.add(record)
            bar.update(bool(record.key))
    return report
