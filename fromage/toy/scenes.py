"""Scenes of one to four objects: how they are sampled, split into train and validation, and drawn."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon", "arrow", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (250, 225, 50),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (25, 25, 25),
}
SIZES = {"small": 9.0, "big": 15.0}  # radius in pixels of a PIXELS-wide image
PLACES = {"left": (0.2, 0.5), "right": (0.8, 0.5), "top": (0.5, 0.2), "bottom": (0.5, 0.8), "middle": (0.5, 0.5)}
GROUNDS = {"sand": (222, 196, 140), "grass": (120, 180, 90), "sea": (90, 160, 205), "snow": (228, 234, 240)}
TIMES = ("day", "night")
PIXELS = 96


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene. Within a scene no two share a place."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One to four objects on a ground, by day or night. Equal scenes are the same image up to jitter."""

    things: tuple[Thing, ...]
    ground: str
    time: str

    @property
    def key(self) -> str:
        """A name for the scene that does not depend on the order of its objects."""
        things = "+".join("-".join((t.size, t.colour, t.shape, t.place)) for t in sorted(self.things))
        return f"{things}@{self.ground}-{self.time}"

    @classmethod
    def parse(cls, key: str) -> Scene:
        """The scene of a key, its objects in the key's order. Raises ValueError for anything else."""
        things, _, setting = key.partition("@")
        ground, time = setting.split("-")
        words = [thing.split("-") for thing in things.split("+")]
        return cls(tuple(Thing(shape, colour, size, place) for size, colour, shape, place in words), ground, time)

    @property
    def split(self) -> str:
        """'val' for a tenth of all scenes, chosen by their key: the same ones in every world and for every seed."""
        return "val" if zlib.crc32(self.key.encode()) % 10 == 0 else "train"


Polygon = list[tuple[float, float]]


class Mark(NamedTuple):
    """Where an object was drawn, in pixels.

    Attributes:
        box: x, y, width, height, as in COCO.
        outline: its edge, and after it that of its hole.
    """

    box: list[float]
    outline: list[Polygon]


def sample_scene(rng: random.Random, split: str, n: int | None = None) -> Scene:
    """Draw a scene of a split; n objects (half the scenes have one, three in ten two, two in ten three).

    Shapes and colours differ within a scene.
    """
    while True:
        count = n or rng.choices((1, 2, 3), (5, 3, 2))[0]
        scene = _scatter(rng.sample(SHAPES, count), rng.sample(list(COLOURS), count), rng)
        if scene.split == split:
            return scene


def sample_crowded_scene(rng: random.Random, split: str) -> Scene:
    """Draw a scene of a split of two to four objects that it takes a referring expression to tell apart.

    In four of five scenes several have the same shape, perhaps all; colours are drawn from two.
    """
    while True:
        count = rng.choice((2, 3, 4))
        kinds = rng.choice((1, rng.randint(1, count - 1))) if rng.random() < 0.8 else count  # of shape
        shapes = (rng.sample(SHAPES, kinds) * count)[:count]
        colours = rng.choices(rng.sample(list(COLOURS), 2), k=count)
        scene = _scatter(shapes, colours, rng)
        if scene.split == split:
            return scene


def _scatter(shapes: Sequence[str], colours: Sequence[str], rng: random.Random) -> Scene:
    """A scene of objects of these shapes and colours; everything else is random."""
    places = rng.sample(list(PLACES), len(shapes))
    things = tuple(Thing(s, c, rng.choice(list(SIZES)), p) for s, c, p in zip(shapes, colours, places, strict=True))
    return Scene(things, rng.choice(list(GROUNDS)), rng.choice(TIMES))


def sample_scenes(
    rng: random.Random, split: str, count: int, sample: Callable[..., Scene] = sample_scene, **options: int | None
) -> list[Scene]:
    """Draw count scenes, all different, by sample(rng, split, **options)."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample(rng, split, **options)
        scenes.setdefault(scene.key, scene)
    return list(scenes.values())


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """A shape as a polygon within the unit circle; y grows downwards."""
    if shape == "star":
        radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        return tuple(
            (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in zip(range(10), radii, strict=True)
        )
    if shape == "moon":
        outer = [(math.cos(a), math.sin(a)) for a in (math.radians(d) for d in range(50, 311, 10))]
        inner = [(0.45 + 0.78 * math.cos(a), 0.78 * math.sin(a)) for a in (math.radians(d) for d in range(285, 74, -10))]
        return tuple((x + 0.2, y) for x, y in outer + inner)
    if shape == "heart":
        points = []
        for d in range(0, 360, 12):
            a = math.radians(d)
            y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
            points.append((math.sin(a) ** 3, -y / 16))
        return tuple(points)
    w = 0.34
    return {
        "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
        "triangle": ((0, -1), (0.95, 0.75), (-0.95, 0.75)),
        "diamond": ((0, -1), (0.6, 0), (0, 1), (-0.6, 0)),
        "cross": (
            (-w, -1),
            (w, -1),
            (w, -w),
            (1, -w),
            (1, w),
            (w, w),
            (w, 1),
            (-w, 1),
            (-w, w),
            (-1, w),
            (-1, -w),
            (-w, -w),
        ),
        "arrow": ((-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)),
    }[shape]


def _circle(x: float, y: float, radius: float) -> Polygon:
    """A circle as a polygon of 36 corners."""
    turns = (math.radians(degrees) for degrees in range(0, 360, 10))
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, rng: random.Random, ground: tuple[int, ...]) -> Mark:
    """Draw one object."""
    radius = SIZES[thing.size] * rng.uniform(0.95, 1.05)
    cx, cy = (PIXELS * c + rng.uniform(-2.5, 2.5) for c in PLACES[thing.place])
    fill, edge = COLOURS[thing.colour], (10, 10, 10) if thing.colour != "black" else (235, 235, 235)
    if thing.shape in ("circle", "ring"):
        canvas.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill, edge)
        outline = [_circle(cx, cy, radius)]
        if thing.shape == "ring":
            hole = radius * 0.55
            canvas.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), ground, edge)
            outline.append(_circle(cx, cy, hole))
        return Mark([round(v, 2) for v in (cx - radius, cy - radius, 2 * radius, 2 * radius)], outline)
    angle = rng.uniform(-0.12, 0.12)
    sin, cos = math.sin(angle) * radius, math.cos(angle) * radius
    points = [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in _outline(thing.shape)]
    canvas.polygon(points, fill, edge)
    xs, ys = zip(*points, strict=True)
    return Mark([round(v, 2) for v in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))], [points])


def draw(scene: Scene, seed: int = 0) -> tuple[Image.Image, list[Mark]]:
    """Draw a scene, PIXELS square, with jitter and speckles that depend on the scene's key and the seed alone.

    Returns the image and where each object is, in the order of scene.things.
    """
    rng = random.Random(f"{scene.key}/{seed}")
    shade = 1.0 if scene.time == "day" else 0.32
    ground = tuple(round(c * shade * rng.uniform(0.96, 1.04)) for c in GROUNDS[scene.ground])
    image = Image.new("RGB", (PIXELS, PIXELS), ground)
    canvas = ImageDraw.Draw(image)
    for _ in range(24):
        x, y, d = rng.uniform(0, PIXELS), rng.uniform(0, PIXELS), rng.choice((-14, 12))
        speck = tuple(max(0, min(255, c + d)) for c in ground)
        length = {"sand": 1, "grass": 3, "sea": 7, "snow": 2}[scene.ground]
        canvas.line(
            (x, y, x + (length if scene.ground != "grass" else 0), y + (length if scene.ground == "grass" else 0)), speck
        )
    return image, [_draw_thing(canvas, thing, rng, ground) for thing in scene.things]


def names_colour_and_shape(text: str, scene: Scene) -> bool:
    """Whether the colours and shapes a caption names are those of a scene of one object."""
    words = set(text.replace(".", " ").replace(",", " ").split())
    thing = scene.things[0]
    return words & COLOURS.keys() == {thing.colour} and words & set(SHAPES) == {thing.shape}
