"""The runs of a sweep: their settings, their folders, and which of them are done."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from training.checkpoint import has_checkpoint
from training.config import (
    Experiment,
    as_recorded,
    differing_settings,
    experiment_of,
    read_experiment,
)
from training.config.neutral import NEUTRAL
from training.logging import flat_settings
from training.methods import check_method
from training.presets import effective
from training.run_dir import CONFIG, ENVIRONMENT, file_sha256, held_by, is_finished, read_json
from training.sweeps.files import Sweep

Standing = Literal["done", "to do", "running elsewhere", "unreadable"]
_MAPPINGS = ("method.options", "backbone.options")  # settings that are mappings themselves


class Job(NamedTuple):
    """One run of a sweep."""

    name: str
    experiment: Experiment
    folder: Path


class UnreadableRunError(ValueError):
    """A run is finished, but the record of its settings cannot be read."""


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
        other settings. A finished run that cannot be read stops nothing: it fails in its turn.
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
            standing(jobs[-1])
    return jobs


def _experiment(sweep: Sweep, name: str, extra: Sequence[str]) -> Experiment:
    argv = [f"--config={config}" for config in sweep.configs]
    try:
        # What the command line says wins over the file, but a variant is what it is.
        argv += [*_flags(sweep.settings or {}), *extra, *_flags(sweep.variants[name] or {})]
        fixed = [x for x in argv if x.partition("=")[0] in ("--seed", "--out")]
        if fixed:
            msg = f"{', '.join(fixed)}: seeds and folders are the sweep's own to set"
            raise ValueError(msg)
        experiment = experiment_of(argv)
        check_method(experiment.method)
    except ValueError as error:
        msg = f"variant {name}: {error}"
        raise ValueError(msg) from error
    return experiment


def standing(job: Job) -> Standing:
    """Where the run of a job stands.

    Raises
    ------
    ValueError
        If the folder holds a finished run of other settings.
    """
    try:
        done = finished(job)
    except UnreadableRunError:
        return "unreadable"
    if done:
        return "done"
    return "to do" if held_by(job.folder) is None else "running elsewhere"


def finished(job: Job) -> bool:
    """Whether the run of a job is in its folder already.

    Raises
    ------
    UnreadableRunError
        If the folder holds a finished run whose settings cannot be read.
    ValueError
        If the folder holds a finished run of other settings.
    """
    if not is_finished(job.folder):
        return False
    try:
        found = read_experiment(job.folder / CONFIG)
    except (ValueError, OSError) as error:
        msg = f"{job.folder} holds a finished run that cannot be read, move it away: {error}"
        raise UnreadableRunError(msg) from error
    wanted = as_recorded(effective(job.experiment))
    # Where two paths lead to the same file, it does not matter how they are written.
    apart = differing_settings(found, wanted)
    there, here = flat_settings(found), flat_settings(wanted)
    alike = (*NEUTRAL, "out", "device", "threads", "overwrite", "tracker")
    differing = [k for k in here if k in apart and k not in alike and there.get(k) != here[k]]
    if "backbone.weights" in differing and _same_weights(job.folder, wanted):
        differing.remove("backbone.weights")
    if differing:
        msg = (
            f"{job.folder} holds a run with other settings ({', '.join(differing)} differ): give "
            "another --out, or move that run away"
        )
        raise ValueError(msg)
    return True


def can_go_on(job: Job) -> bool:
    """Whether the folder of a job holds an unfinished run of its settings with a checkpoint.

    It then goes on as it was begun: settings that do not decide what is learned may differ.
    """
    if is_finished(job.folder) or not (job.folder / CONFIG).is_file():
        return False
    try:
        return not _others(job) and has_checkpoint(job.folder)
    except ValueError:
        return False


def require_replaceable(job: Job) -> None:
    """Refuse to begin anew where an unfinished run of other settings could still go on.

    Raises
    ------
    ValueError
        If the folder holds one, or one whose settings cannot be read.
    """
    if not (job.folder / CONFIG).is_file() or not has_checkpoint(job.folder):
        return
    try:
        others = _others(job)
    except ValueError as error:
        msg = f"{job.folder} holds an unfinished run that cannot be read, move it away: {error}"
        raise ValueError(msg) from error
    if others:
        msg = (
            f"{job.folder} holds an unfinished run with other settings ({', '.join(others)} "
            "differ): give another --out, or move that run away"
        )
        raise ValueError(msg)


def _others(job: Job) -> list[str]:
    """Settings of the job other than those that an unfinished run was begun with."""
    found = read_experiment(job.folder / CONFIG)
    # It would look for its data where they were.
    alike = {*NEUTRAL} - {"data.root"}
    differing = differing_settings(found, as_recorded(effective(job.experiment)))
    return [name for name in differing if name not in alike]


def _same_weights(folder: Path, wanted: Experiment) -> bool:
    """Whether the file of weights has the content that the run in a folder recorded."""
    path = Path(wanted.backbone.weights or "")
    if not path.is_file() or not (folder / ENVIRONMENT).is_file():
        return False
    recorded = read_json(folder / ENVIRONMENT).get("backbone", {}).get("weights_sha256")
    return recorded is not None and recorded == _digest(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _digest(path: Path, modified: int) -> str:
    """Hash of a file: many runs ask for that of the same one."""
    del modified
    return file_sha256(path)


def _flags(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as arguments of ``loda train``; sections may be nested or dotted."""
    flags = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _MAPPINGS:
            flags += _flags(value, f"{name}.")
            continue
        try:
            text = value if isinstance(value, str) else json.dumps(value)
        except TypeError as error:  # YAML has dates, sets and bytes too
            msg = f"{name} is {value!r}, which no setting can be; text is put in quotes"
            raise ValueError(msg) from error
        flags.append(f"--{name}={text}")
    return flags
