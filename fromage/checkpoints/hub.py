"""The model hub: within reach or not."""

from __future__ import annotations

import re
import socket
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.ckpt)")


@cache
def look_for_hub() -> None:
    """Without a way to the model hub, look at its cache only: the hub's own retries take minutes to fail."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
