# SPDX-License-Identifier: Apache-2.0
"""Pictures of coloured shapes with captions, for the bundled text-conditioned pipelines, and a judge of such pictures.

A scene is one thing, perhaps with a size ("a small red circle"), or two things and the relation of the first to the second
("a green triangle above a yellow circle"). A picture is 32x32 RGB on a plain dark ground whose brightness varies a little.
It is drawn four times as large and averaged down, so that its edges are smooth.

A tenth of the captions with two things (`held_out`, fixed by `SPLIT_SEED`) is never shown to the networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps

SIDE = 32
SUPERSAMPLING = 4
SPLIT_SEED = 0
HELD_OUT_SHARE = 0.1
COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (55, 95, 235),
    "yellow": (245, 205, 40),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (4.0, 5.5), "": (4.0, 11.0), "large": (8.5, 11.0)}
RELATIONS = ("left of", "right of", "above", "below")
# The area of each shape as a share of the rectangle that holds it, by which the judge tells the shapes apart.
FILLING = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}


@dataclass(frozen=True)
class Thing:
    """One coloured shape; `size` is "small", "large" or, for a size that is not said, ""."""

    colour: str
    shape: str
    size: str = ""

    def __str__(self) -> str:
        return " ".join(("a", *filter(None, (self.size, self.colour, self.shape))))


@dataclass(frozen=True)
class Scene:
    """What a caption says: `first`, or `first` in `relation` to `second`."""

    first: Thing
    relation: str = ""
    second: Thing | None = None

    @property
    def caption(self) -> str:
        return str(self.first) if self.second is None else f"{self.first} {self.relation} {self.second}"


@cache
def single_scenes() -> tuple[Scene, ...]:
    """The 45 scenes of one thing."""
    return tuple(Scene(Thing(colour, shape, size)) for size in SIZES for colour in COLOURS for shape in SHAPES)


@cache
def pair_scenes() -> tuple[Scene, ...]:
    """The 720 scenes of two things, whose colours differ."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    return tuple(Scene(a, relation, b) for a in things for relation in RELATIONS for b in things if a.colour != b.colour)


@cache
def held_out() -> tuple[Scene, ...]:
    """The scenes of two things that no training picture shows."""
    pairs = pair_scenes()
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))[: int(HELD_OUT_SHARE * len(pairs))]
    return tuple(pairs[i] for i in sorted(chosen))


@cache
def shown() -> tuple[Scene, ...]:
    """The scenes of two things that the training pictures show."""
    return tuple(sorted(set(pair_scenes()) - set(held_out()), key=lambda scene: scene.caption))


def outline(shape: str, x: float, y: float, radius: float) -> tuple[str, list[float]]:
    """The PIL method that draws `shape` about (x, y), and its coordinates in pixels."""
    if shape == "circle":
        return "ellipse", [x - radius, y - radius, x + radius, y + radius]
    if shape == "square":
        half = 0.88 * radius
        return "rectangle", [x - half, y - half, x + half, y + half]
    top, bottom, half = y - radius, y + 0.8 * radius, 1.05 * radius
    return "polygon", [x, top, x + half, bottom, x - half, bottom]


def places(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, float, float, float]]:
    """Each thing of the scene with the centre and radius, in pixels, at which one picture shows it."""
    if scene.second is None:
        radius = rng.uniform(*SIZES[scene.first.size])
        x, y = rng.uniform(radius + 2, SIDE - radius - 2, size=2)
        return [(scene.first, x, y, radius)]
    radii = rng.uniform(4.5, 6.5, size=2)
    along = (rng.uniform(7.5, 10.0), rng.uniform(22.0, 24.5))
    across = rng.uniform(9.0, 23.0) + rng.uniform(-1.5, 1.5, size=2)
    if scene.relation in ("right of", "below"):
        along = along[::-1]
    centres = list(zip(along, across, strict=True))
    if scene.relation in ("above", "below"):
        centres = [(x, y) for y, x in centres]
    return [(thing, *centre, radius) for thing, centre, radius in zip((scene.first, scene.second), centres, radii, strict=True)]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One picture of the scene, `[32, 32, 3]` in 0 ... 255; place, size and brightness of the ground come from `rng`."""
    ground = int(rng.uniform(20, 50))
    canvas = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), (ground, ground, ground + 6))
    draw = ImageDraw.Draw(canvas)
    for thing, x, y, radius in places(scene, rng):
        method, coordinates = outline(thing.shape, x, y, radius)
        getattr(draw, method)([SUPERSAMPLING * value for value in coordinates], fill=COLOURS[thing.colour])
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def pictures(count: int, seed: int, pairs: tuple[Scene, ...] | None = None) -> tuple[np.ndarray, list[str]]:
    """`count` pictures `[count, 32, 32, 3]`, a fifth of them of one thing, and their captions.

    Args:
        count: number of pictures.
        seed: fixes scenes and pictures.
        pairs: the scenes of two things to draw from; `shown()` if not given.
    """
    rng = np.random.default_rng(seed)
    pairs = shown() if pairs is None else pairs
    singles = single_scenes()
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    captions = []
    for index in range(count):
        choices = singles if rng.random() < 0.2 else pairs
        scene = choices[rng.integers(len(choices))]
        images[index] = render(scene, rng)
        captions.append(scene.caption)
    return images, captions


@dataclass(frozen=True)
class Verdict:
    """What is right in a picture of a scene: the colours, the relation (true for one thing), the shapes."""

    colours: bool
    relation: bool
    shapes: bool


def judge(picture: np.ndarray, scene: Scene) -> Verdict:
    """Compare a picture `[32, 32, 3]` in 0 ... 255 with a scene.

    Every pixel is taken for a mixture of the ground, seen in the corners, and one of the five colours: the one that leaves the
    smallest remainder, counted if its share is above a half. The colours are right if just those of the scene have 16 pixels
    or more; the relation, if the centres are 6 pixels or more apart in its direction; the shapes, if the covered area as a
    share of the rectangle about it is nearest to that of the shape said.
    """
    pixels = picture.astype(float)
    ground = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    directions = np.array(list(COLOURS.values())) - ground
    covers = (pixels - ground) @ (directions / np.square(directions).sum(1, keepdims=True)).T
    remainders = np.square((pixels - ground)[..., None, :] - covers[..., None] * directions).sum(-1)
    nearest = remainders.argmin(-1)
    masks = {colour: (nearest == i) & (covers[..., i] > 0.5) for i, colour in enumerate(COLOURS)}
    things = [scene.first] if scene.second is None else [scene.first, scene.second]
    present = {colour for colour, mask in masks.items() if mask.sum() >= 16}
    colours = present == {thing.colour for thing in things}
    if not all(thing.colour in present for thing in things):
        return Verdict(False, False, False)
    centres = [np.argwhere(masks[thing.colour]).mean(0) for thing in things]
    relation = True
    if scene.second is not None:
        down, right = centres[1] - centres[0]
        relation = bool({"left of": right, "right of": -right, "above": down, "below": -down}[scene.relation] >= 6)
    cover = {colour: covers[..., i].clip(0, 1) for i, colour in enumerate(COLOURS)}
    shapes = all(nearest_shape(cover[thing.colour], masks[thing.colour]) == thing.shape for thing in things)
    return Verdict(colours, relation, shapes)


def nearest_shape(cover: np.ndarray, mask: np.ndarray) -> str:
    """The shape whose filling is nearest to that of the pixels under `mask`; `cover` is the share of each that is covered."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = cover[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]
    # The rectangle's sides to a fraction of a pixel: the largest cover in each row and column, summed.
    filling = window.sum() / (window.max(1).sum() * window.max(0).sum())
    return min(FILLING, key=lambda shape: abs(FILLING[shape] - filling))


def contact_sheet(rows: Iterable[Iterable[np.ndarray]], scale: int = 3) -> Image.Image:
    """The pictures in rows, each enlarged `scale` times, two pixels apart; short rows end in black."""
    side = SIDE * scale
    tiles = [[Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST) for picture in row] for row in rows]
    columns, empty = max(map(len, tiles)), Image.new("RGB", (side, side))
    filled = [tile for row in tiles for tile in row + [empty] * (columns - len(row))]
    return make_image_grid([ImageOps.expand(tile, border=1) for tile in filled], len(tiles), columns)
