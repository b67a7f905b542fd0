"""Pictures: out of files and tar shards, one by one or as a stream, and onto contact sheets."""

from __future__ import annotations

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fromage.errors import UserError
from fromage.shards import expand, read_shard, shard_sizes

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
MAX_PIXELS = 89_478_485  # Pillow's own line between a large picture and a decompression bomb
MAX_ASPECT = 100  # a strip of 1 x 20,000 pixels passes the first limit, and explodes when its short side is scaled up

MARGIN, GAP, MAX_COLUMNS, MIN_WIDTH = 24, 16, 10, 480  # pixels, but for the number of columns
WHITE, INK, GREY, PALE, RULE = (255, 255, 255), (28, 30, 34), (112, 116, 124), (240, 241, 243), (222, 224, 228)
WIDE_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")  # where the system has one
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Item(NamedTuple):
    """A picture in an index: where open_picture finds it, and what is said of it ('' if nothing)."""

    path: str
    caption: str = ""


def is_picture(path: Path) -> bool:
    """Whether a file name says picture; hidden files (macOS writes ._name.jpg) do not count."""
    return path.suffix[1:].lower() in SUFFIXES and not path.name.startswith(".")


def open_picture(locator: str) -> Image.Image:
    """The RGB picture at 'path.jpg', or at 'shard.tar#key': the member key.jpg (.png, ...) within a tar.

    Raises UserError where there is none, or none that can be decoded.
    """
    shard, is_member, key = locator.partition(".tar#")
    try:
        if is_member and not Path(locator).is_file():
            return decode_picture(io.BytesIO(_member(f"{shard}.tar", key)), locator)
        with Path(locator).open("rb") as file:
            return decode_picture(file, locator)
    except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{locator}: cannot be read ({error}); was it moved or deleted?") from error


def _member(shard: str, key: str) -> bytes:
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, suffix = member.name.rpartition(".")
            if stem == key and suffix.lower() in SUFFIXES and (file := tar.extractfile(member)):
                return file.read()
    raise UserError(f"{shard}: holds no picture with the key {key}; was the shard written anew?")


def decode_picture(file: IO[bytes], name: str) -> Image.Image:
    """Decode to RGB, upright as EXIF has it, transparency on white, an animation's first frame. name is for errors."""
    try:
        image: Image.Image = Image.open(file)
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels are too large or too narrow")
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything
        raise UserError(f"{name}: is no usable picture ({error}); repair or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # a plain conversion would clip 16 bits to white
        image = image.point(lambda level: level * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


class Sample(NamedTuple):
    """A picture of a PictureSource. order: (file or shard, place in it), as workers deliver in turns."""

    order: tuple[int, int]
    item: Item
    tensor: Tensor | None  # pixels (3, H, W), or stored features (m,)
    problem: str = ""  # why there is no tensor


Members = dict[str, bytes]  # suffix -> bytes, of one sample
Lost = Callable[[str, str], None]  # takes the name of what is lost, and the cause
Reader = Callable[[str, Lost], Iterator[tuple[str, Members]]]  # file or shard -> (locator, members) of its pictures


class PictureSource(IterableDataset):
    """The pictures of files or shards, which are dealt out among the workers. What is broken becomes a Sample too.

    Attributes:
        count: how many there should be; None if unknown.
    """

    def __init__(
        self, parts: Sequence[str], read: Reader, transform: Callable[[Image.Image], Tensor], count: int | None
    ) -> None:
        self.parts, self.read, self.transform, self.count = parts, read, transform, count

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.parts), step):
            yield from self._part(number, self.parts[number])

    def _part(self, number: int, part: str) -> Iterator[Sample]:
        lost: list[str] = []
        for place, (locator, members) in enumerate(self.read(part, lambda name, cause: lost.append(f"{name}: {cause}"))):
            yield self._sample((number, place), locator, members)
        yield from (Sample((number, 0), Item(part), None, problem) for problem in lost)

    def _sample(self, order: tuple[int, int], locator: str, members: Members) -> Sample:
        item = Item(locator, members.get("txt", b"").decode("utf-8", "replace").strip())
        try:
            return Sample(order, item, self._tensor(locator, members))
        except UserError as error:
            return Sample(order, item, None, str(error))

    def _tensor(self, locator: str, members: Members) -> Tensor:
        if "npy" in members:
            return _features(members["npy"], locator)  # (m,)
        suffix = next((suffix for suffix in SUFFIXES if suffix in members), None)
        if suffix is None:
            raise UserError(f"{locator}: holds no picture; expected one of {', '.join(SUFFIXES)} or npy")
        return self.transform(decode_picture(io.BytesIO(members[suffix]), locator))  # (3, H, W)


def _features(data: bytes, locator: str) -> Tensor:
    try:
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)).flatten()  # (m,)
    except (ValueError, EOFError, TypeError) as error:
        raise UserError(f"{locator}: holds no array ({error}); compute the features again") from error


def _read_file(path: str, lost: Lost, captions: dict[str, str]) -> Iterator[tuple[str, Members]]:
    try:
        yield path, {Path(path).suffix[1:].lower(): Path(path).read_bytes(), "txt": captions.get(path, "").encode()}
    except OSError as error:
        lost(path, f"cannot be read ({error.strerror})")


def _read_shard(shard: str, lost: Lost) -> Iterator[tuple[str, Members]]:
    where = shard if ":" in shard else Path(shard).absolute()
    for sample in read_shard(shard, lost):
        yield f"{where}#{sample['__key__']}", {k: v for k, v in sample.items() if isinstance(v, bytes)}


def find_pictures(source: str, transform: Callable[[Image.Image], Tensor], captions: Path | None = None) -> PictureSource:
    """The pictures of a folder or of webdataset shards; fromage.index.embed_pictures says what a source may be.

    Raises UserError where neither is there, and for captions that cannot be read or name none of the pictures.
    """
    if _is_shards(Path(source)):
        if captions is not None:
            raise UserError(f"{source}: shards bring their captions along; leave out {captions}")
        shards = expand(source)
        sizes = [size for size in shard_sizes(shards) if size is not None]
        return PictureSource(shards, _read_shard, transform, sum(sizes) if len(sizes) == len(shards) else None)
    folder = Path(source).absolute()
    files = [str(path) for path in sorted(folder.rglob("*")) if is_picture(path) and path.is_file()]
    if not files:
        raise UserError(f"{source}: holds neither pictures ({', '.join(SUFFIXES)}) nor .tar shards; name a folder that does")
    said = _read_captions(captions, folder) if captions else {}
    if captions and said.keys().isdisjoint(files):
        raise UserError(f"{captions}: names no picture of {source}; names in it must be relative to that folder")
    return PictureSource(files, partial(_read_file, captions=said), transform, len(files))


def _is_shards(source: Path) -> bool:
    return any(source.glob("*.tar")) if source.is_dir() else ".tar" in str(source)


def _read_captions(path: Path, folder: Path) -> dict[str, str]:
    """File -> first caption, from {"a.jpg": "text" or ["text", ...]} or COCO's caption JSON, names relative to folder."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "annotations" in data:
            names = {image["id"]: image["file_name"] for image in data["images"]}
            pairs = [(names[a["image_id"]], a["caption"]) for a in data["annotations"]]
        else:
            pairs = [(name, text if isinstance(text, str) else text[0]) for name, text in data.items()]
        return {str(folder / name): text for name, text in reversed(pairs)}  # reversed: the first caption stays
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no caption file ({error!r}); give {{file: caption}} or COCO's caption JSON") from error


def collate(samples: list[Sample]) -> list[tuple[Tensor | None, list[Sample]]]:
    """Stack the tensors of equal shape; the samples come back beside them, without theirs."""
    groups: dict[torch.Size | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(None if sample.tensor is None else sample.tensor.shape, []).append(sample)
    return [_stacked(group) for group in groups.values()]


def _stacked(group: list[Sample]) -> tuple[Tensor | None, list[Sample]]:
    tensors = [s.tensor for s in group if s.tensor is not None]
    return torch.stack(tensors) if tensors else None, [s._replace(tensor=None) for s in group]


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[Image.Image | None, str]]]], tile: int = 160) -> Image.Image:
    """One row of labelled pictures under each query.

    A picture None becomes a grey tile. A label's first line is dark (rank, score), what follows it grey (caption).

    Args:
        rows: (query, its pictures with their labels) each.
        tile: side in pixels of the square that a picture is fitted into.
    """
    columns = max(1, min(MAX_COLUMNS, max((len(pictures) for _, pictures in rows), default=1)))
    width = max(MIN_WIDTH, columns * (tile + GAP) - GAP)
    blocks: list[Image.Image] = []
    for query, pictures in rows:
        blocks += [Image.new("RGB", (width, 1), RULE)] if blocks else []
        blocks += [_text_block(query, 18, width, 4, INK)]
        cells = [_cell(picture, label, tile) for picture, label in pictures]
        blocks += [_beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return ImageOps.expand(_stack(blocks, width, GAP), MARGIN, WHITE)


def _cell(picture: Image.Image | None, label: str, tile: int) -> Image.Image:
    first, _, rest = label.partition("\n")
    texts = [_text_block(first, 14, tile, 2, INK), _text_block(rest, 12, tile, 3, GREY)]
    return _stack([_frame(picture, tile), *[text for text in texts if text.height > 1]], tile, 4)


def _frame(picture: Image.Image | None, tile: int) -> Image.Image:
    frame = Image.new("RGB", (tile, tile), PALE if picture else RULE)
    if picture is None:
        ImageDraw.Draw(frame).text((tile / 2, tile / 2), "missing", GREY, _font(14), anchor="mm")
        return frame
    width, height = (max(1, round(side * tile / max(picture.size))) for side in picture.size)
    inner = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    frame.paste(inner, ((tile - width) // 2, (tile - height) // 2))
    return frame


@cache
def _font(size: int, ascii_only: bool = True) -> Font:
    """Pillow's own font, which draws boxes for what is not ASCII: for such text a font of the system, if there is one."""
    for name in () if ascii_only else WIDE_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _text_block(text: str, size: int, width: int, max_lines: int, colour: tuple[int, int, int]) -> Image.Image:
    font = _font(size, text.isascii())
    lines, leading = _wrap(text, font, width, max_lines), round(size * 1.3)
    block = Image.new("RGB", (width, max(1, leading * len(lines))), WHITE)
    for i, line in enumerate(lines):
        ImageDraw.Draw(block).text((0, leading * (i + 0.5)), line, colour, font, anchor="lm")
    return block


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Lines no wider than width pixels, broken at spaces where there are any; what does not fit ends in an ellipsis."""
    printable = "".join(c if c.isprintable() else " " for c in text[:2000])
    left = " ".join(printable.split())
    lines: list[str] = []
    while left and len(lines) < max_lines:
        fits = max(1, bisect_right(range(len(left) + 1), width, key=lambda n: ceil(font.getlength(left[:n]))) - 1)
        cut = fits if fits >= len(left) else left.rfind(" ", 0, fits + 1)
        cut = cut if cut > 0 else fits
        lines.append(left[:cut].rstrip())
        left = left[cut:].lstrip()
    if left:
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


def _beside(cells: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(c.width + GAP for c in cells) - GAP, max(c.height for c in cells)), WHITE)
    left = 0
    for cell in cells:
        row.paste(cell, (left, 0))
        left += cell.width + GAP
    return row


def _stack(blocks: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    stack = Image.new("RGB", (width, max(1, sum(b.height + gap for b in blocks) - gap)), WHITE)
    top = 0
    for block in blocks:
        stack.paste(block, (0, top))
        top += block.height + gap
    return stack
