"""The command ``loda``: every command, its arguments and what it prints.

Nothing heavy is imported before a command needs it: neither torch for help, reports and sweeps, nor
anything outside the standard library for ``loda --help``.
"""

import argparse
import codecs
import io
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from training.spelling import did_you_mean, visible

# Modules that the train extra installs.
_TRAIN = (
    *("torch", "torchvision", "timm", "accelerate", "jinja2", "jsonargparse", "matplotlib"),
    *("numpy", "pandas", "PIL", "rich", "safetensors", "scipy", "sklearn", "yaml"),
)

_USAGE_ERROR = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141

_Act = Callable[[argparse.Namespace], int | None]
_Argument = tuple[tuple[str, ...], dict[str, Any]]  # names and details, as argparse takes them
_COMMANDS: dict[str, tuple[_Act, tuple[_Argument, ...], dict[str, Any]]] = {}
_GROUPS = {
    "train": ("train", "extend", "sweep"),
    "use a trained model": ("predict", "eval", "export"),
    "compare runs": ("report", "bundle", "analyse"),
    "check": ("data", "verify", "ranks"),
    "set up": ("completion",),
}
# Commands that take settings of an experiment besides their own arguments.
_TAKE_SETTINGS = ("train", "extend", "sweep")


def _arg(*names: str, **details: Any) -> _Argument:
    return names, details


def _command(
    name: str, summary: str, *arguments: _Argument, **details: Any
) -> Callable[[_Act], _Act]:
    """Register a function as a command; it gets the parsed arguments. Help keeps this order."""

    def add(act: _Act) -> _Act:
        _COMMANDS[name] = act, arguments, {"help": summary, **details}
        return act

    return add


_RUN = _arg("run", type=Path, metavar="RUN", help="the run folder")
_RUNS = _arg(
    "runs",
    nargs="+",
    metavar="[NAME=]RUN",
    help="run folders, folders that hold runs, or files written by loda bundle",
)
_OVERWRITE = _arg("--overwrite", action="store_true", help="replace files that are there")
_ROOT = _arg("--root", help="folder of the images, if it has moved since training")
_ALLOW = _arg(
    "--allow",
    action="append",
    default=[],
    metavar="CLASS",
    help="import path of a class of another package that the run may load; may be repeated",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        0 on success; 1 if ``verify`` or ``data check`` finds a problem or a run of a sweep fails;
        2 for errors that the user can fix (settings, data, files), reported as one line on
        standard error; 130 after Ctrl-C (143 after SIGTERM and 129 after SIGHUP, as SystemExit);
        141 if the reader of the output has closed the pipe.
    """
    _print_on_any_console()
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    command = arguments.command
    if command is None:
        parser.print_help()
        return 0
    if command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error(
            f"loda {command} runs in one process: start it without torchrun or accelerate launch"
        )
    if rest and command not in _TAKE_SETTINGS:
        options = [x for names, _ in _COMMANDS[command][1] for x in names if x.startswith("-")]
        cure = did_you_mean(rest[0].partition("=")[0], options)
        parser.error(f"loda {command} has no {' '.join(rest)}{cure}")
    missing = [name for name in _TRAIN if find_spec(name) is None]
    if missing:
        _say(
            f"loda {command} needs {', '.join(missing)}, which the base install leaves out: "
            "pip install 'loda[train]'"
        )
        return _USAGE_ERROR
    try:
        arguments.settings = rest
        if "run" in arguments:
            _require_run(arguments.run)  # before torch is imported
        with _brief_warnings():
            status = arguments.act(arguments) or 0
        sys.stdout.flush()  # here an error of the output can still be told
    except KeyboardInterrupt as stop:
        _say(f"loda {command}: interrupted{f'; {stop}' if str(stop) else ''}")
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output (head, say) has closed the pipe
        _drop_output()
        return _BROKEN_PIPE
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        lacks_memory = _lacks_memory(error)
        foreseen = ValueError, OSError, FloatingPointError, ModuleNotFoundError
        if os.environ.get("LODA_DEBUG") or not (isinstance(error, foreseen) or lacks_memory):
            raise
        _say(f"loda {command}: {_OUT_OF_MEMORY if lacks_memory else _one_line(str(error))}")
        try:
            sys.stdout.flush()
        except OSError:  # the output itself cannot be written, on a full disk say
            _drop_output()
        return _USAGE_ERROR
    return status


# Characters of our own texts, for consoles whose encoding lacks them; besides Greek letters.
_PLAIN = {
    **dict.fromkeys("–−", "-"),
    "·": ".",
    "Λ": "Lambda",  # LAMDA in Unicode, as λ
    "λ": "lambda",
    "‖": "||",
    "±": "+-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "…": "...",
    "→": "->",
}


def _plain(character: str) -> str:
    """A character in ASCII: names of Greek letters, U^T for an index above."""
    if character in _PLAIN:
        return _PLAIN[character]
    greek = re.fullmatch(
        r"GREEK (CAPITAL|SMALL) LETTER (?:FINAL )?(\w+)", unicodedata.name(character, "")
    )
    if greek:
        return greek[2].capitalize() if greek[1] == "CAPITAL" else greek[2].lower()
    index = re.fullmatch(r"<(super|sub)> (\w{4})", unicodedata.decomposition(character))
    if index:
        return {"super": "^", "sub": "_"}[index[1]] + chr(int(index[2], 16))
    # What is left is in names of files and classes: escaped, not lost.
    return character.encode("ascii", "backslashreplace").decode("ascii")


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """What is printed for characters that a console cannot show; an error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_plain, text)), error.end


def _print_on_any_console() -> None:
    """Replace characters that the encoding of the output lacks: no command fails for one."""
    codecs.register_error("loda", _replacement)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="loda")


@contextmanager
def _brief_warnings() -> Iterator[None]:
    """Show warnings as one line without a place in the code, unless that is asked for."""
    ordinary = warnings.formatwarning
    if not os.environ.get("LODA_DEBUG"):
        warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = ordinary


def _one_line(text: str) -> str:
    return visible(" ".join(line.strip() for line in text.splitlines()))


def _drop_output() -> None:
    """Let what is still buffered go nowhere, so that flushing it at the end cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_OUT_OF_MEMORY = (
    "out of memory: lower train.batch_size, train.eval_batch_size or data.workers, or set "
    "data.cache false; a run that has a checkpoint goes on with loda train --resume RUN"
)
# In the words of the C library, C++, Python's threads and the GPU's libraries.
_NO_MEMORY = ("allocate memory", "bad_alloc", "start new thread", "map segment", "ALLOC_FAILED")


def _lacks_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a CPU or GPU, has run out of memory."""
    # By name: torch need not be imported here. On a CPU it raises a plain RuntimeError.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = str(error)
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(x in said for x in _NO_MEMORY)


class _Parser(argparse.ArgumentParser):
    """A parser without abbreviations that suggests the name that was meant."""

    def __init__(self, **details: Any) -> None:
        super().__init__(allow_abbrev=False, **details)
        self._positionals.title = "arguments"

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with status 2."""
        chosen = re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if chosen:
            what, given, choices = chosen.groups()
            names = [name.strip("' ") for name in choices.split(",")]
            cure = did_you_mean(given, names)
            if what in ("COMMAND", "ACTION"):
                cure = cure or f"; choose from {', '.join(names)}"
                message = f"there is no {what.lower()} {given}{cure}"
            else:
                message = f"{what} must be one of {', '.join(names)}, got {given}{cure}"
        typed = re.match(r"argument (\S+): invalid (\w+) value: '(.*)'", message)
        if typed:
            name, kind, given = typed.groups()
            wanted = {"int": "a whole number", "float": "a number"}.get(kind, f"a {kind}")
            message = f"{name} must be {wanted}, got {given}"
        super().error(visible(message))


class _Program(_Parser):
    """The parser of the whole program; its help shows the commands in groups."""

    def format_help(self) -> str:
        """The help, one line a command."""
        width = max(map(len, _COMMANDS))
        lines = ["usage: loda COMMAND ...", "", str(self.description)]
        for title, names in _GROUPS.items():
            lines += ["", f"{title}:"]
            lines += [f"  {name:<{width}}  {_COMMANDS[name][2]['help']}" for name in names]
        lines += ["", "loda COMMAND --help explains a command; loda --version shows the version."]
        return "\n".join([*lines, str(self.epilog), ""])


def _parser() -> argparse.ArgumentParser:
    parser = _Program(
        prog="loda",
        description="Continual learning of pretrained vision transformers with LoDA.",
        epilog="With LODA_DEBUG=1 in the environment an error shows its traceback.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (act, arguments, details) in _COMMANDS.items():
        what = str(details["help"])
        command = commands.add_parser(name, description=f"{what[0].upper()}{what[1:]}.", **details)
        if act is _data_check:  # the only command of two words
            what = "decode every image, compare the splits and report problems"
            actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
            command = actions.add_parser(
                "check", help=what, description=f"{what[0].upper()}{what[1:]}."
            )
        for names, options in arguments:
            command.add_argument(*names, **options)
        command.set_defaults(act=act)
    return parser


def _version() -> str:
    try:
        return f"loda {version('loda')}"
    except PackageNotFoundError:
        return "loda (not installed)"


def _say(*lines: str) -> None:
    for line in lines:
        print(visible(line), file=sys.stderr)


def _print(*lines: str) -> None:
    for line in lines:
        print(visible(line))


def _require_run(run: Path) -> None:
    if not run.is_dir():  # the code that loads the folder checks its contents
        msg = f"no run folder {run}"
        raise FileNotFoundError(msg)


# Training


# The settings have their own parser, which also prints their help.
@_command("train", "train a model on tasks that come one after another", add_help=False)
def _train(arguments: argparse.Namespace) -> None:
    from training.config import keeps_nothing, load_experiment, requested_help, run_options

    if (text := requested_help(arguments.settings)) is not None:
        print(text, end="")
        return
    given, settings = run_options(arguments.settings)
    if given.resume is not None:
        _resume(given.resume, settings, given.allow)
        return
    # Read the settings first, so that help and errors need not wait for torch.
    experiment = load_experiment(settings)
    if _is_first_process():
        _say(*(f"loda train: {note}" for note in keeps_nothing(experiment)))
        from training.overview import data_name

        # torch takes seconds to load, and a large folder of images to read.
        data, backbone = data_name(experiment), experiment.backbone.name
        _print(f"{experiment.method.name} on {data} with {backbone}: loading ...")
        sys.stdout.flush()
    from training.train import train

    train(experiment, overwrite=given.overwrite)


def _resume(run: Path, settings: Sequence[str], allow: Sequence[str]) -> None:
    _require_run(run)
    from training.config import (
        FREE,
        as_recorded,
        begun_experiment,
        differing_settings,
        load_experiment,
    )
    from training.run_dir import CONFIG, is_finished, tidy

    begun = begun_experiment(run)
    given = load_experiment(settings, recorded=run / CONFIG, allow=allow)
    differing = [x for x in differing_settings(as_recorded(given), begun) if x not in FREE]
    if differing:
        msg = (
            f"{run} was started with other values of {', '.join(differing)}: resume it "
            f"without them, or start a new run"
        )
        raise ValueError(msg)
    if is_finished(run):
        if _is_first_process():
            tidy(run)
            _print(f"the run in {run} is finished")
        return
    from training.train import resume

    resume(run, given)


@_command(
    "extend",
    "learn one more task, or several, on a finished run",
    _RUN,
    _arg(
        "photos",
        type=Path,
        nargs="?",
        metavar="PHOTOS",
        help="folder of class folders, with train/ and test/ or without; without PHOTOS, the run "
        "goes on with the tasks that data.tasks has cut off",
    ),
    _arg(
        "--increment",
        type=int,
        metavar="N",
        help="number of new classes per task (default: one task of all new classes)",
    ),
    _arg("--tasks", type=int, metavar="N", help="without PHOTOS: number of further tasks"),
    _arg("--out", type=Path, help="folder of the new run (default: RUN-extended-1, then -2)"),
    _arg("--overwrite", action="store_true", help="replace the run in --out"),
    _ALLOW,
    epilog="RUN is only read. Further arguments are settings of loda train that do not change "
    "what is learned, such as --data.root (where its images are now) and --data.workers.",
)
def _extend(arguments: argparse.Namespace) -> None:
    from training.config import begun_experiment, load_experiment
    from training.run_dir import CONFIG, is_finished

    if not is_finished(arguments.run):
        msg = f"{arguments.run} holds no finished run: only a finished run can be extended"
        raise ValueError(msg)
    experiment = begun_experiment(arguments.run, arguments.allow)
    if arguments.settings:
        experiment = load_experiment(
            arguments.settings,
            recorded=arguments.run / CONFIG,
            allow=arguments.allow,
            program="loda extend",
        )
    from training.extension import extend

    extend(
        arguments.run,
        arguments.photos,
        increment=arguments.increment,
        tasks=arguments.tasks,
        out=arguments.out,
        experiment=experiment,
        overwrite=arguments.overwrite,
    )


def _is_first_process() -> bool:
    """Whether this is rank 0, the process that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


@_command(
    "sweep",
    "train several variants with several seeds; finished runs are skipped",
    _arg("sweep", metavar="SWEEP", help="a YAML file, or the name of a packaged sweep"),
    _arg("--out", type=Path, required=True, metavar="FOLDER", help="folder of the sweep"),
    _arg(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="number of runs in parallel (default: 1)",
    ),
    _arg(
        "--engine",
        choices=["processes", "slurm", "local"],
        default="processes",
        help="where to run: processes of this machine, jobs of a SLURM cluster, or local (the jobs "
        "of a cluster, run on this machine)",
    ),
    _arg("--only", nargs="+", metavar="VARIANT", help="only these variants"),
    _arg("--dry-run", action="store_true", help="list the runs and start none"),
    epilog="Any further arguments are settings of loda train and apply to every run.",
)
def _sweep(arguments: argparse.Namespace) -> int:
    from training.config import keeps_nothing
    from training.sweep import job_state, plan, read_sweep, run_sweep, summarise, write_groups

    if arguments.workers < 1:
        msg = f"--workers must be at least 1, got {arguments.workers}"
        raise ValueError(msg)
    sweep = read_sweep(arguments.sweep)
    jobs = plan(sweep, arguments.out, arguments.settings, only=arguments.only)
    if arguments.dry_run:
        for job in jobs:
            _print(f"{job.name}: {job_state(job)} ({job.folder})")
        return 0
    notes = dict.fromkeys(note for job in jobs for note in keeps_nothing(job.experiment))
    _say(*(f"loda sweep: {note}" for note in notes))
    write_groups(arguments.out, sweep.groups)
    outcomes = run_sweep(
        jobs, arguments.out, workers=arguments.workers, engine=arguments.engine, slurm=sweep.slurm
    )
    lines, failures = summarise(outcomes)
    _print(*lines)
    _say(*failures)
    return 1 if failures else 0


# One finished run


@_command(
    "eval",
    "evaluate the saved model of a run again, and show what it confuses",
    _RUN,
    _arg("--readout", help="show details of this read-out (default: the primary one)"),
    _arg("--figure", type=Path, help="draw the confusion matrix; .png, .svg or .pdf"),
    _arg("--out", type=Path, metavar="FILE", help="write accuracy by class; .csv, .json, .parquet"),
    _OVERWRITE,
    _arg("--device", choices=("auto", "cpu", "cuda"), help="default: as the run was trained"),
    _ROOT,
    _ALLOW,
)
def _eval(arguments: argparse.Namespace) -> None:
    from training.analysis.evaluate import evaluate_run, evaluation_text
    from training.analysis.predict import require_table, write_table
    from training.config import begun_experiment
    from training.plots import confusion_figure
    from training.run_dir import require_new

    if arguments.out is not None:
        require_table(arguments.out, overwrite=arguments.overwrite)
    if arguments.figure is not None:
        require_new(arguments.figure, overwrite=arguments.overwrite)
    if arguments.readout is not None:  # before the evaluation, which may take long
        names = [x.name for x in begun_experiment(arguments.run, arguments.allow).head.build()]
        if arguments.readout not in names:
            msg = f"--readout must be one of {', '.join(names)}, got {arguments.readout}"
            raise ValueError(msg)
    results = evaluate_run(
        arguments.run, root=arguments.root, device=arguments.device, allow=arguments.allow
    )
    shown = arguments.readout or next(iter(results))
    for name, result in results.items():
        _print(*evaluation_text(name, result, details=name == shown).split("\n"))
    result = results[shown]
    if arguments.out is not None:
        _print(f"by class: {write_table(result.by_class(), arguments.out, overwrite=True)}")
    if arguments.figure is not None:
        starts = [task[0] for task in result.tasks]
        title = f"{shown}: accuracy {100 * result.accuracy:.2f} %"
        written = confusion_figure(
            result.confusion, result.classes, arguments.figure, starts=starts, title=title
        )
        _print(f"figure: {written}")


@_command(
    "predict",
    "classify images with the model of a run",
    _RUN,
    _arg(
        "images",
        type=Path,
        nargs="+",
        metavar="FILE|FOLDER",
        help="image files, and folders that are searched for them",
    ),
    _arg("--top", type=int, default=3, help="number of classes to list per image (default: 3)"),
    _arg(
        "--threshold",
        type=float,
        metavar="P",
        help="answer unknown where the best class has a probability (or score) below this",
    ),
    _arg("--readout", help="read-out that decides (default: the primary one)"),
    _arg("--out", type=Path, metavar="FILE", help="write a table; .csv, .json or .parquet"),
    _OVERWRITE,
    _arg("--device", default="cpu", help="cpu, cuda or cuda:1, say (default: cpu)"),
    _ALLOW,
)
def _predict(arguments: argparse.Namespace) -> int:
    from training.analysis.predict import image_files, load, require_table, write_table

    if arguments.out is not None:
        require_table(arguments.out, overwrite=arguments.overwrite)
    files, others = image_files(arguments.images)
    if others:
        shown = ", ".join(path.name for path in others[:4]) + (", ..." if len(others) > 4 else "")
        _say(f"loda predict: left out, without the ending of an image: {len(others)} ({shown})")
    classifier = load(arguments.run, device=arguments.device, allow=arguments.allow)
    readout = classifier.chosen(arguments.readout)
    failed = []

    def skip(image: object, error: Exception) -> None:
        failed.append(image)
        _say(f"loda predict: skipped: {error}")

    table = classifier.table(
        files,
        top=arguments.top,
        readout=readout,
        threshold=arguments.threshold,
        on_error=skip,
    )
    if table.empty:
        msg = f"none of the {len(files)} images could be read"
        raise ValueError(msg)
    calibrated = readout in classifier.temperatures
    if arguments.out is not None:
        write_table(table, arguments.out, overwrite=arguments.overwrite)
        kind = "probabilities" if calibrated else "scores, not probabilities"
        _print(f"{len(table)} images by {readout} ({kind}): {arguments.out}")
        return 1 if failed else 0
    for image, *values in table.itertuples(index=False):
        known = "" if arguments.threshold is None else f"{values.pop(0)} | "
        best = [
            f"{name} {100 * value:.1f} %" if calibrated else f"{name} {value:.3f}"
            for name, value in zip(values[::2], values[1::2], strict=True)
        ]
        _print(f"{image}: {known}{', '.join(best)}")
    return 1 if failed else 0


@_command(
    "export",
    "write the model of a run in the form of another library",
    _RUN,
    _arg(
        "--format",
        required=True,
        choices=("timm", "hf", "onnx", "peft"),
        help="timm or hf (transformers): the backbone; onnx: the whole classifier; peft: what the "
        "run added to the backbone, as an adapter",
    ),
    _arg("--out", type=Path, required=True, help="a folder; for onnx a file, FILE.onnx"),
    _arg("--readout", help="read-out of the ONNX file (default: the primary one)"),
    _OVERWRITE,
    _ALLOW,
)
def _export(arguments: argparse.Namespace) -> None:
    from training.analysis.export import CHECKED_BY, export

    written = export(
        arguments.run,
        arguments.out,
        arguments.format,
        readout=arguments.readout,
        overwrite=arguments.overwrite,
        allow=arguments.allow,
    )
    _print(f"{arguments.format}: {written.path}", *(f"  {note}" for note in written.notes))
    library = CHECKED_BY[arguments.format]
    if written.difference is None:
        _print(f"  Not checked: {library} is not installed, which would load it.")
        return
    agreement = (
        f"agree with the run to {written.difference:.0e} of the largest value"
        if written.difference
        else "are exactly those of the run"
    )
    _print(f"  Checked: loaded by {library}, its results {agreement}.")


# Many finished runs


@_command(
    "report",
    "compare finished runs in tables and figures, on one page",
    _RUNS,
    _arg("--out", type=Path, metavar="FOLDER", help="write the page, tables and figures here"),
    _arg("--overwrite", action="store_true", help="replace the report in --out, and --figure"),
    _arg(
        "--figure", type=Path, metavar="FILE", help="draw accuracy over tasks; .png, .svg or .pdf"
    ),
    _arg("--only", nargs="+", default=[], metavar="NAME", help="only these methods"),
    _arg("--lead-of", metavar="NAME", help="show by how much this method leads (default: loda)"),
    _arg("--baseline", metavar="NAME", help="draw accuracies relative to this method"),
)
def _report(arguments: argparse.Namespace) -> None:
    from training.report import Report, comparison_figure, write_report
    from training.run_dir import require_new

    if arguments.figure is not None:
        require_new(arguments.figure, overwrite=arguments.overwrite)
    report = Report.over(
        arguments.runs,
        only=arguments.only,
        lead_of=arguments.lead_of,
        baseline=arguments.baseline,
    )
    if arguments.out is None:
        _print(*report.markdown().rstrip("\n").split("\n"))
    else:
        _print(f"report: {write_report(report, arguments.out, overwrite=arguments.overwrite)}")
    if arguments.figure is not None:
        comparison_figure(report.sections, arguments.figure)


@_command(
    "bundle",
    "put what a report needs of finished runs into one text file, to share it",
    _RUNS,
    _arg("--out", type=Path, required=True, metavar="FILE.jsonl", help="the file"),
    _arg("--overwrite", action="store_true", help="replace the file in --out"),
)
def _bundle(arguments: argparse.Namespace) -> None:
    from training.report import find_runs, write_bundle

    inventory = find_runs(arguments.runs)
    _say(*(f"loda bundle: left out, not finished: {path}" for path in inventory.unfinished))
    _say(*(f"loda bundle: left out: {path}: {why}" for path, why in inventory.unreadable.items()))
    written = write_bundle(inventory.runs, arguments.out, overwrite=arguments.overwrite)
    count = len(inventory.runs)
    _print(f"bundle of {count} run{'' if count == 1 else 's'}: {written}")


@_command(
    "analyse",
    "compute the data of the figures about LoDA in a report, from what runs kept",
    _arg("runs", type=Path, nargs="+", metavar="RUN", help="finished runs of LoDA"),
    _arg(
        "--parts",
        nargs="+",
        choices=("subspaces", "losses"),
        default=("subspaces", "losses"),
        help="what to compute (default: both)",
    ),
    _arg(
        "--tasks",
        type=int,
        nargs="+",
        metavar="N",
        help="tasks to compute losses for (default: the second, the middle and the last)",
    ),
    _arg(
        "--points",
        type=int,
        default=16,
        metavar="N",
        help="number of points on a loss curve, for α from 0 to 1.5 (default: 16)",
    ),
    _ROOT,
    _ALLOW,
)
def _analyse(arguments: argparse.Namespace) -> None:
    from training.analysis.analyse import analyse

    for run in arguments.runs:
        written, notes = analyse(
            run,
            parts=arguments.parts,
            tasks=arguments.tasks,
            points=arguments.points,
            root=arguments.root,
            allow=arguments.allow,
        )
        _say(*(f"loda analyse: {note}" for note in notes))
        _print(f"analysis: {written}")


# Checks


@_command(
    "data",
    "check a folder of images: loda data check ROOT",
    _arg(
        "root",
        type=Path,
        metavar="ROOT",
        help="one folder of images for each class, or such folders in train/ and test/ or val/",
    ),
    _arg(
        "--workers",
        type=int,
        metavar="N",
        help="number of decoding threads (default: one per core)",
    ),
)
def _data_check(arguments: argparse.Namespace) -> int:
    from training.data import check_data

    report = check_data(arguments.root, workers=arguments.workers)
    _print(*str(report).split("\n"))
    return 0 if report.passed else 1


@_command(
    "verify",
    "check every solved subspace against the exact optimum",
    _arg(
        "path",
        type=Path,
        metavar="RUN|FILE.npz",
        help="a run trained with keep.moments and keep.branches, or an .npz file of arrays",
    ),
    _arg(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="largest relative error that passes (default: 1e-5)",
    ),
    _arg(
        "--export",
        type=Path,
        metavar="FILE.npz",
        help="also write what was checked, for python -m loda_math.verify",
    ),
    _arg("--overwrite", action="store_true", help="replace the file of --export"),
    _arg("--files", action="store_true", help="only check that no file of the run has changed"),
)
def _verify(arguments: argparse.Namespace) -> int:
    from loda_math.verify import verification_table
    from training.analysis.verify import export_run, verify
    from training.run_dir import changed_files, require_new

    if arguments.files:
        changed = changed_files(arguments.path)
        _say(*(f"loda verify: missing or changed: {arguments.path / name}" for name in changed))
        if not changed:
            _print(f"every file of {arguments.path} is as it was written")
        return 1 if changed else 0
    if arguments.export is not None:
        require_new(arguments.export, overwrite=arguments.overwrite)
    checks = verify(arguments.path, tolerance=arguments.tolerance)
    if arguments.export is not None:
        export_run(arguments.path, arguments.export)
    shown = [c._replace(task=visible(c.task), layer=visible(c.layer)) for c in checks]
    _print(*verification_table(shown).split("\n"))
    return 0 if all(check.passed for check in checks) else 1


@_command(
    "ranks",
    "show the rank that each layer needs, from the moments that a run kept",
    _arg("run", type=Path, metavar="RUN", help="a run trained with keep.moments"),
    _arg(
        "--share",
        type=float,
        nargs="+",
        default=[0.9, 0.99],
        metavar="X",
        help="fractions of the energy and of the ratio to reach (default: 0.9 0.99)",
    ),
)
def _ranks(arguments: argparse.Namespace) -> None:
    from training.analysis.ranks import layer_ranks, rank_table

    _print(*rank_table(layer_ranks(arguments.run, arguments.share)).split("\n"))


# Set-up


@_command(
    "completion",
    "print a script with which a shell completes commands, settings and their values",
    _arg("shell", choices=["bash", "zsh", "tcsh"], metavar="SHELL", help="bash, zsh or tcsh"),
    epilog="For bash: loda completion bash > ~/.local/share/bash-completion/completions/loda. "
    "Needs shtab: pip install 'loda[completion]'.",
)
def _completion(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError as error:
        msg = "loda completion needs shtab: pip install 'loda[completion]'"
        raise ModuleNotFoundError(msg) from error
    from training.config import setting_choices

    settings = setting_choices()
    parser = _parser()
    commands = {x: p for x, p in _subparsers(parser).items() if x in _TAKE_SETTINGS}
    for command, parser_of in commands.items():
        known = {name for action in parser_of._actions for name in action.option_strings}
        for name, (text, values) in settings.items():
            if name not in known and not (command != "train" and name == "--resume"):
                parser_of.add_argument(
                    name, help=text.replace("%", "%%"), choices=values or None, metavar="VALUE"
                )
    commands["train"].add_argument("photos", nargs="?")
    for parser_of in _subparsers(parser).values():
        for action in parser_of._actions:
            if action.type is Path or action.dest in _PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=arguments.shell))


_PATHS = {"photos", "runs", "sweep", "root", "out", "data.root", "backbone.weights"}


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    return dict(commands.choices)


if __name__ == "__main__":
    sys.exit(main())
