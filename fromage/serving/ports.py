"""Ports to listen at. Nothing of the extra [serve] is imported here: the command line asks before a model is loaded."""

from __future__ import annotations

import errno
import socket

from fromage.errors import UserError, reason


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises UserError where the address is taken or impossible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        why = reason(error).partition(" (while ")[0]  # after it Python repeats the address
        other = "--port" if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES, 0) else "--host"
        raise UserError(f"{host}, port {port}: cannot listen there ({why}); give another {other}") from error
