"""What shards hold, before training: what is broken and why, what comes twice, how long captions and how large images are.

Samples are read and decoded as in training, so what is counted as broken here is what training would leave out.
"""

from __future__ import annotations

import heapq
import io
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from fromage.data.features import from_npy
from fromage.data.shards import Broken, Raw, caption_of, expand, image_of, read_shards, shard_name, shard_sizes
from fromage.data.workers import init_worker, worker_share
from fromage.errors import BrokenSample
from fromage.images.codec import SUFFIXES, jpeg
from fromage.images.contact_sheet import contact_sheet

TILE = 160  # pixels of an image on the sheet
EXAMPLES = 5  # names under a heading
QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
Measure = Callable[[str], int]  # the length of a caption


def count_words(text: str) -> int:
    """The words of a caption, as spaces part them."""
    return len(text.split())


class Look(NamedTuple):
    """What is kept of a stored sample, or of a loss that belongs to none (the torn end of a shard)."""

    shard: str
    key: str = ""
    broken: str = ""  # 'cause: detail', as BrokenSample has it
    lost: int = 0  # samples that sizes.json promises and the shard does not hold
    length: int = 0  # of the caption, as it is measured
    size: tuple[int, int] | None = None  # width and height; None for stored features
    image: int = 0  # digests of the image's bytes, and of caption and image
    pair: int = 0
    draw: int = 0  # where the sample stands in a random order of all
    shown: tuple[bytes, str] | None = None  # a small JPEG and the caption, of those that may come first in that order

    @property
    def name(self) -> str:
        """'shards/00000.tar#key', as images.open_image takes it."""
        return f"{self.shard}#{self.key}" if self.key else self.shard


def digest(*parts: bytes) -> int:
    """64 bits of the parts: among ten million samples two fall together by chance in one run of four hundred thousand."""
    return int.from_bytes(blake2b(b"\0".join(parts), digest_size=8).digest(), "big")


# --- reading ---------------------------------------------------------------------------------------------------------


class Losses(Broken):
    """Remembers what could not be used, and never stops."""

    def __init__(self) -> None:
        super().__init__(limit=1.0)
        self.found: list[tuple[str, str]] = []

    def lose(self, shard: str, cause: str) -> None:
        """Remember a shard that cannot be read to its end, or a member that belongs to no sample."""
        self.found.append((shard, " ".join(cause.split())))


class Walk(IterableDataset[Look]):
    """Every sample of the shards; a worker takes every so-manieth shard."""

    def __init__(self, shards: list[str], measure: Measure, shown: int) -> None:
        self.shards = list(zip(shards, shard_sizes(shards), strict=True))
        self.measure, self.shown = measure, shown
        self.first: list[int] = []  # a heap of the negative draws of those that may be shown

    def __iter__(self) -> Iterator[Look]:
        worker, workers = worker_share()
        for shard in self.shards[worker::workers]:
            losses, name = Losses(), shard[0] if Path(shard[0]).is_file() else shard_name(shard[0])
            for raw in read_shards([shard], losses):
                yield self.look(name, raw)
            for _, cause in losses.found:
                yield Look(name, broken=cause)
            yield Look(name, lost=losses.missing)

    def look(self, shard: str, raw: Raw) -> Look:
        """What is to be known of a stored sample."""
        key, image = raw["__key__"], None
        try:
            caption = caption_of(raw)
            if "npy" in raw:
                from_npy(raw["npy"])
            else:
                image = image_of(raw)
        except BrokenSample as error:
            return Look(shard, key, str(error))
        data = next(raw[kind] for kind in ("npy", *SUFFIXES) if kind in raw)
        look = Look(shard, key, "", 0, self.measure(caption), None, digest(data), digest(caption.encode(), data))
        if image is None:
            return look
        draw = digest(shard.encode(), key.encode())
        shown = (jpeg(image, TILE), caption) if self.may_be_shown(draw) else None
        return look._replace(size=image.size, draw=draw, shown=shown)

    def may_be_shown(self, draw: int) -> bool:
        """Whether a sample is among the first of the random order so far."""
        if len(self.first) < self.shown:
            heapq.heappush(self.first, -draw)
            return True
        return bool(self.first) and -heapq.heappushpop(self.first, -draw) != draw


# --- counting --------------------------------------------------------------------------------------------------------


class ShardReport:
    """The figures of shards, and samples of them.

    Attributes:
        bad, seen: per shard, as training counts them: broken samples and all, the promised ones that are missing included.
    """

    def __init__(self, max_broken: float, unit: str = "words", shown: int = 20) -> None:
        self.max_broken, self.unit = max_broken, unit
        self.bad: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.causes: dict[str, list[str]] = defaultdict(list)  # the first names under each
        self.counts: Counter[str] = Counter()
        self.names: list[str] = []  # of the samples that can be used
        self.keys, self.images, self.pairs = array("Q"), array("Q"), array("Q")
        self.lengths, self.widths, self.heights = array("I"), array("I"), array("I")
        self.smallest: tuple[int, str, tuple[int, int]] | None = None
        self.largest: tuple[int, str, tuple[int, int]] | None = None
        self.sheet: list[tuple[int, str, tuple[bytes, str]]] = []
        self.shown = shown

    def add(self, look: Look) -> None:
        """Count what was seen."""
        self.seen[look.shard] += look.lost + bool(look.key or look.broken)
        if look.lost:
            self._broken(look.shard, "fewer than sizes.json says", f"{look.shard} ({look.lost} missing)", look.lost)
        elif look.broken:
            cause, _, detail = look.broken.partition(": ")
            self._broken(look.shard, cause, f"{look.name} ({detail})" if detail else look.name, 1)
        elif look.key:
            self._usable(look)

    def _broken(self, shard: str, cause: str, name: str, count: int) -> None:
        self.bad[shard] += count
        self.counts[cause] += count
        if len(self.causes[cause]) < EXAMPLES:
            self.causes[cause].append(name)

    def _usable(self, look: Look) -> None:
        self.names.append(look.name)
        self.keys.append(digest(look.key.encode()))
        self.images.append(look.image)
        self.pairs.append(look.pair)
        self.lengths.append(look.length)
        if look.size is not None:
            self.widths.append(look.size[0])
            self.heights.append(look.size[1])
            sized = (look.size[0] * look.size[1], look.name, look.size)
            self.smallest, self.largest = min(self.smallest or sized, sized), max(self.largest or sized, sized)
        if look.shown:
            self.sheet = heapq.nsmallest(self.shown, [*self.sheet, (look.draw, look.name, look.shown)])

    @property
    def share(self) -> float:
        """Broken samples of all, 0 to 1."""
        return self.bad.total() / max(1, self.seen.total())

    @property
    def accepted(self) -> bool:
        """Whether training would go through the shards; it needs one sample at least."""
        return bool(self.names) and self.share <= self.max_broken

    def figures(self) -> dict[str, Any]:
        """Everything that was counted, as JSON can hold it."""
        worst = {name: self.bad[name] / self.seen[name] for name, _ in self.bad.most_common()}
        return {
            "shards": len(self.seen),
            "samples": self.seen.total(),
            "usable": len(self.names),
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
            f"caption_{self.unit}": quantiles(self.lengths),
            "image_width": quantiles(self.widths),
            "image_height": quantiles(self.heights),
            "smallest_image": self.smallest and {"name": self.smallest[1], "size": list(self.smallest[2])},
            "largest_image": self.largest and {"name": self.largest[1], "size": list(self.largest[2])},
        }

    def _twice(self, digests: array[int]) -> dict[str, Any]:
        """How many samples repeat one that came before, and the first of these with whom they repeat."""
        values = np.frombuffer(digests, np.uint64)
        order = np.argsort(values, kind="stable")
        again = np.flatnonzero(values[order[1:]] == values[order[:-1]])  # places in the order, equal to the next
        pairs = sorted((int(order[i + 1]), int(order[i])) for i in again)[:EXAMPLES]
        return {"count": len(again), "first": [f"{self.names[later]} = {self.names[earlier]}" for later, earlier in pairs]}

    def text(self) -> str:
        """The report, to read."""
        found = self.figures()
        lines = [f"{found['shards']} shards, {found['samples']} samples: {found['usable']} usable, {found['broken']} broken"]
        lines += [f"  {c['count']:7} {cause}: {', '.join(c['first'])}" for cause, c in found["causes"].items()]
        lines += [f"  {t['count']:7} with the {what} of another: {', '.join(t['first'])}"
                  for what, t in found["twice"].items() if t["count"]]  # fmt: skip
        lines += [" " * 18 + "".join(f"{name:>9}" for name in QUANTILES)]
        for what in (f"caption_{self.unit}", "image_width", "image_height"):
            if found[what]:
                lines.append(f"{what.replace('_', ' '):18}" + "".join(f"{value:9}" for value in found[what].values()))
        for what in ("smallest_image", "largest_image"):
            if one := found[what]:
                lines.append(f"{what.replace('_', ' ')}: {one['size'][0]} x {one['size'][1]}, {one['name']}")
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """In one line, whether training would accept the shards."""
        broken = f"{self.share:.1%} broken, max_broken allows {self.max_broken:.1%}"
        worst = max(self.bad, key=lambda name: self.bad[name] / self.seen[name], default=None)
        by = f"; worst {worst}, {self.bad[worst] / self.seen[worst]:.1%}" if worst else ""
        return f"training would {'accept' if self.accepted else 'refuse'} these shards: {broken}{by}"

    def image(self) -> Image.Image:
        """The samples drawn at random, with their captions."""
        tiles = [(Image.open(io.BytesIO(data)), f"{name}\n{caption}") for _, name, (data, caption) in self.sheet]
        return contact_sheet([(f"{len(tiles)} of {len(self.names)} samples, drawn at random", tiles)], TILE)


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Some quantiles, each one of the values; none of nothing."""
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
    """Walk shards (a pattern, see fromage.data.shards.expand) with a progress bar.

    Args:
        shards: what to look at.
        max_broken: share of broken samples that training is to allow, 0 to 1. Training holds each worker's part to it, and
            stops there and then; the report judges all shards together.
        workers: processes that decode; 0 decodes in this one.
        shown: samples to draw at random, for the contact sheet. The same whatever the number of workers.
        measure: the length of a caption.
        unit: what that is counted in.

    Raises:
        UserError: a shard is missing.
    """
    walk = Walk(expand(shards), measure, shown)
    report = ShardReport(max_broken, unit, shown)
    sizes = [size for _, size in walk.shards]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    loader = DataLoader(
        walk, batch_size=None, num_workers=min(workers, len(walk.shards)), collate_fn=tuple, worker_init_fn=init_worker
    )
    with tqdm(total=total, desc="shards", unit=" samples") as bar:
        for look in (Look(*row) for row in loader):
            report.add(look)
            bar.update(bool(look.key))
    return report
