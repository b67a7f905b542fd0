"""Connections to Milvus, and its errors as ours.

A name that ends in .db is a folder of Milvus Lite, which one process at a time can use; any other is the address of a
server, whose token is taken from FROMAGE_MILVUS_TOKEN and never stored.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fromage.distribution import pip_install
from fromage.errors import OutOfReach, UserError, first_line

if TYPE_CHECKING:
    from pymilvus import MilvusClient

TOKEN = "FROMAGE_MILVUS_TOKEN"  # environment variable
LITE = ".db"
SECONDS = 60.0  # for an answer
UNREACHED = {2}  # code of pymilvus


def connect(uri: str) -> MilvusClient:
    """A connection to Milvus. Raises UserError where there is none, or pymilvus is missing."""
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise UserError(f"an index in Milvus needs pymilvus: {pip_install('milvus')}") from error
    for name in ("pymilvus", "milvus_lite", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is told below, once
    with asking(uri):
        return MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=SECONDS)


def reach(uri: str) -> None:
    """Raise UserError unless there is a Milvus that answers; no connection is kept."""
    connect(absolute_uri(uri)).close()


@contextmanager
def asking(uri: str) -> Iterator[None]:
    """Raise UserError for what Milvus refuses or does not answer."""
    import grpc
    from pymilvus import MilvusException

    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        cause = error.message if isinstance(error, MilvusException) else error.details()
        told = f"{first_line(Exception(cause))}{_hint(uri, error)}"
        if _is_silent(error):
            raise OutOfReach(f"Milvus at {uri}: {told}") from error
        raise UserError(f"Milvus: {told}") from error  # a client over HTTP reads this, and not the address


def _hint(uri: str, error: Exception) -> str:
    """The remedy, where Milvus was not reached; what it refuses it explains itself."""
    if uri.endswith(LITE):
        return "; one process at a time can use it" if "Open local" in str(error) else ""
    return f"; see that the server runs, and what {TOKEN} says" if _is_silent(error) else ""


def _is_silent(error: Exception) -> bool:
    code = getattr(error, "code", None)
    return not isinstance(code, int) or code in UNREACHED


def absolute_uri(uri: str) -> str:
    """A place for later: the absolute path of a .db, or an address as it is. Raises UserError for what is neither."""
    if uri.startswith(("http://", "https://", "tcp://", "unix:")):
        if "@" in uri:
            raise UserError(f"{uri.partition('//')[0]}//...: an address is stored, so it may hold no password; set {TOKEN}")
        return uri
    if not uri.endswith(LITE):
        raise UserError(f"{uri}: is neither the address of a Milvus (http://host:19530) nor a path that ends in .db")
    return str(Path(uri).absolute())
