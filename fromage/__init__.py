"""FROMAGe: a frozen language model that reads images in its prompt and answers with images.

What users import stands here. Type checkers and editors read the imports under TYPE_CHECKING; at run time a name is
imported when it is first used, so that `import fromage` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fromage.distribution import versions

if TYPE_CHECKING:
    from fromage.config import FromageConfig as FromageConfig
    from fromage.config import OctopusConfig as OctopusConfig
    from fromage.data.datamodule import CC3M as CC3M
    from fromage.errors import UserError as UserError
    from fromage.generation.chat import Chat as Chat
    from fromage.generation.generate import Answer as Answer
    from fromage.generation.generate import caption as caption
    from fromage.generation.generate import generate as generate
    from fromage.generation.generate import stream as stream
    from fromage.generation.options import Decoding as Decoding
    from fromage.generation.score import score as score
    from fromage.generation.score import score_prompts as score_prompts
    from fromage.models.fromage import Fromage as Fromage
    from fromage.models.fromage import load_model as load_model
    from fromage.models.prompts import RET as RET
    from fromage.models.prompts import Starts as Starts
    from fromage.models.prompts import Url as Url
    from fromage.octopus.data import OctopusData as OctopusData
    from fromage.octopus.model import Octopus as Octopus
    from fromage.octopus.model import load_octopus as load_octopus
    from fromage.octopus.module import OctopusModule as OctopusModule
    from fromage.retrieval.base import ImageIndex as ImageIndex
    from fromage.retrieval.build import build_index as build_index
    from fromage.retrieval.faiss_index import FaissIndex as FaissIndex
    from fromage.retrieval.open_index import open_index as open_index
    from fromage.retrieval.open_index import search_index as search_index
    from fromage.retrieval.results import Hit as Hit
    from fromage.training.checkpoint_io import SafeCheckpoint as SafeCheckpoint
    from fromage.training.lr_finder import LRFinder as LRFinder
    from fromage.training.module import FromageModule as FromageModule
    from fromage.training.run_report import RunReport as RunReport
    from fromage.training.strategy import ShardedModel as ShardedModel
    from fromage.training.strategy import ShardedTowers as ShardedTowers

_MODULES = {  # public name: its module; a test holds it equal to the imports above
    "Answer": "fromage.generation.generate",
    "CC3M": "fromage.data.datamodule",
    "Chat": "fromage.generation.chat",
    "Decoding": "fromage.generation.options",
    "FaissIndex": "fromage.retrieval.faiss_index",
    "Fromage": "fromage.models.fromage",
    "FromageConfig": "fromage.config",
    "FromageModule": "fromage.training.module",
    "Hit": "fromage.retrieval.results",
    "ImageIndex": "fromage.retrieval.base",
    "LRFinder": "fromage.training.lr_finder",
    "Octopus": "fromage.octopus.model",
    "OctopusConfig": "fromage.config",
    "OctopusData": "fromage.octopus.data",
    "OctopusModule": "fromage.octopus.module",
    "RET": "fromage.models.prompts",
    "Starts": "fromage.models.prompts",
    "RunReport": "fromage.training.run_report",
    "SafeCheckpoint": "fromage.training.checkpoint_io",
    "ShardedModel": "fromage.training.strategy",
    "ShardedTowers": "fromage.training.strategy",
    "Url": "fromage.models.prompts",
    "UserError": "fromage.errors",
    "build_index": "fromage.retrieval.build",
    "caption": "fromage.generation.generate",
    "generate": "fromage.generation.generate",
    "load_model": "fromage.models.fromage",
    "load_octopus": "fromage.octopus.model",
    "open_index": "fromage.retrieval.open_index",
    "score": "fromage.generation.score",
    "score_prompts": "fromage.generation.score",
    "search_index": "fromage.retrieval.open_index",
    "stream": "fromage.generation.generate",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return versions(["fromage"])["fromage"]
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
