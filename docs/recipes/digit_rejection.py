"""Keep the ten digits out of the random glyphs.

A random glyph whose blurred picture correlates with a digit's, over shifts, widths and slants, is
no glyph class. The stroke templates of the digits, several hands each, are our own and serve no
other purpose: nothing is trained on them.
"""

from functools import cache

import numpy as np

from training.data.glyphs import (
    CELLS,
    FloatArray,
    Glyphs,
    distinct_glyphs,
    pack,
    pictures,
    trace,
    unit,
)

Point = tuple[float, float]

# Jittered digits lie above it (see tests/test_recipe_glyphs_vit.py), most random glyphs below.
DIGIT_CORRELATION = 0.82
WIDTHS = (0.45, 0.65, 0.85, 1.0)
SLANTS = (-0.25, 0.0, 0.25)
SHIFTS = (-1, 0, 1)
BOX = 0.8


def line(*corners: Point) -> FloatArray:
    """Return the stroke of straight lines through the corners."""
    ends = np.array(corners)
    stroke = np.empty((2 * len(ends) - 1, 2))
    stroke[::2] = ends
    stroke[1::2] = (ends[:-1] + ends[1:]) / 2
    return stroke


def bow(*corners: Point) -> FloatArray:
    """Return the smooth open stroke that the corners pull: it starts and ends at the outer two."""
    pulls = np.array(corners)
    stroke = np.empty((2 * len(pulls) - 3, 2))
    stroke[1::2] = pulls[1:-1]
    stroke[2:-1:2] = (pulls[1:-2] + pulls[2:-1]) / 2
    stroke[[0, -1]] = pulls[[0, -1]]
    return stroke


def ring(left: float, top: float, right: float, bottom: float) -> FloatArray:
    """Return the closed oval inside a box."""
    x, y = (left + right) / 2, (top + bottom) / 2
    box = [(x, top), (right, top), (right, y), (right, bottom), (x, bottom)]
    return np.array([*box, (left, bottom), (left, y), (left, top), (x, top)])


def digit_strokes() -> dict[int, list[list[FloatArray]]]:
    """Return the stroke templates of each digit, in a unit box with y pointing down."""
    upper, lower = ring(0.1, 0.0, 0.9, 0.5), ring(0.0, 0.5, 1.0, 1.0)
    stem = bow((0.8, 0.0), (0.1, 0.15), (0.0, 0.7))
    return {
        0: [[ring(0, 0, 1, 1)], [ring(0, 0, 1, 1), line((0.8, 0.15), (0.2, 0.85))]],
        1: [
            [line((0.5, 0), (0.5, 1))],
            [line((0.2, 0.25), (0.5, 0), (0.5, 1))],
            [line((0, 0.4), (0.5, 0), (0.5, 1))],
            [line((0.2, 0.25), (0.5, 0), (0.5, 1)), line((0.15, 1), (0.85, 1))],
            [line((0.5, 0), (0.5, 1)), line((0.1, 1), (0.9, 1))],
        ],
        2: [
            [bow((0, 0.25), (0.1, 0), (1, -0.05), (1, 0.45), (0, 1)), line((0, 1), (1, 1))],
            [bow((0, 0.1), (0.9, -0.15), (0.9, 0.5), (0, 1)), line((0, 1), (1, 1))],
            [bow((0, 0.2), (1, -0.3), (1, 0.5), (0.3, 1.1), (-0.2, 0.9), (0.3, 0.7), (1, 1))],
            [line((0, 0), (1, 0), (0, 1), (1, 1))],
        ],
        3: [
            [
                bow((0, 0.1), (0.5, -0.1), (1, 0.1), (0.8, 0.45), (0.3, 0.48)),
                bow((0.3, 0.48), (1, 0.5), (1.05, 0.95), (0.5, 1.1), (0, 0.9)),
            ],
            [line((0, 0), (0.9, 0), (0.4, 0.4)), bow((0.4, 0.4), (1, 0.4), (1.1, 1), (0, 1))],
            [line((0, 0), (1, 0)), line((0.2, 0.5), (1, 0.5)), line((1, 0), (1, 1), (0, 1))],
        ],
        4: [
            [line((0.7, 1), (0.7, 0), (0, 0.65), (1, 0.65))],
            [line((0.1, 0), (0, 0.55), (1, 0.55)), line((0.75, 0.1), (0.75, 1))],
            [line((0.1, 0), (0, 0.5), (0.9, 0.5)), line((0.9, 0), (0.9, 1))],
            [line((0.4, 0), (0, 0.6), (1, 0.6)), line((0.65, 0.35), (0.6, 1))],
            [bow((0, 0), (0, 0.6), (0.9, 0.5)), line((0.9, 0), (0.8, 1))],
        ],
        5: [
            [line((1, 0), (0.1, 0), (0.1, 0.45)), bow((0.1, 0.45), (1, 0.3), (1, 1), (0, 1))],
            [line((1, 0), (0.1, 0)), bow((0.1, 0), (0, 0.5), (1, 0.35), (1.1, 1), (0, 1))],
            [bow((1, 0), (0, -0.1), (0, 0.5), (1, 0.5), (1, 1), (0, 1))],
            [line((1, 0), (0, 0), (0, 0.5), (1, 0.5), (1, 1), (0, 1))],
        ],
        6: [
            [stem, ring(0, 0.45, 1, 1)],
            [bow((0.6, 0), (0, 0.3), (0, 0.75)), ring(0, 0.55, 0.9, 1)],
            [line((0.3, 0), (0, 0.75)), ring(0, 0.5, 1, 1)],
        ],
        7: [
            [line((0, 0), (1, 0), (0.35, 1))],
            [line((0, 0), (1, 0), (0.35, 1)), line((0.3, 0.5), (0.95, 0.5))],
            [line((0, 0.2), (0, 0), (1, 0), (0.4, 1))],
            [line((0, 0), (1, 0)), bow((1, 0), (0.45, 0.4), (0.4, 1))],
            [line((0, 0), (1, 0), (0.9, 1))],
            [
                bow((0, 0.15), (0.2, -0.1), (1, 0.05), (0.5, 0.5), (0.4, 1)),
                line((0.1, 0.5), (1, 0.5)),
            ],
        ],
        8: [
            [upper, lower],
            [ring(0, 0, 1, 0.5), ring(0.1, 0.5, 0.9, 1)],
            [
                line((0.1, 0.1), (0.9, 0.9)),
                line((0.9, 0.1), (0.1, 0.9)),
                line((0.1, 0.1), (0.9, 0.1)),
                line((0.1, 0.9), (0.9, 0.9)),
            ],
        ],
        9: [
            [ring(0, 0, 1, 0.55), line((1, 0.25), (0.9, 1))],
            [ring(0, 0, 1, 0.5), bow((1, 0.25), (1, 0.9), (0.2, 1))],
            [ring(0.1, 0, 1, 0.45), bow((1, 0.2), (1, 1.1), (0, 1), (0, 0.85))],
            [ring(0, 0, 0.9, 0.5), line((0.9, 0.1), (0.5, 1))],
        ],
    }


@cache
def digit_bank() -> tuple[FloatArray, FloatArray]:
    """Return the pictures of all digit templates, slanted and shifted, as rows of 256.

    First those of the templates at several widths, then those stretched to the common box.
    """
    flat = pack([shape for shapes in digit_strokes().values() for shape in shapes])
    natural, stretched = [], []
    for slant in SLANTS:
        for width in WIDTHS:
            natural += _shifted(pictures(_skewed(flat, width, slant)))
        # A bare stroke stretched to a wide box is no shape at all: it is left out here.
        dots = trace(*_skewed(flat, 1.0, slant))
        wide = np.ptp(dots, axis=1)[:, 0] > 0.3
        stretched += _shifted(pictures(_skewed(flat, 1.0, slant).take(wide), BOX))
    return unit(np.concatenate(natural)), unit(np.concatenate(stretched))


def _skewed(glyphs: Glyphs, width: float, slant: float) -> Glyphs:
    return Glyphs(glyphs.points @ np.array([[width, 0.0], [slant, 1.0]]), glyphs.arcs)


def _shifted(rows: FloatArray) -> list[FloatArray]:
    images = rows.reshape(-1, CELLS, CELLS)
    return [np.roll(images, (y, x), (1, 2)) for y in SHIFTS for x in SHIFTS]


def digit_likeness(glyphs: Glyphs) -> FloatArray:
    """Return each glyph's largest correlation with any digit template, shape (N,), in [-1, 1].

    Twice: with the glyph's aspect kept, and with glyph and template stretched to one box, so that
    a wide or a narrow digit is found too.

    Examples
    --------
    >>> float(digit_likeness(pack(digit_strokes()[4])).round(3).min())
    1.0
    """
    natural, stretched = digit_bank()
    likeness: FloatArray = np.maximum(
        (pictures(glyphs) @ natural.T).max(axis=1),
        (pictures(glyphs, BOX) @ stretched.T).max(axis=1),
    )
    return likeness


def glyph_classes(count: int, seed: int) -> Glyphs:
    """Draw ``count`` random glyph classes, none like a digit and none like another one.

    The first n of a longer list are the list of n, whatever ``count`` is.

    Raises
    ------
    ValueError
        If ``count`` is not positive.
    """
    return distinct_glyphs(count, seed, lambda batch: digit_likeness(batch) <= DIGIT_CORRELATION)
