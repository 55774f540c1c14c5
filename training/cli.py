"""The command ``loda``. Nothing heavy is imported before a command needs it."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from training.commands import checks, reports, runs, sweeps

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
_BROKEN_PIPE = 141


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
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.command not in (None, "train") and os.environ.get("WORLD_SIZE", "1") != "1":
        _parser().error(f"{arguments.command} is for one process: start it without a launcher")
    if arguments.command is None:
        _parser().print_help()
        return 0
    if rest and not arguments.takes_settings:
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
        return arguments.act(arguments, rest) or 0
    except KeyboardInterrupt as stop:
        said = f"; {stop}" if str(stop) else ""
        print(f"loda {arguments.command}: interrupted{said}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output (head, say) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in it
        return _BROKEN_PIPE
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("LODA_DEBUG"):
            raise
        reason = " ".join(line.strip() for line in str(error).splitlines())
        print(f"loda {arguments.command}: {reason}", file=sys.stderr)
        return _USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loda",
        description="Continual learning of pretrained vision transformers by LoDA.",
        epilog="Set LODA_DEBUG=1 to see the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.set_defaults(takes_settings=False)
    # In the order of their use.
    runs.add_train(commands)
    for family in (sweeps, runs, reports, checks):
        family.add(commands)
    return parser


def _version() -> str:
    try:
        return f"loda {version('loda')}"
    except PackageNotFoundError:
        return "loda (not installed)"


if __name__ == "__main__":
    sys.exit(main())
