"""The runs of a sweep: their settings, their folders, and which of them are done."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoints import has_checkpoint
from training.config import (
    Experiment,
    as_recorded,
    differing_settings,
    experiment_of,
    read_experiment,
)
from training.config.neutral import NEUTRAL
from training.presets import effective
from training.run_folder import CHECKPOINTS, CONFIG, is_finished
from training.sweeps.files import Sweep
from training.trackers import flat_settings

_MAPPINGS = ("method.options", "backbone.options")  # settings that are mappings themselves


class Job(NamedTuple):
    """One run of a sweep."""

    name: str
    experiment: Experiment
    folder: Path


def plan(
    sweep: Sweep, out: Path, extra: Sequence[str] = (), *, only: Sequence[str] | None = None
) -> list[Job]:
    """The runs of a sweep, their settings checked; seeds change slowest.

    Parameters
    ----------
    sweep : Sweep
        Variants and seeds.
    out : Path
        Folder of the sweep; a run goes to ``out/VARIANT/seedN``.
    extra : sequence of str
        Further arguments of ``loda train`` for every run.
    only : sequence of str, optional
        Variants to run; all by default.

    Raises
    ------
    ValueError
        If there is no such variant, settings of one are wrong, or a run's folder holds a run of
        other settings.
    """
    unknown = sorted(set(only or ()) - set(sweep.variants))
    if unknown:
        msg = f"the sweep has no variants {unknown}; it has {', '.join(sweep.variants)}"
        raise ValueError(msg)
    chosen = [name for name in sweep.variants if only is None or name in only]
    variants = {name: _experiment(sweep, name, extra) for name in chosen}
    jobs = []
    for seed in sweep.seeds:
        for name, experiment in variants.items():
            folder = out / name / f"seed{seed}"
            own = replace(experiment, seed=seed, out=str(folder))
            jobs.append(Job(f"{name}, seed {seed}", own, folder))
            finished(jobs[-1])
    return jobs


def _experiment(sweep: Sweep, name: str, extra: Sequence[str]) -> Experiment:
    argv = [f"--config={config}" for config in sweep.configs]
    # What the command line says wins over the file, but a variant is what it is.
    argv += [*_flags(sweep.settings or {}), *extra, *_flags(sweep.variants[name] or {})]
    fixed = [x for x in argv if x.partition("=")[0] in ("--seed", "--out")]
    if fixed:
        msg = f"variant {name}: {', '.join(fixed)}: seeds and folders are the sweep's own to set"
        raise ValueError(msg)
    try:
        return experiment_of(argv)
    except ValueError as error:
        msg = f"variant {name}: {error}"
        raise ValueError(msg) from error


def finished(job: Job) -> bool:
    """Whether the run of a job is in its folder already.

    Raises
    ------
    ValueError
        If the folder holds a finished run of other settings.
    """
    if not is_finished(job.folder):
        return False
    found, wanted = read_experiment(job.folder / CONFIG), as_recorded(effective(job.experiment))
    there, here = flat_settings(found), flat_settings(wanted)
    alike = (*NEUTRAL, "out", "device", "threads", "overwrite", "tracker")
    differing = [key for key in here if key not in alike and there.get(key) != here[key]]
    if differing:
        msg = (
            f"{job.folder} holds a run with other settings ({', '.join(differing)} differ): give "
            "another --out, or move that run away"
        )
        raise ValueError(msg)
    return True


def can_go_on(job: Job) -> bool:
    """Whether the folder of a job holds an unfinished run of its settings with a checkpoint."""
    if is_finished(job.folder) or not (job.folder / CONFIG).is_file():
        return False
    found, wanted = read_experiment(job.folder / CONFIG), as_recorded(effective(job.experiment))
    return not differing_settings(found, wanted) and has_checkpoint(job.folder / CHECKPOINTS)


def _flags(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as arguments of ``loda train``; sections may be nested or dotted."""
    flags = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _MAPPINGS:
            flags += _flags(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flags.append(f"--{name}={text}")
    return flags
