"""People's own YAML files, looked through before they are read: simple ones, each key once."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

_DEEPEST = 20


def read_yaml(path: Path) -> Any:
    """What a file holds.

    Raises
    ------
    ValueError
        If it is no YAML, or `require_simple_yaml` refuses it.
    """
    text = path.read_text(encoding="utf-8")
    require_simple_yaml(text, path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # such as a date of the 41st
        msg = f"{path} is not YAML: {error}"
        raise ValueError(msg) from error


def require_simple_yaml(text: str, path: Path) -> None:
    r"""Refuse a text that would take boundless time or memory to read, or says a thing twice.

    Of a key that stands twice, PyYAML would silently keep the last. ``method: {rank: 8}`` and
    ``method.rank: 4`` are the same key.

    Raises
    ------
    ValueError
        If it is no YAML, nests deeply, repeats parts of itself by aliases, or has a key twice.

    Examples
    --------
    >>> require_simple_yaml("a: 1\nb: {a: 2}\na: 3", Path("my.yaml"))
    Traceback (most recent call last):
    ...
    ValueError: my.yaml: the key 'a' stands twice, on lines 1 and 3; each may stand once.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                msg = f"{path}: aliases (*{event.anchor}) are not read; write out what it means"
                raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                msg = f"{path}: settings nest more than {_DEEPEST} levels deep"
                raise ValueError(msg)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        msg = f"{path} is not YAML: {error}"
        raise ValueError(msg) from error
    for mapping in _mappings(root):
        _require_once(((key.value, key) for key, _ in _pairs(mapping)), path)
    _require_once(_dotted(root), path)


def _require_once(keys: Iterable[tuple[str, yaml.Node]], path: Path) -> None:
    seen: dict[tuple[str, str], int] = {}
    for key, node in keys:
        place, line = (node.tag, key), node.start_mark.line + 1
        if place in seen:
            first, last = sorted((seen[place], line))
            where = f"on line {line}" if first == last else f"on lines {first} and {last}"
            msg = f"{path}: the key {key!r} stands twice, {where}; each may stand once."
            raise ValueError(msg)
        seen[place] = line


def _pairs(mapping: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    return [pair for pair in mapping.value if isinstance(pair[0], yaml.ScalarNode)]


def _dotted(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Keys of nested mappings under dotted names, where they end."""
    if isinstance(node, yaml.MappingNode):
        for key, value in _pairs(node):
            if isinstance(value, yaml.MappingNode):
                yield from _dotted(value, f"{prefix}{key.value}.")
            else:
                yield f"{prefix}{key.value}", key


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping below a node."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for pair in node.value:
            for part in pair:
                yield from _mappings(part)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _mappings(part)
