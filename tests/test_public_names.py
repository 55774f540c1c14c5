"""What the mathematics offers: its names, their documentation, its version."""

import importlib.metadata
import inspect
import re
from typing import Any

import pytest

import loda_math as lm

PUBLIC = {f"loda_math.{name}": getattr(lm, name) for name in lm.__all__ if name != "verify"}
PUBLIC |= {f"loda_math.verify.{name}": getattr(lm.verify, name) for name in lm.verify.__all__}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
# Arguments that have no order to confuse, or no name of their own.
UNNAMED = {"second_moment", "combine", "remember", "gradient_alignment", "project_conflict"}


def test_the_version_is_that_of_the_package() -> None:
    assert lm.__version__ == importlib.metadata.version("loda")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refer_to_their_siblings(name: str) -> None:
    section = re.search(r"See Also\n-+\n((?:[\w.]+ : .+\n?(?:    .+\n)*)+)", _doc(FUNCTIONS[name]))
    assert section is not None
    for reference in re.findall(r"^([\w.]+) :", section[1], re.MULTILINE):
        path = reference.removeprefix("loda_math.")
        own, package = name.rpartition(".")[0], "loda_math"
        assert {f"{own}.{path}", f"{package}.{path}"} & PUBLIC.keys(), reference
        assert not name.endswith(f".{path}"), f"{name} refers to itself"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documented_arguments_are_the_arguments(name: str) -> None:
    function = FUNCTIONS[name]
    section = re.search(r"Parameters\n-+\n(.*?)\n\n\w+\n-+\n", _doc(function), re.DOTALL)
    assert section is not None
    documented = re.findall(r"^(\*?\w+(?:, \w+)*)(?: :|$)", section[1], re.MULTILINE)
    words = [word.lstrip("*") for line in documented for word in line.split(", ")]
    assert words == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_may_be_named(name: str) -> None:
    if name.rpartition(".")[2] not in UNNAMED:
        kinds = {p.kind for p in inspect.signature(FUNCTIONS[name]).parameters.values()}
        assert inspect.Parameter.POSITIONAL_ONLY not in kinds


def _doc(function: Any) -> str:
    return inspect.getdoc(function) or ""
