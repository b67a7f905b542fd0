"""The model hub: within reach or not."""

from __future__ import annotations

import re
import socket
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.ckpt)")


@cache
def stay_offline_without_hub() -> None:
    """Without a way to the model hub, set huggingface_hub offline, so that it looks at its cache only.

    Its own retries take minutes to fail. The hub (HF_ENDPOINT) is looked for once, and not behind a proxy; the setting holds
    for the rest of the process.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        url = urlparse(constants.ENDPOINT)
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or "", port), timeout=5).close()
    except (OSError, ValueError):  # ValueError: no port
        constants.HF_HUB_OFFLINE = True
