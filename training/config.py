"""What an experiment is: its settings, and the YAML files and command lines that set them.

Every setting is declared once: as a field of a dataclass, or as an argument of the constructor of
a component (`training.components`), with its help in the docstring. jsonargparse reads both. A file
may set any part of them, and the command line overrides the file::

    loda train --config caltech101 --data.root my/images --train.lr 0.1

How a setting gets from a file to the constructor of a method::

    _layers      cuts what is given into layers: a file's base, the file, the command line
    _choose      finds the components that the layers name, so that their options are known
    _experiment  drops what was said of components that a later layer has replaced
    _parser      jsonargparse's, with exactly the options of the chosen components
    _built       puts the values into the dataclasses here, which check and keep them
    build        of a component makes an instance from its options, when it is needed

A relative path (``data.root``, ``backbone.weights``, ``out``) starts at the working directory.
"""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from importlib.resources import files
from itertools import accumulate
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
    not_negative,
    positive,
    refuse_null,
    summary,
)
from training.data.config import DataConfig
from training.methods.base import METHODS, MethodConfig
from training.run_dir import CONFIG

NEUTRAL = (
    "data.workers",
    "data.cache",
    "data.root",
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
"""Settings that do not decide what is learned: where data lie, how fast or safe a run is."""

FREE = tuple(
    name
    for name in NEUTRAL
    if name not in ("method.heldout", "train.eval_batch_size", "train.compile")
)
"""Those that change no bit of a result either: a run that goes on may have others than before."""

READOUTS = Registry(
    kind="read-out",
    paths={
        "heads": "backends.torch.readouts.Heads",
        "alignment": "backends.torch.readouts.Alignment",
        "nearest_mean": "backends.torch.readouts.NearestMean",
        "ridge": "backends.torch.readouts.Ridge",
    },
    requires=("fit", "load"),
    group="loda.readouts",
)


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
        compiler; changes the result by rounding.
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
        the class statistics), nearest_mean, ridge (on random features), or the import path of a
        class, my_package.MyReadout.
    also
        Further read-outs to evaluate on the same training.
    options
        Options of the read-outs, by name or by the last part of the import path; those that are
        left out get their defaults.
    trusted
        As of a component.
    """

    start: Literal["random", "class_mean"] = "class_mean"
    scale: float = 20.0
    margin: float = 0.0
    readout: str = "alignment"
    also: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    trusted: bool = field(default=True, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        positive("head.scale", self.scale)
        not_negative("head.margin", self.margin)
        check(len({*self.also}) == len(self.also), "head.also", self.also, "without repetition")
        by_key = {_last(name): name for name in self.names}
        alone = len(by_key) == len(self.names)
        check(alone, "head.also", self.also, "read-outs whose classes have different names")
        if strange := sorted(set(self.options) - set(by_key)):
            msg = f"head must have options of its read-outs {', '.join(by_key)}, got {strange}"
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
        return [READOUTS.build(name, self.options.get(_last(name), {})) for name in self.names]


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
        at_least("threads", self.threads, 1)


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
_UNDECLARED = {"options", "trusted"}  # of a component's own, and no setting


def _declared(kind: type) -> list[str]:
    """Names of the settings that a section has whatever component is chosen."""
    return [item.name for item in fields(kind) if item.name not in _UNDECLARED]


def effective(experiment: Experiment) -> Experiment:
    """The experiment as it is run, and recorded.

    ``ncm`` and ``ranpac_frozen`` are read-outs of an untrained backbone: nothing is trained, and
    their read-out is the primary one. The one that was asked for is evaluated beside it.

    Examples
    --------
    >>> ncm = effective(Experiment(method=MethodConfig("ncm")))
    >>> ncm.train.epochs, ncm.head.readout, ncm.head.also
    (0, 'nearest_mean', ['alignment'])
    """
    method = experiment.method
    own = _own_readout(method.name) if method.is_known else None
    if own is None:
        return experiment
    also = [name for name in experiment.head.names if name != own]
    head = replace(experiment.head, readout=own, also=also)
    return replace(experiment, train=replace(experiment.train, epochs=0), head=head)


def foreign_classes(experiment: Experiment) -> list[str]:
    """Components of an experiment that are not of this package: what ``--allow`` has to name.

    Examples
    --------
    >>> foreign_classes(Experiment())
    []
    """
    return [*_divided(_choose(_DEFAULT, flat_settings(experiment)), allow=())[1].values()]


def keeps_nothing(experiment: Experiment) -> list[str]:
    """What is said of the switches of ``keep`` that are on, but keep nothing of the method.

    Methods of other packages are not judged.

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


# Reading


def load_experiment(
    argv: Sequence[str], *, recorded: Path | None = None, allow: Collection[str] = ()
) -> Experiment:
    """Read an experiment from command-line arguments; errors leave with status 2.

    Parameters
    ----------
    argv : sequence of str
        The arguments.
    recorded : Path, optional
        The ``config.yaml`` of a run to start from, in place of the defaults.
    allow : collection of str
        Import paths that it may name; those that the arguments name are allowed as well.

    Examples
    --------
    >>> load_experiment(["--train.lr", "0.1"]).train.lr
    0.1
    """
    try:
        layers = _layers(argv)
        if recorded is None:
            return _experiment(layers)
        named = _named(_choose(_DEFAULT, layers[-1]))
        return _experiment([*_file_layers(recorded), *layers], {*allow, *named.values()})
    except ValueError as error:
        jsonargparse.ArgumentParser(prog=_PROGRAM, usage=_USAGE).error(str(error))


def experiment_of(*layers: Sequence[str] | Mapping[str, Any]) -> Experiment:
    """The experiment of some layers, later ones over earlier ones.

    Parameters
    ----------
    *layers : sequence of str or mapping
        Arguments of a command line, or sections with settings.

    Raises
    ------
    ValueError
        If a setting is unknown, of the wrong type or out of range.

    Examples
    --------
    >>> experiment_of({"method": {"rank": 4}}, ["--method", "o_lora"]).method.options["rank"]
    4
    """
    return _experiment([part for layer in layers for part in _layers(layer)])


def read_experiment(path: str | Path, allow: Collection[str] = ()) -> Experiment:
    """Read an experiment from a YAML file, such as the ``config.yaml`` of a run folder.

    Parameters
    ----------
    path : str or Path
        The file.
    allow : collection of str
        Import paths of classes of other packages that it may name. Others are not imported, and
        what they are made with is kept as it stands.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it holds an unknown key, or a value of the wrong type or out of range.
    """
    with _not_a_configuration(str(path)):
        return _experiment(_file_layers(Path(path)), allow)


def begun_experiment(path: Path, allow: Collection[str] = ()) -> Experiment:
    """The settings of a run that began in a folder.

    Parameters
    ----------
    path : Path
        The run folder.
    allow : collection of str
        As of `read_experiment`.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    if not (path / CONFIG).is_file():
        msg = f"{path} is no run folder: no {CONFIG} in it"
        raise FileNotFoundError(msg)
    return read_experiment(path / CONFIG, allow)


def experiment_from(
    values: Mapping[str, Any], source: str, allow: Collection[str] = ()
) -> Experiment:
    """The experiment whose settings `experiment_values` gave, checked as those of a file are.

    Parameters
    ----------
    values
        Sections with their settings, as JSON holds them.
    source
        Where they are from, for messages.
    allow
        As of `read_experiment`.

    Raises
    ------
    ValueError
        As `read_experiment`.

    Examples
    --------
    >>> experiment_from({"seed": 7, "train": {"lr": 1e-05}}, "here").train.lr
    1e-05
    """
    with _not_a_configuration(source):
        return _experiment(_layers(values), allow)


@contextmanager
def _not_a_configuration(source: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        msg = f"{source} is not a configuration: {str(error).removeprefix(f'{source}: ')}"
        raise ValueError(msg) from error


_Settings = dict[str, Any]  # by dotted name
_Layer = list[str] | _Settings  # arguments without --config, or what a file says


def _layers(given: Sequence[str] | Mapping[str, Any]) -> list[_Layer]:
    """Settings as layers: files go first, wherever on a command line they are named."""
    if isinstance(given, Mapping):
        return [_flat(given)]
    configs: list[_Layer] = []
    rest: list[str] = []
    arguments = iter(given)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option == "--config":
            configs += _file_layers(resolve_config(value if equals else next(arguments, "")))
        elif option.removeprefix("--") in _COMPONENTS and option.startswith("--"):
            rest.append(f"{option}.name{equals}{value}")  # --method is short for --method.name
        else:
            rest.append(argument)
    return [*configs, rest]


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[_Layer]:
    """What the bases of a file say, the most general one first, and what it says itself.

    A file may begin with ``base: NAME``, a file beside it or a configuration of the package.
    """
    if path.resolve() in above:
        msg = f"{path}: its base leads back to itself"
        raise ValueError(msg)
    values = read_yaml(path)
    if not isinstance(values, dict):
        msg = f"{path} must hold sections with settings, got {values!r:.40}"
        raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
    bases: list[_Layer] = []
    if "base" in values:
        name = values.pop("base")
        if not isinstance(name, str):
            msg = f"{path}: base must be the name of a configuration, got {name}"
            raise ValueError(msg)
        beside = path.parent / f"{name.removesuffix('.yaml')}.yaml"
        base = beside if beside.is_file() else resolve_config(name)
        bases = _file_layers(base, (*above, path.resolve()))
    try:
        return [*bases, _flat(values)]
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def _flat(values: Any) -> _Settings:
    """Settings under their dotted names: ``method: {rank: 4}`` is ``method.rank: 4``."""
    if not isinstance(values, Mapping):
        msg = f"settings must be in sections, got {values!r:.40}"
        raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
    known = _declared(Experiment)
    strange = [str(key) for key in values if str(key).partition(".")[0] not in known]
    if strange:
        msg = f"unknown settings {', '.join(strange)}; known at the top: {', '.join(known)}"
        raise ValueError(msg)
    flat: _Settings = {}
    for key, value in values.items():
        if key in _COMPONENTS and isinstance(value, str):
            flat[f"{key}.name"] = value
        elif key in _SECTIONS:
            check(isinstance(value, Mapping), key, value, "a mapping of settings")
            for name, item in value.items():
                flat |= _flat_item(f"{key}.{name}", item)
        else:
            flat |= _flat_item(str(key), value)
    return flat


def _flat_item(key: str, value: Any) -> _Settings:
    # A mapping in the section head is the options of a read-out; any other is the value of one.
    if key.startswith("head.") and isinstance(value, Mapping):
        return {f"{key}.{option}": item for option, item in value.items()}
    return {key: value}


# The settings that choose components, and with them which options there are.
_DEFAULT: _Settings = {
    **{f"{section}.name": vars(kind)["name"] for section, kind in _COMPONENTS.items()},
    "head.readout": HeadConfig.readout,
    "head.also": [],
}


def _choose(before: _Settings, layer: _Layer) -> _Settings:
    """What is chosen after a layer."""
    given = _chosen_on(layer) if isinstance(layer, list) else layer
    choice = {key: given.get(key, value) for key, value in before.items()}
    for key, value in choice.items():
        if key == "head.also":
            names = isinstance(value, list) and all(isinstance(name, str) for name in value)
            check(names, key, value, "a list of names")
        else:
            check(isinstance(value, str), key, value, "a name")
    return choice


def _chosen_on(argv: Sequence[str]) -> _Settings:
    """What a command line chooses; everything else is the parser's to read."""
    finder = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for key in _DEFAULT:
        finder.add_argument(f"--{key}", nargs="?")
    values = vars(finder.parse_known_args(argv)[0])
    # A value that is missing is reported by the parser.
    given = {key: value for key, value in values.items() if value is not None}
    if "head.also" in given:
        with suppress(yaml.YAMLError):
            given["head.also"] = yaml.safe_load(given["head.also"])
    return given


def _named(choice: _Settings) -> dict[str, str]:
    """Names of the chosen components by the prefix of their options: method, head.ridge."""
    names = {section: choice[f"{section}.name"] for section in _COMPONENTS}
    readouts = (choice["head.readout"], *choice["head.also"])
    return names | {f"head.{_last(name)}": name for name in readouts}


def _registry(prefix: str) -> Registry:
    return _COMPONENTS[prefix].registry if prefix in _COMPONENTS else READOUTS


def _own_readout(method: str) -> str | None:
    """The read-out of a method that trains nothing."""
    return getattr(METHODS.find(method), "readout", None)


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
        names.setdefault(f"head.{_last(own)}", own)
    return tuple(item for item in names.items() if item[0] not in foreign), foreign


def _experiment(layers: Sequence[_Layer], allow: Collection[str] | None = None) -> Experiment:
    """The experiment of layers, later ones over earlier ones.

    A file of a run may be a stranger's, and to import a class runs its code. So ``allow`` names the
    classes of other packages that may be imported, or is None where somebody has named all of them
    here. Options of further ones are taken out before the parser sees them, and kept as they stand.

    Where a later layer chooses another component, options of earlier layers that the new one has
    stay, and others that the old one had are dropped: they were said of the old one. What neither
    has is left for the parser to refuse.
    """
    choices = [*accumulate(layers, _choose, initial=_DEFAULT)]
    components, foreign = _divided(choices[-1], allow)
    arguments: list[str] = []
    recorded: dict[str, Any] = {}  # options of the foreign ones, by section
    for layer, choice in zip(layers, choices[1:], strict=True):
        here, foreign_here = _divided(choice, allow)
        dropped = _options(here) - _options(components)
        if isinstance(layer, list):
            arguments += _arguments_without(layer, dropped)
            continue
        settings = {key: value for key, value in layer.items() if not _is_of(key, dropped)}
        for prefix, name in foreign_here.items():
            # Nobody knows which options it has: all that its section does not declare.
            section, _, readout = prefix.partition(".")
            declared = {f"{section}.{key}" for key in _declared(_SECTIONS[section])}
            given = [k for k in settings if k.startswith(f"{prefix}.") and k not in declared]
            options = {key.removeprefix(f"{prefix}."): settings.pop(key) for key in given}
            if foreign.get(prefix) == name:
                own = recorded.setdefault(section, {})
                (own.setdefault(readout, {}) if readout else own).update(options)
        arguments.append(f"--config={_yaml(settings)}")
    try:
        values = _parser(components).parse_args(arguments).as_dict()
    except (argparse.ArgumentError, OverflowError) as error:
        raise ValueError(str(error)) from error
    return _built(values, dict(components), recorded)


def _is_of(key: str, names: Collection[str]) -> bool:
    """Whether a setting is one of some, or a part of one, such as ``backbone.options.depth``."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _arguments_without(argv: Sequence[str], dropped: Collection[str]) -> list[str]:
    """A command line without some settings, as one of a sweep is for several methods."""
    result: list[str] = []
    left_out = False
    for argument in argv:
        if argument.startswith("--"):  # else it is the value of the one before
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


_PROGRAM = "loda train"
_USAGE = "loda train [--config CONFIG] [--SETTING VALUE ...] [--overwrite] | --resume RUN"


# A report reads hundreds of experiments that choose alike, and to build the parser takes longest.
@lru_cache(maxsize=32)
def _parser(components: _Components) -> jsonargparse.ArgumentParser:
    """A parser with exactly the options of some components."""
    result = jsonargparse.ArgumentParser(
        prog=_PROGRAM,
        description="Train one class-incremental experiment and write its run folder, or go on "
        "with one that was interrupted.",
        usage=_USAGE,
        epilog="The options of the chosen method, data set, backbone and read-outs are shown; to "
        "see those of others, name them: --method o_lora --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    packaged = ", ".join(packaged_configs())
    result.add_argument(
        "--config",
        action="config",
        help=f"A YAML file, or the name of a packaged configuration: {packaged}",
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


def _built(
    values: dict[str, Any], components: Mapping[str, str], recorded: Mapping[str, Any]
) -> Experiment:
    """The experiment of parsed values, and of options of components that may not be imported."""
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
    """Write an experiment as YAML, every setting included; `read_experiment` gives it back.

    Examples
    --------
    >>> "seed: 7" in dump_experiment(Experiment(seed=7)).splitlines()
    True
    """
    return _yaml(experiment_values(experiment))


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
    """The same with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat_settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting under its dotted name.

    Examples
    --------
    >>> settings = flat_settings(Experiment(seed=3))
    >>> settings["seed"], settings["method.rank"], settings["head.alignment.epochs"]
    (3, 16, None)
    """
    return _flat(experiment_values(experiment))


def as_recorded(experiment: Experiment) -> Experiment:
    """The experiment as a run records it: with absolute paths."""
    recorded: dict[str, Any] = {name: getattr(experiment, name).recorded() for name in _COMPONENTS}
    return replace(experiment, **recorded)


def differing_settings(one: Experiment, other: Experiment) -> list[str]:
    """Dotted names of the settings in which two experiments differ as recorded, the folder aside.

    Paths that lead to the same file are the same, however they are written. Of two components
    only the name is given.

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


def _last(name: str) -> str:
    """The last part of an import path, under which the options of a read-out stand."""
    return name.rpartition(".")[2]


# Files

_CONFIGS = Path(str(files("training"))) / "configs"


def packaged_configs() -> list[str]:
    """Names of the experiments in the package, such as digits and paper/cub."""
    paths = [p for part in ("", "paper/", "native/") for p in _CONFIGS.glob(f"{part}*.yaml")]
    names = [path.relative_to(_CONFIGS).with_suffix("") for path in paths]
    return sorted(name.as_posix() for name in names if not name.name.startswith("_"))


def resolve_config(name: str) -> Path:
    """Find the file of a configuration: an existing path, else a packaged name.

    Raises
    ------
    ValueError
        If it is neither; the message lists the packaged names.
    """
    if Path(name).is_file():
        return Path(name)
    if name in packaged_configs():
        return _CONFIGS / f"{name}.yaml"
    msg = (
        f"--config must be a YAML file or a packaged configuration, got {name!r}; packaged are "
        f"{', '.join(packaged_configs())}"
    )
    raise ValueError(msg)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, if it is a simple one that says everything once.

    Of a key that stands twice, PyYAML would silently keep the last. ``method: {rank: 8}`` and
    ``method.rank: 4`` are the same key. Aliases and deep nesting are refused too: with them, a
    short text may take boundless time and memory to read.

    Raises
    ------
    ValueError
        If it is no YAML, nests deeply, repeats parts of itself by aliases, or has a key twice.
    """
    try:
        # It reads the first block at once, and may find characters there that YAML does not have.
        loader = _StrictLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            _require_once(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        msg = f"{path} is not YAML: {error}"
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


class _StrictLoader(yaml.SafeLoader):
    """Reads plain data, and numbers and dates as jsonargparse does: 1e-3 is a number."""

    deepest = 20
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            msg = f"aliases (*{self.peek_event().anchor}) are not read; write out what it means"  # type: ignore[no-untyped-call]
            raise ValueError(msg)
        self.depth += 1
        if self.depth > self.deepest:
            msg = f"settings must nest at most {self.deepest} levels deep"
            raise ValueError(msg)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# A date is text: no setting is one.
_StrictLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _StrictLoader.yaml_implicit_resolvers.items()
}


def _require_once(node: yaml.Node | None) -> None:
    """Refuse a key that stands twice in a mapping, or as ``a: {b: 1}`` and as ``a.b: 2``."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _require_once(item)
    elif isinstance(node, yaml.MappingNode):
        _require_once_below(node, "", {})


def _require_once_below(node: yaml.MappingNode, prefix: str, dotted: dict[str, int]) -> None:
    own: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # PyYAML refuses it
        line, name = key.start_mark.line + 1, f"{prefix}{key.value}"
        _once(own, (key.tag, key.value), key.value, line)
        if isinstance(value, yaml.MappingNode):
            _require_once_below(value, f"{name}.", dotted)
        else:
            _require_once(value)
            _once(dotted, name, name, line)


def _once(lines: dict[Any, int], key: Any, name: str, line: int) -> None:
    if key in lines:
        first, last = sorted((lines[key], line))
        where = f"on line {line}" if first == last else f"on lines {first} and {last}"
        msg = f"the key {name!r} stands twice, {where}; each may stand once"
        raise ValueError(msg)
    lines[key] = line


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what jsonargparse would read as a number, though plain YAML would not (1e5)."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_Dumper.add_representer(str, _represent_text)
