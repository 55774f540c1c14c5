"""The continual-learning methods, all under one small interface."""

from collections.abc import Callable
from importlib.metadata import entry_points

from torch import nn

from training.config import MethodConfig
from training.config.methods import GROUP
from training.methods.base import Context, Method, MethodFactory, saves_open_task
from training.methods.frozen import Frozen
from training.methods.inflora import InfLoRA
from training.methods.loda import LoDAMethod, null_lora
from training.methods.o_lora import OLoRA
from training.methods.sd_lora import SDLoRA
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

__all__ = ["METHODS", "Context", "Method", "MethodFactory", "build_method", "saves_open_task"]


def build_method(config: MethodConfig, model: nn.Module, context: Context) -> Method:
    """The method of a configuration over a model, which it may adapt in place.

    Raises
    ------
    ValueError
        If the settings do not suit the model: a pattern that matches no layer, a rank too high,
        an unknown entry of ``method.options``.
    """
    return _factory(config.name)(config, model, context)


def _factory(name: str) -> Callable[[MethodConfig, nn.Module, Context], Method]:
    if name in METHODS:
        return METHODS[name]
    (entry,) = (e for e in entry_points(group=GROUP) if e.name == name)
    found: MethodFactory = entry.load()
    return found
