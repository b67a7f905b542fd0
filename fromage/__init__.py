"""FROMAGe: a frozen language model that reads pictures in its prompt and answers with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

_PUBLIC = {
    "CC3M": "fromage.data",
    "Chat": "fromage.chat",
    "Decoding": "fromage.decoding",
    "Fromage": "fromage.model",
    "FromageModule": "fromage.lightning_module",
    "ImageIndex": "fromage.index",
    "RET": "fromage.prompts",
    "ShardedTowers": "fromage.sharded_towers",
    "Url": "fromage.prompts",
    "UserError": "fromage.errors",
    "load_model": "fromage.checkpoint",
    "open_index": "fromage.index",
}
__all__ = [*_PUBLIC]


def on_first_use(package: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's __getattr__ that imports its public names, each from its module, when they are asked for.

    So `import fromage` itself takes no time. Raises AttributeError for other names.
    """

    def get(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(public[name]), name)

    return get


__getattr__ = on_first_use(__name__, _PUBLIC)
