"""The command ``loda``: every command, its arguments and what it prints.

Nothing heavy is imported before a command needs it: neither torch for help, reports and sweeps, nor
anything outside the standard library for ``loda --help``.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# Import names of what the train extra brings.
_TRAIN = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "jinja2",
    "jsonargparse",
    "matplotlib",
    "numpy",
    "pandas",
    "PIL",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "yaml",
)

_USAGE_ERROR = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141

_ONE_RUN = "the run folder"
_RUNS = "run folders, folders that hold runs, or files written by loda bundle"
_ROOT = "where the images are now, if they have moved since the training"
_ALLOW = "import path of a class of another package that the run may load; may be repeated"

Commands = argparse._SubParsersAction  # argparse has no public name for it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0 on success, 1 where ``verify`` or ``data check`` finds something wrong or a run of a
        sweep fails, 2 for what the user can mend (settings, data, files), with one clear line on
        the standard error, 130 after Ctrl-C (143 after SIGTERM and 129 after SIGHUP, by
        SystemExit), 141 if nobody reads the output any more.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    command = arguments.command
    if command is None:
        parser.print_help()
        return 0
    if command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error(f"{command} is for one process: start it without a launcher")
    if rest and not arguments.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    missing = [name for name in _TRAIN if find_spec(name) is None]
    if missing:
        _say(
            f"loda {command} needs {', '.join(missing)}, which the base install leaves out: "
            "pip install 'loda[train]'"
        )
        return _USAGE_ERROR
    try:
        arguments.settings = rest
        return arguments.act(arguments) or 0
    except KeyboardInterrupt as stop:
        _say(f"loda {command}: interrupted{f'; {stop}' if str(stop) else ''}")
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output (head, say) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in it
        return _BROKEN_PIPE
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("LODA_DEBUG"):
            raise
        _say(f"loda {command}: {' '.join(line.strip() for line in str(error).splitlines())}")
        return _USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loda",
        description="Continual learning of pretrained vision transformers by LoDA.",
        epilog="Set LODA_DEBUG=1 to see the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(takes_settings=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # In the order of their use.
    for add in (
        _add_train,
        _add_sweep,
        _add_eval,
        _add_predict,
        _add_report,
        _add_bundle,
        _add_analyse,
        _add_data_check,
        _add_verify,
        _add_ranks,
    ):
        add(commands)
    return parser


def _version() -> str:
    try:
        return f"loda {version('loda')}"
    except PackageNotFoundError:
        return "loda (not installed)"


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _require_run(run: Path) -> None:
    """Raise FileNotFoundError unless there is a folder; before torch is imported."""
    # What the folder holds is checked by whoever loads it.
    if not run.is_dir():
        msg = f"no run folder {run}"
        raise FileNotFoundError(msg)


def _add_allow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow", action="append", default=[], metavar="CLASS", help=_ALLOW)


# Training


def _add_train(commands: "Commands[argparse.ArgumentParser]") -> None:
    # Its settings have a parser of their own, which also prints their help.
    parser = commands.add_parser("train", help="train on a stream of tasks", add_help=False)
    parser.set_defaults(act=_train, takes_settings=True)


def _train(arguments: argparse.Namespace) -> None:
    own = argparse.ArgumentParser(prog="loda train", add_help=False, allow_abbrev=False)
    own.add_argument("--resume", type=Path, metavar="RUN")
    own.add_argument("--overwrite", action="store_true")
    _add_allow(own)
    given, settings = own.parse_known_args(arguments.settings)
    if given.resume is not None and given.overwrite:
        own.error("--overwrite begins a run anew and --resume goes on with one: give one of them")
    if given.resume is None and given.allow:
        own.error("--allow is for --resume: what a command line names is allowed already")
    if given.resume is not None:
        _resume(given.resume, settings, given.allow)
        return
    from training.config import keeps_nothing, load_experiment

    # Settings first: help and mistakes need not wait for torch to be imported.
    experiment = load_experiment(settings)
    if _is_first_process():
        _say(*(f"loda train: {note}" for note in keeps_nothing(experiment)))
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
            f"{run} was begun with other settings ({', '.join(differing)} differ): go on with it "
            f"without them, or begin another run"
        )
        raise ValueError(msg)
    if is_finished(run):
        if _is_first_process():
            tidy(run)
        print(f"the run in {run} is finished")
        return
    from training.train import resume

    resume(run, given)


def _is_first_process() -> bool:
    """Whether this is the process of a run that writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def _add_sweep(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sweep",
        help="train many runs, methods times seeds; those that are done are skipped",
        epilog="Further arguments are settings of loda train, for every run.",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="a YAML file, or the name of a packaged one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--engine",
        choices=["processes", "slurm", "local"],
        default="processes",
        help="processes on this machine, jobs of a SLURM cluster, or submitit without a cluster, "
        "to try it out",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run only these variants")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")
    parser.set_defaults(act=_sweep, takes_settings=True)


def _sweep(arguments: argparse.Namespace) -> int:
    from training.config import keeps_nothing
    from training.sweep import plan, read_sweep, run_sweep, standing, summarise, write_groups

    if arguments.workers < 1:
        msg = f"--workers must be at least 1, got {arguments.workers}"
        raise ValueError(msg)
    sweep = read_sweep(arguments.sweep)
    jobs = plan(sweep, arguments.out, arguments.settings, only=arguments.only)
    if arguments.dry_run:
        for job in jobs:
            print(f"{job.name}: {standing(job)} ({job.folder})")
        return 0
    notes = dict.fromkeys(note for job in jobs for note in keeps_nothing(job.experiment))
    _say(*(f"loda sweep: {note}" for note in notes))
    write_groups(arguments.out, sweep.groups)
    outcomes = run_sweep(
        jobs,
        arguments.out,
        workers=arguments.workers,
        engine=arguments.engine,
        slurm=sweep.slurm,
    )
    lines, failures = summarise(outcomes)
    print("\n".join(lines))
    _say(*failures)
    return 1 if failures else 0


# One finished run


def _add_eval(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("eval", help="evaluate the saved model of a run again")
    parser.add_argument("run", type=Path, metavar="RUN", help=_ONE_RUN)
    parser.add_argument("--root", help=_ROOT)
    _add_allow(parser)
    parser.set_defaults(act=_eval)


def _eval(arguments: argparse.Namespace) -> None:
    _require_run(arguments.run)
    from training.analysis.predict import evaluate_run

    results = evaluate_run(arguments.run, root=arguments.root, allow=arguments.allow)
    for readout, result in results.items():
        tasks = "  ".join(f"{100 * share:.2f}" for share in result["by_task"])
        right, total = sum(result["correct"]), sum(result["total"])
        print(f"{readout}: accuracy {100 * result['accuracy']:.2f} % ({right} of {total} images)")
        print(f"  by task: {tasks}")


def _add_predict(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("predict", help="classify images with the model of a run")
    parser.add_argument("run", type=Path, metavar="RUN", help=_ONE_RUN)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes to name (default: 3)")
    _add_allow(parser)
    parser.set_defaults(act=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    _require_run(arguments.run)
    from training.analysis.predict import load

    classifier = load(arguments.run, allow=arguments.allow)
    top = min(arguments.top, len(classifier.classes))
    predictions = classifier.predict(arguments.images, top=top)
    for path, best in zip(arguments.images, predictions, strict=True):
        print(f"{path}: {', '.join(f'{guess.name} {guess.score:.3f}' for guess in best)}")


# Many finished runs


def _add_report(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report", help="compare finished runs: tables, figures, and a page that holds them all"
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help=_RUNS)
    parser.add_argument("--out", type=Path, help="write everything to this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the report in --out")
    parser.add_argument("--figure", type=Path, help="draw accuracy over tasks to this PNG or SVG")
    parser.add_argument(
        "--against", metavar="NAME", help="whose lead over the others is given (default: loda)"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="to whose accuracy the others are drawn in relation"
    )
    parser.set_defaults(act=_report)


def _report(arguments: argparse.Namespace) -> None:
    from training.report import Report, comparison_figure, write_report

    report = Report.over(arguments.runs, against=arguments.against, baseline=arguments.baseline)
    if arguments.out is None:
        print(report.markdown(), end="")
    else:
        print(f"report: {write_report(report, arguments.out, overwrite=arguments.overwrite)}")
    if arguments.figure is not None:
        comparison_figure(report.sections, arguments.figure)


def _add_bundle(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bundle", help="write what a report needs of finished runs to one text file, to share it"
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help=_RUNS)
    parser.add_argument("--out", type=Path, required=True, help="the file, FILE.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace the file in --out")
    parser.set_defaults(act=_bundle)


def _bundle(arguments: argparse.Namespace) -> None:
    from training.report import find_runs, write_bundle

    inventory = find_runs(arguments.runs)
    _say(*(f"loda bundle: left out, not finished: {path}" for path in inventory.unfinished))
    _say(*(f"loda bundle: left out: {path}: {why}" for path, why in inventory.unreadable.items()))
    written = write_bundle(inventory.runs, arguments.out, overwrite=arguments.overwrite)
    print(f"bundle of {len(inventory.runs)} runs: {written}")


def _add_analyse(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "analyse", help="compute what figures of LoDA in a report need, from what a run kept"
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs of LoDA")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("subspaces", "losses"),
        default=("subspaces", "losses"),
        help="what to compute (default: both)",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        nargs="+",
        help="tasks whose losses are computed (default: 2, the middle one and the last)",
    )
    parser.add_argument(
        "--points", type=int, default=16, help="points of a loss curve, from 0 to 1.5 (default: 16)"
    )
    parser.add_argument("--root", help=_ROOT)
    _add_allow(parser)
    parser.set_defaults(act=_analyse)


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
        print(f"analysis: {written}")


# Checks


def _add_data_check(commands: "Commands[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="look through a folder of images")
    parser = data.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "check", help="decode every image, compare the splits, and say what is wrong"
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="holds train/ and test/ or val/")
    parser.add_argument("--workers", type=int, help="threads that decode (default: one a core)")
    parser.set_defaults(act=_data_check)


def _data_check(arguments: argparse.Namespace) -> int:
    from training.data import check_data

    report = check_data(arguments.root, workers=arguments.workers)
    print(report)
    return 0 if report.passed else 1


def _add_verify(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify", help="solve every layer and task again from saved moments, and compare"
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN|FILE.npz", help="a run with kept moments, or saved arrays"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest relative error (default: 1e-5)"
    )
    parser.set_defaults(act=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from training.analysis.verify import verification_table, verify

    checks = verify(arguments.path, tolerance=arguments.tolerance)
    print(verification_table(checks))
    return 0 if all(check.passed for check in checks) else 1


def _add_ranks(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "ranks", help="say which rank the layers of a run need, from saved moments"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run with kept moments")
    parser.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[0.9, 0.99],
        help="shares of the energy and of the ratio to reach (default: 0.9 0.99)",
    )
    parser.set_defaults(act=_ranks)


def _ranks(arguments: argparse.Namespace) -> None:
    _require_run(arguments.run)
    from training.analysis.ranks import layer_ranks, rank_table

    print(rank_table(layer_ranks(arguments.run, arguments.share)))


if __name__ == "__main__":
    sys.exit(main())
