"""What can be checked: ``data check``, ``verify`` and ``ranks``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.commands import Commands, require_run


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add ``data check``, ``verify`` and ``ranks``."""
    data = commands.add_parser("data", help="look through a folder of images")
    check = data.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "check", help="decode every image, compare the splits, and say what is wrong"
    )
    check.add_argument("root", type=Path, metavar="ROOT", help="holds train/ and test/ or val/")
    check.add_argument("--workers", type=int, help="threads that decode (default: one a core)")
    check.set_defaults(act=check_data)
    parser = commands.add_parser(
        "verify", help="solve every layer and task again from saved moments, and compare"
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN|FILE.npz", help="a run with kept moments, or saved arrays"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="default: 1e-5")
    parser.set_defaults(act=verify)
    parser = commands.add_parser(
        "ranks", help="ranks that the layers of a run need, from saved moments"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run with kept moments")
    parser.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[0.9, 0.99],
        help="shares of the energy and of the ratio to reach (default: 0.9 0.99)",
    )
    parser.set_defaults(act=ranks)


def check_data(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Look through a folder of images."""
    del rest
    from training import data

    report = data.check_data(arguments.root, workers=arguments.workers)
    print(report)
    return 0 if report.passed else 1


def verify(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Solve again what a run or a file claims."""
    del rest
    from training.analysis.verify import verification_table
    from training.analysis.verify import verify as check_solutions

    checks = check_solutions(arguments.path, tolerance=arguments.tolerance)
    print(verification_table(checks))
    return 0 if all(check.passed for check in checks) else 1


def ranks(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the ranks that layers need."""
    del rest
    require_run(arguments.run)
    from training.analysis.ranks import layer_ranks, rank_table

    print(rank_table(layer_ranks(arguments.run, arguments.share)))
