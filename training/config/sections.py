"""The settings of an experiment, as dataclasses that check their values.

A field's entry under Parameters is also its help on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from training.config._checks import at_least, check, check_seed, not_negative, positive
from training.config.backbone import BackboneConfig
from training.config.data import DataConfig
from training.config.method import MethodConfig

Readout = Literal["heads", "alignment", "nearest_mean", "ridge"]


@dataclass
class TrainConfig:
    """How a task is trained: an optimiser, new for every task, and a schedule per epoch.

    Parameters
    ----------
    epochs
        Passes over each task's training images; 0 keeps the model and the heads as they start.
    batch_size
        Images a mini-batch; the last one of an epoch may be smaller.
    lr
        Learning rate of the first epoch.
    momentum
        Momentum of SGD, at least 0 and below 1; Adam does not read it.
    weight_decay
        L2 penalty.
    optimizer
        sgd or adam.
    schedule
        Learning rate over the epochs: cosine (down to zero) or constant.
    eval_batch_size
        Images a batch where no gradient is taken; changes the result by rounding at most.
    compile
        Train through torch.compile, which costs the first two tasks some time and needs a C++
        compiler; rounds otherwise.
    """

    epochs: int = 5
    batch_size: int = 48
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["cosine", "constant"] = "cosine"
    eval_batch_size: int = 256
    compile: bool = False

    def __post_init__(self) -> None:
        at_least("train.epochs", self.epochs, 0)
        at_least("train.batch_size", self.batch_size, 1)
        at_least("train.eval_batch_size", self.eval_batch_size, 1)
        positive("train.lr", self.lr)
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "at least 0 and below 1")
        not_negative("train.weight_decay", self.weight_decay)


@dataclass
class HeadConfig:
    """The cosine heads, one a task, and how classes are decided at test time.

    Parameters
    ----------
    start
        Start of a head's weights: random, or class_mean (its classes' normalised mean features).
    scale
        Factor of the cosines in the CosFace loss.
    margin
        Margin of the CosFace loss.
    readout
        The primary read-out: heads (as trained), alignment (heads retrained on Gaussian samples of
        the class statistics), nearest_mean, or ridge (on random features).
    also
        Further read-outs to evaluate on the same training.
    alignment_epochs
        Epochs of the alignment (the paper: 5); run to convergence when not given.
    alignment_shrinkage
        Shrinkage of class covariances towards the pooled one, in the alignment to convergence.
    alignment_lr
        Learning rate of the alignment.
    alignment_temperature
        Divides the normalised logits in the alignment.
    alignment_covariance
        Added to the diagonal of every class covariance.
    ridge_features
        Number of random features of the ridge read-out.
    """

    start: Literal["random", "class_mean"] = "class_mean"
    scale: float = 20.0
    margin: float = 0.0
    readout: Readout = "alignment"
    also: list[Readout] = field(default_factory=list)
    alignment_epochs: int | None = None
    alignment_shrinkage: float = 0.3
    alignment_lr: float = 0.01
    alignment_temperature: float = 0.2
    alignment_covariance: float = 1e-3
    ridge_features: int = 1000

    def __post_init__(self) -> None:
        for key in ("scale", "alignment_lr", "alignment_temperature"):
            positive(f"head.{key}", getattr(self, key))
        for key in ("margin", "alignment_covariance", "alignment_shrinkage"):
            not_negative(f"head.{key}", getattr(self, key))
        for key in ("alignment_epochs", "ridge_features"):
            at_least(f"head.{key}", getattr(self, key), 1)
        unique = len(set(self.also)) == len(self.also)
        check(unique, "head.also", self.also, "a list in which nothing occurs twice")


@dataclass
class KeepConfig:
    """What is kept in the run folder, beside the final model.

    Parameters
    ----------
    branches
        Of every task, the trained branches before the merge.
    moments
        Of every task, the second moments of the passes over it: new, trained and merged.
    heads
        Of every task, all heads after it.
    statistics
        Of every task, the class statistics of the read-outs after it.
    state
        The state that a later task starts from, as large as a checkpoint.
    figure
        The drawing of the accuracies.
    """

    branches: bool = False
    moments: bool = False
    heads: bool = False
    statistics: bool = False
    state: bool = True
    figure: bool = True


@dataclass
class CheckpointConfig:
    """How a run is saved while it goes on, so that it can be resumed; at every task in any case.

    Parameters
    ----------
    steps
        Also after this many mini-batches since the last checkpoint.
    minutes
        Also after this many minutes since the last checkpoint.
    keep
        The last checkpoints that are kept; 0 writes none.
    """

    steps: int | None = None
    minutes: float | None = 5.0
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("checkpoint.steps", self.steps, 1)
        if self.minutes is not None:
            positive("checkpoint.minutes", self.minutes)
        at_least("checkpoint.keep", self.keep, 0)


@dataclass
class Experiment:
    """One run: everything that decides its result, and where it goes.

    Parameters
    ----------
    seed
        Seed of the class order and of all training randomness.
    out
        The run folder; a new one under runs/ when not given.
    device
        auto takes a GPU if there is one.
    precision
        no (float32) or bf16 (mixed precision).
    threads
        CPU threads; torch's own choice when not given.
    overwrite
        Allow a run folder that is not empty: its files are replaced.
    tracker
        Also log to a tracker that Accelerate knows, such as tensorboard, wandb or mlflow.
    """

    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 1993
    out: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["no", "bf16"] = "no"
    threads: int | None = None
    overwrite: bool = False
    tracker: str | None = None

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        at_least("threads", self.threads, 1)
