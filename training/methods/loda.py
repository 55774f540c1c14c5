"""LoDA and its ablations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from backends.torch import (
    LoDA,
    LoDASettings,
    TaskRecord,
    find_layers,
    random_bases,
)
from training.config import Experiment, MethodConfig
from training.config.methods import BUILT_IN, UNTRAINED
from training.methods.base import Context
from training.methods.options import read_options
from training.methods.steps import Stepper, look_ahead
from training.seeds import derive

Directions = Literal["solved", "random"]


@dataclass(frozen=True)
class LoDAOptions:
    """What is no part of LoDA, but shows what a part of it is worth.

    Parameters
    ----------
    directions
        solved from the second moments, or random ones in their place.
    """

    directions: Directions = "solved"

    def __post_init__(self) -> None:
        if self.directions not in get_args(Directions):
            allowed = ", ".join(get_args(Directions))
            msg = f"method.options directions is {self.directions!r}; allowed: {allowed}"
            raise ValueError(msg)


class LoDAMethod(Stepper):
    """LoDA (arXiv:2603.00191); the settings of ``method`` switch its parts off one by one."""

    saves_open_task = True
    sums_over_processes = True

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        self.options, self.context = read_options(config, LoDAOptions), context
        model.requires_grad_(False)
        settings = LoDASettings(
            target=config.target,
            rank=config.rank,
            general_weight=config.general_weight,
            isolated_weight=config.isolated_weight,
            down_scale=config.down_scale,
            branches=config.branches,
            isolated=config.isolated,
            ridge=config.ridge,
            energy_floor=config.energy_floor,
            recalibration=config.recalibration,
            joint=config.joint,
            gamma=config.gamma,
            history_weight=config.history_weight,
            history=config.history,
            history_decay=config.history_decay,
            heldout=config.heldout,
        )
        self.loda = LoDA(model, settings, reduce=context.reduce)
        self.radius = look_ahead(config, default=True)
        self.reduce = context.reduce

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Solve for the directions of the branches."""
        bases = None
        if self.options.directions == "random":
            loda, seed = self.loda, derive(self.context.seed, self.loda.tasks, "method")
            bases = random_bases(
                loda.settings,
                find_layers(loda.model, loda.settings.target),
                first_task=loda.tasks == 0,
                generator=torch.Generator().manual_seed(seed),
            )
        self.loda.begin_task(batches, bases=bases)

    def parameters(self) -> list[nn.Parameter]:
        """The tensors of the branches."""
        return self.loda.lora_parameters()

    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Recalibrate and merge."""
        return self.loda.end_task(batches)

    def state_dict(self) -> dict[str, Tensor]:
        """The history of second moments, and the branches of an open task."""
        return self.loda.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the history, and an open task."""
        self.loda.load_state_dict(state)


def null_lora(config: MethodConfig, model: nn.Module, context: Context) -> LoDAMethod:
    """The isolated branch alone, in the null space of the old tasks: what LoDA argues against.

    The update leaves outputs on old inputs as they are, as far as their moment has a null space.
    As in LoDA the first task, which has no past, trains a general branch.
    """
    return LoDAMethod(as_loda(config), model, context)


def as_loda(config: MethodConfig) -> MethodConfig:
    """Settings of LoDA under which it is the method of the settings: ``loda`` or ``null_lora``.

    Raises
    ------
    ValueError
        If the method is another one.

    Examples
    --------
    >>> as_loda(MethodConfig("null_lora")).isolated
    'null'
    """
    if config.name == "loda":
        return config
    if config.name != "null_lora":
        msg = f"{config.name} is not LoDA under other settings"
        raise ValueError(msg)
    gao = False if config.gao is None else config.gao
    return replace(config, branches="isolated", isolated="null", gao=gao)


def keeps_nothing(experiment: Experiment) -> list[str]:
    """What is said of the switches of ``keep`` that are on, but keep nothing of the method.

    Methods that other packages add are not judged.

    Examples
    --------
    >>> from training.config import KeepConfig
    >>> keep = KeepConfig(branches=True, moments=True, heads=True)
    >>> keeps_nothing(Experiment(method=MethodConfig("o_lora"), keep=keep))
    ['keep.moments keeps nothing: o_lora has no moments']
    """
    name, keep = experiment.method.name, experiment.keep
    found = []
    if keep.branches and name in UNTRAINED:
        found.append("branches")
    if keep.moments and name in set(BUILT_IN) - {"loda", "null_lora"}:
        found.append("moments")
    return [f"keep.{switch} keeps nothing: {name} has no {switch}" for switch in found]
