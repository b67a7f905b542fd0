"""The toy world as data sets on disk: what `fromage toy make` writes, the same bytes for the same arguments anywhere."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import islice, product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fromage.errors import UserError, reason
from fromage.identity import FolderKind
from fromage.io import whole_folder, write_json
from fromage.toy import composed_queries, grounding, visual_genome, writers, yes_no
from fromage.toy.scenes import (
    COLOURS,
    GROUNDS,
    PLACES,
    SHAPES,
    SIZES,
    TIMES,
    Scene,
    Thing,
    sample_crowded_scene,
    sample_scenes,
)

VERSION = 4
WORLD = FolderKind("world.json", "a toy world", of="version, or of other arguments", remedy="choose another --out")
SPLITS = ("train", "val")
COMPOSED = "composed"  # the folder of CIRCO, CIRR and ChatIR
COCO_TRAIN = 500  # maximum number of training images with five captions
FLICKR = 200  # maximum number of images of Flickr30k's test split
BLOCK = 4096  # images in memory at a time


def make_world(
    out: Path,
    seed: int = 0,
    train: int = 8192,
    val: int = 1000,
    stories: int = 500,
    dialogues: int = 500,
    refs: int = 500,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the world to the folder `out`, or keep it if it is there already with the same arguments.

    train and val count CC3M-style pairs (COCO captions are of the same scenes); stories, dialogues and refs count those of
    val, and train gets as many, except that train dialogues are about the at most 500 images of coco/train2017. refs are
    the images of RefCOCO, which Flickr30k Entities, LLaVA's instructions, POPE and the questions about attributes are about
    too; Visual Genome has as many training scenes of its own. Composed retrieval (CIRCO, CIRR, ChatIR) has as many queries
    as dialogues, at most 128; a world that lacks it gets it. A test split is the val of a world of another seed.
    Returns what world.json holds, and `made`: False if the world was there already. Raises UserError for counts out of range
    and for a folder that holds something else.
    """
    out = Path(out).resolve()
    counts = {"train": train, "val": val, "stories": stories, "dialogues": dialogues, "refs": refs}
    record: dict[str, Any] = {"version": VERSION, "seed": seed, "counts": counts}
    _check_counts(counts)
    there = WORLD.find(out, record) is not None
    if there and (out / COMPOSED).is_dir():
        return record | {"made": False}
    try:
        if there:  # written before there was composed retrieval: that is added
            with whole_folder(out / COMPOSED) as draft:
                _write_composed(draft, seed, dialogues, progress)
            return record | {"made": False}
        with whole_folder(out) as draft:
            _write(draft, seed, counts, progress)
            _write_composed(draft / COMPOSED, seed, dialogues, progress)
            write_json(draft / WORLD.file, record)
    except OSError as error:
        raise UserError(f"{out}: cannot write the toy world there ({reason(error)}); choose another --out") from error
    return record | {"made": True}


def _write_composed(out: Path, seed: int, count: int, progress: bool) -> None:
    total = composed_queries.size(count)
    with ProcessPoolExecutor(os.cpu_count()) as pool, tqdm(total=total, unit=" images", disable=not progress) as bar:
        composed_queries.write(out, count, _rng(seed, "composed"), _painter(pool, bar))


def _check_counts(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name} {count}: must be at least 1")
    if counts["stories"] > (most := _unseen_singles()):
        raise UserError(f"--stories {counts['stories']}: there are {most} unseen last images; ask for at most as many")


def _unseen_singles() -> int:
    """The number of validation scenes of one object: a story ends on one, and no two on the same."""
    things = (Thing(*words) for words in product(SHAPES, COLOURS, SIZES, PLACES))
    return sum(Scene((t,), g, when).split == "val" for t in things for g, when in product(GROUNDS, TIMES))


def _painter(pool: Executor, bar: tqdm[Any]) -> writers.Paint:
    """Drawing in several processes; images come in the order of the jobs for any number of processes."""

    def paint(jobs: Iterable[writers.Job]) -> Iterator[writers.Drawn]:
        rest = iter(jobs)
        while block := list(islice(rest, BLOCK)):
            for drawn in pool.map(writers.encode, block, chunksize=64):
                bar.update()
                yield drawn

    return paint


def _write(out: Path, seed: int, counts: dict[str, int], progress: bool) -> None:
    train, val, stories, dialogues, refs = counts.values()
    few = min(train, COCO_TRAIN)
    total = train + few + 2 * val + min(val, FLICKR) + 10 * stories + dialogues + 3 * refs
    with ProcessPoolExecutor(os.cpu_count()) as pool, tqdm(total=total, unit=" images", disable=not progress) as bar:
        paint = _painter(pool, bar)
        scenes = {"train": sample_scenes(_rng(seed, "train"), "train", train)}
        scenes["val"] = sample_scenes(_rng(seed, "val"), "val", val)
        talks = {"train": scenes["train"][:few][:dialogues]}
        talks["val"] = sample_scenes(_rng(seed, "talks"), "val", dialogues)
        captioned = {}
        for split in SPLITS:
            writers.write_cc3m(out, split, scenes[split], _rng(seed, "cc3m", split), paint)
            listed = scenes[split][:few] if split == "train" else scenes[split]
            captioned[split] = writers.write_coco(out, split, listed, _rng(seed, "coco", split), paint)
            tales = writers.sample_stories(_rng(seed, "vist", split), split, stories)
            writers.write_vist(out, split, tales, paint)
            writers.write_visdial(out, split, talks[split], _rng(seed, "visdial", split), paint)
        writers.write_flickr30k(out, "val", scenes["val"][:FLICKR], _rng(seed, "flickr30k"), paint)
        referred = {s: sample_scenes(_rng(seed, "refs", s), s, refs, sample_crowded_scene) for s in SPLITS}
        shown = grounding.write_refcoco(out, referred, _rng(seed, "refcoco"), paint)
        grounding.write_refcoco_plus_and_g(out, shown, _rng(seed, "refcoco+"))
        grounding.write_entities(out, shown, _rng(seed, "entities"))
        grounding.write_llava(out, shown, captioned, _rng(seed, "llava"))
        yes_no.write_attributes(out, shown, _rng(seed, "pope"))  # a name of before, so that the questions stay the same
        yes_no.write_pope(out, shown, _rng(seed, "pope", "objects"))
        regions = sample_scenes(_rng(seed, "regions"), "train", refs, sample_crowded_scene)
        visual_genome.write_visual_genome(out, regions, _rng(seed, "visual_genome"), paint)


def _rng(seed: int, *names: str) -> random.Random:
    """A separate random generator per part, so that the size of one part does not change the content of another."""
    return random.Random("/".join((str(seed), *names)))
