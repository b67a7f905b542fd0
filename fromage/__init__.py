"""FROMAGe: a frozen language model that reads pictures in its prompt and answers with pictures."""

from __future__ import annotations

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


def __getattr__(name: str) -> Any:
    """Import on first use: `import fromage` itself takes no time."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fromage' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
