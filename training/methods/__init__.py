"""The continual-learning methods, all under one small interface."""

from collections.abc import Callable
from importlib.metadata import entry_points

from torch import nn

from training.config import MethodConfig
from training.config.methods import GROUP, UNTRAINED
from training.methods.base import (
    Context,
    Method,
    MethodFactory,
    saves_open_task,
    sums_over_processes,
)
from training.methods.frozen import Frozen
from training.methods.inflora import InfLoRA, InfLoRAOptions
from training.methods.loda import LoDAMethod, LoDAOptions, null_lora
from training.methods.o_lora import OLoRA, OLoRAOptions
from training.methods.options import NoOptions, read_options
from training.methods.sd_lora import SDLoRA, SDLoRAOptions
from training.methods.seq_lora import SequentialLoRA

METHODS: dict[str, MethodFactory] = {
    "loda": LoDAMethod,
    "seq_lora": SequentialLoRA,
    "joint": SequentialLoRA,  # on a stream of one task
    "frozen": Frozen,
    "ncm": Frozen,
    "ranpac_frozen": Frozen,
    "null_lora": null_lora,
    "o_lora": OLoRA,
    "inflora": InfLoRA,
    "sd_lora": SDLoRA,
}

_OPTIONS: dict[str, type] = {
    "loda": LoDAOptions,
    "null_lora": LoDAOptions,
    "o_lora": OLoRAOptions,
    "inflora": InfLoRAOptions,
    "sd_lora": SDLoRAOptions,
}

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "MethodFactory",
    "build_method",
    "check_method",
    "saves_open_task",
    "steps_a_batch",
    "sums_over_processes",
]


def check_method(config: MethodConfig) -> None:
    """Refuse settings that no model could make right, before there is one.

    Those of a method that another package adds are its own to check.

    Raises
    ------
    ValueError
        If there is an unknown or unsuitable entry in ``method.options``, or gradient-aligned steps
        are asked of a method that trains no tensor of the backbone.
    """
    if config.name in UNTRAINED and config.gao:
        msg = (
            f"method.gao is true, but {config.name} trains no tensor of the backbone that a "
            "look-ahead could move: leave it out, or give null"
        )
        raise ValueError(msg)
    if config.name in METHODS:
        read_options(config, _OPTIONS.get(config.name, NoOptions))


def build_method(config: MethodConfig, model: nn.Module, context: Context) -> Method:
    """The method of a configuration over a model, which it may adapt in place.

    Raises
    ------
    ValueError
        If the settings do not suit the method, as `check_method` says, or the model: a pattern
        that matches no layer, a rank too high.
    """
    check_method(config)
    return _factory(config.name)(config, model, context)


def steps_a_batch(config: MethodConfig) -> int | None:
    """Optimiser steps of a mini-batch of several classes, and how often each image is passed.

    Two where steps are gradient-aligned, else one; None of a method that another package adds.
    """
    if config.name not in METHODS:
        return None
    aligned = config.name == "loda" if config.gao is None else config.gao
    return 2 if aligned and config.name not in UNTRAINED else 1


def _factory(name: str) -> Callable[[MethodConfig, nn.Module, Context], Method]:
    if name in METHODS:
        return METHODS[name]
    (entry,) = (e for e in entry_points(group=GROUP) if e.name == name)
    found: MethodFactory = entry.load()
    return found
