"""A written report: every file is there, nothing comes from outside, and it fits a phone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from browser import measured
from fake_runs import FROZEN, analysis, changed_json, fake_run
from run_contents import contents

from training.config import BackboneConfig, HeadConfig, MethodConfig
from training.report import Report, write_report

PHONE = 390  # CSS pixels
NAME = 'LoDA <b>&"50 %"_{x}</b> with a name that is far too long for a column of a table'


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds, an upper bound, another backbone, and an unfinished run."""
    folder = tmp_path_factory.mktemp("runs")
    sources = []
    for seed in (1, 2):
        rows = ((90,), (60 + seed, 80))
        sources.append(f"{NAME}={fake_run(folder / f'loda{seed}', rows, seed=seed)}")
        sources.append(fake_run(folder / f"frozen{seed}", seed=seed, method=FROZEN))
    changed_json(folder / "loda1" / "analysis.json", **analysis())
    joint = MethodConfig("joint")
    sources.append(fake_run(folder / "joint", ((99, 99),), seed=1, method=joint))
    other = BackboneConfig("cifar_vit")
    sources.append(fake_run(folder / "other", seed=1, method=FROZEN, backbone=other))
    (fake_run(folder / "half", seed=3) / "summary.json").unlink()
    out = tmp_path_factory.mktemp("out") / "report"
    report = Report.over([*sources, folder / "half"])
    assert write_report(report, out) == out / "report.html"
    return out


class Reader(HTMLParser):
    """Start tags of a page, by name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_every_figure_is_there_in_every_format(written: Path) -> None:
    first = written / "figures" / "digits-2-tasks-glyphs"
    slug = "loda-b-50-x-b-with-a-name-that-is-far-too-long-for-a-column-of-a-table"
    assert {path.stem for path in first.glob("*.svg")} == {
        f"accuracy-{HeadConfig.readout}", "lead", "relative", "forgetting", "costs",
        "matrix-frozen", f"matrix-{slug}", f"ratio-{slug}", f"energy-{slug}", f"loss-{slug}-task2",
    }  # fmt: skip
    for kind in ("png", "pdf"):
        assert {p.stem for p in first.glob(f"*.{kind}")} == {p.stem for p in first.glob("*.svg")}
    assert {p.name for p in written.iterdir()} == {
        "tables.md", "tables.tex", "runs.csv", "figures", "report.html", "manifest.json",
    }  # fmt: skip


def test_the_page_needs_nothing_from_outside(written: Path) -> None:
    tags = Reader(written / "report.html").tags
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in tags}
    sources = [a for _, attrs in tags for k, a in attrs.items() if k in {"src", "href", "srcset"}]
    assert all(str(source).startswith(("data:", "#")) for source in sources)
    assert "url(" not in (written / "report.html").read_text()
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == len(list(written.glob("figures/*/*.svg")))
    assert all(len(str(attrs["alt"])) > 20 for attrs in images)


def test_the_numbers_are_a_table_of_their_own(written: Path) -> None:
    frame = pd.read_csv(written / "runs.csv")
    assert len(frame) == 6
    assert {"section", "group", "seed", "readout", "last", "method.name"} <= set(frame)


def test_a_report_writes_nowhere_else(tmp_path: Path) -> None:
    # A read-out may be called anything in somebody's file, and so may a group.
    run = fake_run(tmp_path / "run", ((99, 99),), head=HeadConfig(readout="heads"))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    summary["counts"] = {"../../../up": summary["counts"]["heads"]}
    changed_json(run / "summary.json", **summary)
    write_report(Report.over([f"../../x={run}"]), tmp_path / "deep" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "dear.png").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "figures").symlink_to(outside)
    with pytest.raises(OSError, match="link"):
        write_report(Report.over([run]), tmp_path / "other", overwrite=True)
    assert [path.name for path in outside.iterdir()] == ["dear.png"]


def test_labels_are_text(written: Path) -> None:
    assert not [tag for tag, _ in Reader(written / "report.html").tags if tag == "b"]
    assert "LoDA &lt;b&gt;" in (written / "report.html").read_text()
    assert r"\_\{x\}" in (written / "tables.tex").read_text()


def test_the_runs_are_counted_and_the_unfinished_one_is_named(written: Path) -> None:
    assert "6 finished runs of 3 methods." in (written / "report.html").read_text()
    for name in ("report.html", "tables.md"):
        assert re.search(r"not counted: \S+/half\.", (written / name).read_text())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_on_a_phone(written: Path, tmp_path: Path, dark: bool) -> None:
    found = measured(written / "report.html", tmp_path, width=PHONE, dark=dark)
    assert PHONE - 20 <= found["width"] <= PHONE  # less a scroll bar
    assert found["scrolled"] == found["width"]
    assert found["wider"] == []
    assert found["scrolling"] >= 2  # wide tables move inside their boxes
    assert found["images"]
    for loaded, alt, width in found["images"]:
        assert loaded, alt
        assert 250 < width <= found["width"]
    light = ["rgb(27, 27, 27)", "rgb(255, 255, 255)"]
    assert ([found["ink"], found["paper"]] == light) is not dark
    assert found["headings"][1] == "Side by side"


def test_tables_in_latex_are_whole(written: Path) -> None:
    text = (written / "tables.tex").read_text()
    tables = re.findall(r"\\begin\{table\}.*?\\end\{table\}", text, re.DOTALL)
    assert len(tables) >= 4
    for table in tables:
        (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", table)
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
        assert all(r"\%" in f" {row}" or "%" not in row for row in rows)
        assert table.isascii()


def test_a_report_that_was_cut_off_can_be_replaced(tmp_path: Path) -> None:
    one, other = (fake_run(tmp_path / name, ((99, 99),)) for name in ("one", "other"))
    report = Report.over([f"one={one}", f"other={other}"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "figures").touch()  # no figure can be written
    with pytest.raises(OSError, match="figures"):
        write_report(report, out, overwrite=True)
    (out / "figures").unlink()
    assert "2 finished runs of 1 method in 2 variants." in write_report(
        report, out, overwrite=True
    ).read_text("utf-8")


def test_only_what_a_report_wrote_is_replaced(tmp_path: Path) -> None:
    report = Report.over([fake_run(tmp_path / "run", ((99, 99),))])
    out = tmp_path / "out"
    write_report(report, out)
    with pytest.raises(FileExistsError, match="not empty"):
        write_report(report, out)
    stale, mine, plot = (out / name for name in ("figures/old.png", "mine.txt", "figures/plot.png"))
    for path in (stale, mine, plot):
        path.write_text("mine")
    written = json.loads((out / "manifest.json").read_text("utf-8"))["files"]
    outside = tmp_path / "outside.png"
    outside.touch()
    listed = ["figures/old.png", "mine.txt", "../outside.png", str(outside), *written]
    changed_json(out / "manifest.json", files=listed)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"figures/plot\.png"):
        write_report(report, out, overwrite=True)
    assert contents(tmp_path) == before
    plot.unlink()
    write_report(report, out, overwrite=True)
    assert (mine.exists(), outside.exists(), stale.exists()) == (True, True, False)
    with pytest.raises(NotADirectoryError, match="is a file"):
        write_report(report, mine)
    (out / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match=r"report\.html"):
        write_report(report, out, overwrite=True)


def test_a_report_on_some_of_the_methods_is_the_report_on_their_runs(tmp_path: Path) -> None:
    joint = MethodConfig("joint")
    other = BackboneConfig("cifar_vit")
    chosen = [fake_run(tmp_path / "loda", seed=1), fake_run(tmp_path / "frozen", method=FROZEN)]
    chosen.append(fake_run(tmp_path / "elsewhere", seed=1, method=FROZEN, backbone=other))
    left_out = fake_run(tmp_path / "joint", ((99, 99),), seed=1, method=joint)
    some = Report.over([*chosen, left_out], only=["loda", "frozen"])
    assert some.markdown() == Report.over(chosen).markdown()
    assert [run.path.name for run in some.inventory.runs] == ["loda", "frozen", "elsewhere"]
    for option in ({"only": ["joined"]}, {"only": ["loda"], "baseline": "joint"}):
        with pytest.raises(ValueError, match=r"must be one of loda"):
            Report.over([*chosen, left_out], **option)
