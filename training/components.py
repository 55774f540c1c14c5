"""Components of an experiment: methods, data sets, backbones and read-outs, chosen by name.

A component is a class. It is chosen by a name of the package, by a name that an installed package
registers as an entry point, or by its import path, ``my_package.MyMethod``. Its options are the
arguments of its constructor, with their types and defaults; its docstring is their help. Nothing
has to be registered: a file in the working directory is enough. jsonargparse reads signatures and
docstrings.

The constructor checks its arguments and does no work, since it also runs when settings are only
read. A constructor with an argument ``name`` receives the chosen name.
"""

import importlib
import math
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import jsonargparse

from training.spelling import closest, did_you_mean, prefixed

_NAME = "name"
LARGEST_SEED = 2**32 - 1  # NumPy's RandomState, which draws the class order, takes no more


@dataclass(frozen=True)
class Registry:
    """The components of one kind, by name.

    Attributes
    ----------
    kind : str
        The kind, such as ``"method"``, for messages.
    paths : mapping of str to str
        Import paths of the package's own classes, by name. A class is imported when it is used.
    requires : tuple of str
        Functions that a class of this kind must have.
    group : str, optional
        Entry-point group in which other packages register their classes.
    other : callable, optional
        Returns the import path of the class that handles a name found nowhere else (a model of
        timm, say), or None if no class does.
    families : mapping of str to str
        What ``other`` handles, in words, with one name of each: where to look for an option.
    base : str, optional
        The class to inherit, for the message about a class that lacks functions.
    """

    kind: str
    paths: Mapping[str, str]
    requires: tuple[str, ...]
    group: str | None = None
    other: Callable[[str], str | None] = lambda _: None
    families: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None

    def names(self) -> list[str]:
        """Names of this package and of installed ones; imports none of the classes."""
        added = {entry.name for entry in entry_points(group=self.group)} if self.group else set()
        return [*self.paths, *sorted(added - set(self.paths))]

    def is_packaged(self, name: str) -> bool:
        """Whether a name stands for a class of this package, whose code can be trusted."""
        if name in self.paths:
            return True
        if is_import_path(name) or name in self.names():
            return False
        return self.other(name) is not None

    def require_known(self, name: str, section: str, *, trusted: bool) -> None:
        """Refuse to import a class of another package that is named only by the file of a run.

        Raises
        ------
        ValueError
            If it is such a class; the message says how to allow it.
        """
        if not trusted and not self.is_packaged(name):
            msg = (
                f"{section} must be a {self.kind} of loda, got {name}, whose code would be run; if "
                f"you trust it, add --allow {name}"
            )
            raise ValueError(msg)

    def find(self, name: str) -> type:
        """The class of a name or import path.

        Raises
        ------
        ValueError
            If there is none, or if it is not a component of this kind.
        """
        kind: Any
        if name in self.paths:
            kind = _imported(self.paths[name])
        elif self.group and (entries := entry_points(group=self.group, name=name)):
            kind = next(iter(entries)).load()
        elif is_import_path(name):
            kind = _imported(name)
        elif (path := self.other(name)) is not None:
            kind = _imported(path)
        else:
            msg = (
                f"{self.kind} must be one of {', '.join(self.names())} or the import path of a "
                f"class, package.module.Class, got {name}{did_you_mean(name, self.names())}"
            )
            raise ValueError(msg)
        missing = [need for need in self.requires if not callable(getattr(kind, need, None))]
        if not isinstance(kind, type) or missing:
            needs = ", ".join(self.requires)
            inherit = f"; inherit {self.base}" if self.base else ""
            msg = (
                f"{self.kind} must be a class with the functions {needs}, got {name}: "
                f"{kind!r}{inherit}"
            )
            raise ValueError(msg)
        return kind

    def add_options(self, group: Any, name: str, section: str) -> None:
        """Add the options of a component as arguments ``--SECTION.OPTION`` of a group."""
        self._reader(name)  # says clearly what a constructor lacks
        group.add_class_arguments(self.find(name), section, as_group=False, skip={_NAME})

    def options(self, name: str) -> dict[str, Any]:
        """Options of a component with their defaults; None for required ones.

        Examples
        --------
        >>> sets = Registry("set", {"digits": "training.components.Registry"}, ("find",))
        >>> sorted(sets.options("digits"))
        ['base', 'families', 'group', 'kind', 'other', 'paths', 'requires']
        """
        return dict(self._reader(name).get_defaults().as_dict())

    def refuse_unknown(
        self, name: str, keys: Collection[str], section: str, shared: Sequence[str] = ()
    ) -> None:
        """Refuse options that a component does not have, and name the components that have them.

        ``shared`` are settings of the section, which the message lists as well.

        Raises
        ------
        ValueError
            If ``keys`` holds one that is not among `options`.
        """
        options = self.options(name)
        unknown = sorted(set(keys) - set(options))
        if not unknown:
            return
        given = ", ".join(f"{section}.{key}" for key in unknown)
        # Only classes of the package are asked: a list of names imports no code of others.
        classes = {**{known: known for known in self.paths}, **self.families}
        others = [
            label for label, known in classes.items() if set(unknown) <= set(self.options(known))
        ]
        not_a_module = self._not_a_module(name)
        if not others and not not_a_module and len(unknown) == 1:
            mine = [*options, *shared]
            theirs = [key for known in classes.values() for key in self.options(known)]
            if (close := closest(unknown[0], [*mine, *theirs])) is not None:
                owners = [label for label, known in classes.items() if close in self.options(known)]
                of = "" if close in mine else f", of another {self.kind}: {', '.join(owners)}"
                msg = f"{self.kind} {name} has no {given}; did you mean {section}.{close}{of}?"
                raise ValueError(msg)
        cure = f"leave out or correct {'it' if len(unknown) == 1 else 'them'}"
        if others:
            cure += f", or choose another {self.kind}: {', '.join(others)}"
        msg = (
            f"{self.kind} {name} has no {given}; its options: "
            f"{', '.join([*options, *shared]) or 'none'}; {cure}{not_a_module}"
        )
        raise ValueError(msg)

    def require_given(self, name: str, keys: Collection[str], section: str) -> None:
        """Refuse to leave out an option that has no default.

        Raises
        ------
        ValueError
            If one is not in ``keys``.
        """
        actions: list[Any] = _reader(self.find(name))._actions  # the only way to their help
        for action in actions:
            if action.required and action.dest not in keys:
                what = f": {action.help.rstrip('.')}" if action.help else ""
                msg = f"{section}.{action.dest} must be given for the {self.kind} {name}{what}"
                raise ValueError(msg)

    def _not_a_module(self, name: str) -> str:
        """What to say of a name that looks like an import path, but is taken for something else."""
        parts = name.split(".")
        if self.is_packaged(name) and len(parts) > 1 and all(x.isidentifier() for x in parts):
            return f" ({name} is no import path: there is no module {parts[0]})"
        return ""

    def _reader(self, name: str) -> jsonargparse.ArgumentParser:
        kind = self.find(name)
        try:
            return _reader(kind)
        except ValueError as error:
            untyped = [
                argument.name
                for argument in signature(kind).parameters.values()
                if argument.annotation is Parameter.empty
                and argument.default is Parameter.empty
                and argument.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
                and argument.name != _NAME
            ]
            if not untyped:
                raise
            msg = (
                f"{self.kind} {name}: arguments of the constructor are its options and must have "
                f"a type, got {', '.join(untyped)} without one; annotate it, {untyped[0]}: int"
            )
            raise ValueError(msg) from error

    def complete(self, name: str, options: Mapping[str, Any], section: str) -> dict[str, Any]:
        """Options of a component, completed with the defaults.

        Raises
        ------
        ValueError
            If an option is unknown, a required one is missing, or a value has the wrong type or is
            refused by the constructor. Messages call it ``SECTION.OPTION``.
        """
        kind = self.find(name)
        defaults = self.options(name)
        if not isinstance(options, Mapping):
            msg = f"{section} must hold options by name, got {options!r}"
            raise ValueError(msg)  # noqa: TRY004 - a value of a setting
        self.refuse_unknown(name, [str(key) for key in options], section)
        self.require_given(name, options, section)
        try:
            values = dict(_reader(kind).parse_object(dict(options)).as_dict())
        except ArgumentError as error:
            msg = f"{self.kind} {name}: {wrong_value(error, _reader(kind), f'{section}.')}"
            raise ValueError(msg) from error
        refuse_null(values, kind, f"{section}.", defaults)
        self.build(name, values)  # its own checks
        return values

    def build(self, name: str, options: Mapping[str, Any]) -> Any:
        """A new instance of a component.

        Raises
        ------
        ValueError
            If its constructor refuses an option.
        """
        kind = self.find(name)
        named = {_NAME: name} if _NAME in signature(kind).parameters else {}
        with prefixed(f"{self.kind} {name}"):
            return kind(**named, **options)


@dataclass
class Component:
    """A component and its options: a section of an experiment.

    A subclass names its registry; its further fields are settings that all components of the
    kind share.

    Parameters
    ----------
    name
        A name of the registry, or the import path of a class.
    options
        Arguments of its constructor; missing ones get their defaults.
    trusted
        Whether a class of another package may be imported. If not, its options are kept as
        recorded, unchecked.
    """

    registry: ClassVar[Registry]
    section: ClassVar[str]

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    trusted: bool = field(default=True, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.is_known:
            self.options = self.registry.complete(self.name, self.options, self.section)

    def recorded(self) -> Self:
        """A copy with absolute paths, for the record of a run."""
        return self

    @property
    def is_known(self) -> bool:
        """Whether the class may be imported: it is of this package, or the user named it."""
        return self.trusted or self.registry.is_packaged(self.name)

    @property
    def kind(self) -> type:
        """The class.

        Raises
        ------
        ValueError
            If only a file names it: importing it would run code that the user has not asked for.
        """
        self.registry.require_known(self.name, self.section, trusted=self.trusted)
        return self.registry.find(self.name)

    def build(self) -> Any:
        """A new instance with these options; raises as `kind` does."""
        self.registry.require_known(self.name, self.section, trusted=self.trusted)
        return self.registry.build(self.name, self.options)


def is_import_path(name: str) -> bool:
    """Whether a name is the path of something in a module that can be imported.

    Names of models have dots as well, so the first part must be a module. The working directory
    counts: a file there is enough.

    Examples
    --------
    >>> is_import_path("fractions.Fraction"), is_import_path("vit_base_patch16_224.dino")
    (True, False)
    """
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return False
    if _is_installed(parts[0]):
        return True
    here = Path.cwd() / parts[0]
    # A folder without Python files is no package: it may hold the runs of a model of that name.
    return here.with_suffix(".py").is_file() or any(here.glob("**/*.py"))


def refuse_null(
    values: Mapping[str, Any], kind: type, prefix: str, defaults: Mapping[str, Any] | None = None
) -> None:
    """Refuse null for settings whose type excludes it; jsonargparse lets it pass.

    ``kind`` is the class whose constructor takes the values. An option that it passes on to another
    constructor has no type here: null is allowed if it is the option's default.
    """
    try:
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    except NameError:  # types that are imported only for a type checker
        hints = {}
    for key in [key for key, value in values.items() if value is None]:
        hint = hints.get(key)
        fits = (defaults or {}).get(key) is None if hint is None else NoneType in get_args(hint)
        if not fits and hint is not Any:
            msg = f"{prefix}{key} must have a value, got null"
            raise ValueError(msg)


def wrong_value(error: ArgumentError, parser: jsonargparse.ArgumentParser, prefix: str = "") -> str:
    """What an error of a parser says, in the words of our own messages.

    ``prefix`` is put before the name of the setting.
    """
    text = str(error)
    if match := re.match(r"argument (--[^\s,:]+)[^:]*: expected one argument", text):
        return f"{match[1]} must be followed by a value"
    named = re.match(r'Parser key "([^"]+)"', text)
    given = re.search(r"(?:Got|Given) value: (.*)\Z", text, re.DOTALL)
    actions: list[Any] = parser._actions  # the only way to their types
    hints = [getattr(x, "_typehint", None) for x in actions if named and x.dest == named[1]]
    if named and given and hints and hints[0] is not None:
        return f"{prefix}{named[1]} must be {type_in_words(hints[0])}, got {given[1]:.80}"
    return " ".join(text.split())


_KINDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "values of true and false"),
    str: ("a text", "texts"),
    NoneType: ("null", ""),
}


def type_in_words(hint: Any) -> str:
    """A type of a setting, for messages and help.

    Examples
    --------
    >>> type_in_words(int | None), type_in_words(list[int])
    ('a whole number or null', 'a list of whole numbers, such as [1, 2]')
    >>> type_in_words(Literal["sgd", "adam"])
    'sgd or adam'
    """
    words: list[str] = []
    for member in _members(hint):
        if isinstance(member, str):
            words.append(member)
        elif member in _KINDS:
            words.append(_KINDS[member][0])
        else:
            words.append(_collection_in_words(member))
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} or {last}" if first else last


def _members(hint: Any) -> list[Any]:
    """The types of a union, and the values of literals as text, with null at the end."""
    if get_origin(hint) in (Union, UnionType):
        members = [member for part in get_args(hint) for member in _members(part)]
        return sorted(members, key=lambda member: member is NoneType)
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [hint]


def choices_of(hint: Any) -> list[str]:
    """The values of a type that has only a few; otherwise none.

    Examples
    --------
    >>> choices_of(bool), choices_of(Literal["cpu"] | None), choices_of(int)
    (['true', 'false'], ['cpu', 'null'], [])
    """
    names = {bool: ["true", "false"], NoneType: ["null"]}
    values: list[str] = []
    for member in _members(hint):
        own = [member] if isinstance(member, str) else names.get(member)
        if own is None:
            return []
        values += own
    return values


def _collection_in_words(hint: Any) -> str:
    origin, inner = get_origin(hint) or hint, [x for x in get_args(hint) if x is not Ellipsis]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping, such as {name: value}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        item = inner[0] if inner and inner[0] in _KINDS else str
        example = {int: "[1, 2]", float: "[0.1, 1.0]"}.get(item, "[one, other]")
        fixed = origin is tuple and Ellipsis not in get_args(hint)
        count = f"{len(inner)} " if fixed else ""
        return f"a list of {count}{_KINDS[item][1]}, such as {example}"
    return str(getattr(hint, "__name__", hint))


def check(ok: bool, key: str, value: object, rule: str) -> None:
    """Refuse the value of a setting that breaks a rule.

    Examples
    --------
    >>> check(False, "train.lr", -1.0, "positive")
    Traceback (most recent call last):
    ...
    ValueError: train.lr must be positive, got -1.0
    """
    if not ok:
        msg = f"{key} must be {rule}, got {value}"
        raise ValueError(msg)


def at_least(key: str, value: int | None, low: int) -> None:
    """Refuse a number below a limit; None passes."""
    check(value is None or value >= low, key, value, f"at least {low}")


LARGEST_COUNT = 1024
"""Threads or processes that a setting may ask for: more would exhaust any system, or crash it."""


def count_of(key: str, value: int | None, low: int) -> None:
    """Refuse a number of threads or processes below a limit or above `LARGEST_COUNT`."""
    fits = value is None or low <= value <= LARGEST_COUNT
    check(fits, key, value, f"from {low} to {LARGEST_COUNT}")


def positive(key: str, value: float) -> None:
    """Refuse a number that is not above 0 or not finite."""
    check(math.isfinite(value) and value > 0, key, value, "positive and finite")


def not_negative(key: str, value: float) -> None:
    """Refuse a number that is below 0 or not finite."""
    check(math.isfinite(value) and value >= 0, key, value, "at least 0 and finite")


def check_seed(key: str, value: int | None) -> None:
    """Refuse a number that cannot be a seed; None passes."""
    fits = value is None or 0 <= value <= LARGEST_SEED
    check(fits, key, value, f"from 0 to {LARGEST_SEED}")


def summary(kind: type) -> str:
    """First line of the docstring of a class, without its full stop."""
    return cleandoc(kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")


def _is_installed(module: str) -> bool:
    """Whether there is a module of that name, whatever the working directory."""
    # A script is the module __main__, which has no spec.
    return sys.modules.get(module) is not None or find_spec(module) is not None


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not _is_installed(module.partition(".")[0]) and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that it shadows no installed package
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        msg = f"{path} cannot be imported: {error}"
        raise ValueError(msg) from error


@lru_cache(maxsize=64)
def _reader(kind: type) -> jsonargparse.ArgumentParser:
    """A parser of the options of a class."""
    reader = jsonargparse.ArgumentParser(exit_on_error=False)
    reader.add_class_arguments(kind, as_group=False, skip={_NAME})
    return reader
