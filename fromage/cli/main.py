"""One command line under two names, `lightning` and `fromage`: a table of functions, whose signatures give the options."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, Literal

from fromage.allocator import keep_freed_memory
from fromage.cli import evals, find, index, plan, shards, talk, tours, towers, tuples, weights
from fromage.cli.command import Function, call, options_of, parser_of, speaks, tell, with_dashes
from fromage.cli.options import HERE, check_out
from fromage.distribution import pip_install
from fromage.errors import Terminated, UserError, near
from fromage.io import disk_error
from fromage.printable import PrintableStream, one_line
from fromage.training.fit import FITTING, run_lightning

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

USAGE = """usage: fromage COMMAND [options]        (fromage COMMAND --help lists a command's options)

{commands}

A configuration (`fit --config cc3m.yaml`) is found as given, else in lightning_configs/. Options take dashes or underscores.
Users' errors are one line on stderr and exit code 2; after Ctrl-C the code is 130. --debug shows the traceback.
--version prints the version. Completion: eval "$(fromage completion bash)" in .bashrc, or zsh (needs shtab)."""


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> None:
    """Print a script that completes commands and options in a shell.

    Args:
        shell: for which shell: bash, zsh or tcsh
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError(f"completion needs shtab: {pip_install('completion')}") from error
    print(shtab.complete(parser(), shell, root_prefix="fromage"))


COMMANDS: dict[str, Function] = {
    "toy make": tours.toy_make,
    "toy demo": tours.toy_demo,
    "shards tsv": shards.shards_tsv,
    "shards jsonl": shards.shards_jsonl,
    "shards coco": shards.shards_coco,
    "shards tuples": tuples.shards_tuples,
    "shards check": shards.shards_check,
    "tuples toy": tuples.tuples_toy,
    "tuples make": tuples.tuples_make,
    "photos": tours.photos,
    "features": shards.features,
    "towers list": towers.towers_list,
    "towers get": towers.towers_get,
    "plan": plan.plan,
    "import": weights.import_weights,
    "export": weights.export_weights,
    "index embed": index.embed,
    "index build": index.build,
    "index add": index.add,
    "index describe": index.describe,
    "index remove": index.remove,
    "index sync": index.sync,
    "index trust": index.trust,
    "index merge": index.merge,
    "index import": index.import_embeddings,
    "index info": index.info,
    "search": find.search,
    "ground": find.ground,
    "eval coco": evals.coco,
    "eval flickr30k": evals.flickr30k,
    "eval vist": evals.vist,
    "eval visdial": evals.visdial,
    "eval circo": evals.circo,
    "eval cirr": evals.cirr,
    "eval fashioniq": evals.fashioniq,
    "eval genecis": evals.genecis,
    "eval chatir": evals.chatir,
    "eval few-shot": evals.few_shot,
    "eval refcoco": evals.refcoco,
    "eval pope": evals.pope,
    "eval instructions": evals.instructions,
    "eval spotting": evals.spotting,
    "eval answers": evals.answers,
    "eval mteb": evals.mteb,
    "caption": talk.caption,
    "chat": talk.chat,
    "tune-ret": talk.tune_ret,
    "demo": talk.demo,
    "serve": talk.serve,
    "completion": completion,
}


def usage(group: str = "") -> str:
    """The help of everything, or of the commands that begin with a word."""
    lines = FITTING | {name: (run.__doc__ or "").splitlines()[0].rstrip(".") for name, run in COMMANDS.items()}
    listed = [f"  {name:20} {does}" for name, does in lines.items() if name.startswith(group)]
    return "\n".join(listed) if group else USAGE.format(commands="\n".join(listed))


def named(words: list[str]) -> tuple[str, list[str]]:
    """The command that a line begins with, and the rest of the line. Raises UserError where there is none."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, words[count:]
    group = f"{words[0]} " if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    if set(words[len(group) > 0 :][:1]) & {"-h", "--help"}:
        print(usage(group))
        raise SystemExit(0)
    known = [name for name in (*COMMANDS, *FITTING) if name.startswith(group)]
    word = " ".join(words[: 2 if group else 1])
    if word == group.strip():
        raise UserError(f"name a command: {', '.join(known)} (fromage --help)")
    raise UserError(f"{word}: no such command{near(word, known)} (fromage {group}--help)")


def parse(words: list[str]) -> tuple[Function, dict[str, Any]]:
    """The function of a command line, and what its options say. Raises SystemExit for --help."""
    name, rest = named(words)
    rest = with_dashes(rest)
    reader = parser_of(name, COMMANDS[name])
    if {"-h", "--help"} & {*rest}:  # whatever is wrong beside it
        rest = ["--help"]
    rest = [
        f"{word}={HERE}" if word == "--json" and not after.lower().endswith(".json") else word  # what follows is no file
        for word, after in zip(rest, [*rest[1:], ""], strict=False)
    ]
    _check_said(name, rest)
    try:
        values = vars(reader.parse_args(rest))
        check_out(values)
        return COMMANDS[name], values
    except argparse.ArgumentError as error:
        unknown, options = re.search(r"unrecognized arguments: (--[\w.-]+)", str(error)), options_of(COMMANDS[name])
        meant = near(unknown[1], options) if unknown else ""
        if unknown and "." in unknown[1] and "--options" in options:
            meant = f"; give it to the training as --options={unknown[1]}=VALUE"
        raise UserError(f"{name}: {_plainly(error)}{meant} (fromage {name} --help)") from error


def _plainly(error: argparse.ArgumentError) -> str:
    """What an option lacks; jsonargparse words a choice in Python's types."""
    if found := re.search(r'Parser key "(\w+)":\s+Expected a typing\.Literal\[(.*)\]\. Got value: (.*)', str(error)):
        choices = ", ".join(re.findall("'([^']*)'", found[2]))
        return f"{found[1].replace('_', '-')}: {found[3]}: give {choices}"
    return str(error)


def _check_said(name: str, words: list[str]) -> None:
    """Raise UserError for an option that is given nothing: Path("") would be the current folder."""
    for before, word in zip(["", *words], words, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            which = word or (before if before.startswith("-") else "a word")
            raise UserError(f"{name}: {which}: is empty; name something, or leave it out")


def parser() -> ArgumentParser:
    """The parser of all commands in one, for completion."""
    from jsonargparse import ArgumentParser

    root = ArgumentParser(prog="fromage")
    levels: dict[str, Any] = {"": root.add_subcommands()}
    for name in FITTING:
        levels[""].add_subcommand(name, ArgumentParser())
    for name, function in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in levels:
            levels[""].add_subcommand(group, inner := ArgumentParser())
            levels[group] = inner.add_subcommands()
        levels[group].add_subcommand(last, parser_of(name, function))
    return root


def run(words: list[str]) -> None:
    """Run a command line."""
    if words[:1] == ["--version"]:
        from fromage import __version__

        print(f"fromage {__version__}")
    elif words and words[0] in FITTING:
        _check_said(words[0], words[1:])
        run_lightning(words)  # whose trainer has its own ways with signals
    else:
        signal.signal(signal.SIGTERM, _terminate)  # ends as by Ctrl-C: what is temporary goes
        function, values = parse(words)
        said = call(function, values)
        if speaks(function):
            tell(said, values["json"])
    sys.stdout.flush()


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. What it prints passes `PrintableStream`, tracebacks too."""
    if argv is None:  # the process is this command line's
        keep_freed_memory()
    words = list(sys.argv[1:] if argv is None else argv)
    log = logging.getLogger("fromage")
    if not any(isinstance(handler, Lines) for handler in log.handlers):
        log.addHandler(Lines())
        log.setLevel(logging.INFO)
        log.propagate = False
    warnings.showwarning = _warn  # type: ignore[assignment]
    with redirect_stdout(PrintableStream(sys.stdout)), redirect_stderr(PrintableStream(sys.stderr)):  # type: ignore[type-var]
        return _code([word for word in words if word != "--debug"], "--debug" in words)


def _code(words: list[str], debug: bool) -> int:
    """Run a command line, and say what went wrong."""
    try:
        run(words)
    except (UserError, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
            return 1
        stopped = isinstance(error, KeyboardInterrupt)
        print("fromage: " + one_line("; ".join(["stopped"] * stopped + [*map(str, error.args)])), file=sys.stderr)
        return 130 if stopped else 2
    except BrokenPipeError:  # what reads on, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a disk that is full or may not be written to, wherever that is met
        if debug or (told := disk_error(error)) is None:
            traceback.print_exc()
            return 1
        print("fromage: " + one_line(str(told)), file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


class Lines(logging.Handler):
    """What the package logs, as lines on standard error; of several processes of a run the first one's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(one_line(record.getMessage()), file=sys.stderr, flush=True)


def _warn(message: Warning | str, *where: Any) -> None:
    """In place of Python's own way, which shows a line of our source."""
    print(f"warning: {one_line(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
