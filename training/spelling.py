"""Names in messages: of places, suggestions for those unknown, the first few, escapes."""

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from unicodedata import category

# Control, format, lone surrogate, and the two separators of lines.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # of Persian and Indian letters, and of emojis


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
    close = get_close_matches(wanted, plain, n=1)
    return plain[close[0]] if close else None


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of an error message: a suggestion, or nothing.

    Examples
    --------
    >>> did_you_mean("trian", ["train", "eval"]), did_you_mean("xyz", ["train"])
    ('; did you mean train?', '')
    """
    name = closest(given, known)
    return "" if name is None else f"; did you mean {name}?"


def some(names: Sequence[str] | Set[str], most: int = 8) -> str:
    """The first names for a message, those of a set in order, and how many more there are.

    Examples
    --------
    >>> some(["b", "a"]), some({"b", "a", "c"}, most=2)
    ('b, a', 'a, b and 1 more')
    """
    ordered = sorted(names) if isinstance(names, Set) else list(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def prefixed(place: object) -> Iterator[None]:
    """Put a place, such as the name of a file, before the message of a ValueError.

    Examples
    --------
    >>> with prefixed("mine.yaml"):
    ...     int("x")
    Traceback (most recent call last):
    ...
    ValueError: mine.yaml: invalid literal for int() with base 10: 'x'
    """
    try:
        yield
    except ValueError as error:
        msg = f"{place}: {error}"
        raise ValueError(msg) from error


def visible(text: str) -> str:
    r"""One line of text without anything that moves a cursor, colours, hides or reorders text.

    Names of files, classes and weights come from anybody. Control characters, line breaks, marks of
    direction and other invisible characters are escaped; letters of every language stay.

    Examples
    --------
    >>> print(visible("Kür\x1b[2K\r\u202egnp.exe\nloda: done"))
    Kür\x1b[2K\r\u202egnp.exe\nloda: done
    """
    if text.isprintable():
        return text
    return "".join(
        _escaped(x) if category(x) in _INVISIBLE and x not in _JOINERS else x for x in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
