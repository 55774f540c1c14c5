"""Read-outs: how classes are decided from features, and the options of each.

A read-out gathers statistics of every task's features (or nothing), and is fitted on them after
each task. This file loads no torch, so that a command line can show the options; the algorithms
are in the files beside it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from backends.torch.readouts.checks import check_names, finite
from backends.torch.settings import whole

# The types below stand in quotes. Postponed annotations would not do: a command line resolves
# those of a constructor by running this block, which loads torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from backends.torch.readouts.heads import CosineClassifier
    from backends.torch.readouts.ridge import RidgeClassifier, RidgeStatistics
    from backends.torch.readouts.statistics import ClassStatistics, TaskStatistics


class Classifier(Protocol):
    """A fitted read-out: decides between all classes seen."""

    def logits(self, features: "Tensor") -> "Tensor":
        """Scores (N, C) of features (N, D); the highest one names the class."""

    def tensors(self) -> "dict[str, Tensor]":
        """All that `Readout.load` needs to build it again, ready for safetensors."""


class Readout(ABC):
    """Settings of a read-out, and the fit that they define.

    Your own read-out is a subclass, whose constructor arguments are its options. It keeps no
    state: statistics and fitted classifiers belong to :class:`Readouts`.

    Attributes
    ----------
    name : str
        Name in results and files; by default that of the class.
    gathers : str or None
        Name of the statistics that it is fitted on; ``"statistics"`` are those of the classes.
        Read-outs that give the same name share one object. None if the heads are enough.
    likelihoods : bool
        Whether the softmax of its scores, over a temperature, is what it was trained to predict:
        then the scores can be turned into probabilities. False by default.

    Examples
    --------
    >>> from backends.torch.readouts import CosineClassifier
    >>> class Centred(Readout):
    ...     name, gathers = "centred", "statistics"
    ...     def fit(self, statistics, **_):
    ...         return CosineClassifier(statistics.mean - statistics.mean.mean(0))
    >>> import torch
    >>> readouts = Readouts([Centred()], dim=2)
    >>> readouts.add_task(torch.tensor([[5.0, 4.0], [4.0, 5.0]]), torch.tensor([0, 1]))
    >>> readouts.fit()["centred"].logits(torch.tensor([[3.0, 2.0]])).argmax().item()
    0
    """

    name: ClassVar[str]
    gathers: ClassVar[str | None] = None
    likelihoods: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @property
    def warm_start(self) -> bool:
        """Whether a fit starts from the classifier of the fit before, which is then saved."""
        return False

    def statistics(self, dim: int, seed: int) -> "TaskStatistics":  # noqa: ARG002
        """New, empty statistics; by default counts, means and covariances of the classes.

        Parameters
        ----------
        dim : int
            Width D of the features.
        seed : int
            Seed of everything that is drawn once for all tasks.
        """
        from backends.torch.readouts.statistics import ClassStatistics

        return ClassStatistics()

    @abstractmethod
    def fit(
        self,
        statistics: Any,
        *,
        head_weight: "Tensor | None",
        generator: "torch.Generator",
        previous: Any,
    ) -> Classifier:
        """The classifier over all classes seen so far; ``**_`` takes what is not needed.

        Parameters
        ----------
        statistics : TaskStatistics or None
            What was gathered under the name `gathers`. Only to be read.
        head_weight : Tensor, shape (C, D), or None
            Weights of the heads of all tasks, where there are heads. Only to be read.
        generator : torch.Generator
            A CPU generator for all that is drawn.
        previous : Classifier or None
            The classifier after the task before; None on the first, and without `warm_start`.
        """

    def load(self, tensors: "Mapping[str, Tensor]") -> Classifier:
        """The classifier whose `tensors` were stored, with the same logits bit for bit.

        By default one that stores a direction a class, `CosineClassifier`.

        Raises
        ------
        ValueError
            If the tensors are not those of this read-out.
        """
        check_names(tensors, {"weight"}, f"the read-out {self.name!r}")
        return _by_cosine("weight", tensors["weight"])


@dataclass(frozen=True)
class Heads(Readout):
    """The heads as they were trained, all of them side by side: the paper's own read-out."""

    name = "heads"
    likelihoods = True

    def fit(
        self,
        statistics: None = None,  # noqa: ARG002
        *,
        head_weight: "Tensor | None" = None,
        **_: Any,
    ) -> "CosineClassifier":
        """Cosines to the head weights."""
        if head_weight is None or head_weight.ndim != 2 or not len(head_weight):
            shape = None if head_weight is None else tuple(head_weight.shape)
            msg = f"head_weight must have shape (C, D) with at least one class, got {shape}"
            raise ValueError(msg)
        return _by_cosine("head weights", head_weight.detach().clone())


@dataclass(frozen=True)
class NearestMean(Readout):
    """The class whose mean feature has the largest cosine."""

    name = "nearest_mean"
    gathers = "statistics"

    def fit(self, statistics: "ClassStatistics", **_: Any) -> "CosineClassifier":
        """Cosines to the class means."""
        statistics.require_classes()
        return _by_cosine("class means", statistics.mean.clone())


@dataclass(frozen=True)
class Alignment(Readout):
    """Heads retrained on Gaussian samples of the class statistics ("classifier alignment").

    There are two ways to train. With ``epochs`` (the paper: 5) it follows the published schedule:
    every epoch draws 256 samples per class and takes as many SGD steps of 256 samples as there are
    classes. The learning rate follows a cosine, epoch by epoch. The mean of a class of task t
    (from 1) of T is multiplied by 0.9 + 0.1·t/T. Old classes start at their weights of the
    previous alignment, and the first task is not aligned.

    With ``epochs=None`` the same loss is minimised until it stops falling, so the result does not
    depend on the heads. Means are not scaled, and covariances are shrunk towards the pooled one:
    (1 - a)·S_c + a·S_pooled with a = k·D / (k·D + n_c - 1) and k = ``shrinkage``. Then λ/N is added
    to their diagonals, where λ is the ridge of a regression of the N images on the indicators of
    their classes. Of eleven from 1e-4 to 10 times tr(XᵀX) / D (X: the centred features),
    generalised cross-validation (Golub, Heath and Wahba 1979) takes the one with the least
    ‖Y - XW‖² / (N - df)², where df = 1 + tr((XᵀX + λ I)⁻¹ XᵀX), and the strongest of those that are
    equal up to a factor of 1 + 1e-6. With fewer images than features, samples of the bare
    covariances would lie in a few directions, and heads would fit just those. The heads are trained
    in the span of the images, beyond which samples are nothing but the diagonal.

    Parameters
    ----------
    epochs : int, optional
        Epochs of the published schedule (the paper: 5); without it, train to convergence.
    shrinkage : float
        Strength k of the shrinkage of class covariances towards the pooled one, at least 0; used
        when training to convergence.
    lr : float
        Learning rate of the published schedule.
    temperature : float
        Temperature τ that divides the normalised logits in the loss (paper: 0.3 for CIFAR-100,
        0.2 for CUB, ImageNet-A and -R, 0.1 for DomainNet).
    covariance : float, optional
        Added to the diagonal of every class covariance, at least 0. Without it, 1e-3 in the
        published schedule (the paper), and chosen as above when training to convergence.
    relative : bool
        Measure covariance in units of the mean of that diagonal; not with a chosen one.
    momentum : float
        Momentum of the published schedule.
    weight_decay : float
        L2 penalty of the published schedule.
    tolerance : float
        Relative fall of the loss over 50 steps below which training to convergence slows down.
    max_steps : int
        Most steps of training to convergence.
    """

    name = "alignment"
    gathers = "statistics"
    likelihoods = True

    epochs: int | None = None
    shrinkage: float = 0.3
    lr: float = 0.01
    temperature: float = 0.2
    covariance: float | None = None
    relative: bool = False
    momentum: float = 0.9
    weight_decay: float = 5e-4
    tolerance: float = 0.01
    max_steps: int = 3000

    def __post_init__(self) -> None:
        if self.epochs is not None:  # without them, training goes on until it converges
            whole("epochs", self.epochs)
        whole("max_steps", self.max_steps)
        for option in ("lr", "temperature", "tolerance"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value > 0):
                msg = f"{option} must be finite and above 0, got {value}"
                raise ValueError(msg)
        for option in ("shrinkage", "covariance", "momentum", "weight_decay"):
            value = getattr(self, option)
            if value is not None and not (math.isfinite(value) and value >= 0):
                msg = f"{option} must be finite and at least 0, got {value}"
                raise ValueError(msg)
        if self.relative and self.covariance is None and self.epochs is None:
            msg = "relative must be false where covariance is chosen, got True; set covariance"
            raise ValueError(msg)

    @property
    def warm_start(self) -> bool:
        """The published schedule starts from the weights of the alignment before."""
        return self.epochs is not None

    def fit(
        self,
        statistics: "ClassStatistics",
        *,
        generator: "torch.Generator",
        head_weight: "Tensor | None" = None,
        previous: "CosineClassifier | None" = None,
    ) -> "CosineClassifier":
        """Cosines to the retrained weights; ``head_weight`` is needed with ``epochs`` only.

        Examples
        --------
        >>> import torch
        >>> from backends.torch.readouts import ClassStatistics
        >>> statistics = ClassStatistics()
        >>> x = torch.tensor([[2.0, 0.1], [2.0, -0.1], [1.0, 2.0], [1.2, 2.0]])
        >>> statistics.add_task(x, torch.tensor([0, 0, 1, 1]))
        >>> aligned = Alignment().fit(statistics, generator=torch.Generator().manual_seed(0))
        >>> aligned.logits(x).argmax(1).tolist()
        [0, 0, 1, 1]
        """
        from backends.torch.readouts.alignment import align_heads
        from backends.torch.readouts.heads import CosineClassifier

        start = head_weight
        # As published, old classes start from their last alignment and new ones from their head.
        if head_weight is not None and previous is not None:
            start = head_weight.clone()
            start[: len(previous.weight)] = previous.weight.to(start)
        return CosineClassifier(align_heads(statistics, self, generator=generator, weight=start))


@dataclass(frozen=True)
class Compensated(Alignment):
    """Alignment on class statistics that are compensated for the drift of the features.

    `Alignment` trusts statistics of old classes from when these were learned. Here they follow the
    features of every later task, by a map that is fitted on its images
    (:class:`backends.torch.readouts.CompensatedStatistics`). With a backbone that does not move,
    both are the same. The options are those of `Alignment`.
    """

    name = "compensated"
    gathers = "compensated"

    def statistics(self, dim: int, seed: int) -> "TaskStatistics":  # noqa: ARG002
        """Counts, means and covariances that follow the features."""
        from backends.torch.readouts.statistics import CompensatedStatistics

        return CompensatedStatistics()


@dataclass(frozen=True)
class Ridge(Readout):
    """Ridge regression on random ReLU features (RanPAC, McDonnell et al., arXiv:2307.02251).

    Parameters
    ----------
    features : int
        Number of random features (the paper: 10000); memory grows with its square.
    """

    name = "ridge"
    gathers = "ridge"

    features: int = 1000

    def __post_init__(self) -> None:
        whole("features", self.features)

    def statistics(self, dim: int, seed: int) -> "RidgeStatistics":
        """Sums over the random features, which are drawn with the seed."""
        from backends.torch.readouts.ridge import RidgeStatistics

        return RidgeStatistics(dim, features=self.features, seed=seed)

    def fit(self, statistics: "RidgeStatistics", **_: Any) -> "RidgeClassifier":
        """Linear scores at the strength that was chosen on the last task.

        A last task of few images chooses poorly, and for all classes.
        """
        from backends.torch.readouts.ridge import RidgeClassifier, solve_ridge

        statistics.require_classes()
        weight = solve_ridge(statistics.gram, statistics.cross, statistics.strength)
        return RidgeClassifier(
            statistics.projection.clone().contiguous(), finite("ridge weights", weight)
        )

    def load(self, tensors: "Mapping[str, Tensor]") -> "RidgeClassifier":
        """The classifier of stored tensors."""
        from backends.torch.readouts.ridge import RidgeClassifier

        check_names(tensors, {"projection", "weight"}, f"the read-out {self.name!r}")
        return RidgeClassifier(
            finite("projection", tensors["projection"]), finite("weight", tensors["weight"])
        )


READOUTS: dict[str, type[Readout]] = {
    readout.name: readout for readout in (Heads, NearestMean, Alignment, Compensated, Ridge)
}
"""The packaged read-outs by name."""


class Readouts:
    """The read-outs of a run with their statistics, their classifiers and the state of both.

    Parameters
    ----------
    readouts : sequence of Readout
        Each name once.
    dim : int
        Width D of the features.
    seed : int, default 0
        Seed of what statistics draw once for all tasks (the random features of `Ridge`).
    keep_statistics : bool, default False
        Gather means and covariances of the classes even if no read-out is fitted on them.

    Attributes
    ----------
    statistics : dict of str to TaskStatistics
        What is gathered, by the names that the read-outs give it.
    classifiers : dict of str to Classifier
        Of the last `fit`, by read-out.

    Examples
    --------
    >>> import torch
    >>> readouts = Readouts([NearestMean(), Ridge(features=50)], dim=2)
    >>> x = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.1, 1.0], [0.0, 1.0]])
    >>> readouts.add_task(x, torch.tensor([0, 0, 1, 1]))
    >>> {name: c.logits(x).argmax(1).tolist() for name, c in readouts.fit().items()}
    {'nearest_mean': [0, 0, 1, 1], 'ridge': [0, 0, 1, 1]}
    """

    def __init__(
        self,
        readouts: Sequence[Readout],
        *,
        dim: int,
        seed: int = 0,
        keep_statistics: bool = False,
    ) -> None:
        names = [readout.name for readout in readouts]
        if len(set(names)) < len(names):
            msg = f"read-outs must have different names, got {names}"
            raise ValueError(msg)
        if parted := [name for name in names if "/" in name]:
            msg = f"names of read-outs must have no / (states use it), got {parted}"
            raise ValueError(msg)
        self.readouts = {readout.name: readout for readout in readouts}
        self.statistics: dict[str, TaskStatistics] = {}
        self.classifiers: dict[str, Classifier] = {}
        # NearestMean stands here for what it gathers; it is not fitted.
        for readout in [*readouts, NearestMean()] if keep_statistics else readouts:
            if readout.gathers is None:
                continue
            statistics = readout.statistics(dim, seed)
            statistics.width = dim
            shared = self.statistics.setdefault(readout.gathers, statistics)
            if _form(shared) != _form(statistics):
                msg = (
                    f"read-outs that gather {readout.gathers!r} share it, so they must gather it "
                    f"with the same options; {readout.name!r} has others than one before it. Give "
                    "its class another name in gathers"
                )
                raise ValueError(msg)

    @property
    def primary(self) -> str:
        """Name of the first read-out."""
        return next(iter(self.readouts))

    @property
    def compensates(self) -> bool:
        """Whether `begin_task` has to get features from the second task on."""
        return any(statistics.compensates for statistics in self.statistics.values())

    def begin_task(self, features: "Tensor") -> None:
        """Take features of a task's training images, from before anything of it is trained.

        Only statistics that follow the features need them; for others this does nothing.

        Parameters
        ----------
        features : Tensor, shape (N, D)
            In the order in which `add_task` gets those of the same images.
        """
        for statistics in self.statistics.values():
            statistics.begin(features)

    def add_task(self, features: "Tensor", labels: "Tensor", classes: int | None = None) -> None:
        """Gather a finished task; of its images, nothing is computed again.

        Parameters
        ----------
        features : Tensor, shape (N, D)
            Features of the task's training images.
        labels : Tensor, shape (N,)
            Integers that continue the numbering of the classes of earlier tasks.
        classes : int, optional
            Number of classes of the task; by default up to the highest label.

        Raises
        ------
        ValueError
            If features or labels do not fit, or those from before the task are missing where they
            are needed (`begin_task`). Nothing has been taken in then.
        """
        for statistics in self.statistics.values():
            statistics.check_task(features, labels, classes)
        for statistics in self.statistics.values():
            statistics.collect(features, labels)
            statistics.end_task(classes)

    def update(self, features: "Tensor", labels: "Tensor") -> None:
        """Add features (N, D) of new images of finished classes to the statistics.

        The heads do not change: a read-out that is fitted on nothing else decides as before.

        Raises
        ------
        ValueError
            If a label is of no finished class, or statistics of another package cannot be updated.
        """
        for statistics in self.statistics.values():
            statistics.update(features, labels)

    def fit(self, head_weight: "Tensor | None" = None, seed: int = 0) -> dict[str, Classifier]:
        """Fit all read-outs to the classes seen so far.

        Parameters
        ----------
        head_weight : Tensor, shape (C, D), optional
            Weights of the heads of all tasks (`CosineHeads.weight`).
        seed : int, default 0
            Every read-out draws from a generator of its own with this seed, so that none depends
            on which others there are.

        Returns
        -------
        dict of str to Classifier
            In the order of the read-outs.
        """
        import torch

        self.classifiers = {
            name: readout.fit(
                self.statistics.get(readout.gathers or ""),
                head_weight=head_weight,
                generator=torch.Generator().manual_seed(seed),
                previous=self.classifiers.get(name) if readout.warm_start else None,
            )
            for name, readout in self.readouts.items()
        }
        return self.classifiers

    def load(self, tensors: "Mapping[str, Tensor]") -> dict[str, Classifier]:
        """The classifiers whose `tensors` were stored.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            As `tensors` gives them.

        Raises
        ------
        ValueError
            If tensors of a read-out are missing or not its own.
        """
        groups = _by_first_part(tensors)
        self.classifiers = {
            name: readout.load(groups.get(name, {})) for name, readout in self.readouts.items()
        }
        return self.classifiers

    def tensors(self) -> "dict[str, Tensor]":
        """Tensors of all classifiers of the last `fit`, as ``readout/tensor``."""
        return _flat({name: c.tensors() for name, c in self.classifiers.items()})

    def state_dict(self) -> "dict[str, Tensor]":
        """All that the next task needs: statistics, and classifiers that a fit starts from."""
        groups = {f"gathered/{name}": s.state_dict() for name, s in self.statistics.items()}
        for name, classifier in self.classifiers.items():
            if self.readouts[name].warm_start:
                groups[f"fitted/{name}"] = classifier.tensors()
        return _flat(groups)

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Take over a state of the same read-outs.

        Raises
        ------
        ValueError
            If the state is one of other read-outs, or of features of another width. Nothing has
            been taken over then.
        """
        # All names are checked before anything is taken over.
        parts = {kind: _by_first_part(group) for kind, group in _by_first_part(state).items()}
        gathered, fitted = parts.pop("gathered", {}), parts.pop("fitted", {})
        warm = {name for name, readout in self.readouts.items() if readout.warm_start}
        if parts or gathered.keys() != self.statistics.keys() or not fitted.keys() <= warm:
            msg = (
                f"the state must be of the statistics {sorted(self.statistics)} and the read-outs "
                f"{sorted(warm)}, got {sorted(gathered)} and {sorted([*fitted, *parts])}"
            )
            raise ValueError(msg)
        loaded = {name: copy(statistics) for name, statistics in self.statistics.items()}
        for name, statistics in loaded.items():
            statistics.load_state_dict(gathered[name])
        if len({statistics.task_sizes for statistics in loaded.values()}) > 1:
            sizes = {name: statistics.task_sizes for name, statistics in loaded.items()}
            msg = f"all statistics of a state must be of the same tasks, got {sizes}"
            raise ValueError(msg)
        self.classifiers = {name: self.readouts[name].load(fitted[name]) for name in fitted}
        self.statistics = loaded

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the statistics by name: what the read-outs carry from task to task."""
        return {
            name: sum(x.numel() * x.element_size() for x in statistics.state_dict().values())
            for name, statistics in self.statistics.items()
        }


def _by_cosine(name: str, weight: "Tensor") -> "CosineClassifier":
    # Imported where the first classifier is made: reading the options needs no torch.
    from backends.torch.readouts.heads import CosineClassifier

    return CosineClassifier(finite(name, weight))


def _form(statistics: "TaskStatistics") -> tuple[type, dict[str, tuple[Any, ...]]]:
    """Kind of empty statistics, and shapes and types of what they hold."""
    tensors = statistics.tensors()
    return type(statistics), {name: (x.shape, x.dtype) for name, x in tensors.items()}


def _flat(groups: "Mapping[str, Mapping[str, Tensor]]") -> "dict[str, Tensor]":
    return {f"{group}/{name}": x for group, named in groups.items() for name, x in named.items()}


def _by_first_part(tensors: "Mapping[str, Tensor]") -> "dict[str, dict[str, Tensor]]":
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups
