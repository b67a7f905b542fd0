"""Errors of what is outside the program: files, options, data."""


class UserError(Exception):
    """Something a user can mend, in one line that names the thing and the remedy; the command line prints it alone."""


class BrokenSample(Exception):
    """A sample, or its picture, that cannot be used; the message is 'cause' or 'cause: detail', without a name."""
