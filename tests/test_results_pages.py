"""The committed results: what the report page says comes from records, committed too."""

from functools import cache
from pathlib import Path

import pytest

from training.report import Report, find_runs
from training.report.tables import markdown

DOCS = Path(__file__).parents[1] / "docs"
COMPARED = ("caltech101.jsonl", "caltech101-cifar_vit.jsonl")
TRIALS = ("caltech101-cifar_vit-trials.jsonl",)
SEEDS = list(range(1993, 1998))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@cache
def report() -> Report:
    return Report.over([DOCS / "records" / name for name in COMPARED])


def test_the_report_page_is_what_the_report_prints() -> None:
    assert report().markdown() in page("results-caltech101.md")


def test_every_group_has_all_seeds() -> None:
    for section in report().sections:
        for label, runs in section.groups.items():
            assert [run.experiment.seed for run in runs] == SEEDS, label


def test_the_page_of_results_quotes_the_report() -> None:
    quoted = page("results.md")
    for table in report().overview():
        assert markdown(table).partition("\n\n")[2] in quoted
    for section in report().sections:
        assert section.base in quoted


@pytest.mark.parametrize("name", [*COMPARED, *TRIALS])
def test_records_name_no_path_of_a_machine(name: str) -> None:
    for run in find_runs([DOCS / "records" / name]).runs:
        data, backbone = run.experiment.data, run.experiment.backbone
        assert data.root == "caltech101"
        assert backbone.weights in (None, "vit_cifar10.safetensors")
        assert run.experiment.out is None


def test_rates_are_those_that_the_trials_chose() -> None:
    (section,) = Report.over([DOCS / "records" / TRIALS[0]]).sections
    last: dict[str, dict[float, float]] = {}
    for runs in section.groups.values():
        for run in runs:
            rates = last.setdefault(run.experiment.method.name, {})
            rates[run.experiment.train.lr] = run.matrices["alignment"].last
    assert all(len(rates) == 5 for name, rates in last.items() if name != "frozen")
    for run in find_runs([DOCS / "records" / COMPARED[1]]).runs:
        rates = last[run.experiment.method.name]
        assert rates[run.experiment.train.lr] == max(rates.values())
