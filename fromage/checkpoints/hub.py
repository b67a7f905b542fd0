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

    Its own retries take minutes to fail. The hub is looked for once, and not behind a proxy; the setting holds for the rest
    of the process.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
