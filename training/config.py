"""What an experiment is: its settings, and the YAML files and command lines that set them.

Every setting is declared once: as a field of a dataclass, or as an argument of the constructor of
a component (`training.components`), with its help in the docstring. jsonargparse reads both. A file
may set any part of them, and the command line overrides the file::

    loda train --config caltech101 --data.root my/images --train.lr 0.1

How a setting gets from a file to the constructor of a method::

    _sources     lists the sources of settings: the base of a file, the file, the command line
    _choose      finds the components that the sources name, so that their options are known
    _experiment  drops options of components that a later source has replaced
    _parser      builds jsonargparse's parser, with exactly the options of the chosen components
    _assemble    puts the values into the dataclasses below, which check and keep them (the options
                 of a component by making an instance once, `components.Registry.complete`)
    build        of a component makes an instance from its options, when it is needed

Relative paths (``data.root``, ``backbone.weights``, ``out``) start at the working directory.
"""

import argparse
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from training.backbones.config import HUGGING_FACE, BackboneConfig
from training.components import (
    Component,
    Registry,
    at_least,
    check,
    check_seed,
    choices_of,
    count_of,
    not_negative,
    positive,
    refuse_null,
    summary,
    wrong_value,
)
from training.data.config import DataConfig
from training.methods.base import METHODS, MethodConfig, fact
from training.run_dir import CONFIG, MANIFEST
from training.spelling import did_you_mean, prefixed, visible
from training.yaml_files import (
    CONFIGS,
    DEFAULT,
    PHOTOS,
    as_yaml,
    packaged_configs,
    read_yaml,
    resolve_config,
)

NEUTRAL = (
    "data.workers",
    "data.cache",
    "data.root",
    "data.extensions",
    "data.download",
    "data.verify",
    "method.heldout",
    "train.eval_batch_size",
    "train.compile",
    "checkpoint.steps",
    "checkpoint.minutes",
    "checkpoint.keep",
    "keep.figure",
)
"""Settings that do not affect what is learned, except for rounding.

They say where the data are, how fast a run is and how often it is saved.
"""

FREE = tuple(
    name
    for name in NEUTRAL
    if name not in ("method.heldout", "train.eval_batch_size", "train.compile")
)
"""Those of them that leave results equal bit for bit: a resumed run may change them."""

READOUTS = Registry(
    kind="read-out",
    paths={
        "heads": "backends.torch.readouts.Heads",
        "alignment": "backends.torch.readouts.Alignment",
        "compensated": "backends.torch.readouts.Compensated",
        "nearest_mean": "backends.torch.readouts.NearestMean",
        "ridge": "backends.torch.readouts.Ridge",
    },
    requires=("fit", "load", "statistics"),
    group="loda.readouts",
    base="backends.torch.readouts.Readout",
)


@dataclass
class TrainConfig:
    """How a task is trained: a fresh optimiser for every task, a learning rate for every epoch.

    Parameters
    ----------
    epochs
        Passes over the training images of each task; 0 trains nothing.
    batch_size
        Images per mini-batch; the last one of an epoch may be smaller.
    lr
        Learning rate of the first epoch.
    momentum
        Momentum of SGD, at least 0 and below 1; ignored by Adam.
    weight_decay
        L2 penalty.
    optimizer
        sgd or adam.
    schedule
        Learning rate over the epochs: cosine (down to zero) or constant.
    eval_batch_size
        Images per batch in passes without gradients; affects results only by rounding.
    compile
        Train with torch.compile: needs a C++ compiler and slows the first two tasks down; affects
        results only by rounding.
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
    """The classifiers: a cosine head for every task, and read-outs that decide in the end.

    Parameters
    ----------
    start
        Initial weights of a head: random, or class_mean (normalised mean features of its classes).
    scale
        Factor of the cosines in the CosFace loss.
    margin
        Margin of the CosFace loss.
    readout
        The classifier that decides: heads (as trained), alignment (heads retrained on Gaussian
        samples of the class statistics), compensated (the same on statistics that follow the
        features), nearest_mean, ridge (on random features), or the import path of a class,
        my_package.MyReadout.
    also
        Other read-outs to evaluate in the same run, such as [heads, ridge].
    options
        Options of the read-outs, by name or by the last part of the import path; missing ones get
        their defaults.
    trusted
        As in Component.
    """

    start: Literal["random", "class_mean"] = "class_mean"
    scale: float = 20.0
    margin: float = 0.0
    readout: str = "compensated"
    also: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    trusted: bool = field(default=True, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        positive("head.scale", self.scale)
        not_negative("head.margin", self.margin)
        check(len({*self.also}) == len(self.also), "head.also", self.also, "without repetition")
        by_key = {_class_name(name): name for name in self.names}
        distinct = len(by_key) == len(self.names)
        check(distinct, "head.also", self.also, "read-outs whose classes have different names")
        if strange := sorted(set(self.options) - set(by_key)):
            msg = f"head may hold options of its read-outs {', '.join(by_key)} only, got {strange}"
            raise ValueError(msg)
        given, self.options = self.options, {}
        for key, name in by_key.items():
            options = given.get(key, {})
            if self.trusted or READOUTS.is_packaged(name):
                options = READOUTS.complete(name, options, f"head.{key}")
            if options:
                self.options[key] = options

    @property
    def names(self) -> list[str]:
        """Names of all read-outs, the primary one first."""
        return list(dict.fromkeys([self.readout, *self.also]))

    def build(self) -> list[Any]:
        """New read-outs, the primary one first."""
        for name in self.names:
            READOUTS.require_known(name, "head.readout", trusted=self.trusted)
        return [
            READOUTS.build(name, self.options.get(_class_name(name), {})) for name in self.names
        ]


@dataclass
class KeepConfig:
    """What is kept in the run folder besides the final model.

    Parameters
    ----------
    branches
        For every task, the trained low-rank branches, before they are merged.
    moments
        For every task, the second moments of the inputs of the adapted layers, before training,
        after it and after the merge; loda verify and loda ranks read them.
    heads
        All heads as they were after every task.
    statistics
        The class statistics after every task, as they were gathered: compensated moves its own.
    state
        What loda extend needs besides the model: moments, heads and statistics after the last
        task. Its size is said at the end.
    figure
        A figure of the accuracies.
    """

    branches: bool = False
    moments: bool = False
    heads: bool = False
    statistics: bool = False
    state: bool = True
    figure: bool = True


@dataclass
class CheckpointConfig:
    """When a run saves itself, besides after every task, so that it can be resumed.

    Parameters
    ----------
    steps
        Also save after this number of mini-batches since the last checkpoint.
    minutes
        Also save after this number of minutes since the last checkpoint.
    keep
        Number of checkpoints to keep, the newest ones; 0 writes none.
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
        Seed of the class order and of everything random in training.
    out
        The run folder; a new one under runs/ if not given.
    device
        auto uses a GPU if there is one.
    precision
        no (float32) or bf16 (mixed precision).
    threads
        Number of CPU threads; torch's default if not given.
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
    tracker: str | None = None

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        count_of("threads", self.threads, 1)
        if self.data.is_known and self.backbone.name in getattr(self.data.kind, "refuses", ()):
            msg = (
                f"backbone.name must not be {self.backbone.name} for data.name {self.data.name}: "
                "it was pretrained on such images, so nothing would be shown; choose another "
                "backbone, such as cifar_vit"
            )
            raise ValueError(msg)


_COMPONENTS: dict[str, type[Component]] = {
    kind.section: kind for kind in (DataConfig, BackboneConfig, MethodConfig)
}
_SECTIONS: dict[str, type] = {
    **_COMPONENTS,
    "train": TrainConfig,
    "head": HeadConfig,
    "keep": KeepConfig,
    "checkpoint": CheckpointConfig,
}
_UNDECLARED = {"options", "trusted"}  # fields of components that are not settings


_LISTS = {
    f"{section}.{item.name}"
    for section, kind in _SECTIONS.items()
    for item in fields(kind)
    if "list[" in str(item.type) or "tuple[" in str(item.type)
}


def _declared(kind: type) -> list[str]:
    """Names of the settings that a section has with every component."""
    return [item.name for item in fields(kind) if item.name not in _UNDECLARED]


def effective(experiment: Experiment) -> Experiment:
    """The experiment as it is run and recorded.

    ``ncm`` and ``ranpac_frozen`` are read-outs of an untrained backbone: nothing is trained, and
    their own read-out becomes the primary one. The requested read-out is evaluated as well.

    Examples
    --------
    >>> ncm = effective(Experiment(method=MethodConfig("ncm")))
    >>> ncm.train.epochs, ncm.head.readout, ncm.head.also
    (0, 'nearest_mean', ['compensated'])
    """
    method = experiment.method
    own = _own_readout(method.name) if method.is_known else None
    if own is None:
        return experiment
    also = [name for name in experiment.head.names if name != own]
    head = replace(experiment.head, readout=own, also=also)
    return replace(experiment, train=replace(experiment.train, epochs=0), head=head)


def resolved(experiment: Experiment) -> Experiment:
    """The experiment with the values of what is left to the backbone.

    These are how images are prepared and, unless ``method.target`` is set, which layers are
    adapted.

    Examples
    --------
    >>> resolved(Experiment()).data.image_size
    8
    """
    from backends.torch.settings import TIMM_QKV
    from training.backbones import preprocessing_of

    wanted = preprocessing_of(experiment.backbone)
    method, backbone = experiment.method, experiment.backbone
    target = getattr(backbone.kind, "default_target", None) if backbone.is_known else None
    if target is not None and method.is_known and method.options.get("target") == TIMM_QKV:
        method = replace(method, options={**method.options, "target": target})
    return replace(experiment, data=experiment.data.resolved(wanted), method=method)


def foreign_classes(experiment: Experiment) -> list[str]:
    """Components of an experiment from other packages: those that ``--allow`` has to name.

    Examples
    --------
    >>> foreign_classes(Experiment())
    []
    """
    return [*_divided(_choose(_DEFAULT, flat_settings(experiment)), allow=())[1].values()]


def resume_command(run: Path, experiment: Experiment) -> str:
    """The command that resumes a run; it allows the classes of other packages again.

    Examples
    --------
    >>> resume_command(Path("runs/mine"), Experiment())
    'loda train --resume runs/mine'
    """
    allowed = [part for name in foreign_classes(experiment) for part in ("--allow", name)]
    return shlex.join(["loda", "train", "--resume", str(run), *allowed])


def keeps_nothing(experiment: Experiment) -> list[str]:
    """Warnings about switches of ``keep`` that have no effect with the chosen method.

    Methods of other packages are not checked.

    Examples
    --------
    >>> keep = KeepConfig(branches=True, moments=True, heads=True)
    >>> keeps_nothing(Experiment(method=MethodConfig("o_lora"), keep=keep))
    ['keep.moments keeps nothing: o_lora has no moments']
    """
    method = experiment.method
    if not method.registry.is_packaged(method.name):
        return []
    keeps = method.kind.keeps  # type: ignore[attr-defined]
    return [
        f"keep.{switch} keeps nothing: {method.name} has no {switch}"
        for switch in ("branches", "moments")
        if getattr(experiment.keep, switch) and switch not in keeps
    ]


def refuse_idle(experiment: Experiment, given: Collection[str]) -> None:
    """Refuse settings that were given but have no effect together with the others.

    ``given`` are the dotted names of those that the user gave on the command line.

    Raises
    ------
    ValueError
        Names the setting and says why it has no effect.

    Examples
    --------
    >>> refuse_idle(Experiment(train=TrainConfig(optimizer="adam")), ["train.momentum"])
    Traceback (most recent call last):
    ...
    ValueError: train.momentum has no effect: train.optimizer is adam; leave it out
    """
    method, train = experiment.method, experiment.train
    own = _own_readout(method.name) if method.is_known else None
    trains = [f"train.{name}" for name in _declared(TrainConfig) if name != "eval_batch_size"]
    rules = [
        (own is not None, trains, f"{method.name} trains nothing"),
        (train.epochs == 0, [x for x in trains if x != "train.epochs"], "train.epochs is 0"),
        (train.optimizer == "adam", ["train.momentum"], "train.optimizer is adam"),
        (method.options.get("gao") is False, ["method.radius"], "method.gao is false"),
        (
            experiment.checkpoint.keep == 0,
            ["checkpoint.steps", "checkpoint.minutes"],
            "checkpoint.keep is 0, so no checkpoint is written",
        ),
    ]
    for holds, idle, why in rules:
        names = [name for name in idle if name in given]
        if holds and names:
            verb, it = ("has", "it") if len(names) == 1 else ("have", "them")
            msg = f"{', '.join(names)} {verb} no effect: {why}; leave {it} out"
            raise ValueError(msg)


# Reading

_PROGRAM = "loda train"


def load_experiment(
    argv: Sequence[str],
    *,
    recorded: Path | None = None,
    allow: Collection[str] = (),
    program: str = _PROGRAM,
) -> Experiment:
    """Read an experiment from command-line arguments; errors exit with status 2.

    Parameters
    ----------
    argv : sequence of str
        The arguments.
    recorded : Path, optional
        The ``config.yaml`` of a run to start from. Without it, and without ``--config``, the
        default experiment is the start, unless the arguments name other data or another backbone.
    allow : collection of str
        Import paths that the recorded file may name, besides those that the arguments name.
    program : str
        The command that an error names.

    Examples
    --------
    >>> load_experiment(["--train.lr", "0.1"]).train.lr
    0.1
    """
    try:
        sources = _sources(argv)
        if recorded is None:
            experiment = _experiment([*_default_sources(sources), *sources])
            refuse_idle(experiment, _keys(sources[-1]))
            return experiment
        named = _named(_choose(_DEFAULT, sources[-1]))
        return _experiment([*_file_sources(recorded), *sources], {*allow, *named.values()})
    except ValueError as error:
        if os.environ.get("LODA_DEBUG"):
            raise
        argparse.ArgumentParser(prog=program).exit(2, f"{program}: {visible(str(error))}\n")


def experiment_of(*sources: Sequence[str] | Mapping[str, Any]) -> Experiment:
    """Build an experiment from sources of settings; later ones override earlier ones.

    A source is the arguments of a command line, or a mapping of sections with settings.

    Raises
    ------
    ValueError
        If a setting is unknown, has the wrong type or is out of range.

    Examples
    --------
    >>> experiment_of({"method": {"rank": 4}}, ["--method", "o_lora"]).method.options["rank"]
    4
    """
    return _experiment([part for source in sources for part in _sources(source)])


def read_experiment(path: str | Path, allow: Collection[str] = ()) -> Experiment:
    """Read an experiment from a YAML file, such as the ``config.yaml`` of a run folder.

    Parameters
    ----------
    path : str or Path
        The file.
    allow : collection of str
        Import paths of third-party classes that the file may name. Others are not imported; their
        options are kept unchecked.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file holds an unknown key, or a value of the wrong type or out of range.
    """
    with _naming_source(str(path)):
        return _experiment(_file_sources(Path(path)), allow)


def begun_experiment(path: Path, allow: Collection[str] = ()) -> Experiment:
    """Settings of the run in a folder, finished or not; ``allow`` as in `read_experiment`.

    Raises
    ------
    FileNotFoundError
        If there is no run.
    """
    if not (path / CONFIG).is_file():
        msg = f"{path} is not a run folder: it has no {CONFIG}"
        raise FileNotFoundError(msg)
    return read_experiment(path / CONFIG, allow)


def experiment_from(values: Mapping[str, Any], source: str) -> Experiment:
    """Rebuild an experiment from `experiment_values`, with the same checks as for a file.

    Parameters
    ----------
    values
        Sections with their settings, as JSON holds them.
    source
        Where they come from, for messages.

    Raises
    ------
    ValueError
        As in `read_experiment`.

    Examples
    --------
    >>> experiment_from({"seed": 7, "train": {"lr": 1e-05}}, "here").train.lr
    1e-05
    """
    with _naming_source(source):
        return _experiment(_sources(values), allow=())


@contextmanager
def _naming_source(source: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        msg = f"invalid configuration {source}: {str(error).removeprefix(f'{source}: ')}"
        raise ValueError(msg) from error


_Settings = dict[str, Any]  # by dotted name
_Source = list[str] | _Settings  # arguments without --config, or the settings of a file


class _FileSettings(_Settings):
    """The settings of a file, which messages about them name."""

    def __init__(self, settings: _Settings, path: Path) -> None:
        super().__init__(settings)
        self.path = path


def _naming_file(source: _Source) -> AbstractContextManager[None]:
    """Put the file of a source, if it is one, before the message of an error."""
    return prefixed(source.path) if isinstance(source, _FileSettings) else nullcontext()


def _sources(given: Sequence[str] | Mapping[str, Any]) -> list[_Source]:
    """Settings as a list of sources: files come first, wherever the command line names them."""
    if isinstance(given, Mapping):
        return [_flat(given)]
    configs: list[_Source] = []
    rest: list[str] = []
    arguments = iter(_with_lists(given))
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option == "--config":
            path = resolve_config(value if equals else next(arguments, ""))
            *bases, own = _file_sources(path)
            if path.name == CONFIG and (path.parent / MANIFEST).is_file():
                own.pop("out", None)  # a new run with the settings of an old one has its own folder
            configs += [*bases, own]
        elif option.removeprefix("--") in _COMPONENTS and option.startswith("--"):
            rest.append(f"{option}.name{equals}{value}")  # --SECTION: short for its name
        else:
            rest.append(argument)
    return [*configs, rest]


def _with_lists(argv: Sequence[str]) -> list[str]:
    """A command line in which several numbers after a setting that takes a list are one list."""
    result: list[str] = []
    numbers: list[str] | None = None  # after such a setting
    for argument in argv:
        if numbers is None or not _is_number(argument):
            numbers = [] if argument.removeprefix("--") in _LISTS else None
        else:
            numbers.append(argument)
            if len(numbers) > 1:
                result[-1] = f"[{', '.join(numbers)}]"
                continue
        result.append(argument)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _default_sources(sources: Sequence[_Source]) -> list[_FileSettings]:
    """The default experiment, for a command line without a configuration.

    Its settings suit its own data and backbone. Whoever names others starts from the defaults of
    the settings. A folder of photos has a configuration of its own. The learning rate of either was
    chosen for its own method on its own backbone, and is left out with another one.
    """
    *configs, given = sources
    if configs or not isinstance(given, list):
        return []
    named = {**dict(*_folder_source(sources)), **_chosen_on(given)}
    photos = named.get("data.name") == "folder"
    (default,) = _file_sources(CONFIGS / (PHOTOS if photos else f"{DEFAULT}.yaml"))
    changed = {key for key, value in named.items() if value != default.get(key, value)}
    if not photos and changed & {"data.name", "backbone.name"}:
        return []
    if changed & {"method.name", "backbone.name"}:
        del default["train.lr"]
    return [default]


def _folder_source(sources: Sequence[_Source]) -> list[_Settings]:
    """The choice of a folder of images, where data.root is set before any data set is named."""
    for source in sources:
        given = _keys(source)
        if "data.name" in given:
            break
        if "data.root" in given:
            return [{"data.name": "folder"}]
    return []


def _file_sources(path: Path, above: tuple[Path, ...] = ()) -> list[_FileSettings]:
    """Settings of the bases of a file, the most general first, and then of the file itself.

    A file may have ``base: NAME``, a file in its folder or a packaged configuration.
    """
    if path.resolve() in above:
        msg = f"{path}: its chain of bases is circular; remove one base"
        raise ValueError(msg)
    values = read_yaml(path)
    if not isinstance(values, dict):
        # What it holds is not repeated: a configuration of others may name any file as its base.
        msg = f"{path} must hold sections with settings, got a {type(values).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
    bases: list[_FileSettings] = []
    if "base" in values:
        name = values.pop("base")
        # Never a path out of the folder: a configuration may come from anybody.
        beside = path.parent / f"{str(name).removesuffix('.yaml')}.yaml"
        leaves = Path(str(name)).is_absolute() or ".." in Path(str(name)).parts
        if not leaves and beside.is_file():
            base = beside
        elif name in packaged_configs():
            base = CONFIGS / f"{name}.yaml"
        else:
            msg = (
                f"{path}: base must be the name of a YAML file in its folder or of a packaged "
                f"configuration, got {name!r:.80}; packaged are {', '.join(packaged_configs())}"
            )
            raise ValueError(msg)
        bases = _file_sources(base, (*above, path.resolve()))
    with prefixed(path):
        return [*bases, _FileSettings(_flat(values), path)]


def _flat(values: Any) -> _Settings:
    """Settings under their dotted names: ``method: {rank: 4}`` is ``method.rank: 4``."""
    if not isinstance(values, Mapping):
        msg = f"settings must be in sections, got {values!r:.40}"
        raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
    known = _declared(Experiment)
    for key in values:
        if str(key).partition(".")[0] not in known:
            raise ValueError(_unknown(str(key)))
    flat: _Settings = {}
    for key, value in values.items():
        if key in _COMPONENTS and isinstance(value, str):
            flat[f"{key}.name"] = value
        elif key in _SECTIONS:
            if value is None:  # a section with nothing under it has its defaults
                continue
            check(isinstance(value, Mapping), key, value, "a mapping of settings")
            for name, item in value.items():
                flat |= _flat_item(f"{key}.{name}", item)
        else:
            flat |= _flat_item(str(key), value)
    return flat


def _unknown(key: str) -> str:
    """The message about a setting that belongs to no section."""
    flags = [name.removeprefix("--") for name in (*_RUN_OPTIONS, *_WITHOUT_VALUE)]
    names = [*_declared(Experiment), *flags]
    names += [f"{section}.{x}" for section, kind in _SECTIONS.items() for x in _declared(kind)]
    cure = did_you_mean(key, names) or "; loda train --help all lists all settings"
    return f"unknown setting {key}{cure}"


def _flat_item(key: str, value: Any) -> _Settings:
    # A mapping in the section head holds options of a read-out; elsewhere it is a value.
    if key.startswith("head.") and isinstance(value, Mapping):
        return {f"{key}.{option}": item for option, item in value.items()}
    return {key: value}


# The settings that choose components, and thereby which options exist.
_DEFAULT: _Settings = {
    **{f"{section}.name": vars(kind)["name"] for section, kind in _COMPONENTS.items()},
    "head.readout": HeadConfig.readout,
    "head.also": [],
}


def _choose(before: _Settings, source: _Source) -> _Settings:
    """The chosen components after one more source."""
    given = _chosen_on(source) if isinstance(source, list) else source
    choice = {key: given.get(key, value) for key, value in before.items()}
    for key, value in choice.items():
        if key == "head.also":
            names = isinstance(value, list) and all(isinstance(name, str) for name in value)
            check(names, key, value, "a list of names")
        else:
            check(isinstance(value, str), key, value, "a name")
    return choice


def _chosen_on(argv: Sequence[str]) -> _Settings:
    """The components that a command line names; the full parser reads everything else."""
    finder = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for key in _DEFAULT:
        finder.add_argument(f"--{key}", nargs="?")
    values = vars(finder.parse_known_args(argv)[0])
    # The full parser reports a missing value.
    given = {key: value for key, value in values.items() if value is not None}
    if "head.also" in given:
        with suppress(yaml.YAMLError):
            given["head.also"] = yaml.safe_load(given["head.also"])
    return given


def _named(choice: _Settings) -> dict[str, str]:
    """Names of the chosen components by the prefix of their options: method, head.ridge."""
    names = {section: choice[f"{section}.name"] for section in _COMPONENTS}
    readouts = (choice["head.readout"], *choice["head.also"])
    return names | {f"head.{_class_name(name)}": name for name in readouts}


def _registry(prefix: str) -> Registry:
    return _COMPONENTS[prefix].registry if prefix in _COMPONENTS else READOUTS


def _own_readout(method: str) -> str | None:
    """The read-out of a method that trains nothing."""
    own: str | None = fact(METHODS.find(method), "readout")
    return own


_Components = tuple[tuple[str, str], ...]  # prefixes of options and names, to be hashed


def _divided(
    choice: _Settings, allow: Collection[str] | None
) -> tuple[_Components, dict[str, str]]:
    """Chosen components that may be imported, and those that may not be; see `_experiment`."""
    names = _named(choice)
    foreign = {
        prefix: name
        for prefix, name in names.items()
        if allow is not None and name not in allow and not _registry(prefix).is_packaged(name)
    }
    if "method" not in foreign and (own := _own_readout(names["method"])):
        names.setdefault(f"head.{_class_name(own)}", own)
    return tuple(item for item in names.items() if item[0] not in foreign), foreign


def _experiment(sources: Sequence[_Source], allow: Collection[str] | None = None) -> Experiment:
    """Build the experiment from sources; later ones override earlier ones.

    The file of a run may come from anyone, and importing a class runs its code. So ``allow`` lists
    the third-party classes that may be imported; None allows all, because the user named them. The
    options of other classes are taken out before the parser sees them, and kept unchecked.

    If a later source chooses another component, options from earlier sources are kept if the new
    component has them. Options that only the old one had are dropped. Options that neither has are
    left in, so that the parser refuses them.
    """
    sources = [*_folder_source(sources), *sources]
    choice = _DEFAULT
    divided = []
    for source in sources:
        with _naming_file(source):
            choice = _choose(choice, source)
            divided.append(_divided(choice, allow))
            _options(divided[-1][0])  # refuses a class whose options cannot be read
    # From here on the settings are arguments for jsonargparse. A file becomes --config=TEXT, for it
    # is read without what was dropped and without what belongs to foreign classes.
    components, foreign = divided[-1] if divided else _divided(_DEFAULT, allow)
    arguments: list[str] = []
    recorded: dict[str, Any] = {}  # options of the foreign components, by section
    for source, (here, foreign_here) in zip(sources, divided, strict=True):
        with _naming_file(source):
            _refuse_unknown(source, here, foreign_here, _options(components))
        dropped = _options(here) - _options(components)
        if isinstance(source, list):
            arguments += _arguments_without(source, dropped)
            continue
        settings = {key: value for key, value in source.items() if not _is_of(key, dropped)}
        for prefix, name in foreign_here.items():
            # Its options are unknown: every setting that the section does not declare.
            section, _, readout = prefix.partition(".")
            declared = {f"{section}.{key}" for key in _declared(_SECTIONS[section])}
            given = [k for k in settings if k.startswith(f"{prefix}.") and k not in declared]
            options = {key.removeprefix(f"{prefix}."): settings.pop(key) for key in given}
            if foreign.get(prefix) == name:
                own = recorded.setdefault(section, {})
                (own.setdefault(readout, {}) if readout else own).update(options)
        arguments.append(f"--config={as_yaml(settings)}")
    values = _parsed(components, arguments, sources)
    return _assemble(values, dict(components), recorded)


def _keys(source: _Source) -> list[str]:
    """Dotted names of the settings that a source gives."""
    if not isinstance(source, list):
        return list(source)
    options = [x.removeprefix("--").partition("=")[0] for x in source if x.startswith("--")]
    return [option.removesuffix("+") for option in options]  # --head.also+=ridge adds to a list


def _refuse_unknown(
    source: _Source, here: _Components, foreign: Mapping[str, str], later: frozenset[str]
) -> None:
    """Refuse settings that a source's components do not have, nor those that replace them."""
    names = dict(here)
    known = _options(here) | later
    for key in _keys(source):
        section, _, setting = key.partition(".")
        kind = _SECTIONS.get(section)
        if kind is None or not setting:
            if isinstance(source, list):
                _require_top_level(key)
            continue
        if _is_of(setting, _declared(kind)) or _is_of(key, known):
            continue
        readout, _, option = setting.partition(".")
        prefix = f"head.{readout}" if kind is HeadConfig and option else section
        if prefix in foreign:
            if isinstance(source, list):  # a file's are kept unchecked
                _registry(prefix).require_known(foreign[prefix], prefix, trusted=False)
        elif prefix in names:
            unknown = key.removeprefix(f"{prefix}.")
            shared = [] if kind is HeadConfig else _declared(kind)[1:]  # all but the name
            _registry(prefix).refuse_unknown(names[prefix], [unknown], prefix, shared)
        else:
            chosen = [p.removeprefix("head.") for p in names if p.startswith("head.")]
            settings = [f"{section}.{name}" for name in _declared(kind)]
            close = did_you_mean(key, settings) or f"; settings of {section}: {', '.join(settings)}"
            msg = f"unknown setting {key}{close}"
            if kind is HeadConfig and option:
                msg = (
                    f"{key} needs the read-out {readout}, which is neither head.readout nor in "
                    f"head.also, got {', '.join(chosen)}; add it to head.also, or leave {key} out"
                )
            raise ValueError(msg)


def _require_top_level(option: str) -> None:
    """Refuse an option of a command line that is in no section and not one of an experiment."""
    if option in _SECTIONS:
        example = f"{option}.{_declared(_SECTIONS[option])[0]}"
        msg = f"--{option} is a section of settings: set them one by one, such as --{example}"
        raise ValueError(msg)
    known = {"config", *_declared(Experiment)}
    if option and option not in known and f"--{option}" not in {*_RUN_OPTIONS, *_WITHOUT_VALUE}:
        raise ValueError(_unknown(option))


def _parsed(
    components: _Components, arguments: Sequence[str], sources: Sequence[_Source]
) -> dict[str, Any]:
    """Values of all settings; an error names the file that it lies in."""
    parser = _parser(components)
    try:
        return dict(parser.parse_args([*arguments]).as_dict())
    except (argparse.ArgumentError, OverflowError) as error:
        said = message = str(error)
        if isinstance(error, argparse.ArgumentError):
            message = wrong_value(error, parser)
        for source in sources:
            if isinstance(source, _FileSettings) and _error_of(parser, source) == said:
                message = f"{source.path}: {message}"
                break
        if "required" in said:
            given = {key for source in sources for key in _keys(source)}
            for prefix, name in components:
                options = {x.removeprefix(f"{prefix}.") for x in given}
                _registry(prefix).require_given(name, options, prefix)
        raise ValueError(message) from error


def _error_of(parser: jsonargparse.ArgumentParser, settings: _Settings) -> str | None:
    """What the parser says of the settings of one file alone."""
    try:
        parser.parse_args([f"--config={as_yaml(settings)}"])
    except (argparse.ArgumentError, OverflowError) as error:
        return str(error)
    return None


def _is_of(key: str, names: Collection[str]) -> bool:
    """Whether a setting is in ``names``, or is part of one, such as ``backbone.options.depth``."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _arguments_without(argv: Sequence[str], dropped: Collection[str]) -> list[str]:
    """A command line without some settings: that of a sweep may set options of several methods."""
    result: list[str] = []
    left_out = False
    for argument in argv:
        if argument.startswith("--"):  # otherwise it is the value of the argument before it
            left_out = _is_of(argument.removeprefix("--").partition("=")[0], dropped)
        if not left_out:
            result.append(argument)
    return result


@lru_cache(maxsize=64)
def _options(components: _Components) -> frozenset[str]:
    """Dotted names of all options of some components."""
    return frozenset(
        f"{prefix}.{option}"
        for prefix, name in components
        for option in _registry(prefix).options(name)
    )


_USAGE = (
    "loda train [PHOTOS] [--config CONFIG] [--SETTING VALUE ...] [--overwrite] | "
    "--resume RUN [--allow CLASS ...]"
)
_DESCRIPTION = """\
Train a model on tasks that come one after another, and write a run folder.

  loda train                  the default experiment: drawn characters, 3 minutes
  loda train PHOTOS           your own images: a folder with one folder for each class
  loda train --config NAME    a packaged experiment, or a YAML file of settings
  loda train --resume RUN     go on with an interrupted run"""
_EPILOG = """\
loda train --help all       every setting of the chosen method, data set, backbone and read-outs
loda train --help SECTION   data, backbone, method, train, head, keep or checkpoint
loda train --method o_lora --help method    the settings of another method
loda train --print-config                   all settings as a YAML file"""


class _Help(jsonargparse.DefaultHelpFormatter):
    """Help in plain words: no Python types, and no defaults that mean that nothing is set."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:  # laid out already
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        if action.default in (None, argparse.SUPPRESS, []):
            return text
        default = action.default
        if not isinstance(default, str):
            flow = as_yaml(_plain(default), flow=True)
            default = flow.removesuffix("\n").removesuffix("\n...")
        return f"{text} (default: {default})".replace("%", "%%")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _OnlyShown) or not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[-1 if action.dest == "help" else 0]
        if name.removesuffix(".name").removeprefix("--") in _COMPONENTS:
            name = name.removesuffix(".name")
        if action.nargs == 0 or action.dest in ("help", "print_config"):
            return name
        return f"{name} {self._metavar(action)}"

    def _metavar(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        choices = choices_of(hint)
        if choices:
            return "{" + ",".join(choices) + "}"
        letters: dict[Any, str] = {int: "N", float: "X"}
        own = action.metavar or letters.get(hint)
        return str(own or action.dest.rpartition(".")[2].upper())


# Arguments of the command that are no settings.
_RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "--overwrite": {"action": "store_true", "help": "Replace the run in the folder --out."},
    "--overwrite-unfinished": {
        "action": "store_true",
        "help": "The same, but never a finished run.",
    },
    "--resume": {
        "type": Path,
        "metavar": "RUN",
        "help": "Go on with an interrupted run. Only settings that do not affect its result may "
        "be changed.",
    },
    "--allow": {
        "action": "append",
        "default": [],
        "metavar": "CLASS",
        "help": "With --resume: import path of a class of another package that the run may load. "
        "May be given several times.",
    },
}


def run_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the arguments of ``loda train`` that are no settings from the settings.

    A folder of images, given without an option, becomes the setting ``data.root``.

    Examples
    --------
    >>> options, settings = run_options([".", "--overwrite", "--seed=3"])
    >>> options.overwrite, options.resume, options.allow, settings
    (True, None, [], ['--data.root=.', '--seed=3'])
    """
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, usage=_USAGE, add_help=False, allow_abbrev=False
    )
    for name, details in _RUN_OPTIONS.items():
        parser.add_argument(name, **details)
    given, settings = parser.parse_known_args(argv)
    if given.overwrite_unfinished:
        given.overwrite = "unfinished"
    if given.resume is not None and given.overwrite:
        parser.error("--overwrite starts over and --resume continues: give only one of them")
    if given.resume is None and given.allow:
        parser.error("--allow works only with --resume: a command line may name any component")
    settings = _with_lists(settings)
    places = _positional(settings)
    if len(places) > 1:
        folders = ", ".join(settings[place] for place in places)
        parser.error(f"give one folder of images, got {folders}")
    for place in places:
        folder = settings[place]
        if not Path(folder).is_dir() and (
            folder in packaged_configs() or folder.endswith((".yaml", ".yml"))
        ):
            parser.error(
                f"PHOTOS must be a folder of images, got {folder}; did you mean --config {folder}?"
            )
        if (Path(folder) / CONFIG).is_file():
            parser.error(f"{folder} is a run, not a folder of images; did you mean --resume?")
        if not Path(folder).expanduser().is_dir():
            parser.error(f"PHOTOS must be a folder of images; there is no folder {folder}")
        if "data.root" in _keys(settings):
            parser.error(
                "the folder of images is given twice, as PHOTOS and as --data.root: leave one out"
            )
        settings[place] = f"--data.root={folder}"
    return given, settings


_HELP = {"-h", "--help"}
_WITHOUT_VALUE = {*_HELP, "--print-config"}
# What the short help shows.
_COMMON = {
    *("config", "overwrite", "resume", "seed", "out", "device"),
    *("data.name", "data.root", "data.increment", "data.workers", "backbone.name", "method.name"),
    *("method.rank", "train.epochs", "train.lr", "train.batch_size", "head.readout"),
}


def setting_choices() -> dict[str, tuple[str, list[str]]]:
    """Every option of ``loda train`` with its help and its values, if it has only a few.

    The options of all components of the package are included: for the completion of a shell.

    Examples
    --------
    >>> setting_choices()["--train.optimizer"]
    ('sgd or adam.', ['sgd', 'adam'])
    """
    chosen = {**_DEFAULT, "head.also": [*READOUTS.paths]}
    names: dict[str, list[str]] = {}
    for section, kind in _COMPONENTS.items():
        names[f"--{section}"] = names[f"--{section}.name"] = kind.registry.names()
    names["--config"], names["--head.readout"] = packaged_configs(), READOUTS.names()
    result: dict[str, tuple[str, list[str]]] = {f"--{section}": ("", []) for section in _COMPONENTS}
    for section, kind in _COMPONENTS.items():
        for name in (*kind.registry.paths, *kind.registry.families.values()):
            parser = _parser(_divided({**chosen, f"{section}.name": name}, None)[0])
            for action in parser._actions:
                values = choices_of(getattr(action, "_typehint", None))
                result |= dict.fromkeys(action.option_strings[:1], (action.help or "", values))
    return {name: (text, names.get(name, values)) for name, (text, values) in result.items()}


def requested_help(argv: Sequence[str]) -> str | None:
    """The help of ``loda train`` if the command line asks for it; otherwise None.

    ``--help`` shows the usual settings, ``--help all`` every setting, ``--help train`` those of a
    section; each with the value that it would have, for the components that are chosen.

    Examples
    --------
    >>> requested_help(["--seed", "3"]) is None
    True
    >>> "--train.momentum" in requested_help(["--help", "train"])
    True
    """
    places = [place for place, argument in enumerate(argv) if argument in _HELP]
    if not places:
        return None
    topic = next(iter(argv[places[0] + 1 :]), "")
    argv = [*argv[: places[0]], *argv[places[0] + 1 :]]
    choice, sources = _DEFAULT, list[_Source]()
    with suppress(ValueError):  # the help is shown whatever the settings are
        folder = [x for x in argv if not x.startswith("-") and Path(x).is_dir()][:1]
        sources = _sources([*argv, *(f"--data.root={x}" for x in folder)])
        sources = [*_folder_source(sources), *_default_sources(sources), *sources]
        for source in sources:
            choice = _choose(choice, source)
    parser = _make_parser(_divided(choice, None)[0])
    values: dict[str, Any] = {}
    with suppress(ValueError):
        values = flat_settings(_experiment(sources))
    for group in parser._action_groups:
        for action in group._group_actions:
            action.default = values.get(action.dest, action.default)
            common = topic not in _SECTIONS and action.dest in _COMMON
            if topic != "all" and action.dest.partition(".")[0] != topic and not common:
                action.help = argparse.SUPPRESS
        if all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None
    return str(parser.format_help())


def _positional(argv: Sequence[str]) -> list[int]:
    """Positions of the arguments that are neither options nor values of options."""
    places: list[int] = []
    value = False  # whether the next argument is the value of an option; all options have one
    for place, argument in enumerate(argv):
        if argument.startswith("--") or argument in _WITHOUT_VALUE:
            value = "=" not in argument and argument not in _WITHOUT_VALUE
        elif value:
            value = False
        else:
            places.append(place)
    return places


class _OnlyShown(argparse.Action):
    """An argument that the help explains and `run_options` reads; it is no setting."""

    def __call__(self, *_: Any) -> None:
        raise argparse.ArgumentError(self, "only loda train takes it; leave it out")


def _make_parser(components: _Components) -> jsonargparse.ArgumentParser:
    """A parser with exactly the options of some components."""
    result = jsonargparse.ArgumentParser(
        prog=_PROGRAM,
        description=_DESCRIPTION,
        usage=_USAGE,
        epilog=_EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
        exit_on_error=False,
        print_config="--print-config",
    )
    packaged = ", ".join(x for x in packaged_configs() if "/" not in x)
    packaged += ", native/..., paper/...."
    result.add_argument(
        "--config",
        action="config",
        help=f"A YAML file, or the name of a packaged experiment: {packaged}",
    )
    for name, details in _RUN_OPTIONS.items():
        shown = {"metavar": details.get("metavar"), "help": details["help"]}
        nargs = None if "metavar" in details else 0
        result.add_argument(
            name, action=_OnlyShown, nargs=nargs, default=argparse.SUPPRESS, **shown
        )
    result.add_class_arguments(Experiment, as_group=False, skip={*_SECTIONS})
    for section, kind in _SECTIONS.items():
        own = [item for item in components if item[0].partition(".")[0] == section]
        chosen = [f"{name}: {summary(_registry(prefix).find(name))}" for prefix, name in own]
        group = result.add_argument_group(f"{section}: {summary(kind)}", "; ".join(chosen) or None)
        group.add_class_arguments(kind, section, as_group=False, skip=_UNDECLARED)
        for prefix, name in own:
            _registry(prefix).add_options(group, name, prefix)
    return result


# A report reads hundreds of experiments with equal components; building the parser is slowest.
_parser = lru_cache(maxsize=32)(_make_parser)


def _assemble(
    values: dict[str, Any], components: Mapping[str, str], recorded: Mapping[str, Any]
) -> Experiment:
    """The experiment from parsed values and the options of components that are not imported."""
    if "method" in components and (own := _own_readout(components["method"])):
        head = values["head"]
        head["readout"], *head["also"] = dict.fromkeys([own, head["readout"], *head["also"]])
    for section, kind in _SECTIONS.items():
        options = dict(values[section])
        settings = {key: options.pop(key) for key in _declared(kind)}
        refuse_null(settings, kind, f"{section}.")
        if kind is HeadConfig or section in _COMPONENTS:
            settings["options"] = options | recorded.get(section, {})
            settings["trusted"] = section not in recorded
        values[section] = kind(**settings)
    settings = {key: values[key] for key in _declared(Experiment)}
    refuse_null(settings, Experiment, "")
    return effective(Experiment(**settings))


# Writing and comparing


def dump_experiment(experiment: Experiment) -> str:
    """An experiment as YAML, every setting included; `read_experiment` reads it back.

    Examples
    --------
    >>> "seed: 7" in dump_experiment(Experiment(seed=7)).splitlines()
    True
    """
    return as_yaml(experiment_values(experiment))


def experiment_values(experiment: Experiment) -> dict[str, Any]:
    """Every setting, by section, in types that JSON and YAML have."""
    values = {key: getattr(experiment, key) for key in _declared(Experiment)}
    for name, kind in _SECTIONS.items():
        section = values[name]
        common = {key: getattr(section, key) for key in _declared(kind)}
        values[name] = common | getattr(section, "options", {})
    plain: dict[str, Any] = _plain(values)
    return plain


def _plain(value: Any) -> Any:
    """The value with lists instead of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat_settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting under its dotted name.

    Examples
    --------
    >>> settings = flat_settings(Experiment(seed=3))
    >>> settings["seed"], settings["method.rank"], settings["head.compensated.epochs"]
    (3, 16, None)
    """
    return _flat(experiment_values(experiment))


def as_recorded(experiment: Experiment) -> Experiment:
    """A copy with absolute paths, for the record of a run."""
    recorded: dict[str, Any] = {name: getattr(experiment, name).recorded() for name in _COMPONENTS}
    return replace(experiment, **recorded)


def differing_settings(one: Experiment, other: Experiment) -> list[str]:
    """Dotted names of the settings in which two experiments differ, apart from the output folder.

    Paths that lead to the same file are equal, however they are written. If a component differs,
    only its name is listed, not its options.

    Examples
    --------
    >>> differing_settings(Experiment(seed=1, out="a"), Experiment(seed=2, out="b"))
    ['seed']
    """
    first, second = (flat_settings(as_recorded(x)) for x in (one, other))
    differing = [
        name
        for name in dict.fromkeys([*first, *second])
        if name != "out" and not _same(first.get(name, _NONE), second.get(name, _NONE))
    ]
    others = [name.removesuffix("name") for name in differing if name.endswith(".name")]
    return [
        name
        for name in differing
        if name.endswith(".name") or not any(name.startswith(other) for other in others)
    ]


_NONE = object()


def _same(one: Any, other: Any) -> bool:
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    paths = [Path(text.removeprefix(HUGGING_FACE)) for text in (one, other)]
    if not all(path.is_absolute() for path in paths):
        return False
    there = all(path.exists() for path in paths)
    return paths[0].resolve() == paths[1].resolve() or (there and paths[0].samefile(paths[1]))


def _class_name(name: str) -> str:
    """The last part of an import path: the key of the options of a read-out."""
    return name.rpartition(".")[2]
