"""Errors of what is outside the program: files, options, data, signals."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """Something a user can mend, in one line that names the thing and the remedy; the command line prints it alone."""


class OutOfReach(UserError):
    """A service that does not answer, such as Milvus; the message names its address, which strangers are not told."""


OUT_OF_REACH = "the index of images is out of reach; try later"  # what strangers are told


class BrokenSample(Exception):
    """A sample, or its image, that cannot be used; the message is 'cause' or 'cause: detail', without a name."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the process ends, also where Ctrl-C stops something within it alone."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
    """Why a file cannot be used, in words for people: the system's or a library's, none of Python's own."""
    if isinstance(error, UserError | BrokenSample):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError | MemoryError):
        return "cut off" if isinstance(error, EOFError) else "takes too much memory"
    builtin = type(error).__module__ in ("builtins", "_struct", "struct", "json.decoder", "zlib", "_pickle", "binascii")
    return "damaged" if builtin and not isinstance(error, OSError) else first_line(error)


def first_few(names: Sequence[str], between: str = ", ", few: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = [f"and {len(names) - few} more"] if len(names) > few else []
    return between.join([*names[:few], *more])


def near(word: str, known: Iterable[str], front: str = "") -> str:
    """A question whether something known was meant, or nothing."""
    names = {name.lower(): name for name in known}
    return "".join(f"; did you mean {front}{names[match]}?" for match in get_close_matches(word.lower(), names, n=1))
