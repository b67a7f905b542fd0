"""What the tours have in common: parts with their times, trainings that are not done twice, drawings of searches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fromage.checkpoints.run_folder import last_checkpoint
from fromage.errors import UserError
from fromage.images.codec import to_png
from fromage.io import write_files
from fromage.models.fromage import Fromage
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.open_index import search_index
from fromage.retrieval.results import draw_hits, load_images

CHECKPOINT = Path("checkpoints", "last.ckpt")
SHOWN = 5  # images of a search
FINISHED, OPTIONS = "finished", "options.json"  # files beside a run's checkpoints


@contextmanager
def timed(name: str, seconds: dict[str, float], usual: Mapping[str, float] | None = None) -> Iterator[None]:
    """Announce a part of the tour, with the time left where it is known, and note its wall-clock seconds.

    usual: seconds of each part on some machine; this one's parts so far say how it compares.
    """
    left = f", about {time_left(seconds, usual):.0f} s left" if usual else ""
    print(f"\n== {name}{left}", flush=True)
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def time_left(seconds: Mapping[str, float], usual: Mapping[str, float]) -> float:
    """Estimated seconds of the parts that are not done."""
    done = sum(usual[name] for name in seconds)
    pace = sum(seconds.values()) / done if done else 1.0
    return pace * sum(usual[name] for name in usual if name not in seconds)


def placed(run: Path) -> list[str]:
    """Words for `lightning fit` that keep a run's logs and checkpoints in a folder; a former run in it is replaced."""
    logger = [f"--trainer.logger.init_args.save_dir={run.parent}", f"--trainer.logger.init_args.name={run.name}"]
    return [*logger, f"--trainer.callbacks.init_args.dirpath={(run / CHECKPOINT).parent}", "--overwrite"]


def draw_searches(model: Fromage, index: ImageIndex, asked: Sequence[str], path: Path) -> None:
    """Write an image of what each text finds, its five best, as PNG."""
    found = [load_images(hits, SHOWN)[0] for hits in search_index(model, index, asked, SHOWN)]
    write_files(path.parent, {path.name: to_png(draw_hits(asked, found))})


def once(run: Path, options: Sequence[str] | None, fit: Callable[[list[str]], object]) -> Path:
    """Train what saves its checkpoints in a run's folder, unless it came to its end before; returns the checkpoint.

    Args:
        run: the folder.
        options: words of `lightning fit` that the user gave; the folder keeps them. None: a run that came to its end will
            do whatever its options were.
        fit: takes further words for `lightning fit`, by which a run that was killed goes on.

    Raises:
        UserError: the folder's run has a checkpoint, and was begun with other options.
    """
    done, kept, given = finished(run), run / OPTIONS, list(options or ())
    if done and options is None:
        return done
    begun = last_checkpoint((run / CHECKPOINT).parent)
    there = json.loads(kept.read_text(encoding="utf-8")) if begun and kept.exists() else given
    if there != given:
        told = " and ".join(repr(" ".join(some)) for some in (there, given))
        raise UserError(f"{run}: its training was begun with other options ({told}); give the same, or another folder")
    if done:
        return done
    write_files(run, {OPTIONS: json.dumps(given).encode()})
    fit(["--ckpt_path=last"] if begun else [])
    write_files(run, {FINISHED: b""})
    return run / CHECKPOINT


def finished(run: Path) -> Path | None:
    """The checkpoint in a run's folder, if it is that of a run that came to its end."""
    return run / CHECKPOINT if (run / FINISHED).exists() else None
