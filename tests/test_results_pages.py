"""The committed results: what the pages say comes from records, which are committed too."""

from functools import cache
from pathlib import Path

from training.report import Report, find_runs, report_tables
from training.report.measures import lead, lead_text
from training.report.side import side_by_side
from training.report.tables import Table, markdown
from training.sweeps import plan, read_sweep

DOCS = Path(__file__).parents[1] / "docs"
COMPARED = ["caltech101.jsonl", "caltech101-cifar_vit.jsonl"]
TRIALS = "caltech101-cifar_vit-trials.jsonl"
INSIDE = "caltech101-inside.jsonl"
SEEDS = list(range(1993, 1998))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def recorded(*names: str) -> list[Path]:
    return [DOCS / "records" / name for name in names]


@cache
def report() -> Report:
    return Report.over(recorded(*COMPARED))


def body(table: Table) -> str:
    """A table without its title."""
    return markdown(table).partition("\n\n")[2]


def test_the_report_page_is_what_the_report_prints() -> None:
    assert report().markdown() in page("results-caltech101.md")


def test_every_group_has_all_seeds() -> None:
    for section in report().sections:
        for label, runs in section.groups.items():
            assert [run.experiment.seed for run in runs] == SEEDS, label


def test_the_page_of_results_quotes_the_report() -> None:
    for section in report().sections:
        ends = ("alignment (%)", "alignment (points)")
        quoted = [t for t in report_tables(section, None) if t.title.endswith(ends)]
        assert len(quoted) == 2
        for table in quoted:
            assert body(table) in page("results.md")


def test_the_page_of_results_shows_how_the_lead_moves_with_the_backbone() -> None:
    (moves,) = [
        table
        for table in side_by_side(report().sections)
        if "lead of loda" in table.title and "alignment" in table.title
    ]
    assert moves.header[-1] == "change"
    assert body(moves) in page("results.md")


def test_what_a_control_changes_of_its_own_method() -> None:
    methods, controls = report().sections[:2]
    runs = {**methods.groups, **controls.groups}
    changed = [label for label in runs if label.endswith(("-aligned", "-double-epochs"))]
    assert len(changed) == 9
    for label in changed:
        method = label.removesuffix("-aligned").removesuffix("-double-epochs")
        if method in runs:
            leads = [lead(runs[label], runs[method], kind, "last") for kind in controls.readouts]
            assert all(found is not None and found.size == len(SEEDS) for found in leads)
            assert f"| {label} | {' | '.join(map(lead_text, leads))} |" in page("results.md")


def test_the_energy_ratios_are_those_of_the_analysis() -> None:
    (run,) = find_runs(recorded(INSIDE)).runs
    layers = [layer for task in run.analysis["subspaces"] for layer in task["layers"].values()]
    for name in ("null", "isolated"):
        ratios = [layer[name]["ratio"] for layer in layers]
        assert f"{min(ratios):.2f} to {max(ratios):.2f}" in page("results.md")
    shares = [100 * layer["isolated"]["new_energy"] for layer in layers]
    assert f"{min(shares):.1f} to {max(shares):.1f} %" in page("results.md")


def test_records_name_no_path_of_a_machine() -> None:
    for run in find_runs(recorded(*COMPARED, INSIDE, TRIALS)).runs:
        data, backbone = run.experiment.data, run.experiment.backbone
        assert data.root == "caltech101"
        assert backbone.weights in (None, "vit_cifar10.safetensors")
        assert run.experiment.out is None


def test_rates_on_cifar_vit_are_the_best_of_equal_trials() -> None:
    last: dict[str, dict[float, float]] = {}
    for run in find_runs(recorded(TRIALS)).runs:
        assert run.experiment.data.validation == 0.2  # the test images were not opened
        rates = last.setdefault(run.experiment.method.name, {})
        rates[run.experiment.train.lr] = 100 * run.matrices["alignment"].last
    jobs = plan(read_sweep("caltech101-cifar_vit"), Path("out"), ["--data.root=x"])
    chosen = {job.experiment.method.name: job.experiment.train.lr for job in jobs}
    assert set(chosen) == set(last)
    for name, rates in last.items():
        if name == "frozen":
            continue
        assert sorted(rates) == [0.006, 0.02, 0.06, 0.18]
        assert rates[chosen[name]] == max(rates.values())
        cells = [
            f"**{rates[lr]:.2f}**" if lr == chosen[name] else f"{rates[lr]:.2f}"
            for lr in sorted(rates)
        ]
        assert f"| {name} | {' | '.join(cells)} |" in page("results.md")
