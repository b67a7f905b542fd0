"""For `make docs`: tokens such as </s> and <d0> in docstrings are text, not HTML."""

from __future__ import annotations

import re
from typing import Any

import griffe

TAG = re.compile(r"`[^`]*`|<(?=[/|A-Za-z])")  # code spans stay as they are


class EscapeTags(griffe.Extension):
    """Escapes what Markdown would read as the beginning of a tag."""

    def on_object(self, *, obj: griffe.Object, **more: Any) -> None:
        """Called for each object of the package when it is read."""
        if obj.docstring:
            obj.docstring.value = TAG.sub(lambda found: found[0] if found[0][0] == "`" else "&lt;", obj.docstring.value)
