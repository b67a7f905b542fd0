"""The image index: what every kind of it gives, and what all kinds share.

q is the width of the shared retrieval space, N the number of images in the index, B that of the queries. A subclass names
rows near a query (nearest, propose); fromage.retrieval.rerank searches with these and scores them exactly. To add a backend,
write its subclass and name it in open_index.BACKENDS and build._backend.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload
from weakref import ref

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fromage.checks import check_whole
from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.image_root import ImageAccess, ImageRoot, to_bytes
from fromage.retrieval.index_spec import FLAT, IndexSpec
from fromage.retrieval.item_table import Embedded, ItemTable, check_there, image_id, without
from fromage.retrieval.missing import CHECKED, Missing, look
from fromage.retrieval.rerank import RERANK_FACTOR, Near, search_approximate, search_exact, unit
from fromage.retrieval.results import Hit
from fromage.retrieval.table_file import Table

if TYPE_CHECKING:
    from fromage.models.fromage import Fromage
    from fromage.retrieval.ann import ANNIndex

State = list[tuple[int, int]]  # of parameters: address and version of each


class ImageIndex(ABC):
    """An index over unit rows, where the inner product is the cosine.

    Attributes:
        backend: name of the kind of index in index.json.
        moves_root: whether a change may write what the paths are relative to (see `change`).
        fingerprint: of the model that embedded the images; only this model's queries mean anything here.
        checkpoint: path that model was loaded from; '' if not known.
        candidates: what proposes rows, where this program and not a server holds it; None in a flat index.
        texts: (n, q) unit rows of captions as searched for, with which candidates are measured; often none.
        place: where the images are, and which of them are opened.
        model: the one whose texts and images `search` takes; None where only rows are searched for.
    """

    backend: ClassVar[str]
    moves_root: ClassVar[bool]
    candidates: ANNIndex | None = None
    model: Fromage | None = None

    def __init__(
        self, fingerprint: str, checkpoint: str = "", texts: np.ndarray | None = None, place: ImageAccess | None = None
    ) -> None:
        self.fingerprint, self.checkpoint, self.place = fingerprint, checkpoint, place or ImageAccess()
        self.texts = np.empty((0, self.width), np.float32) if texts is None else texts
        self._known: tuple[Callable[[], Fromage | None], State] = (lambda: None, [])  # see require_model

    # --- what each kind of index gives --------------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @property
    @abstractmethod
    def width(self) -> int:
        """q."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """'flat', or the name that the backend has for how it searches."""

    @abstractmethod
    def nearest(self, queries: np.ndarray, n: int, passing: Any = None) -> list[Near]:
        """The n rows nearest to each of (B, q) unit queries, up to the rounding of float32; passing: what filter gave."""

    def propose(self, queries: np.ndarray, n: int, passing: Any = None) -> list[Near]:
        """As nearest, but a kind that is not flat may miss some."""
        return self.nearest(queries, n, passing)

    @abstractmethod
    def filter(self, where: str) -> Any:
        """A filter (fromage.retrieval.where) over the metadata as nearest and propose take it. Raises UserError."""

    @abstractmethod
    def table(self) -> Table | None:
        """The metadata that filters look at, by the paths of the images; None where there is none."""

    @abstractmethod
    def vectors_of(self, rows: Sequence[int]) -> np.ndarray:
        """(n, q) vectors of the rows that hits name."""

    @abstractmethod
    def finder(self) -> Callable[[str], Item | None]:
        """What finds an image by its id (fromage.retrieval.item_table.image_id)."""

    @abstractmethod
    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""

    @abstractmethod
    def rows(self) -> Iterator[Embedded]:
        """All vectors with their items, in order, some at a time."""

    @abstractmethod
    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the index as a folder, whole or not at all.

        Raises UserError where an index is there that may not be replaced, or anything else.
        """

    @abstractmethod
    def change(
        self,
        folder: str | Path,
        gone: pa.Array,
        rows: Iterable[Embedded],
        root: ImageRoot | None = None,
        tables: Sequence[Table] = (),
    ) -> ImageIndex:
        """The index in this folder without the images at the paths `gone` (bytes), and with rows after the rest.

        tables: metadata of images that have none yet.

        A run that was killed may be repeated. root: what the paths are to be relative to from now on, where the backend
        can change it; None as before. Raises UserError where no image is left.
        """

    @abstractmethod
    def set_place(self, place: ImageAccess) -> None:
        """Look for the images elsewhere; nothing is written."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, about: dict[str, Any], place: ImageAccess) -> ImageIndex:
        """The index of a folder whose index.json says `about`. Raises UserError where it is damaged or out of reach."""

    @classmethod
    @abstractmethod
    def write(cls, out: str | Path, rows: Iterable[Embedded], spec: IndexSpec) -> ImageIndex:
        """Write unit rows as an index in the folder out."""

    @classmethod
    @abstractmethod
    def check(cls, kind: str | None, width: int, milvus: str = "") -> None:
        """Raise UserError for a kind that cannot be made for rows of width q, and for a Milvus that is out of reach."""

    @classmethod
    @abstractmethod
    def drop(cls, about: dict[str, Any]) -> None:
        """Remove what an index that has been replaced has outside its folder; about: what its index.json said."""

    def learnt(self, folder: str | Path) -> ANNIndex | None:
        """The candidates of the index in this folder, in memory, where they can be changed; None where there are none."""
        return None

    # --- what all kinds share -----------------------------------------------------------------------------------------

    @classmethod
    def from_folder(
        cls,
        images: str | Path,
        model: Fromage | str | Path,
        out: str | Path | None = None,
        *,
        captions: str | Path | None = None,
        batch_size: int = 64,
        workers: int = 0,
        kind: str | None = None,
    ) -> ImageIndex:
        """The index of a folder of images, which takes texts and images in `search`: opened where there is one, else made.

            index = ImageIndex.from_folder("photos", "CKPT", "runs/photos")
            index.search("something at night", k=3)

        Args:
            images: folder of images, searched to its depth, or shards, or the folder of an index.
            model: the model, or its checkpoint.
            out: folder of the index; one that is there is opened as it is (`fromage index sync` takes in what has changed).
                None keeps the index in memory.
            captions: and the others are those of fromage.build_index.
        """
        from fromage.retrieval.build import from_folder  # stands above this module: an exception named in setup.cfg

        return from_folder(images, model, out, captions=captions, batch_size=batch_size, workers=workers, kind=kind)

    def add(
        self, folder: str | Path, rows: Iterable[Embedded], root: ImageRoot | None = None, tables: Sequence[Table] = ()
    ) -> ImageIndex:
        """The index in this folder with rows put after its own; images that are there already stay as they are."""
        return self.change(folder, pa.array([], pa.binary()), without(rows, self.paths()), root, tables)

    def describe(self, folder: str | Path, tables: Sequence[Table]) -> ImageIndex:
        """The index in this folder with the metadata of tables in place of its own. Raises UserError where it cannot."""
        raise UserError(f"{folder}: metadata comes with its images there; build it again with --table FILE --key COLUMN")

    def remove(self, folder: str | Path, paths: str | Sequence[str]) -> ImageIndex:
        """The index in this folder without the images at these paths. Raises UserError for a path that is not there.

        A path may also be relative to the current folder, or to that of the images.
        """
        ways = [
            (name, os.path.abspath(name), self.root.locate(name))  # noqa: PTH100 (bytes)
            for name in map(to_bytes, [paths] if isinstance(paths, str) else paths)
        ]
        there = self.there(pa.array([way for some in ways for way in some], pa.binary()))
        gone = [next((way for way in some if way in there), some[0]) for some in ways]
        check_there(folder, gone, there)
        return self.change(folder, pa.array(gone, pa.binary()), ())

    def there(self, paths: pa.Array) -> set[bytes]:
        """Which of the paths, as bytes, the index has an image at."""
        return set(self.paths().filter(pc.is_in(self.paths(), value_set=paths)).to_pylist())

    @property
    def root(self) -> ImageRoot:
        """What the stored paths are relative to."""
        return self.place.root or ImageRoot()

    def id_of(self, path: str) -> str:
        """The id of an image, with which `finder` finds it."""
        return image_id(self.root.store(to_bytes(path)))

    def about(self) -> dict[str, Any]:
        """What index.json says of the index, of where its images are too; a subclass adds what is its own."""
        names = ("backend", "width", "kind", "fingerprint", "checkpoint")
        told = {"confined": self.place.confined, "left_out": dict(self.place.left_out)}
        placed = {"root": self.root.path} | {name: value for name, value in told.items() if value}
        return {"count": len(self)} | {name: getattr(self, name) for name in names} | placed

    def missing(self, most: int = CHECKED) -> Missing:
        """Look whether the images are there and may be opened: all files of up to `most`, a sample of more; no addresses."""
        return look(self.some(most), self.place.within)

    def some(self, most: int) -> Iterator[Item]:
        """Up to so many of the images, spread over the index where the backend can."""
        for _, items in self.rows():
            yield from ItemTable([items[:most]])
            most -= len(items)
            if most <= 0:
                return

    @overload
    def search(
        self, query: str | Path | Image.Image, k: int = 5, exclude: str | Collection[str] | None = None, where: str = ""
    ) -> list[Hit]: ...

    @overload
    def search(
        self, query: np.ndarray | Sequence[Any], k: int = 5, exclude: str | Collection[str] | None = None, where: str = ""
    ) -> list[list[Hit]]: ...

    def search(self, query: Any, k: int = 5, exclude: str | Collection[str] | None = None, where: str = "") -> Any:
        """The k images nearest to a query, best first, fewer if there are not as many.

        Scores are exact in every kind, up to the rounding of its rows to float16 in kinds that are not flat. A flat index
        finds the true nearest, equal scores in the order of the index, whatever else is in the batch. The other kinds rank
        the nearest of their candidates.

        Args:
            query: a text, an image or an image's path, for which the index needs its model; or a list of queries, each one
                of these or a list of texts and images; or rows (B, q) of any length but zero. For a list and for rows a list
                of hits comes for each.
            k: images per query, at least 1.
            exclude: paths that must not be found.
            where: a filter over the metadata, such as "year >= 2019 and place = 'Rome'", see fromage.retrieval.where; '' for
                all images.

        Raises:
            UserError: a query or a filter that the index cannot take.
        """
        check_whole("k", k, 1)
        passing = self.filter(where) if where else None
        excluded = frozenset([exclude] if isinstance(exclude, str) else exclude or ())
        if _are_rows(query):
            return self._search(query, k, excluded, passing)
        queries = list(query) if isinstance(query, (list, tuple)) else [query]
        found = self._search(self._embedded(queries), k, excluded, passing) if queries else []
        return found if isinstance(query, (list, tuple)) else found[0]

    def _embedded(self, queries: Sequence[Any]) -> np.ndarray:
        """(B, q) rows of texts and images."""
        from fromage.retrieval.queries import query_rows

        if self.model is None:
            raise UserError(
                "the index was opened without its model, which texts and images need; use open_index or search_index"
            )
        self.require_model(self.model)
        return query_rows(self.model, queries)

    def _search(self, queries: np.ndarray, k: int, excluded: frozenset[str], passing: Any) -> list[list[Hit]]:
        rows = unit(queries, "the query")  # (B, q)
        if rows.shape[1] != self.width:
            raise UserError(f"queries are {rows.shape[1]} wide, the index {self.width}; use the model that built the index")
        nearest, propose = partial(self.nearest, passing=passing), partial(self.propose, passing=passing)
        if self.exact:
            found = search_exact(nearest, rows, k, excluded)
        else:
            found = search_approximate(propose, nearest, self.factor, rows, k, excluded)
        if self.place.within is None:
            return found
        return [[hit._replace(within=self.place.within) for hit in hits] for hits in found]

    @property
    def exact(self) -> bool:
        """Whether every row is looked at."""
        return self.kind == FLAT

    @property
    def factor(self) -> int:
        """Candidates that are ranked per image that is asked for."""
        return self.candidates.factor if self.candidates else RERANK_FACTOR

    def beyond(
        self, query: np.ndarray, hits: Sequence[Hit], exclude: str | Collection[str] | None = None, where: str = ""
    ) -> Iterator[Hit]:
        """The hits of a search for one query (q,), and then all after them: searched for as they are asked for."""
        given: set[int] = set()
        while len(hits) > len(given):
            for hit in hits:
                if hit.row not in given:  # approximate kinds may rank otherwise when they are asked for more
                    given.add(hit.row)
                    yield hit._replace(rank=len(given))
            hits = self.search(query[None], 2 * len(given), exclude, where)[0]

    def first(self) -> Item:
        """The first image."""
        return ItemTable([next(items for _, items in self.rows() if len(items))])[0]

    def require(self, fingerprint: str, folder: str | Path = "the index") -> None:
        """Raise UserError unless the model of this fingerprint built the index; folder is where it lies, for the message."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{folder}: built with checkpoint {self.fingerprint} ({self.checkpoint or 'path unknown'}), not with "
                f"{fingerprint}; give the checkpoint it was built with, or build it again: fromage index build"
            )

    def require_model(self, model: Fromage) -> None:
        """As require, of a model. It is digested once, and again when it has been trained or loaded again since."""
        model_then, state_then = self._known
        state = [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in model.trained().values()]
        if model_then() is not model or state_then != state:
            self.require(model.fingerprint())
            self._known = ref(model), state


def _are_rows(query: Any) -> bool:
    """Whether a query is (B, q) numbers, and no texts or images."""
    if isinstance(query, (list, tuple)):
        return bool(query) and all(isinstance(row, (list, tuple, np.ndarray)) and _are_numbers(row) for row in query)
    return hasattr(query, "__array__") and not isinstance(query, Image.Image)


def _are_numbers(row: Any) -> bool:
    return len(row) > 0 and all(isinstance(number, Real) for number in row)
