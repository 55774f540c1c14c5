"""Configuration files: those of the package, and files that build on another one.

A file may begin with ``base: NAME``, a file beside it or a configuration of the package. What the
base sets holds unless the file sets it again.
"""

import re
from importlib.resources import files
from pathlib import Path

import yaml

from training.config.yaml_text import require_simple_yaml

_BASE = re.compile(r"(?m)^base:.*$")


def packaged_configs() -> list[str]:
    """Names of the experiments in the package, such as digits and paper/cub."""
    folder = Path(str(files("training").joinpath("configs")))
    paths = [p for part in ("", "paper/", "native/") for p in folder.glob(f"{part}*.yaml")]
    names = [path.relative_to(folder).with_suffix("") for path in paths]
    return sorted(name.as_posix() for name in names if not name.name.startswith("_"))


def resolve_config(name: str) -> Path:
    """Find the file of a configuration: an existing path, else a packaged name.

    Raises
    ------
    ValueError
        If it is neither; the message lists the packaged names.
    """
    if Path(name).is_file():
        return Path(name)
    if name in packaged_configs():
        return Path(str(files("training").joinpath("configs", f"{name}.yaml")))
    known = ", ".join(packaged_configs()) or "none"
    msg = f"no configuration {name!r}: give a YAML file, or a packaged one ({known})."
    raise ValueError(msg)


def read_layers(path: Path) -> list[str]:
    """The text of a file and before it those of its bases, the most general one first.

    Raises
    ------
    ValueError
        If a base is no file beside it and no packaged configuration, or leads back to the file, or
        a key stands twice.
    """
    return _layers(path, ())


def _layers(path: Path, above: tuple[Path, ...]) -> list[str]:
    if path.resolve() in above:
        msg = f"{path}: its base leads back to itself."
        raise ValueError(msg)
    text = path.read_text(encoding="utf-8")
    require_simple_yaml(text, path)
    found = _BASE.search(text)
    if found is None:
        return [text]
    try:
        name = yaml.safe_load(found[0])["base"]
    except yaml.YAMLError as error:
        msg = f"{path}: {found[0]} does not name a configuration"
        raise ValueError(msg) from error
    if not isinstance(name, str):
        msg = f"{path}: base must be the name of a configuration, got {name}."
        raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
    beside = path.parent / f"{name.removesuffix('.yaml')}.yaml"
    base = beside if beside.is_file() else resolve_config(name)
    # A blank line in its place keeps the line numbers of error messages.
    own = _BASE.sub("", text, count=1)
    says = any(line.strip() and not line.lstrip().startswith("#") for line in own.splitlines())
    return [*_layers(base, (*above, path.resolve())), *([own] if says else [])]
