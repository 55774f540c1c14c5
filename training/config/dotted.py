"""The settings of an experiment under one name each."""

from dataclasses import asdict
from typing import Any

from training.config.sections import Experiment


def dotted_settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting under its dotted name.

    Examples
    --------
    >>> dotted_settings(Experiment(seed=3))["method.rank"]
    16
    """
    flat: dict[str, Any] = {}
    for section, value in asdict(experiment).items():
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": item for key, item in value.items()})
        else:
            flat[section] = value
    return flat
