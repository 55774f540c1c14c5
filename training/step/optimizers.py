"""The optimiser of a task and its learning rate."""

from collections.abc import Sequence

import numpy as np
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from training.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """A new optimiser over the parameters of a task; moments of an earlier one are not taken on."""
    if config.optimizer == "adam":
        return Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch, counted from 0; a cosine reaches zero after the last one.

    Examples
    --------
    >>> learning_rate(TrainConfig(epochs=2, lr=0.1), 1)
    0.05
    >>> learning_rate(TrainConfig(epochs=2, lr=0.1, schedule="constant"), 1)
    0.1
    """
    if config.schedule == "constant":
        return config.lr
    return float(config.lr * (1 + np.cos(np.pi * epoch / config.epochs)) / 2)
