"""YAML files of settings: where those of the package are, and how any is read and written.

Reading is strict. A key that occurs twice is an error, for PyYAML would silently keep the last; and
since a file may come from anybody, so are aliases and deep nesting.
"""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from training.spelling import did_you_mean

CONFIGS = Path(str(files("training"))) / "configs"


def packaged_configs() -> list[str]:
    """Names of the experiments in the package, such as digits and paper/cub."""
    paths = [p for part in ("", "paper/", "native/") for p in CONFIGS.glob(f"{part}*.yaml")]
    names = [path.relative_to(CONFIGS).with_suffix("") for path in paths]
    return sorted(name.as_posix() for name in names if not name.name.startswith("_"))


DEFAULT = "glyphs"
"""The packaged configuration of the default experiment."""

PHOTOS = "_photos.yaml"
"""The file of the settings that a folder of photos starts from."""


def resolve_config(name: str) -> Path:
    """Find the file of a configuration: an existing path or a packaged name.

    Raises
    ------
    ValueError
        If the name is neither; the message lists the packaged names.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = packaged_configs()
    if name in packaged:
        return CONFIGS / f"{name}.yaml"
    cure = did_you_mean(name, packaged) or f"; packaged are {', '.join(packaged)}"
    msg = f"--config must be a YAML file or the name of a packaged configuration, got {name}{cure}"
    raise ValueError(msg)


def read_yaml(path: Path) -> Any:
    """Read a YAML file; refuse repeated keys, aliases and deep nesting.

    PyYAML would silently keep the last of two equal keys. ``method: {rank: 8}`` and
    ``method.rank: 4`` are equal keys. With aliases or deep nesting, reading a short text may take
    unbounded time and memory.

    Raises
    ------
    ValueError
        If it is not YAML, nests too deeply, uses aliases, or repeats a key.
    """
    try:
        # The constructor already reads the first block, and refuses characters YAML lacks.
        loader = _StrictLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            _require_once(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        # Without the lines that PyYAML would quote: it may be any file that a base names.
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        place = f"{path}, line {mark.line + 1}," if mark else f"{path}"
        msg = f"{place} is not YAML: {problem or getattr(error, 'reason', 'it cannot be read')}"
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


class _StrictLoader(yaml.SafeLoader):
    """Reads plain data, and numbers and dates as jsonargparse does: 1e-3 is a number."""

    deepest = 20
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            msg = f"aliases (*{self.peek_event().anchor}) are not supported; write the value out"  # type: ignore[no-untyped-call]
            raise ValueError(msg)
        self.depth += 1
        if self.depth > self.deepest:
            msg = f"settings must nest at most {self.deepest} levels deep"
            raise ValueError(msg)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# Dates stay text: no setting is a date.
_StrictLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _StrictLoader.yaml_implicit_resolvers.items()
}


def _require_once(node: yaml.Node | None) -> None:
    """Refuse a key that occurs twice in a mapping, or both as ``a: {b: 1}`` and ``a.b: 2``."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _require_once(item)
    elif isinstance(node, yaml.MappingNode):
        _require_once_below(node, "", {})


def _require_once_below(node: yaml.MappingNode, prefix: str, dotted: dict[str, int]) -> None:
    own: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # PyYAML refuses it
        line, name = key.start_mark.line + 1, f"{prefix}{key.value}"
        _once(own, (key.tag, key.value), key.value, line)
        if isinstance(value, yaml.MappingNode):
            _require_once_below(value, f"{name}.", dotted)
        else:
            _require_once(value)
            _once(dotted, name, name, line)


def _once(lines: dict[Any, int], key: Any, name: str, line: int) -> None:
    if key in lines:
        first, last = sorted((lines[key], line))
        where = f"on line {line}" if first == last else f"on lines {first} and {last}"
        msg = f"the key {name!r} must occur only once, got it twice, {where}; remove one"
        raise ValueError(msg)
    lines[key] = line


def as_yaml(value: Any, *, flow: bool = False) -> str:
    """Plain data as the text of a YAML file, which `read_yaml` and jsonargparse read back.

    Parameters
    ----------
    value
        A mapping of settings, or one value.
    flow
        On one line, with braces and brackets.

    Examples
    --------
    >>> print(as_yaml({"train": {"lr": 0.1}, "out": "1e5"}), end="")
    train:
      lr: 0.1
    out: "1e5"
    """
    if isinstance(value, Mapping):
        value = dict(value)
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that jsonargparse would read as a number, though plain YAML would not (1e5)."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_Dumper.add_representer(str, _represent_text)
