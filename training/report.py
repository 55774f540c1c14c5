"""A table over several finished runs: mean and spread over seeds, by method and read-out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from training.config import Experiment, read_experiment
from training.files import read_json
from training.run_folder import CONFIG, SUMMARY

METRICS = ("last", "average", "forgetting")

# Settings that tell runs of one experiment apart without making them different experiments.
_RUN_ONLY = ("seed", "out", "threads", "overwrite", "device", "keep")
_RUN_ONLY_KEYS = ("data.workers", "data.cache", "data.root", "head.also", "train.eval_batch_size")


class Finished(NamedTuple):
    """A finished run: its settings and the metrics of each read-out."""

    path: Path
    experiment: Experiment
    readouts: dict[str, dict[str, Any]]


def read_run(path: Path) -> Finished:
    """Read the settings and the summary of a run folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    """
    missing = [name for name in (CONFIG, SUMMARY) if not (path / name).is_file()]
    if missing:
        msg = f"{path} holds no finished run: {', '.join(missing)} not there"
        raise FileNotFoundError(msg)
    summary = read_json(path / SUMMARY)
    return Finished(path, read_experiment(path / CONFIG), summary["readouts"])


def comparison_curves(paths: Sequence[Path]) -> dict[str, list[list[float]]]:
    """Accuracy over all classes seen after each task, a list of seeds by method.

    The read-out is the primary one of each run.

    Parameters
    ----------
    paths : sequence of Path
        Finished runs.

    Returns
    -------
    dict of str to list of list of float
        As :func:`training.figures.comparison_figure` takes them.
    """
    return {
        label: [run.readouts[run.experiment.head.readout]["curve"] for run in runs]
        for label, runs in _grouped(paths).items()
    }


def comparison_table(paths: Sequence[Path]) -> str:
    """Markdown table of runs that differ in their seed alone, a row a group and read-out.

    Parameters
    ----------
    paths : sequence of Path
        Finished runs.

    Returns
    -------
    str
        Mean and sample standard deviation in per cent; the deviation is left out for one seed.

    Raises
    ------
    FileNotFoundError
        If a folder holds no finished run.
    ValueError
        If a seed occurs twice among runs of the same settings.
    """
    lines = [
        "| method | read-out | last | average | forgetting | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for label, runs in _grouped(paths).items():
        seeds = [run.experiment.seed for run in runs]
        shared = [k for k in runs[0].readouts if all(k in run.readouts for run in runs)]
        for kind in shared:
            found = [run.readouts[kind] for run in runs]
            cells = [_spread([values[metric] for values in found]) for metric in METRICS]
            count = ", ".join(str(seed) for seed in sorted(seeds))
            lines.append(f"| {label} | {kind} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


def _grouped(paths: Sequence[Path]) -> dict[str, list[Finished]]:
    """Runs that differ in their seed alone, under a label that tells the groups apart."""
    groups: dict[str, list[Finished]] = {}
    for run in map(read_run, paths):
        groups.setdefault(_settings_key(run.experiment), []).append(run)
    for runs in groups.values():
        if len({run.experiment.seed for run in runs}) < len(runs):
            again = ", ".join(str(run.path) for run in runs)
            msg = f"these runs have the same settings and not all seeds differ: {again}"
            raise ValueError(msg)
    labels = _labels([runs[0].experiment for runs in groups.values()])
    return dict(zip(labels, groups.values(), strict=True))


def _spread(values: Sequence[float]) -> str:
    centre = f"{100 * mean(values):.2f}"
    return centre if len(values) == 1 else f"{centre} ± {100 * stdev(values):.2f}"


def _settings_key(experiment: Experiment) -> str:
    return json.dumps(_settings(experiment), sort_keys=True)


def _settings(experiment: Experiment) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in asdict(experiment).items():
        if section in _RUN_ONLY:
            continue
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": item for key, item in value.items()})
        else:
            flat[section] = value
    return {key: value for key, value in flat.items() if key not in _RUN_ONLY_KEYS}


def _labels(experiments: Sequence[Experiment]) -> list[str]:
    """Names of methods, with the settings in which groups of one method differ."""
    settings = [_settings(e) for e in experiments]
    labels = []
    for own in settings:
        rivals = [other for other in settings if other["method.name"] == own["method.name"]]
        differing = [k for k in own if any(other[k] != own[k] for other in rivals)]
        extra = ", ".join(f"{key} {own[key]}" for key in differing)
        labels.append(f"{own['method.name']} ({extra})" if extra else str(own["method.name"]))
    return labels
