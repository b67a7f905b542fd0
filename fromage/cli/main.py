"""One command line under two names, `lightning` and `fromage`.

    fit, validate, test, predict     Lightning's own verbs; a configuration is found as given, else in lightning_configs/
    toy make, toy demo               the synthetic world, and the tour of `make demo`
    shards tsv, shards coco          pairs on disk -> webdataset shards
    shards check                     what shards hold: broken samples, duplicates, lengths, sizes
    features                         shards -> shards with stored image features
    plan                             what a run will need: parameters, memory, work, time
    import, export                   the authors' released files -> a folder of trained parameters, and back
    index embed, index build         images -> embeddings -> an image index
    index add, remove, merge         change an index
    index import, index info         the authors' embeddings -> an index; what an index is
    search                           questions to an index, in words or images
    ground                           Octopus: words -> the boxes of what they mean in an image
    eval coco, flickr30k, vist, visdial   the tables of the paper; eval few-shot: examples in the prompt
    eval refcoco, pope, instructions      Octopus: which object is meant, what is there, several objects
    chat, demo, serve                a conversation: in the terminal, in a browser, over HTTP

What a user can mend is one line on stderr and exit code 2, and so is Ctrl-C, with 130; --debug shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from typing import Any

from fromage.cli import data, evals, ground, index, search, talk, weights
from fromage.cli.verb import Verbs
from fromage.errors import UserError
from fromage.training.fit import FITTING, fitting

PARTS = (data, evals, ground, index, search, talk, weights)
VERBS: Verbs = {words: verb for part in PARTS for words, verb in part.VERBS.items()}


def parser() -> argparse.ArgumentParser:
    """The parser of our own verbs."""
    root = argparse.ArgumentParser(prog="fromage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    levels: dict[tuple[str, ...], Any] = {(): root.add_subparsers(required=True, metavar="VERB")}
    for name in FITTING:
        levels[()].add_parser(name, help=f"Lightning's {name}", add_help=False)
    for words, (run, options) in VERBS.items():
        if len(words) == 2 and words[:1] not in levels:
            within = ", ".join(other[1] for other in VERBS if other[0] == words[0])
            levels[words[:1]] = levels[()].add_parser(words[0], help=within).add_subparsers(required=True, metavar="VERB")
        summary = (run.__doc__ or "").rstrip(".")
        verb = levels[words[:-1]].add_parser(words[-1], help=summary, description=summary)
        for names, settings in options:
            verb.add_argument(*names, **settings)
        verb.set_defaults(run=run)
    return root


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        if words and words[0] in FITTING:
            fitting(words)  # whose trainer has its own ways with signals
        else:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C: what is temporary goes
            args = parser().parse_args(words)
            args.run(args)
            sys.stdout.flush()
    except (UserError, KeyboardInterrupt) as error:
        if debug:
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        print("fromage: " + "; ".join(["stopped"] * stopped + [*map(str, error.args)]), file=sys.stderr)
        return 130 if stopped else 2
    except BrokenPipeError:  # what reads on, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _warn(message: Warning | str, *where: Any) -> None:
    """In place of Python's own way, which shows a line of our source."""
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
