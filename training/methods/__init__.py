"""The continual-learning methods, all under one small interface."""

from collections.abc import Callable

from torch import nn

from training.config import MethodConfig
from training.methods.base import Method
from training.methods.frozen import Frozen
from training.methods.loda import LoDAMethod
from training.methods.seq_lora import SequentialLoRA

METHODS: dict[str, Callable[[MethodConfig, nn.Module, int], Method]] = {
    "loda": LoDAMethod,
    "seq_lora": SequentialLoRA,
    "frozen": Frozen,
}

__all__ = ["METHODS", "Method", "build_method"]


def build_method(config: MethodConfig, model: nn.Module, seed: int) -> Method:
    """The method of a configuration over a model, which it adapts in place.

    Raises
    ------
    ValueError
        If the settings do not suit the model: a pattern that matches no layer, a rank too high.
    """
    return METHODS[config.name](config, model, seed)
