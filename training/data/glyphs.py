"""Procedurally drawn glyphs: random characters of pen strokes, and coloured pictures of them.

A glyph is a set of quadratic Bezier arcs over shared vertices, in a box with y pointing down. An
instance moves the vertices and bends the plane, as between writers. Two programs draw with it: the
data set ``glyphs`` paints characters on coloured grounds, and the recipe of the packaged backbone
``glyphs`` writes them in grey.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BITMAP = 32
MAX_ARCS = 8
# Dots along one arc: an arc as long as the box leaves gaps of two pixels, a pen is three wide.
DOTS = 16
# Width of a glyph's box over its height: characters are rather tall.
ASPECT = (0.5, 1.1)
# Two glyphs whose blurred pictures are closer than this would be one class with two labels.
TWIN_CORRELATION = 0.9
CELLS = 16
BLUR = 1.25
# Pixels of the bitmap that the pen's middle may use, and the pen: pictures are drawn alike.
EXTENT = 26.0
PEN = 2.0

# The characters of the data set: all constants below decide what its images are.
SEED = 20261129
ALPHABETS = {"choose": range(120), "test": range(120, 400)}
MIN_ARCS = 5
CHARACTER_CORRELATION = 0.75
TEST_IMAGES = 40  # of a character; how many there are to train on is a setting of the data set
FINENESS = 3  # dots of the bitmap, along each side, in a pixel of a painted image
PEN_RADIUS = (0.8, 1.8)
INK_SIZE = (18.0, 31.0)
LUMINANCE = np.array([0.299, 0.587, 0.114])
GROUND = (0.15, 0.85)
CONTRAST = (0.3, 0.6)
WAVES = 3
CYCLES = (0.5, 8.0)
HARDNESS = (0.3, 6.0)
STRENGTH = (0.02, 0.14)
SPECKLE = 0.06
INK_TEXTURE = 0.5


class Glyphs(NamedTuple):
    """A batch of glyphs: ``points`` (C, V, 2) as x, y and ``arcs`` (C, MAX_ARCS, 3) into them.

    The three indices of an arc are its start, its control point and its end. Glyphs with fewer
    arcs repeat their last one, which leaves the same ink.
    """

    points: FloatArray
    arcs: IntArray

    def take(self, index: NDArray[np.integer] | slice) -> "Glyphs":
        """Return the glyphs at ``index``."""
        return Glyphs(self.points[index], self.arcs[index])


def pack(strokes: Sequence[Sequence[FloatArray]]) -> Glyphs:
    """Pack glyphs, each a list of strokes of shape (2 k + 1, 2), into one batch.

    The even rows of a stroke are points on the curve, the odd rows are the control points of the
    arcs between them.

    Raises
    ------
    ValueError
        If a glyph has no arc or more than ``MAX_ARCS``, or a stroke has an even number of rows.

    Examples
    --------
    >>> bar = np.array([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]])
    >>> pack([[bar]]).arcs.shape
    (1, 8, 3)
    """
    points = np.zeros((len(strokes), 3 * MAX_ARCS, 2))
    arcs = np.zeros((len(strokes), MAX_ARCS, 3), dtype=np.int64)
    for row, glyph in enumerate(strokes):
        starts: list[int] = []
        used = 0
        for stroke in glyph:
            if len(stroke) % 2 == 0 or len(stroke) < 3:
                msg = f"a stroke needs 2 k + 1 >= 3 points, got {len(stroke)}: one control an arc"
                raise ValueError(msg)
            starts += range(used, used + len(stroke) - 1, 2)
            if len(starts) > MAX_ARCS:
                msg = f"glyph {row} has more than {MAX_ARCS} arcs: draw it with fewer"
                raise ValueError(msg)
            points[row, used : used + len(stroke)] = stroke
            used += len(stroke)
        if not starts:
            msg = f"glyph {row} has no stroke: give it at least one"
            raise ValueError(msg)
        starts += [starts[-1]] * (MAX_ARCS - len(starts))
        arcs[row] = np.array(starts)[:, None] + np.arange(3)
    return Glyphs(points, arcs)


def random_glyph(rng: np.random.Generator) -> list[FloatArray]:
    """Draw one to three random strokes: pen walks of lines and arcs, and closed loops.

    They are stretched to a box of height 1 and of a width drawn from ``ASPECT``. Drawings that are
    nearly straight, which stretching would blow up, are drawn again.
    """
    while True:
        strokes = _random_strokes(rng)
        rows = np.concatenate(strokes)
        low, spread = rows.min(axis=0), np.ptp(rows, axis=0)
        if spread.min() > 0.4 * spread.max():
            box = np.array([rng.uniform(*ASPECT), 1.0])
            return [(stroke - low) / spread * box for stroke in strokes]


def _random_strokes(rng: np.random.Generator) -> list[FloatArray]:
    strokes: list[FloatArray] = []
    budget = MAX_ARCS
    for _ in range(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])):
        start = rng.uniform(0.1, 0.9, size=2)
        # Strokes of one character usually touch.
        if strokes and rng.random() < 0.7:
            other = strokes[rng.integers(len(strokes))]
            start = other[2 * rng.integers((len(other) + 1) // 2)]
        if rng.random() < 0.2 and budget >= 4:
            stroke = _loop(rng, start)
        else:
            stroke = _walk(rng, start, int(rng.integers(1, min(budget, 5) + 1)))
        strokes.append(stroke)
        budget -= len(stroke) // 2
        if budget < 1:
            break
    return strokes


def _walk(rng: np.random.Generator, start: FloatArray, arcs: int) -> FloatArray:
    """Walk from ``start``: arcs that keep the heading at their joints, or turn a corner there."""
    heading = rng.uniform(0, 2 * np.pi)
    sense = rng.choice([-1.0, 1.0])
    rows = [start]
    for step in range(arcs):
        if step and rng.random() < 0.35:
            heading += rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.9) * np.pi
        if rng.random() < 0.25:
            sense = -sense
        turn = 0.0 if rng.random() < 0.35 else sense * rng.uniform(0.2, 0.8) * np.pi
        length = rng.uniform(0.25, 0.8)
        for angle in (heading, heading + turn):
            rows.append(rows[-1] + 0.5 * length * np.array([np.cos(angle), np.sin(angle)]))
        heading += turn
    return np.array(rows)


def _loop(rng: np.random.Generator, start: FloatArray) -> FloatArray:
    """Draw a closed oval of four arcs through ``start``."""
    angles = rng.uniform(0, 2 * np.pi) + np.arange(9) * np.pi / 4
    reach = np.where(np.arange(9) % 2, np.sqrt(2), 1.0)
    around = reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    oval: FloatArray = around * rng.uniform(0.15, 0.4, size=2)
    oval += start - oval[0]
    return oval


def trace(points: FloatArray, arcs: IntArray, dots: int = DOTS) -> FloatArray:
    """Return dots along the arcs, shape (N, MAX_ARCS * dots, 2): (1-t)^2 a + 2 t (1-t) b + t^2 c.

    Examples
    --------
    >>> bar = pack([[np.array([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]])]])
    >>> trace(*bar)[0, [0, DOTS - 1]].tolist()
    [[0.5, 0.0], [0.5, 1.0]]
    """
    t = np.linspace(0, 1, dots)
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    rows = np.arange(len(points))[:, None, None]
    curves: FloatArray = weights @ points[rows, arcs]
    return curves.reshape(len(points), -1, 2)


def fit(dots: FloatArray, extent: FloatArray, centre: FloatArray) -> FloatArray:
    """Scale and shift dots (N, P, 2), aspect kept, into boxes of size ``extent`` at ``centre``."""
    low, high = dots.min(axis=1, keepdims=True), dots.max(axis=1, keepdims=True)
    # A straight stroke has no width: the floor keeps it thin instead of dividing by zero.
    scale = (extent[:, None] / np.maximum(high - low, 1e-3)).min(axis=2, keepdims=True)
    fitted: FloatArray = (dots - (low + high) / 2) * scale + centre[:, None]
    return fitted


def draw(dots: FloatArray, radius: FloatArray, side: int = BITMAP) -> NDArray[np.bool_]:
    """Ink discs of ``radius`` (N,) around dots (N, P, 2), in pixels, on square bitmaps.

    A pixel is inked when its centre lies in a disc. Each disc is a run of pixels in each row it
    touches; the runs' starts and ends are counted and summed along the row.

    Examples
    --------
    >>> draw(np.array([[[16.0, 16.0]]]), np.array([1.0])).sum()
    np.int64(4)
    """
    count = len(dots)
    # Single precision and one shared row grid: this is the slowest part of drawing.
    x, y = (dots[..., i, None].astype(np.float32) for i in (0, 1))
    width = radius.astype(np.float32)[:, None, None]
    row = np.floor(y) + np.arange(-np.ceil(radius.max()), np.ceil(radius.max()) + 1, dtype="f4")
    half = width**2 - (row + np.float32(0.5) - y) ** 2
    covers = (half >= 0) & (row >= 0) & (row < side)
    sample = np.broadcast_to(np.arange(count)[:, None, None], row.shape)[covers]
    x, half, row = np.broadcast_to(x, row.shape)[covers], np.sqrt(half[covers]), row[covers]
    first = np.clip(np.ceil(x - half - np.float32(0.5)), 0, side).astype(np.int64)
    last = np.clip(np.floor(x + half + np.float32(0.5)), 0, side).astype(np.int64)
    # One column more than the bitmap: a run may end at its right edge.
    base = (sample * side + row.astype(np.int64)) * (side + 1)
    cells = count * side * (side + 1)
    edges = np.bincount(base + first, minlength=cells)
    # A run that ends before it starts (no pixel centre in it) gets no ink from either count.
    edges -= np.bincount(base + np.maximum(first, last), minlength=cells)
    covered: NDArray[np.bool_] = edges.reshape(count, side, side + 1).cumsum(axis=2) > 0
    return covered[..., :side]


def bend(glyphs: Glyphs, rng: np.random.Generator, dots: int = DOTS) -> FloatArray:
    """Write one instance of every glyph: points (N, MAX_ARCS * dots, 2) along its strokes.

    Vertices are jittered and the plane is bent by slow waves, turned, slanted and stretched. `fit`
    gives the result a size.
    """
    count = len(glyphs.points)
    points = glyphs.points + rng.normal(0, 0.035, size=glyphs.points.shape)
    curves = trace(points, glyphs.arcs, dots)
    for _ in range(2):
        wave = rng.normal(0, 3.0, size=(count, 2, 1))
        phase = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
        curves = curves + np.sin(curves @ wave + phase) * rng.normal(0, 0.04, size=(count, 1, 2))
    turn = rng.normal(0, 0.13, size=count)
    slant = rng.normal(0, 0.18, size=count)
    wide = np.exp(rng.normal(0, 0.15, size=count))
    cos, sin = np.cos(turn), np.sin(turn)
    plane = np.stack([wide * cos, sin, slant * cos - sin, cos], axis=1).reshape(count, 2, 2)
    bent: FloatArray = curves @ plane
    return bent


def pictures(glyphs: Glyphs, width: float | None = None) -> FloatArray:
    """Draw glyphs as large as the box allows and blur them: unit vectors of mean 0, (N, 256).

    With ``width`` each is first stretched to a box of that width and of height 1.
    """
    dots = trace(*glyphs)
    count = len(dots)
    if width is not None:
        dots = dots / np.maximum(np.ptp(dots, axis=1, keepdims=True), 1e-3) * [width, 1.0]
    extent, centre = np.full((count, 2), EXTENT), np.full((count, 2), BITMAP / 2)
    ink = draw(fit(dots, extent, centre), np.full(count, PEN))
    return unit(_blur(ink))


def _blur(ink: NDArray[np.bool_]) -> FloatArray:
    """Average to 16 x 16 cells and blur by a Gaussian."""
    step = BITMAP // CELLS
    cells = ink.reshape(-1, CELLS, step, CELLS, step).mean(axis=(2, 4))
    grid = np.arange(CELLS)
    kernel = np.exp(-((grid[:, None] - grid) ** 2) / (2 * BLUR**2))
    blurred: FloatArray = kernel @ cells @ kernel
    return blurred


def unit(images: FloatArray) -> FloatArray:
    """Return images (N, ...) as rows of mean 0 and length 1."""
    rows = images.reshape(len(images), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    normed: FloatArray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normed


def distinct_glyphs(
    count: int,
    seed: int,
    accept: Callable[[Glyphs], NDArray[np.bool_]],
    twins: float = TWIN_CORRELATION,
) -> Glyphs:
    """Draw ``count`` random glyphs, none like another one.

    The first n of a longer list are the list of n, whatever ``count`` is.

    Parameters
    ----------
    count
        Number of glyphs.
    seed
        Of the random strokes.
    accept
        Says of a batch of glyphs which may be taken.
    twins
        A glyph whose blurred picture correlates more than this with one before it is left out.

    Raises
    ------
    ValueError
        If ``count`` is not positive.
    """
    if count < 1:
        msg = f"the number of glyph classes must be at least 1, got {count}; take more"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    chosen: list[Sequence[FloatArray]] = []
    seen = np.zeros((count, CELLS * CELLS))
    while len(chosen) < count:
        drawn = [random_glyph(rng) for _ in range(256)]
        batch = pack(drawn)
        for strokes, image, fits in zip(drawn, pictures(batch), accept(batch), strict=True):
            if not fits or len(chosen) == count:
                continue
            if (seen[: len(chosen)] @ image).max(initial=-1.0) > twins:
                continue
            seen[len(chosen)] = image
            chosen.append(strokes)
    return pack(chosen)


def paint(dots: FloatArray, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paint strokes on textured coloured grounds: RGB images (N, 32, 32, 3).

    Colours of ink and ground, textures, the pen's width, the size and the position are drawn for
    each image. Only the luminance of the ink differs from that of its ground for certain.

    Examples
    --------
    >>> bar = pack([[np.array([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]])]])
    >>> paint(trace(*bar), np.random.default_rng(0)).shape
    (1, 32, 32, 3)
    """
    count = len(dots)
    radius = rng.uniform(*PEN_RADIUS, size=count)
    extent = rng.uniform(*INK_SIZE, size=(count, 1)) - 2 * radius[:, None]
    room = (BITMAP - extent) / 2 - radius[:, None]
    centre = BITMAP / 2 + rng.uniform(-1, 1, size=(count, 2)) * room
    placed = fit(dots, np.broadcast_to(extent, (count, 2)), centre)
    fine = BITMAP * FINENESS
    ink = draw(placed * FINENESS, radius * FINENESS, fine).astype(np.float32)
    shares = ink.reshape(count, BITMAP, FINENESS, BITMAP, FINENESS).mean(axis=(2, 4))[..., None]
    ground = rng.uniform(*GROUND, size=(count, 1, 1, 3))
    light = ground @ LUMINANCE
    # Darker or lighter than the ground by at least the contrast, whichever there is room for.
    step = rng.uniform(*CONTRAST, size=light.shape)
    lighter = np.where(rng.random(light.shape) < 0.5, light + step <= 1, light - step < 0)
    wanted = light + np.where(lighter, step, -step)
    colour = rng.uniform(0, 1, size=(count, 1, 1, 3))
    colour += (wanted - colour @ LUMINANCE)[..., None]
    below, above = ground + texture(count, rng), colour + INK_TEXTURE * texture(count, rng)
    pixels = below.clip(0, 1) * (1 - shares) + above.clip(0, 1) * shares
    painted: NDArray[np.uint8] = np.rint(255 * pixels).astype(np.uint8)
    return painted


def texture(count: int, rng: np.random.Generator) -> FloatArray:
    """Draw coloured waves, smooth or striped, and speckle: (N, 32, 32, 3), mean about 0."""
    axis = (np.arange(BITMAP) + 0.5) / BITMAP
    result = rng.normal(size=(count, BITMAP, BITMAP, 1)) * rng.uniform(0, SPECKLE, (count, 1, 1, 1))
    for _ in range(WAVES):
        angle = rng.uniform(0, 2 * np.pi, size=count)
        cycles = _log_uniform(rng, CYCLES, (count,))
        phase = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
        hardness = _log_uniform(rng, HARDNESS, (count, 1, 1))
        across = 2 * np.pi * (cycles * np.cos(angle))[:, None, None] * axis
        down = 2 * np.pi * (cycles * np.sin(angle))[:, None, None] * axis[:, None]
        wave = np.tanh(hardness * np.sin(across + down + phase)) / np.tanh(hardness)
        colour = rng.normal(size=(count, 1, 1, 3)) * rng.uniform(*STRENGTH, size=(count, 1, 1, 1))
        result = result + wave[..., None] * colour
    return result


def _log_uniform(
    rng: np.random.Generator, bounds: tuple[float, float], size: tuple[int, ...]
) -> FloatArray:
    low, high = np.log(bounds)
    drawn: FloatArray = np.exp(rng.uniform(float(low), float(high), size=size))
    return drawn


@cache
def characters() -> Glyphs:
    """Return the characters of both alphabets, always the same."""

    def rich(glyphs: Glyphs) -> NDArray[np.bool_]:
        # Of few arcs there are only bars, hooks and ovals, which handwriting makes alike.
        several: NDArray[np.bool_] = np.diff(glyphs.arcs[:, :MIN_ARCS, 0]).min(axis=1) > 0
        return several

    return distinct_glyphs(ALPHABETS["test"].stop, SEED, rich, CHARACTER_CORRELATION)


@lru_cache(maxsize=512)
def instances(character: int, split: str, count: int) -> NDArray[np.uint8]:
    """Paint images (N, 3, 32, 32) of a character for one of the splits, always the same.

    Parameters
    ----------
    character
        Its number in `characters`.
    split
        train or test.
    count
        N. Other counts give other images: a longer list does not begin with a shorter one.
    """
    rng = np.random.default_rng([SEED, character, split == "test"])
    dots = bend(characters().take(np.full(count, character)), rng, 2 * DOTS)
    return np.ascontiguousarray(paint(dots, rng).transpose(0, 3, 1, 2))


class Drawings(Sequence[Any]):
    """The images of an alphabet in one of the splits, by position, as uint8 tensors (3, 32, 32).

    Parameters
    ----------
    numbers
        The numbers of its characters in `characters`.
    split
        train or test.
    count
        Images of each character.
    """

    def __init__(self, numbers: Sequence[int], split: str, count: int) -> None:
        self.numbers, self.split, self.each = numbers, split, count

    def __len__(self) -> int:
        return len(self.numbers) * self.each

    def __getitem__(self, index: Any) -> Any:
        import torch

        row, position = divmod(index, self.each)
        return torch.from_numpy(instances(self.numbers[row], self.split, self.each)[position])
