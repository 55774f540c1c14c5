"""Tables in LaTeX, whatever the groups are called."""

import shutil
import subprocess
from pathlib import Path

import pytest
from fake_runs import fake_run

from training.config import MethodConfig
from training.report import Report
from training.report.tables import Cell, Table, escape_latex, latex

NAMES = (
    "[1] LoDA",
    " [2] LoDA",
    "* starred",
    'a|b <c> "d" `e`',
    "γ·ρ ≥ 3 ± λ × Λ – Σ",
    "a\nb",
    r"\x{y}$z^~#%&_",
    "-- ?` !` ''",
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    runs = []
    for number, name in enumerate(NAMES):
        for seed in (1, 2):
            rows = ((90,), (60 + number + seed, 80))
            method = MethodConfig("frozen")
            runs.append(
                f"{name}={fake_run(tmp_path / f'{number}-{seed}', rows, method=method, seed=seed)}"
            )
    return Report.over(runs).latex()


def test_a_row_never_begins_with_what_latex_takes_for_an_argument(text: str) -> None:
    starts = [line.lstrip()[:1] for line in text.splitlines()]
    assert {"[", "*"}.isdisjoint(starts)
    table = latex(Table("T", ["m", "x"], [[Cell("[1]", best=True), Cell("[2, 3]")]]))
    assert r"\textbf{[1]} & [2, 3] \\" in table  # only the start of a row matters
    assert text.isascii()


def test_greek_letters_are_those_of_mathematics() -> None:
    assert escape_latex("γ 3, Λ") == r"$\gamma$ 3, $\Lambda$"


def test_latex_compiles(text: str, tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("no pdflatex here")
    lines = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", text]
    (tmp_path / "a.tex").write_text("\n".join([*lines, r"\end{document}"]), "utf-8")
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=100)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-2000:]
    assert "Missing character" not in (tmp_path / "a.log").read_text(errors="replace")
