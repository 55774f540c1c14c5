"""``method.options``: the settings that one method alone has."""

import math
from argparse import ArgumentError
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import jsonargparse

from training.config import MethodConfig

T = TypeVar("T")

_WORDS = {float: "a finite number", int: "a whole number", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class NoOptions:
    """For a method whose settings are all in ``method`` itself."""


def read_options(config: MethodConfig, kind: type[T]) -> T:
    """The entries of ``method.options`` as an instance of a method's own dataclass.

    Raises
    ------
    ValueError
        If there is an entry that the method does not have, a value of another type than the field
        has, a number that is not finite, or one that the dataclass refuses.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Own:
    ...     strength: float = 0.5
    >>> read_options(MethodConfig(options={"strength": 1.0}), Own)
    Own(strength=1.0)
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(map(str, config.options)) - set(known))
    if unknown:
        there = ", ".join(known) or "no options at all"
        msg = f"method.options has {unknown}, which {config.name} does not know; it has {there}"
        raise ValueError(msg)
    return kind(**{key: _typed(config.name, kind, key, x) for key, x in config.options.items()})


def _typed(method: str, kind: type, key: str, value: object) -> Any:
    """A value of an option as the type that the dataclass says."""
    hint = get_type_hints(kind)[key]
    reader = jsonargparse.ArgumentParser(exit_on_error=False)
    reader.add_argument("--value", type=hint)
    try:
        found = reader.parse_object({"value": value}).value
    except ArgumentError:
        found = None
    none = value is None and NoneType in get_args(hint)  # jsonargparse takes it for any type
    if (found is None and not none) or (isinstance(found, float) and not math.isfinite(found)):
        words = [_WORDS.get(x, str(x)) for x in get_args(hint) or (hint,)]
        allowed = ", ".join(words)
        msg = (
            f"method.options has {key} {value!r}, which does not suit {method}; allowed: {allowed}"
        )
        raise ValueError(msg)
    return found
