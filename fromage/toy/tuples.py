"""Tuples of the toy world by rule: a scene, what is to change in it, and the scene that this makes, drawn too."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fromage.errors import UserError
from fromage.io import whole_folder
from fromage.locks import LOCK
from fromage.toy.changes import KINDS, Change, change, fitting
from fromage.toy.language import caption
from fromage.toy.scenes import Scene, sample_scene
from fromage.toy.writers import encode

LINES, IMAGES = "tuples.jsonl", "images"
OWN = re.compile(rf"{IMAGES}/\d{{6,}}(_target)?\.jpg|{IMAGES}|{re.escape(LINES)}|{re.escape(LOCK)}")  # what a folder holds
TRIES, MOST_CHANGES = 8, 4  # draws of a change until one fits; changes of a reference image, at most


class ToyTuple(NamedTuple):
    """A scene and changes of it to other scenes, each of another kind. All scenes are of the same split."""

    scene: Scene
    changes: dict[str, Change]  # by the key of their scene


def sample_tuples(rng: random.Random, split: str, changes: int = 1) -> Iterator[ToyTuple]:
    """References with so many changes each, without end; no scene of one is a scene of another."""
    seen: set[str] = set()
    while True:
        one = _sample(rng, split, changes)
        if one is not None and not (keys := {one.scene.key, *one.changes}) & seen:
            seen |= keys
            yield one


def _sample(rng: random.Random, split: str, changes: int) -> ToyTuple | None:
    """A reference and its changes; None where too few are found.

    Kinds take turns, in random order. Only a tenth of the changes of a scene lead to one of 'val', so several are tried.
    """
    scene = sample_scene(rng, split)
    order = rng.sample(fitting(scene), len(fitting(scene)))
    found: dict[str, Change] = {}
    for kind in order[:changes]:
        tried = (change(scene, rng, (kind,)) for _ in range(TRIES))
        fits = next((c for c in tried if c.scene.split == split and c.scene.key not in found), None)
        if fits is None:
            return None
        found[fits.scene.key] = fits
    return ToyTuple(scene, found)


def make_tuples(
    out: Path, count: int = 8192, split: str = "train", changes: int = 1, seed: int = 0, progress: bool = True
) -> dict[str, int]:
    """Write a folder: tuples.jsonl, for `fromage shards tuples`, and the images of it. Returns the tuples of each kind.

    The same bytes for the same arguments. Tuples of 'val' are of scenes that no training has seen, targets included.
    changes: tuples of each reference image, one after the other; with several the image alone does not tell which target
    is asked for. A folder of such tuples is replaced. Raises UserError for one that holds anything else, for numbers out of
    range, and where another process writes there.
    """
    if count < 1 or not 1 <= changes <= MOST_CHANGES:
        raise UserError(f"--count {count} --changes {changes}: give a count from 1, changes from 1 to {MOST_CHANGES}")
    rng, counts = random.Random(f"{seed}/tuples/{split}"), dict.fromkeys(KINDS, 0)
    out = Path(out).resolve()
    for path in out.rglob("*"):
        if not OWN.fullmatch(str(path.relative_to(out))):
            raise UserError(f"{out}: holds {path.name}, which is not of toy tuples; name another folder")
    with whole_folder(out) as draft:
        (draft / IMAGES).mkdir()
        made, entries = sample_tuples(rng, split, changes), list[dict[str, Any]]()
        with tqdm(total=count, desc="tuples", unit="", disable=not progress) as bar:
            while len(entries) < count:
                entries += _write(draft, range(len(entries), count), next(made), rng)
                bar.update(len(entries) - bar.n)
        for entry in entries:
            counts[entry["kind"]] += 1
        (draft / LINES).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    return counts


def _write(folder: Path, numbers: range, one: ToyTuple, rng: random.Random) -> list[dict[str, Any]]:
    """Draw the images of a reference and its changes; returns their lines, with the keys of both scenes besides.

    numbers: those that are left for tuples; further changes are left out.
    """
    reference, said = f"{IMAGES}/{numbers[0]:06d}.jpg", caption(one.scene, rng)
    (folder / reference).write_bytes(encode((one.scene, numbers[0]))[0])
    lines = []
    for i, drawn in zip(numbers, one.changes.values(), strict=False):
        shown = f"{IMAGES}/{i:06d}_target.jpg"
        (folder / shown).write_bytes(encode((drawn.scene, i))[0])
        line = {"image": reference, "caption": said, "condition": drawn.words}
        line |= {"target_caption": caption(drawn.scene, rng), "target_image": shown, "kind": drawn.kind}
        lines.append(line | {"scene": one.scene.key, "target_scene": drawn.scene.key})
    return lines
