"""The theory page: its examples hold on every library, and no public name is missing from it."""

import doctest
from pathlib import Path

import libraries
import pytest

import loda_math as lm

PAGE = (Path(__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
# The examples use what these have in common; NumPy itself runs where the pages are collected.
LIBRARIES = [x for x in ("torch", "jax", "jax-x32") if not libraries.absent(x)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_examples(library: str) -> None:
    with libraries.opened(library) as xp:
        opening = "import numpy as xp\n"
        assert PAGE.count(opening) == 1
        page = PAGE.replace(opening, f"import {xp.__name__} as xp\n")
        examples = doctest.DocTestParser().get_doctest(page, {}, f"theory on {library}", None, 0)
        assert len(examples.examples) > 40
        result = doctest.DocTestRunner().run(examples, clear_globs=False)
        assert result.failed == 0
        solved = examples.globs["found"].basis
    assert type(solved).__module__.partition(".")[0] in (xp.__name__.partition(".")[0], "jaxlib")


@pytest.mark.parametrize("name", [*lm.__all__, *lm.verify.__all__])
def test_every_public_name_is_there(name: str) -> None:
    assert f"`{name}" in PAGE
