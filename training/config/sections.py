"""The settings of an experiment, as dataclasses that check their values.

A field's entry under Parameters is also its help on the command line.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from training.config._checks import at_least, check, check_seed, not_negative, positive
from training.config.data import DataConfig
from training.config.methods import method_names

Readout = Literal["heads", "alignment", "nearest_mean", "ridge"]

PACKAGED_WEIGHTS = {"glyphs": "glyphs_vit.safetensors", "cifar_vit": "cifar_vit.safetensors"}
"""Files of the backbones that come with the package, by the name of the backbone."""

HUGGING_FACE = "hf:"
"""What the name of a backbone starts with that the library transformers builds."""

_KEEP_WEIGHTS = {
    "cache_dir",
    "dynamic_img_pad",
    "dynamic_img_size",
    "img_size",
    "in_chans",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "strict_img_size",
}
"""Options of timm, beside drop rates, under which it still loads every pretrained weight."""


@dataclass
class BackboneConfig:
    """The frozen, pretrained network.

    Parameters
    ----------
    name
        glyphs or cifar_vit (in the package, no download), the name of any timm model, or
        hf:ORGANISATION/NAME or hf:FOLDER for a vision transformer of transformers.
    weights
        A local .safetensors, .pth or .npz file with the weights; its classifier is dropped.
    options
        Further arguments for timm.create_model, such as {img_size: 32, in_chans: 1}. Those that
        change the architecture need weights, or pretrained false.
    pretrained
        Start from pretrained weights, which timm downloads if no file is given; else random ones.
    """

    name: str = "glyphs"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True

    def __post_init__(self) -> None:
        reserved = {"num_classes", "pretrained", "checkpoint_path"} & set(self.options)
        if reserved:
            msg = (
                f"backbone.options must not hold {sorted(reserved)}: the classifier is always left "
                "out, and weights are chosen by backbone.weights and backbone.pretrained."
            )
            raise ValueError(msg)
        if self.weights is not None and not self.pretrained:
            msg = "backbone.weights is given, but backbone.pretrained is false: set one of them."
            raise ValueError(msg)
        if self.name in PACKAGED_WEIGHTS and (self.weights is not None or self.options):
            msg = (
                f"backbone.name {self.name} comes with its own weights and options: to use others, "
                "give the name of a timm model, for instance --backbone.name vit_tiny_patch16_224."
            )
            raise ValueError(msg)
        if self.name.startswith(HUGGING_FACE) and (self.weights is not None or self.options):
            msg = (
                f"backbone.name {self.name} takes weights and options from its own files: leave "
                "out backbone.weights and backbone.options, or name a timm model."
            )
            raise ValueError(msg)
        # timm would download the weights first, and then drop or leave random what does not match.
        changing = sorted(k for k in self.options if k not in _KEEP_WEIGHTS and "drop" not in k)
        if changing and self.pretrained and self.weights is None:
            msg = (
                f"backbone.options {changing} change the architecture of {self.name}, which timm's "
                "pretrained weights do not fit: give a file with weights for it as "
                "--backbone.weights FILE, or start from random ones by --backbone.pretrained false."
            )
            raise ValueError(msg)


@dataclass
class MethodConfig:
    """The continual-learning method and its settings (LoDA, arXiv:2603.00191).

    Parameters
    ----------
    name
        loda; seq_lora (one plain low-rank branch, trained on); joint (the same on all tasks at
        once, the upper bound); frozen; ncm and ranpac_frozen (frozen, with nearest class means and
        ridge regression in place of training); null_lora, o_lora, inflora, sd_lora; or a method
        that another package adds.
    rank
        Rank of each branch.
    general_weight
        Weight of the general branch; halved when both branches are used.
    isolated_weight
        Weight of the isolated branch; halved when both branches are used.
    down_scale
        Factor c of the down-projections A = c U'.
    ridge
        Regularisation of the isolated subspace, relative to the mean energy of a direction.
    energy_floor
        With isolated trace_ratio: share (0 to 1) of the new-task energy within reach that the
        directions must carry; no floor when not given.
    branches
        both, general or isolated.
    isolated
        Directions of the isolated branch: pencil (generalised eigenvectors), trace_ratio (largest
        ratio of new-task to old-task energy) or null (the null space of the old tasks).
    gao
        Use gradient-aligned steps, or plain ones; when not given, as the method is published.
    radius
        Largest length of the look-ahead of a gradient-aligned step.
    recalibration
        Form of the factor of the general branch at the merge; none merges the branch as trained.
    joint
        Recalibrate both branches together rather than the general one alone.
    gamma
        Weight of the new task against the old ones in the recalibration.
    history_weight
        Weight of the old tasks in the recalibration, a number (as gamma divided by it), or mean:
        the old tasks together weigh as much as one, however many there are.
    history
        The model through which a task's moment enters the history: merged, trained (before the
        merge), or both, which counts a task twice.
    history_decay
        Factor (0 to 1) of the history before a finished task is added; 1 keeps all tasks alike.
    heldout
        Log what the chosen directions keep on images that they were not chosen on.
    target
        Pattern of the names of the linear layers to adapt.
    options
        Settings that one method alone has, such as {penalty: 0.5} of o_lora.
    """

    name: str = "loda"
    rank: int = 16
    general_weight: float = 0.5
    isolated_weight: float = 1.0
    down_scale: float = 3**-0.5
    ridge: float = 1e-2
    energy_floor: float | None = None
    branches: Literal["both", "general", "isolated"] = "both"
    isolated: Literal["pencil", "trace_ratio", "null"] = "pencil"
    gao: bool | None = None
    radius: float = 0.3
    recalibration: Literal["full", "diagonal", "box", "direction", "scalar", "none"] = "full"
    joint: bool = False
    gamma: float = 1.5
    history_weight: float | Literal["mean"] = 1.0
    history: Literal["merged", "trained", "both"] = "merged"
    history_decay: float = 1.0
    heldout: bool = True
    target: str = "*.attn.qkv"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = method_names()
        check(self.name in names, "method.name", self.name, ", ".join(names))
        at_least("method.rank", self.rank, 1)
        positive("method.down_scale", self.down_scale)
        for key in ("general_weight", "isolated_weight", "ridge", "radius", "gamma"):
            not_negative(f"method.{key}", getattr(self, key))
        for key in ("energy_floor", "history_decay"):
            value = getattr(self, key)
            check(value is None or 0 <= value <= 1, f"method.{key}", value, "from 0 to 1")
        if self.history_weight != "mean":
            not_negative("method.history_weight", self.history_weight)
        fits = self.energy_floor is None or self.isolated == "trace_ratio"
        check(
            fits, "method.energy_floor", self.energy_floor, "left out without isolated trace_ratio"
        )
        fits = not self.joint or self.recalibration != "none"
        check(fits, "method.joint", self.joint, "false with recalibration none")
        check(bool(self.target.strip()), "method.target", self.target, "a pattern of module names")


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
    """

    epochs: int = 5
    batch_size: int = 48
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["cosine", "constant"] = "cosine"
    eval_batch_size: int = 256

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
    """What of every task is kept in the run folder, beside the final model.

    Parameters
    ----------
    branches
        The trained branches before the merge.
    moments
        The second moments of the passes over the task: new, trained and merged.
    heads
        All heads after the task.
    statistics
        The class statistics of the read-outs after the task.
    """

    branches: bool = False
    moments: bool = False
    heads: bool = False
    statistics: bool = False


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
