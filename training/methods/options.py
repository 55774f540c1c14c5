"""``method.options``: the settings that one method alone has."""

from dataclasses import dataclass, fields
from typing import TypeVar

from training.config import MethodConfig

T = TypeVar("T")


@dataclass(frozen=True)
class NoOptions:
    """For a method whose settings are all in ``method`` itself."""


def read_options(config: MethodConfig, kind: type[T]) -> T:
    """The entries of ``method.options`` as an instance of a method's own dataclass.

    Raises
    ------
    ValueError
        If there is an entry that the method does not have, or a value that the dataclass refuses.

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
    unknown = sorted(set(config.options) - set(known))
    if unknown:
        there = ", ".join(known) or "no options at all"
        msg = f"method.options has {unknown}, which {config.name} does not know; it has {there}"
        raise ValueError(msg)
    try:
        return kind(**config.options)
    except TypeError as error:
        msg = f"method.options {config.options} do not suit {config.name}: {error}"
        raise ValueError(msg) from error
