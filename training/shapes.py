"""What the JSON files of a run hold, checked when they are read: they may come from anybody."""

import math
from pathlib import Path
from typing import Any

from training.run_dir import read_json

Shape = Any
"""A type of leaf, ``[shape]``, ``{str: shape}``, or keys with shapes (``key?`` may be absent)."""

_LARGEST = 2**53  # beyond it whole numbers are not exact as floats
_MATRIX = {"sizes": [int], "correct": [[int]], "total": [[int]]}
_MEASURES = ("ratio", "new_energy", "old_energy", "new_magnitude", "old_magnitude")
_ENERGIES = {str: dict.fromkeys(_MEASURES, (float, None))}
_PAIR = {"old": float, "new": float}

CLASSES_SHAPE: Shape = {
    "class_names": [str],
    "order": [int],
    "tasks": [[int]],
    "images?": [int],
}
ENVIRONMENT_SHAPE: Shape = {
    "backbone?": {"weights_sha256?": (str, None), "tag?": (str, None)},
    "packages?": {str: (str, None)},
}
SUMMARY_SHAPE: Shape = {
    "counts": {str: _MATRIX},
    "task_given?": {str: {"last": float}},
    "stored_bytes?": {str: int},
    "trainable_parameters?": [int],
}
EVENT_SHAPE: Shape = {"task?": int, "seconds": {str: float}, "memory?": {str: int}}
ANALYSIS_SHAPE: Shape = {
    "subspaces?": ([{"layers": {str: _ENERGIES}}], None),
    "losses?": (
        [
            {
                "task": int,
                "step": [float],
                "own": {"old": [float], "new": [float]},
                "seen": {"old": [float], "new": [float]},
                "marks": {str: {"step": float, "own": _PAIR, "seen": _PAIR}},
            }
        ],
        None,
    ),
}


def read_shaped(path: Path, shape: Shape) -> Any:
    """Read a JSON file that must have a shape.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ValueError
        If it is no JSON, or of another shape; the message names the file and the place.
    """
    content = read_json(path)
    require_shape(content, shape, str(path))
    return content


def require_shape(value: Any, shape: Shape, name: str) -> None:
    """Check what was read; keys that a shape does not name may hold anything.

    Raises
    ------
    ValueError
        Names the first place that is not as it should be.

    Examples
    --------
    >>> require_shape({"a": [1, 2], "b": None}, {"a": [int], "c?": str}, "x.json")
    >>> require_shape({"a": [1, "2"]}, {"a": [int]}, "x.json")
    Traceback (most recent call last):
    ...
    ValueError: x.json: a[1] is '2'; expected a whole number
    """
    _require(value, shape, name, "")


def reduced(value: Any, shape: Shape) -> Any:
    """What a shape names of a value that has it.

    Examples
    --------
    >>> reduced({"a": [{"b": 1, "c": 2}], "d": 3}, {"a": [{"b": int}], "e?": str})
    {'a': [{'b': 1}]}
    """
    if isinstance(shape, tuple):
        return None if value is None else reduced(value, shape[0])
    if isinstance(shape, list):
        return [reduced(item, shape[0]) for item in value]
    if not isinstance(shape, dict):
        return value
    if str in shape:
        return {key: reduced(item, shape[str]) for key, item in value.items()}
    names = {key.removesuffix("?"): inner for key, inner in shape.items()}
    return {k: reduced(value[k], inner) for k, inner in names.items() if k in value}


def _require(value: Any, shape: Shape, name: str, place: str) -> None:
    if isinstance(shape, tuple):
        if value is not None:
            _require(value, shape[0], name, place)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            _refuse(value, "a list", name, place)
        for number, item in enumerate(value):
            _require(item, shape[0], name, f"{place}[{number}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            _refuse(value, "a mapping", name, place)
        _require_keys(value, shape, name, place)
    elif not _is_leaf(value, shape):
        words = {int: "a whole number", float: "a finite number", str: "text"}
        _refuse(value, words[shape], name, place)


def _require_keys(value: dict[str, Any], shape: dict[Any, Shape], name: str, place: str) -> None:
    for key, inner in shape.items():
        if key is str:
            for own, item in value.items():
                _require(item, inner, name, f"{place}.{own}")
        elif key.removesuffix("?") in value:
            _require(value[key.removesuffix("?")], inner, name, f"{place}.{key.removesuffix('?')}")
        elif not key.endswith("?"):
            msg = f"{name}: {place.lstrip('.') or 'it'} lacks {key!r}: it is not what a run writes"
            raise ValueError(msg)


def _is_leaf(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    whole = isinstance(value, int)
    return abs(value) <= _LARGEST if whole else kind is float and math.isfinite(value)


def _refuse(value: Any, wanted: str, name: str, place: str) -> None:
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
    msg = f"{name}: {place.lstrip('.') or 'it'} is {shown}; expected {wanted}"
    raise ValueError(msg)
