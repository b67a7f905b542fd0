"""Errors of what is outside the program: files, options, data."""


class UserError(Exception):
    """Something a user can mend, in one line that names the thing and the remedy; the command line prints it alone."""


class BrokenSample(Exception):
    """A sample, or its image, that cannot be used; the message is 'cause' or 'cause: detail', without a name."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
