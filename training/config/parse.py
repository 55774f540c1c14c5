"""Experiments from the command line and from YAML files, and back."""

import argparse
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import jsonargparse
import yaml

from training.config.layers import packaged_configs, read_layers, resolve_config
from training.config.sections import Experiment

T = TypeVar("T")


def parser(prog: str = "loda train", *, exit_on_error: bool = True) -> jsonargparse.ArgumentParser:
    """Build the command line of an experiment: ``--config``, ``--print_config`` and every setting.

    Parameters
    ----------
    prog
        What the help calls the program.
    exit_on_error
        Print an error and leave with status 2; otherwise raise argparse.ArgumentError.
    """
    result = jsonargparse.ArgumentParser(
        prog=prog,
        description="Train one class-incremental experiment and write its run folder, or go on "
        "with one that was interrupted.",
        usage=f"{prog} [--config CONFIG] [--SETTING VALUE ...] | --resume RUN",
        allow_abbrev=False,
        exit_on_error=exit_on_error,
    )
    result.add_argument(
        "--config",
        action="config",
        help="A YAML file, or the name of a packaged configuration: "
        + ", ".join(packaged_configs()),
    )
    _add_settings(result, Experiment, "")
    return result


def load_experiment(argv: Sequence[str]) -> Experiment:
    """Read an experiment from command-line arguments; errors leave with status 2.

    Examples
    --------
    >>> load_experiment(["--train.lr", "0.1"]).train.lr
    0.1
    """
    cli = parser()
    try:
        return _build(Experiment, cli.parse_args(_resolve_names(argv)).as_dict())
    except (ValueError, OverflowError) as error:
        cli.error(str(error))


def experiment_of(argv: Sequence[str]) -> Experiment:
    """The same as `load_experiment` inside a program: errors are ValueError.

    Raises
    ------
    ValueError
        If a setting is unknown, of the wrong type or out of range.
    """
    try:
        return _parsed(_resolve_names(argv))
    except (argparse.ArgumentError, OverflowError) as error:
        raise ValueError(str(error)) from error


def read_experiment(path: str | Path) -> Experiment:
    """Read an experiment from a YAML file, such as the ``config.yaml`` of a run folder.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it holds an unknown key, or a value of the wrong type or out of range.
    """
    with _not_a_configuration(str(path)):
        return _parsed(_config_arguments(Path(path)))


def experiment_from(values: Mapping[str, Any], source: str) -> Experiment:
    """The experiment whose settings `experiment_values` gave, checked as those of a file are.

    Parameters
    ----------
    values
        Sections with their settings, as JSON holds them.
    source
        Where they are from, for messages.

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
        if not isinstance(values, Mapping):
            msg = f"it is {values!r:.40}, not sections with settings"
            raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
        text = _yaml(values)
        _refuse_strangers(text)
        return _parsed([f"--config={text}"])


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
    values = asdict(experiment)
    values["data"]["crop_scale"] = list(experiment.data.crop_scale)
    return values


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _parsed(arguments: Sequence[str]) -> Experiment:
    return _build(Experiment, parser(exit_on_error=False).parse_args(arguments).as_dict())


@contextmanager
def _not_a_configuration(source: str) -> Iterator[None]:
    try:
        yield
    except (argparse.ArgumentError, ValueError, OverflowError, RecursionError) as error:
        msg = f"{source} is not a configuration: {str(error).removeprefix(f'{source}: ')}"
        raise ValueError(msg) from error


def _resolve_names(argv: Sequence[str]) -> list[str]:
    # Files go first: what the command line says wins, wherever on it the file is named.
    configs: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name = argument.removeprefix("--config=")
        if argument == "--config":
            name = next(arguments, "")
        elif name == argument:
            rest.append(argument)
            continue
        configs += _config_arguments(resolve_config(name))
    return configs + rest


def _config_arguments(path: Path) -> list[str]:
    layers = read_layers(path)
    for text in layers:
        _refuse_strangers(text)
    if layers == [path.read_text(encoding="utf-8")]:
        return [f"--config={path}"]
    # jsonargparse takes the text of a file as well, and here there is no file of just that text.
    return [f"--config={text}" for text in layers]


def _refuse_strangers(text: str) -> None:
    # To jsonargparse, --config is one more key of a file, and it trips over its value.
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return  # reported by jsonargparse, with the line
    if not isinstance(values, dict):
        return
    if "config" in values:
        msg = "config is an option of the command line, not a setting that a file may hold."
        raise ValueError(msg)
    # jsonargparse refuses unknown settings, but lets an unknown section without any pass.
    known = [item.name for item in fields(Experiment)]
    strangers = [str(key) for key in values if str(key).partition(".")[0] not in known]
    if strangers:
        msg = f"unknown settings {', '.join(strangers)}; known at the top: {', '.join(known)}."
        raise ValueError(msg)


class _Dumper(yaml.SafeDumper):
    """Quotes what jsonargparse would read as a number, though plain YAML would not (1e5)."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_Dumper.add_representer(str, _represent_text)


def _add_settings(target: Any, kind: type, prefix: str) -> None:
    # Arguments are added one by one: reading docstrings is an optional extra of jsonargparse.
    hints, helps = get_type_hints(kind), _parameter_docs(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint):
            summary = inspect.cleandoc(hint.__doc__ or "").splitlines()[0].rstrip(".")
            group = target.add_argument_group(f"{item.name}: {summary}")
            _add_settings(group, cast("type", hint), f"{prefix}{item.name}.")
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        text = helps[item.name]
        target.add_argument(f"--{prefix}{item.name}", type=hint, default=default, help=text)


def _parameter_docs(kind: type) -> dict[str, str]:
    lines = inspect.cleandoc(kind.__doc__ or "").splitlines()
    docs: dict[str, list[str]] = {}
    name = ""
    for line in lines[lines.index("Parameters") + 2 :]:
        if line.startswith(" "):
            docs[name].append(line.strip())
        else:
            name = line
            docs[name] = []
    return {key: " ".join(text) for key, text in docs.items()}


def _build(kind: type[T], values: object, name: str = "") -> T:
    # jsonargparse checks the leaves; a section that is no mapping has none.
    if not isinstance(values, dict):
        msg = f"{name} must be a mapping of settings, got {values}."
        raise ValueError(msg)  # noqa: TRY004 - wrong content of a file, not a wrong call
    arguments = {}
    for key, hint in get_type_hints(kind).items():
        value = values[key]
        # jsonargparse lets null pass for any type.
        if value is None and hint is not Any and type(None) not in get_args(hint):
            msg = f"{name}{'.' if name else ''}{key} must have a value, got null."
            raise ValueError(msg)
        arguments[key] = _build(cast("type", hint), value, key) if is_dataclass(hint) else value
    return kind(**arguments)
