"""Which variants of a sweep a report shows together: written beside its runs, and read back."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from training.run_dir import write_json
from training.shapes import read_shaped

_GROUPS = "groups.json"


def write_groups(out: Path, groups: Mapping[str, Sequence[str]] | None) -> None:
    """Put the groups of a sweep into its folder; a sweep without groups leaves what is there."""
    if groups:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _GROUPS, {title: list(names) for title, names in groups.items()})


def read_groups(out: Path) -> dict[str, list[str]]:
    """The groups of the sweep in a folder, in the order of its file; empty where it has none.

    Raises
    ------
    ValueError
        If the file holds no lists of names by title.
    """
    path = out / _GROUPS
    if not path.is_file():
        return {}
    found: dict[str, list[str]] = read_shaped(path, {str: [str]})
    return found
