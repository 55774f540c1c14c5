"""Commands of `loda` in this process: their status, what they say, and that they end clearly."""

import io
import warnings

import pytest

from training import cli


def says(arguments: list[str]) -> tuple[int, str]:
    """Exit status of a command, and its words on the standard error; warnings are let pass."""
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        io.StringIO() as out,
        io.StringIO() as err,
    ):
        warnings.simplefilter("ignore")  # of overflows in absurd moments, say
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        try:
            status = cli.main(arguments)
        except SystemExit as left:
            status = int(str(left.code))
        return status, err.getvalue()


def assert_clear(command: str, status: int, said: str) -> None:
    """Whether a command worked, or refused in one line; it must not crash."""
    assert status in (0, 1, 2), said
    if status == 2:
        assert said.startswith(f"loda {command}: "), said
        assert said.count("\n") == 1, said
