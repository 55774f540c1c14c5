"""Components of an experiment: methods, data sets, backbones and read-outs, chosen by name.

A component is a class. It is chosen by a name of the package, by a name that an installed package
registers as an entry point, or by its import path, ``my_package.MyMethod``. Its options are the
arguments of its constructor, with their types and defaults; its docstring is their help. There is
nothing to register: a file beside the configuration is enough. jsonargparse reads signatures and
docstrings.

The constructor checks what it is given and does no work, since it also runs where settings are only
read. A constructor with an argument ``name`` receives the name that was chosen.
"""

import importlib
import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import cleandoc, signature
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints

import jsonargparse

_NAME = "name"


@dataclass(frozen=True)
class Registry:
    """Where the components of one kind are found.

    Attributes
    ----------
    kind : str
        What they are called: ``"method"``.
    paths : mapping of str to str
        Import paths of the package's own classes, by name. Nothing is imported before it is used.
    requires : tuple of str
        Functions that a class must have to be one.
    group : str, optional
        Entry-point group in which other packages name theirs.
    other : callable, optional
        Gives the import path of the class that takes a name found nowhere else (a model of timm,
        say), or None where no class does.
    """

    kind: str
    paths: Mapping[str, str]
    requires: tuple[str, ...]
    group: str | None = None
    other: Callable[[str], str | None] = lambda _: None

    def names(self) -> list[str]:
        """Names of the package, and those that installed packages add; imports none of them."""
        added = {entry.name for entry in entry_points(group=self.group)} if self.group else set()
        return [*self.paths, *sorted(added - set(self.paths))]

    def is_packaged(self, name: str) -> bool:
        """Whether a name stands for a class of this package: its code is ours."""
        return name in self.paths or (not is_import_path(name) and self.other(name) is not None)

    def find(self, name: str) -> type:
        """The class of a name or import path.

        Raises
        ------
        ValueError
            If there is none, or what is there is not a component of this kind.
        """
        path = self.paths.get(name)
        if path is None:
            for entry in entry_points(group=self.group, name=name) if self.group else ():
                return self._checked(name, entry.load())
            if is_import_path(name):
                return self._checked(name, _imported(name))
            path = self.other(name)
        if path is None:
            msg = (
                f"{self.kind} must be one of {', '.join(self.names())} or the import path of a "
                f"class, package.module.Class, got {name}"
            )
            raise ValueError(msg)
        kind: type = _imported(path)
        return kind

    def _checked(self, name: str, value: Any) -> type:
        missing = [need for need in self.requires if not callable(getattr(value, need, None))]
        if not isinstance(value, type) or missing:
            needs = ", ".join(self.requires)
            msg = f"{self.kind} must be a class with the functions {needs}, got {name}: {value!r}"
            raise ValueError(msg)
        return value

    def add_options(self, group: Any, name: str, section: str) -> None:
        """Add the options of a component as arguments ``--SECTION.OPTION`` of a group."""
        group.add_class_arguments(self.find(name), section, as_group=False, skip={_NAME})

    def options(self, name: str) -> dict[str, Any]:
        """Options of a component with their defaults; None for those without one.

        Examples
        --------
        >>> sets = Registry("set", {"digits": "training.components.Registry"}, ("find",))
        >>> sorted(sets.options("digits"))
        ['group', 'kind', 'other', 'paths', 'requires']
        """
        return dict(_reader(self.find(name)).get_defaults().as_dict())

    def complete(self, name: str, options: Mapping[str, Any], section: str) -> dict[str, Any]:
        """Options of a component, those that are not given at their defaults.

        Raises
        ------
        ValueError
            If an option is unknown or required and not given, or if a value is of another type
            than the constructor says or refused by it. Messages call it ``SECTION.OPTION``.
        """
        kind = self.find(name)
        defaults = self.options(name)
        unknown = sorted(set(map(str, options)) - set(defaults))
        if unknown:
            msg = (
                f"{self.kind} {name} has no {', '.join(f'{section}.{key}' for key in unknown)}; "
                f"its options: {', '.join(defaults) or 'none'}"
            )
            raise ValueError(msg)
        try:
            values = dict(_reader(kind).parse_object(dict(options)).as_dict())
        except ArgumentError as error:
            msg = f"{self.kind} {name}: {' '.join(str(error).split())}"
            raise ValueError(msg) from error
        refuse_null(values, kind, section, defaults)
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
        try:
            return kind(**named, **options)
        except ValueError as error:
            msg = f"{self.kind} {name}: {error}"
            raise ValueError(msg) from error


@dataclass
class Component:
    """A component and its options: a section of an experiment.

    A subclass names its registry; further fields of it are settings that all components of the
    kind share.

    Parameters
    ----------
    name
        A name of the registry, or the import path of a class.
    options
        Arguments of its constructor; those that are left out get their defaults.
    trusted
        Whether a class of another package may be imported. A file of a run only says what it was
        made with: options of such a component are then kept as they stand.
    """

    registry: ClassVar[Registry]
    section: ClassVar[str]

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    trusted: bool = field(default=True, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.is_known:
            self.options = self.registry.complete(self.name, self.options, self.section)

    @property
    def is_known(self) -> bool:
        """Whether the class may be imported: it is ours, or somebody has named it here."""
        return self.trusted or self.registry.is_packaged(self.name)

    @property
    def kind(self) -> type:
        """The class.

        Raises
        ------
        ValueError
            If a file alone names it: importing it would run code that nobody has asked for.
        """
        if not self.is_known:
            msg = (
                f"{self.section} must be a {self.registry.kind} of loda, got {self.name}, whose "
                f"code would be run; if you know it, allow it: --allow {self.name}"
            )
            raise ValueError(msg)
        return self.registry.find(self.name)

    def build(self) -> Any:
        """A new instance with these options."""
        _ = self.kind
        return self.registry.build(self.name, self.options)


def component_values(component: Component) -> dict[str, Any]:
    """Name, options and further settings side by side, as a file of settings has them."""
    shared = [f.name for f in fields(component) if f.name not in ("name", "options", "trusted")]
    more = {key: getattr(component, key) for key in shared}
    return {_NAME: component.name, **component.options, **more}


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
    try:
        if find_spec(parts[0]) is not None:
            return True
    except ValueError:  # __main__ has no spec
        return parts[0] in sys.modules
    here = Path.cwd()
    return (here / parts[0]).is_dir() or (here / f"{parts[0]}.py").is_file()


def refuse_null(
    values: Mapping[str, Any], kind: type, section: str, defaults: Mapping[str, Any]
) -> None:
    """Refuse null where the type of a setting does not have it; jsonargparse lets it pass.

    Raises
    ------
    ValueError
        If there is one.
    """
    hints = get_type_hints(kind) | get_type_hints(kind.__init__)  # type: ignore[misc]
    for key, value in values.items():
        if value is None and defaults.get(key) is not None:
            hint = hints.get(key)
            if hint is not Any and NoneType not in get_args(hint):
                msg = f"{section}{'.' if section else ''}{key} must have a value, got null"
                raise ValueError(msg)


def summary(kind: type) -> str:
    """First line of the docstring of a class, without its full stop."""
    return cleandoc(kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if find_spec(module.partition(".")[0]) is None and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: nothing that is installed is shadowed
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
