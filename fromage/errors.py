"""Errors a user can mend. The command line prints them as one line, without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong; the message is one line that names the thing and the remedy."""
