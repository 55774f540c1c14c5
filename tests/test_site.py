"""The site of the documentation: what is written from the code is complete, the notebooks run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference_pages

from loda_math import __version__
from training.components import Registry
from training.config import Experiment, flat_settings

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ["solvers", "own-model"]


def linked(page: Path) -> list[str]:
    """Files of the repository that a page links to or shows."""
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link]


def test_the_settings_page_has_every_setting() -> None:
    page = reference_pages.settings_page()
    for name in flat_settings(Experiment()):
        assert f"| `{name}` |" in page, name


def test_the_settings_page_has_every_component_with_its_options() -> None:
    page = reference_pages.settings_page()
    registries = [kind.registry for kind in reference_pages.config._COMPONENTS.values()]
    assert all(isinstance(registry, Registry) for registry in registries)
    for registry in registries:
        for name in registry.paths:
            section = page.partition(f"### {registry.kind} `{name}`\n")[2].partition("\n##")[0]
            assert section, name
            for option in registry.options(name):
                assert f".{option}` |" in section, (name, option)


def test_the_types_of_settings_are_in_words() -> None:
    page = reference_pages.settings_page()
    for word in ("<class", "typing.", "Literal[", "Optional[", "NoneType", "Union["):
        assert word not in page


def test_every_public_name_has_a_page_of_the_reference() -> None:
    for package in reference_pages.PACKAGES:
        page = reference_pages.package_page(package)
        for names in reference_pages.public_names(package).values():
            for name in names:
                assert page.count(f"   {package}.{name}\n") == 1, name


def test_every_command_has_its_help_on_a_page() -> None:
    page = reference_pages.commands_page()
    for name in ("train", "sweep", "eval", "predict", "report", "verify", "data check"):
        assert f"## loda {name}\n" in page
        assert f"usage: loda {name}" in page


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        found = linked(page)
        assert found
        for link in found:
            assert (page.parent / link).exists(), link


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    cells = re.findall(r"```\{code-cell\}\n(.*?)```", page, re.DOTALL)
    assert len(cells) > 4
    script = tmp_path / f"{name}.py"
    script.write_text("\n".join(cells), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:FigureCanvasAgg", script],
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
