"""Suggestions for names that do not exist: "did you mean ...?"."""

from collections.abc import Iterable
from difflib import get_close_matches

_SIMILAR = 0.6


def closest(given: str, known: Iterable[str]) -> str | None:
    """The known name that resembles a given one most, if one does.

    Dashes count as underscores, and capitals as small letters. A dotted name whose last part is
    the given one comes first: ``lr`` is ``train.lr``.

    Examples
    --------
    >>> closest("sed_lora", ["loda", "seq_lora"]), closest("xyz", ["loda"])
    ('seq_lora', None)
    >>> closest("lr", ["seed", "train.lr"]), closest("train.batch-size", ["train.batch_size"])
    ('train.lr', 'train.batch_size')
    """
    plain = {_plain(name): name for name in known}
    wanted = _plain(given)
    for name, original in plain.items():
        if name == wanted or name.endswith(f".{wanted}"):
            return original
    close = get_close_matches(wanted, plain, n=1, cutoff=_SIMILAR)
    return plain[close[0]] if close else None


def did_you_mean(given: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: a suggestion, or nothing.

    Examples
    --------
    >>> did_you_mean("trian", ["train", "eval"])
    '; did you mean train?'
    >>> did_you_mean("sede", ["seed"], prefix="--"), did_you_mean("xyz", ["train"])
    ('; did you mean --seed?', '')
    """
    name = closest(given, known)
    return "" if name is None else f"; did you mean {prefix}{name}?"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
