"""Sweep files: which variants, with which seeds, from which configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from training.config.yaml_text import read_yaml

_KEYS = {"configs", "settings", "variants", "groups", "seeds", "slurm"}
_SEED_MAX = 2**32 - 1


@dataclass(frozen=True)
class Sweep:
    """Runs of one comparison: every variant with every seed.

    Runs with one seed see the same class order, mini-batches and augmentation whatever the
    variant, so differences between variants can be paired.

    Parameters
    ----------
    variants
        By name: the settings in which the variant differs.
    seeds
        Seeds of class order and training.
    configs
        Configurations that all runs start from, as ``--config`` of ``loda train``.
    settings
        Settings of all runs, over those of the configurations.
    slurm
        What submitit asks the cluster for, such as {timeout_min: 600, gpus_per_node: 1}.
    groups
        By title: the variants that a report shows together; one may be in several.
    """

    variants: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    configs: Sequence[str] = ()
    settings: Mapping[str, Any] | None = None
    slurm: Mapping[str, Any] | None = None
    groups: Mapping[str, Sequence[str]] | None = None


def packaged_sweeps() -> list[str]:
    """Names of the sweeps in the package."""
    folder = files("training").joinpath("configs", "sweeps")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())


def read_sweep(source: str | Path) -> Sweep:
    """Read a sweep from a YAML file, or a packaged one by its name.

    Raises
    ------
    ValueError
        If there is no such sweep, or the file does not hold one, or holds a key twice.
    """
    path = Path(source)
    if not path.is_file():
        if str(source) not in packaged_sweeps():
            known = ", ".join(packaged_sweeps())
            msg = f"no sweep {str(source)!r}: give a YAML file, or a packaged one ({known})"
            raise ValueError(msg)
        path = Path(str(files("training").joinpath("configs", "sweeps", f"{source}.yaml")))
    content = read_yaml(path)
    if not isinstance(content, dict) or not {"variants", "seeds"} <= set(content) <= _KEYS:
        there = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        msg = (
            f"{path}: a sweep has variants and seeds, and may have configs, settings, groups and "
            f"slurm; found {there}"
        )
        raise ValueError(msg)
    variants = content["variants"]
    if isinstance(variants, list) and all(isinstance(name, str) for name in variants):
        # Plain names are names of methods.
        variants = {name: {"method.name": name} for name in variants}
    sweep = Sweep(**{**content, "variants": variants})
    _check(sweep, path)
    return sweep


def _check(sweep: Sweep, path: Path) -> None:
    fine = {
        "variants": isinstance(sweep.variants, dict)
        and bool(sweep.variants)
        and all(isinstance(own, dict | None) for own in sweep.variants.values())
        # A name becomes the name of a folder.
        and all(isinstance(name, str) and _plain(name) for name in sweep.variants)
        and len({str(name).casefold() for name in sweep.variants}) == len(sweep.variants),
        "seeds": isinstance(sweep.seeds, list)
        and len(set(map(str, sweep.seeds))) == len(sweep.seeds) > 0
        and all(type(seed) is int and 0 <= seed <= _SEED_MAX for seed in sweep.seeds),
        "configs": isinstance(sweep.configs, list | tuple)
        and all(isinstance(name, str) for name in sweep.configs),
        "settings": isinstance(sweep.settings, dict | None),
        "slurm": isinstance(sweep.slurm, dict | None),
        "groups": sweep.groups is None
        or (
            isinstance(sweep.groups, dict)
            and all(isinstance(title, str) and title.strip() for title in sweep.groups)
            and all(isinstance(part, list) and part for part in sweep.groups.values())
            and all(_known(part, sweep.variants) for part in sweep.groups.values())
        ),
    }
    rules = {
        "variants": "different names (letters, digits, . _ -) with a mapping of settings each",
        "seeds": f"a list of different whole numbers from 0 to {_SEED_MAX}",
        "configs": "a list of configurations",
        "settings": "a mapping of settings",
        "slurm": "a mapping of job parameters",
        "groups": "lists of different variants of the sweep, each under a title",
    }
    for key, sound in fine.items():
        if not sound:
            msg = f"{path}: {key} is {getattr(sweep, key)!r}; allowed: {rules[key]}"
            raise ValueError(msg)


def _known(names: Sequence[Any], variants: Any) -> bool:
    fine = all(isinstance(name, str) and name in variants for name in names)
    return fine and len(set(names)) == len(names)


def _plain(name: str) -> bool:
    fine = all(c.isalnum() or c in "._-" for c in name)
    return (
        fine
        and name.casefold() not in ("", ".", "..", "logs", "groups.json")
        and not name.startswith("-")
    )
