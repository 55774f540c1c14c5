"""Running statistics of normalisation layers, such as batch norms, during a task."""

from types import MethodType

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Keeps the running statistics of a model as they are, or remembers them while they move.

    While they are frozen their layers, those with buffers ``running_mean`` or ``running_var``, stay
    in evaluation mode, whatever mode the model is put in: they normalise by the statistics that
    they have.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm1d(3)).train()
    >>> statistics = RunningStatistics(model, freeze=True)
    >>> model.train()[0].training
    False
    >>> statistics.release()
    >>> model[0].training
    True
    """

    def __init__(self, model: nn.Module, *, freeze: bool) -> None:
        layers = [
            module
            for module in model.modules()
            if any(
                module._buffers.get(name) is not None for name in ("running_mean", "running_var")
            )
        ]
        self._model, self._frozen = model, freeze
        self._modes = {layer: layer.training for layer in layers} if freeze else {}
        self._was_training = model.training
        self._before: list[tuple[Tensor, Tensor]] = []
        if freeze:
            for layer in layers:
                # The caller's loop calls train() on the whole model, once an epoch for instance.
                layer.train = MethodType(train, layer)  # type: ignore[method-assign]
                layer.eval()
        else:
            buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
            self._before = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def release(self) -> None:
        """Let the layers follow the mode of the model again."""
        same = self._model.training == self._was_training
        for layer, mode in self._modes.items():
            layer.__dict__.pop("train", None)
            layer.train(mode if same else self._model.training)
        self._modes = {}

    @torch.no_grad()
    def put_back(self) -> None:
        """Overwrite statistics that have moved with those from the beginning."""
        for buffer, before in self._before:
            buffer.copy_(before)


def train(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Stay in evaluation mode: replaces ``train`` of a layer whose statistics are frozen."""
    del mode
    return type(layer).train(layer, False)
