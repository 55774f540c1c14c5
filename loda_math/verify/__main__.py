"""``python -m loda_math.verify FILE.npz``: check the solutions in a file, whoever computed them.

Needs NumPy and this package, nothing else. The exit status is 0 if every check passes, 1 if one
fails, and 2 if the file cannot be checked.
"""

import argparse
import sys
from collections.abc import Sequence

from loda_math.verify.archive import printable, verification_table, verify_archive


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m loda_math.verify",
        description="Solve every layer in an .npz file again, in float64, and compare.",
        epilog="Names and shapes of the arrays: help(loda_math.verify.verify_layer).",
    )
    parser.add_argument("path", metavar="FILE.npz", help="arrays named TASK/LAYER/NAME")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest relative error (default: 1e-5)"
    )
    given = parser.parse_args(arguments)
    try:
        checks = verify_archive(given.path, tolerance=given.tolerance)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return 2
    sys.stdout.write(f"{verification_table(checks)}\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
