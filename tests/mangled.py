"""Files as a stranger might hand them over: damaged bytes, and values of other kinds and sizes."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

# Of other kinds, of absurd sizes, and names that lead elsewhere.
ODD = [
    *(None, True, -1, 0, 2**31, 10**30, 1e300, float("inf"), float("nan"), 0.5),
    *("", "x", "../../x", "/etc/passwd", "\x00", "é" * 300, "1e999", "${HOME}"),
    *([], {}, [[]], [None], {"a": {}}, [0] * 50, DEEP),
]


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested lists and mappings, the whole included."""
    yield at
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from places(value, (*at, key))


@st.composite
def mangled(draw: st.DrawFn, content: Any) -> Any:
    """The content with some values replaced, taken out or doubled."""
    found = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        # Short places first: there is little to see in the tenth entry of a list.
        every = sorted(places(found), key=len)
        at = draw(st.sampled_from(every))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        if not at:
            if draw(st.booleans()):
                continue
            return odd
        inner = found
        for key in at[:-1]:
            inner = inner[key]
        if draw(st.integers(0, 3)) == 0:
            del inner[at[-1]]
        else:
            inner[at[-1]] = odd
    return found


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, flipped, repeated, or others altogether."""
    kind = draw(st.sampled_from(["cut", "flipped", "zeros", "twice", "other"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:at]
    if kind == "twice":
        return content[:at] + content
    if kind == "other":
        return draw(st.binary(max_size=200))
    spoilt = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        # Headers come first: half of the places are near the beginning.
        place = place % 128 if draw(st.booleans()) else place
        spoilt[min(place, len(content) - 1)] = 0 if kind == "zeros" else draw(st.integers(0, 255))
    return bytes(spoilt)
