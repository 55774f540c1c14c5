"""Procedurally drawn glyphs: random classes of pen strokes and handwritten instances of them.

A glyph is a set of quadratic Bezier arcs over shared vertices, in a box with y pointing down.
An instance moves the vertices, bends the plane, draws the strokes on a 32 x 32 bitmap and counts
the ink in blocks of 4 x 4 pixels, as the handwritten digits of scikit-learn were made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BITMAP = 32
BLOCK = 4
SIZE = BITMAP // BLOCK
LEVELS = BLOCK * BLOCK
MAX_ARCS = 8
# Dots along one arc: an arc as long as the box leaves gaps of two pixels, a pen is three wide.
DOTS = 16
PEN_RADIUS = (1.5, 2.9)
# Width of a glyph's box over its height: characters are rather tall.
ASPECT = (0.5, 1.1)


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


def trace(points: FloatArray, arcs: IntArray) -> FloatArray:
    """Return dots along the arcs, shape (N, MAX_ARCS * DOTS, 2): (1-t)^2 a + 2 t (1-t) b + t^2 c.

    Examples
    --------
    >>> bar = pack([[np.array([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]])]])
    >>> trace(*bar)[0, [0, DOTS - 1]].tolist()
    [[0.5, 0.0], [0.5, 1.0]]
    """
    t = np.linspace(0, 1, DOTS)
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    rows = np.arange(len(points))[:, None, None]
    dots: FloatArray = weights @ points[rows, arcs]
    return dots.reshape(len(points), -1, 2)


def fit(dots: FloatArray, extent: FloatArray, centre: FloatArray) -> FloatArray:
    """Scale and shift dots (N, P, 2), aspect kept, into boxes of size ``extent`` at ``centre``."""
    low, high = dots.min(axis=1, keepdims=True), dots.max(axis=1, keepdims=True)
    # A straight stroke has no width: the floor keeps it thin instead of dividing by zero.
    scale = (extent[:, None] / np.maximum(high - low, 1e-3)).min(axis=2, keepdims=True)
    fitted: FloatArray = (dots - (low + high) / 2) * scale + centre[:, None]
    return fitted


def draw(dots: FloatArray, radius: FloatArray) -> NDArray[np.bool_]:
    """Ink discs of ``radius`` (N,) around dots (N, P, 2), in pixels, on 32 x 32 bitmaps.

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
    covers = (half >= 0) & (row >= 0) & (row < BITMAP)
    sample = np.broadcast_to(np.arange(count)[:, None, None], row.shape)[covers]
    x, half, row = np.broadcast_to(x, row.shape)[covers], np.sqrt(half[covers]), row[covers]
    first = np.clip(np.ceil(x - half - np.float32(0.5)), 0, BITMAP).astype(np.int64)
    last = np.clip(np.floor(x + half + np.float32(0.5)), 0, BITMAP).astype(np.int64)
    # One column more than the bitmap: a run may end at its right edge.
    base = (sample * BITMAP + row.astype(np.int64)) * (BITMAP + 1)
    cells = count * BITMAP * (BITMAP + 1)
    edges = np.bincount(base + first, minlength=cells)
    # A run that ends before it starts (no pixel centre in it) gets no ink from either count.
    edges -= np.bincount(base + np.maximum(first, last), minlength=cells)
    covered: NDArray[np.bool_] = edges.reshape(count, BITMAP, BITMAP + 1).cumsum(axis=2) > 0
    return covered[..., :BITMAP]


def block_counts(bitmaps: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Count the ink of each 4 x 4 block: (N, 32, 32) to (N, 8, 8), values 0 to 16."""
    blocks = bitmaps.reshape(-1, SIZE, BLOCK, SIZE, BLOCK)
    counts: NDArray[np.uint8] = blocks.sum(axis=(2, 4), dtype=np.uint8)
    return counts


def handwrite(glyphs: Glyphs, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one random instance of every glyph: block counts (N, 8, 8), values 0 to 16.

    Vertices are jittered, the plane is bent by slow waves, turned, sheared and stretched, and the
    pen's width, the size and the position vary, as between writers.

    Examples
    --------
    >>> bar = pack([[np.array([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]])]])
    >>> handwrite(bar, np.random.default_rng(0)).shape
    (1, 8, 8)
    """
    count = len(glyphs.points)
    points = glyphs.points + rng.normal(0, 0.035, size=glyphs.points.shape)
    dots = trace(points, glyphs.arcs)
    for _ in range(2):
        wave = rng.normal(0, 3.0, size=(count, 2, 1))
        phase = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
        dots = dots + np.sin(dots @ wave + phase) * rng.normal(0, 0.04, size=(count, 1, 2))
    turn = rng.normal(0, 0.13, size=count)
    slant = rng.normal(0, 0.18, size=count)
    wide = np.exp(rng.normal(0, 0.15, size=count))
    cos, sin = np.cos(turn), np.sin(turn)
    plane = np.stack([wide * cos, sin, slant * cos - sin, cos], axis=1).reshape(count, 2, 2)
    radius = rng.uniform(*PEN_RADIUS, size=count)
    extent = rng.uniform(27, 32, size=(count, 2)) - 2 * radius[:, None]
    centre = BITMAP / 2 + rng.normal(0, 0.8, size=(count, 2))
    return block_counts(draw(fit(dots @ plane, extent, centre), radius))
