"""Our own stroke templates of the ten digits, several hands each.

They are never trained on: :mod:`training.pretrain.forbidden` rejects glyphs that look like them.
"""

import numpy as np

from training.pretrain.glyphs import FloatArray

Point = tuple[float, float]


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
