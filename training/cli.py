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
    "jsonargparse",
    "matplotlib",
    "numpy",
    "PIL",
    "rich",
    "safetensors",
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
        0 on success, 1 where ``verify`` finds a difference, 2 for what the user can mend
        (settings, data, files), with one clear line on the standard error, 130 after Ctrl-C.
    """
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.command is None:
        _parser().print_help()
        return 0
    if rest and arguments.command != "train":
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
        elif arguments.command == "eval":
            _evaluate(arguments.run, arguments.root)
        elif arguments.command == "verify":
            return _verify(arguments.path, arguments.tolerance)
        elif arguments.command == "report":
            _report(arguments.runs, arguments.figure)
        else:
            _predict(arguments.run, arguments.images, arguments.top)
    except KeyboardInterrupt:
        print(f"loda {arguments.command}: interrupted", file=sys.stderr)
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
    evaluate = commands.add_parser("eval", help="evaluate the saved model of a run again")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("--root", help="where the data are now, if they moved since the training")
    predict = commands.add_parser("predict", help="classify images with the model of a run")
    predict.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=int, default=3, help="classes an image (default: 3)")
    report = commands.add_parser("report", help="compare finished runs: mean and spread over seeds")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    verify = commands.add_parser(
        "verify", help="solve every layer and task again from saved moments, and compare"
    )
    verify.add_argument(
        "path", type=Path, metavar="RUN|FILE.npz", help="a run with kept moments, or saved arrays"
    )
    verify.add_argument("--tolerance", type=float, default=1e-5, help="default: 1e-5")
    report.add_argument("--figure", type=Path, help="also draw accuracy over tasks to this PNG")
    return parser


def _version() -> str:
    try:
        return f"loda {version('loda')}"
    except PackageNotFoundError:
        return "loda (not installed)"


def _train(argv: Sequence[str]) -> None:
    from training.config import load_experiment

    # Settings first: help and mistakes need not wait for torch to be imported.
    experiment = load_experiment(argv)
    from training.loop import train

    train(experiment)


def _evaluate(run: Path, root: str | None) -> None:
    _require_run(run)
    from training.inference import evaluate_run

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


def _report(runs: Sequence[Path], figure: Path | None) -> None:
    from training.figures import comparison_figure
    from training.report import comparison_curves, comparison_table

    print(comparison_table(runs))
    if figure is not None:
        comparison_figure(comparison_curves(runs), figure, title="Accuracy over all classes seen")


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
