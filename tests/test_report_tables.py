"""Tables over runs: accuracies, leads, controls and costs; and their text."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_runs import FROZEN, changed_json, fake_run, sections, texts
from scipy import stats

from training.config import BackboneConfig, HeadConfig, MethodConfig, TrainConfig
from training.report import Report, Table, intervals, latex, markdown
from training.report.runs import Section
from training.report.tables import (
    escape_latex,
    report_tables,
    seeds_text,
    settings_tables,
    verdict,
)

BACKBONES = ("glyphs", "cifar_vit")


def table(section: Section, title: str, lead_of: str | None = None) -> Table:
    """The table whose title begins so."""
    (chosen,) = [t for t in report_tables(section, lead_of) if t.title.startswith(title)]
    return chosen


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, last in ((3, (30, 70)), (1, (60, 80)), (2, (90, 90))):
        fake_run(tmp_path / str(seed), ((90,), last), seed=seed)
    (section,) = sections(tmp_path)
    # last 50, 70, 90; average 70, 80, 90; forgetting 60, 30, 0
    cells = ["70.00 ± 20.00", "80.00 ± 10.00", "30.00 ± 30.00", "95.00 ± 0.00", "1 to 3"]
    assert texts(table(section, f"Accuracy, read-out {HeadConfig.readout}")) == [["loda", *cells]]
    (section,) = sections(tmp_path / "2")  # one seed has no deviation
    assert texts(table(section, "Accuracy"))[0][1] == "90.00"


def test_seeds_that_follow_each_other_are_a_range() -> None:
    assert seeds_text([101, 102, 103]) == seeds_text([103, 101, 102]) == "101 to 103"
    assert seeds_text([1, 2]) == "1, 2"
    assert seeds_text([5, 1, 3]) == "5, 1, 3"


def test_the_best_of_a_column_is_bold(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", ((90,), (60, 80)))
    fake_run(tmp_path / "b", ((80,), (70, 70)), method=FROZEN)  # ties in last, forgets less
    fake_run(tmp_path / "c", ((99, 99),), method=MethodConfig("joint"))
    (section,) = sections(tmp_path)
    accuracy = table(section, "Accuracy")
    assert set(accuracy.best) == {
        *(("loda", name) for name in ("last", "average", "task given")),
        *(("frozen", name) for name in ("last", "forgetting", "task given")),
    }
    assert [*accuracy.cells.loc["joint"]][:4] == ["99.00", "–", "–", "–"]


def test_costs(tmp_path: Path) -> None:
    (section,) = sections(fake_run(tmp_path / "a"))
    assert texts(table(section, "Costs")) == [["loda", "3.5", "2.5", "301", "–"]]


@pytest.mark.parametrize(
    ("method", "each"),
    [
        (MethodConfig("loda"), 2),
        (MethodConfig("loda", {"gao": False}), 1),
        (MethodConfig("loda", {"radius": 0.0}), 2),
        (MethodConfig("seq_lora"), 1),
        (MethodConfig("seq_lora", {"gao": True}), 2),
        (MethodConfig("null_lora"), 1),
        (FROZEN, 1),
    ],
)
def test_controls(tmp_path: Path, method: MethodConfig, each: int) -> None:
    train = TrainConfig(epochs=3, batch_size=10)
    run = fake_run(tmp_path / "a", method=method, train=train)
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[1:] == ["2,000", "1,048,576", "524,288", "5.0", "–", "–"]  # it counted no images
    changed_json(run / "classes.json", class_names=["a", "b"], images=[25, 500])
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == [str(each * 3 * (3 + 50)), f"{each * 3 * 525:,}"]


def grown(folder: Path, lasts: dict[tuple[str, str], dict[int, int]]) -> list[Path]:
    """A folder of runs a backbone, from its name and that of the method to the last accuracies."""
    for (backbone, name), by_seed in lasts.items():
        for seed, last in by_seed.items():
            own = {"backbone": BackboneConfig(backbone), "method": MethodConfig(name)}
            fake_run(folder / backbone / f"{name}{seed}", ((90,), (last, last)), seed=seed, **own)
    return [folder / backbone for backbone in dict.fromkeys(backbone for backbone, _ in lasts)]


def test_leads_are_paired_by_seed(tmp_path: Path) -> None:
    lasts = {"loda": {1: 70, 2: 80, 3: 90, 4: 10}, "frozen": {1: 60, 2: 76, 3: 70, 5: 99}}
    (section,) = sections(*grown(tmp_path, {("glyphs", k): v for k, v in lasts.items()}))
    ((over, last, *_, pairs),) = texts(table(section, "Lead of loda"))
    low, high = stats.ttest_rel([70, 80, 90], [60, 76, 70]).confidence_interval(0.95)
    assert over == "frozen"
    assert last == f"+11.33 [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    assert pairs == "3"
    ((over, last, *_),) = texts(table(section, "Lead of frozen", "frozen"))
    assert (over, last[:6]) == ("loda", "−11.33")


def test_other_class_orders_make_no_pair(tmp_path: Path) -> None:
    for name, order in (("loda", ["a", "b"]), ("frozen", ["b", "a"])):
        folder = fake_run(tmp_path / name, method=MethodConfig(name))
        changed_json(folder / "classes.json", class_names=order)
    (section,) = sections(tmp_path)
    assert not [t for t in report_tables(section) if t.title.startswith("Lead")]


@pytest.mark.parametrize("count", [2, 5])
def test_the_interval_is_that_of_scipy(count: int) -> None:
    ours, theirs = np.random.default_rng(count).normal(size=(2, count))
    ahead = intervals(pd.DataFrame({"a": ours - theirs, "b": np.nan}))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert list(ahead.index) == ["a"]  # nothing makes a pair in the other
    np.testing.assert_allclose(ahead.loc["a", ["low", "high"]], expected)
    single = intervals(pd.DataFrame({"a": [2.0]})).loc["a"]
    assert (single["lead"], single["pairs"]) == (2, 1)
    assert single[["low", "high"]].isna().all()


def verdicts(folder: Path, lasts: dict[str, tuple[int, ...]]) -> str:
    by_seed = {("glyphs", name): dict(enumerate(values)) for name, values in lasts.items()}
    (section,) = sections(*grown(folder, by_seed))
    return " ".join(verdict(section))


def test_the_verdict_names_who_leads_whoever_it_is(tmp_path: Path) -> None:
    ahead = verdicts(tmp_path / "a", {"loda": (70, 72, 74), "frozen": (60, 62, 65)})
    assert ahead.startswith("loda ends highest: 72.0 %")
    assert "loda is significantly above frozen." in ahead
    behind = verdicts(tmp_path / "b", {"loda": (60, 62, 65), "frozen": (70, 72, 74)})
    assert behind.startswith("frozen ends highest")
    assert "loda is significantly below frozen." in behind
    close = verdicts(tmp_path / "c", {"loda": (60, 70, 65), "frozen": (61, 64, 68)})
    assert "loda is not significantly different from frozen." in close


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    folders = grown(tmp_path, {("glyphs", n): {1: k} for n, k in (("loda", 70), ("frozen", 60))})
    (section,) = sections(*folders)
    shown = [*verdict(section), *(markdown(table) for table in report_tables(section))]
    assert "significant" not in " ".join(shown)
    assert not {"±", "["} & set("".join(shown))


def test_settings_that_differ_are_apart_from_those_that_are_shared(tmp_path: Path) -> None:
    for rate in (0.1, 0.2):
        fake_run(tmp_path / str(rate), seed=1, train=TrainConfig(lr=rate))
    changed_json(tmp_path / "0.1" / "environment.json", packages={"torch": "2.10"})
    (section,) = sections(tmp_path)
    own, shared, versions = settings_tables(section)
    assert [row[1:] for row in texts(own)] == [["0.1"], ["0.2"]]
    assert ["train.epochs", str(TrainConfig().epochs)] in texts(shared)
    assert not {"seed", "train.lr"} & {row[0] for row in texts(shared)}
    assert texts(versions) == [["torch", "2.10"]]


def test_data_and_backbones_side_by_side(tmp_path: Path) -> None:
    ours, theirs = {1: 70, 2: 71}, {1: 60, 2: 61}
    lasts = {(b, n): v for b in BACKBONES for n, v in (("loda", ours), ("frozen", theirs))}
    folders = grown(tmp_path, lasts)
    assert [(section.title, list(section.groups)) for section in sections(*folders)] == [
        (f"digits, 2 tasks, {backbone}", ["loda", "frozen"]) for backbone in BACKBONES
    ]
    accuracy, lead = Report.over(folders).overview()
    assert accuracy.title == f"Side by side: last accuracy, read-out {HeadConfig.readout} (%)"
    assert accuracy.header == ["method", "glyphs", "cifar_vit"]
    assert texts(accuracy)[0] == ["loda", "70.50 ± 0.71", "70.50 ± 0.71"]
    assert lead.header == ["over", "glyphs", "cifar_vit", "change"]
    same = "+10.00 [+10.00, +10.00] (2)"
    assert texts(lead) == [["frozen", same, same, "+0.00 [+0.00, +0.00] (2)"]]


def test_differences_are_paired_within_one_backbone(tmp_path: Path) -> None:
    # LoDA's seeds with one backbone, the frozen runs' with the other: no pair but seed 3's.
    lasts = {
        ("glyphs", "loda"): {1: 66, 3: 86},
        ("glyphs", "frozen"): {2: 71, 3: 81},
        ("cifar_vit", "loda"): {2: 75},
        ("cifar_vit", "frozen"): {1: 60, 2: 70},
    }
    _, lead = Report.over(grown(tmp_path, lasts)).overview()
    assert texts(lead) == [["frozen", "+5.00 (1)", "+5.00 (1)"]]  # no seed has all four: no change


def test_how_a_lead_moves_is_paired_by_seed(tmp_path: Path) -> None:
    lasts = {
        ("glyphs", "loda"): (70, 72, 75),
        ("glyphs", "frozen"): (60, 65, 63),
        ("cifar_vit", "loda"): (90, 88, 91),
        ("cifar_vit", "frozen"): (70, 73, 70),
    }
    by_seed = {key: dict(enumerate(values)) for key, values in lasts.items()}
    _, lead = Report.over(grown(tmp_path, by_seed)).overview()
    glyphs, cifar = (np.subtract(lasts[b, "loda"], lasts[b, "frozen"]) for b in BACKBONES)
    low, high = stats.ttest_rel(cifar, glyphs).confidence_interval(0.95)
    expected = f"{(cifar - glyphs).mean():+.2f} [{low:+.2f}, {high:+.2f}] (3)".replace("-", "−")
    assert texts(lead)[0][-1] == expected
    assert lead.note.endswith("the lead with cifar_vit less that with glyphs, seed by seed.")


def test_tables_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from training import cli\n"
        f"cli.main(['report', {str(fake_run(tmp_path / 'a'))!r}])\n"
        "heavy = ('torch', 'timm', 'sklearn', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_labels_are_checked(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    with pytest.raises(ValueError, match="got sgd"):
        Report.over([tmp_path], lead_of="sgd")


NAMES = (
    "[1] LoDA", " [2] LoDA", "* starred", 'a|b <c> "d" `e`', "γ·ρ ≥ 3 ± λ × Λ – Σ", "a\nb",
    r"\x{y}$z^~#%&_", "-- ?` !` ''",
)  # fmt: skip


@pytest.fixture
def odd_latex(tmp_path: Path) -> str:
    """Tables in which groups have odd names."""
    runs = []
    for number, name in enumerate(NAMES):
        for seed in (1, 2):
            rows = ((90,), (60 + number + seed, 80))
            folder = fake_run(tmp_path / f"{number}-{seed}", rows, method=FROZEN, seed=seed)
            runs.append(f"{name}={folder}")
    return Report.over(runs).latex()


def odd(texts: list[str], best: list[tuple[str, str]]) -> Table:
    return Table("T", pd.DataFrame({"x": texts}, index=pd.Index(["[1]"], name="m")), "", best)


def test_a_row_never_begins_with_what_latex_takes_for_an_argument(odd_latex: str) -> None:
    starts = [line.lstrip()[:1] for line in odd_latex.splitlines()]
    assert {"[", "*"}.isdisjoint(starts)
    # Only the start of a row matters.
    assert r"{}[1] & \textbf{[2, 3]} \\" in latex(odd(["[2, 3]"], [("[1]", "x")]))
    assert odd_latex.isascii()


def test_odd_cells_in_markdown_and_latex() -> None:
    assert r"| [1] | a\|b\\nc |" in markdown(odd(["a|b\nc"], []))
    for text in ("<img src=//x>", r"\<b>", "![a](//x)"):
        page = markdown(odd([text], [])._replace(title=text, note=text))
        assert not re.search(r"(^|[^\\])(\\\\)*<|\]\(", page)
    assert escape_latex("γ 3, Λ") == r"$\gamma$ 3, $\Lambda$"


def test_latex_compiles(odd_latex: str, tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("no pdflatex here")
    lines = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", odd_latex]
    (tmp_path / "a.tex").write_text("\n".join([*lines, r"\end{document}"]), "utf-8")
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert "Missing character" not in (tmp_path / "a.log").read_text(errors="replace")
