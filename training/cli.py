"""The command ``loda``. Nothing heavy is imported before a command needs it."""

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
    "PIL",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "yaml",
)

_USAGE_ERROR = 2
_INTERRUPTED = 130


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
        the standard error, 130 after Ctrl-C (143 after SIGTERM, by SystemExit).
    """
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.command is None:
        _parser().print_help()
        return 0
    if rest and arguments.command not in ("train", "sweep"):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    missing = [name for name in _TRAIN if find_spec(name) is None]
    if missing:
        print(
            f"loda {arguments.command} needs {', '.join(missing)}, which the base install leaves "
            f"out: pip install 'loda[train]'",
            file=sys.stderr,
        )
        return _USAGE_ERROR
    try:
        if arguments.command == "train":
            _train(rest)
        elif arguments.command == "sweep":
            return _sweep(arguments, rest)
        elif arguments.command == "eval":
            _evaluate(arguments.run, arguments.root)
        elif arguments.command == "data":
            return _check_data(arguments.root, arguments.workers)
        elif arguments.command == "verify":
            return _verify(arguments.path, arguments.tolerance)
        elif arguments.command == "ranks":
            _ranks(arguments.run, arguments.share)
        elif arguments.command == "report":
            _report(arguments)
        elif arguments.command == "analyse":
            _analyse(arguments)
        else:
            _predict(arguments.run, arguments.images, arguments.top)
    except KeyboardInterrupt as stop:
        said = f"; {stop}" if str(stop) else ""
        print(f"loda {arguments.command}: interrupted{said}", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("LODA_DEBUG"):
            raise
        reason = " ".join(line.strip() for line in str(error).splitlines())
        print(f"loda {arguments.command}: {reason}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loda",
        description="Continual learning of pretrained vision transformers by LoDA.",
        epilog="Set LODA_DEBUG=1 to see the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # The settings of an experiment have a parser of their own, which also prints their help.
    commands.add_parser("train", help="train on a stream of tasks", add_help=False)
    sweep = commands.add_parser(
        "sweep",
        help="train many runs: methods times seeds, skipping what is done",
        epilog="Further arguments are settings of loda train, for every run.",
    )
    sweep.add_argument("sweep", metavar="SWEEP", help="a YAML file, or the name of a packaged one")
    sweep.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    sweep.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    sweep.add_argument(
        "--engine",
        choices=["processes", "slurm", "local"],
        default="processes",
        help="processes on this machine, jobs of a SLURM cluster, or its stand-in for trials",
    )
    sweep.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    sweep.add_argument("--dry-run", action="store_true", help="only list the runs")
    evaluate = commands.add_parser("eval", help="evaluate the saved model of a run again")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("--root", help="where the data are now, if they moved since the training")
    predict = commands.add_parser("predict", help="classify images with the model of a run")
    predict.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=int, default=3, help="classes an image (default: 3)")
    _add_report(commands)
    data = commands.add_parser("data", help="look through a folder of images")
    check = data.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "check", help="decode every image, compare the splits, and say what is wrong"
    )
    check.add_argument("root", type=Path, metavar="ROOT", help="holds train/ and test/ or val/")
    check.add_argument("--workers", type=int, help="threads that decode (default: one a core)")
    verify = commands.add_parser(
        "verify", help="solve every layer and task again from saved moments, and compare"
    )
    verify.add_argument(
        "path", type=Path, metavar="RUN|FILE.npz", help="a run with kept moments, or saved arrays"
    )
    verify.add_argument("--tolerance", type=float, default=1e-5, help="default: 1e-5")
    ranks = commands.add_parser(
        "ranks", help="ranks that the layers of a run need, from saved moments"
    )
    ranks.add_argument("run", type=Path, metavar="RUN", help="a run with kept moments")
    ranks.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[0.9, 0.99],
        help="shares of the energy and of the ratio to reach (default: 0.9 0.99)",
    )
    return parser


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "report", help="compare finished runs: tables, figures, and a page that holds them all"
    )
    report.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="run folders, or folders that hold runs"
    )
    report.add_argument("--out", type=Path, help="write everything to this folder")
    report.add_argument("--overwrite", action="store_true", help="replace the report in --out")
    report.add_argument("--figure", type=Path, help="draw accuracy over tasks to this PNG or SVG")
    report.add_argument("--against", help="whose lead over the others is given (default: loda)")
    report.add_argument("--baseline", help="relative to whom accuracies are drawn")
    analyse = commands.add_parser(
        "analyse", help="compute what the report's figures of LoDA need from what a run kept"
    )
    analyse.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs of LoDA")
    analyse.add_argument(
        "--parts", nargs="+", choices=("subspaces", "losses"), default=("subspaces", "losses")
    )
    analyse.add_argument(
        "--tasks", type=int, nargs="+", help="take losses of these (default: 2, middle and last)"
    )
    analyse.add_argument("--points", type=int, default=16, help="steps from 0 to 1.5 (default: 16)")
    analyse.add_argument("--root", help="where the data are now, if they moved since the training")


def _version() -> str:
    try:
        return f"loda {version('loda')}"
    except PackageNotFoundError:
        return "loda (not installed)"


def _train(argv: Sequence[str]) -> None:
    resuming = argparse.ArgumentParser(prog="loda train", add_help=False, allow_abbrev=False)
    resuming.add_argument("--resume", type=Path, metavar="RUN")
    found, settings = resuming.parse_known_args(argv)
    if found.resume is not None:
        _resume(found.resume, settings)
        return
    from training.config import load_experiment

    # Settings first: help and mistakes need not wait for torch to be imported.
    experiment = load_experiment(argv)
    from training.loop import train

    train(experiment)


def _resume(run: Path, argv: Sequence[str]) -> None:
    _require_run(run)
    from training.config import as_recorded, differing_settings, load_experiment
    from training.presets import effective
    from training.run_folder import CONFIG, begun_experiment, is_finished

    recorded = begun_experiment(run)
    given = load_experiment([f"--config={run / CONFIG}", *argv])
    differing = differing_settings(as_recorded(effective(given)), recorded)
    if differing:
        msg = (
            f"{run} was begun with other settings ({', '.join(differing)} differ): go on with it "
            f"without them, or begin another run"
        )
        raise ValueError(msg)
    if is_finished(run):
        print(f"the run in {run} is finished")
        return
    from training.loop import resume

    resume(run)


def _sweep(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from training.sweeps import finished, plan, read_sweep, run_sweep

    if arguments.workers < 1:
        msg = f"--workers is {arguments.workers}; allowed: at least 1"
        raise ValueError(msg)
    sweep = read_sweep(arguments.sweep)
    jobs = plan(sweep, arguments.out, rest, only=arguments.only)
    if arguments.dry_run:
        for job in jobs:
            print(f"{job.name}: {'done' if finished(job) else 'to do'} ({job.folder})")
        return 0
    outcomes = run_sweep(
        jobs,
        arguments.out,
        workers=arguments.workers,
        engine=arguments.engine,
        slurm=sweep.slurm,
    )
    failed = [outcome.job.name for outcome in outcomes if outcome.status == "failed"]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs are done")
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _evaluate(run: Path, root: str | None) -> None:
    _require_run(run)
    from training.evaluate_run import evaluate_run

    for kind, result in evaluate_run(run, root=root).items():
        tasks = "  ".join(f"{100 * share:.2f}" for share in result["by_task"])
        right, total = sum(result["correct"]), sum(result["total"])
        print(f"{kind}: accuracy {100 * result['accuracy']:.2f} % ({right} of {total} images)")
        print(f"  by task: {tasks}")


def _verify(path: Path, tolerance: float) -> int:
    from training.verify import verification_table, verify

    checks = verify(path, tolerance=tolerance)
    print(verification_table(checks))
    return 0 if all(check.passed for check in checks) else 1


def _check_data(root: Path, workers: int | None) -> int:
    from training.data import check_data

    report = check_data(root, workers=workers)
    print(report)
    return 0 if report.passed else 1


def _ranks(run: Path, shares: Sequence[float]) -> None:
    _require_run(run)
    from training.ranks import layer_ranks, rank_table

    print(rank_table(*layer_ranks(run, shares)))


def _report(arguments: argparse.Namespace) -> None:
    from training.report import Report, comparison_curves, write_report

    report = Report.over(arguments.runs, against=arguments.against, baseline=arguments.baseline)
    if arguments.out is None:
        print(report.markdown(), end="")
    else:
        print(f"report: {write_report(report, arguments.out, overwrite=arguments.overwrite)}")
    if arguments.figure is not None:
        from training.figures import comparison_figure

        title = "Accuracy over all classes seen"
        comparison_figure(comparison_curves(report.sections), arguments.figure, title=title)


def _analyse(arguments: argparse.Namespace) -> None:
    from training.analyse import analyse

    for run in arguments.runs:
        written, notes = analyse(
            run,
            parts=arguments.parts,
            tasks=arguments.tasks,
            points=arguments.points,
            root=arguments.root,
        )
        for note in notes:
            print(f"loda analyse: {note}", file=sys.stderr)
        print(f"analysis: {written}")


def _predict(run: Path, images: Sequence[Path], top: int) -> None:
    _require_run(run)
    from training.inference import load_classifier

    classifier = load_classifier(run)
    for path, found in zip(
        images, classifier.predict(images, top=min(top, len(classifier.classes))), strict=True
    ):
        ranked = ", ".join(f"{prediction.name} {prediction.score:.3f}" for prediction in found)
        print(f"{path}: {ranked}")


def _require_run(run: Path) -> None:
    # Said before torch is imported; what the folder holds is checked by the loader.
    if not run.is_dir():
        msg = f"no run folder {run}"
        raise FileNotFoundError(msg)


if __name__ == "__main__":
    sys.exit(main())
