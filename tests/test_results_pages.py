"""The committed results: what the pages say comes from records, which are committed too."""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pandas as pd
import protocol
import pytest
from protocol_records import DIVERGED
from protocol_records import recorded as trials
from reference_pages import REPORTS

from training.report import Report, find_runs
from training.report.runs import Run
from training.report.tables import (
    Table,
    accuracy_table,
    lead_texts,
    leads,
    markdown,
    of_readout,
    side_by_side,
)
from training.sweep import plan, read_sweep

DOCS = Path(__file__).parents[1] / "docs"
COMPARED = ["caltech101.jsonl", "caltech101-cifar_vit.jsonl"]
TRIALS = "caltech101-cifar_vit-trials.jsonl"
INSIDE = "caltech101-inside.jsonl"
PUBLISHED = "caltech101-as-published.jsonl"
SEEDS = list(range(1993, 1998))
TESTED = ["glyphs", "caltech101-dinov2"]  # streams of the protocol


SIGNED = r"[+−]?\d+\.\d+"
NUMBER = re.compile(SIGNED)
INTERVAL = re.compile(rf"\[({SIGNED}), ({SIGNED})\]")
CELL = re.compile(rf"({SIGNED}) {INTERVAL.pattern}")


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def recorded(*names: str) -> list[Path]:
    return [DOCS / "records" / name for name in names]


@cache
def report() -> Report:
    return Report.over(recorded(*COMPARED))


@cache
def of_test(stream: str) -> Report:
    return Report.over(recorded(f"{stream}-test.jsonl"))


@cache
def contrasts(stream: str, part: str = "test") -> str:
    decided = trials(stream)
    assert decided is not None
    return protocol.contrasts(decided, recorded(f"{stream}-{part}.jsonl"), stream)


@cache
def runs(name: str) -> list[Run]:
    return find_runs(recorded(name)).runs


def rows(table: Table) -> str:
    """A table without its title and its note."""
    return "\n".join(x for x in markdown(table).splitlines() if x.startswith("|"))


def test_every_group_has_all_seeds() -> None:
    for section in report().sections:
        for label, runs in section.groups.items():
            assert [run.seed for run in runs] == SEEDS, label


def test_the_site_holds_the_report() -> None:
    assert list(REPORTS["caltech101"]) == COMPARED
    for name, records in REPORTS.items():
        assert f'href="{name}/report.html"' in page("results.md")
        assert all(path.is_file() for path in recorded(*records))


@pytest.mark.parametrize("name", ["results.md", "caltech101.md", "../README.md"])
def test_intervals_in_the_text_are_those_of_the_report(name: str) -> None:
    text = page(name)
    # Another test holds the table of what controls change.
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    means: dict[tuple[float, float], set[float]] = {}
    alone = Report.over(recorded("glyphs-test.jsonl"), lead_of="isolated-only")
    held = report().markdown() + alone.markdown()
    held += "".join(of_test(stream).markdown() + contrasts(stream) for stream in TESTED)
    held += contrasts("glyphs", "test-readouts")  # the primary ones, run again
    for cell in CELL.findall(held + tables):
        mean, low, high = map(number, cell)
        means.setdefault((low, high), set()).add(abs(mean))
        means.setdefault((-high, -low), set()).add(abs(mean))  # less, in place of more
    found = list(INTERVAL.finditer(prose))
    assert found
    for interval in found:
        low, high = map(number, interval.groups())
        assert (low, high) in means, interval[0]
        before = {abs(number(x)) for x in NUMBER.findall(prose[: interval.start()][-250:])}
        near = [abs(x - mean) for x in before for mean in means[low, high]]
        assert min(near) < 0.051, interval[0]  # some are rounded to a decimal


def test_the_page_of_results_shows_how_the_lead_moves_with_the_backbone() -> None:
    (moves,) = [
        table
        for table in side_by_side(report().sections)
        if "lead of loda" in table.title and "alignment" in table.title
    ]
    assert moves.header[-1] == "change"
    assert rows(moves) in page("results.md")


@pytest.mark.parametrize("stream", TESTED)
def test_the_page_of_results_shows_the_test(stream: str) -> None:
    shown = page("results.md")
    for readout in ("compensated", "alignment"):
        assert rows(accuracy_table(of_test(stream).sections[0], readout)) in shown
    for table in contrasts(stream).split("\n\n")[1::2]:
        assert table in shown
    assert " ".join(DIVERGED[stream]) in shown


def test_the_page_of_results_shows_what_twice_the_passes_change() -> None:
    methods, _, controls = of_test("glyphs").sections[:3]
    shown = page("results.md").partition("### Equal passes")[2].partition("###")[0]
    measures = pd.concat([methods.measures, controls.measures])
    measures = measures.drop_duplicates(["run", "readout"])  # LoDA is in both
    last = {
        readout: of_readout(measures, readout).pivot(index="seed", columns="group", values="last")
        for readout in ("compensated", "alignment")
    }
    ends = {readout: by_seed.mean() for readout, by_seed in last.items()}
    labels = [x.removesuffix("-aligned") for x in ends["alignment"].index if x.endswith("-aligned")]
    assert len(labels) > 3
    for label in labels:
        plain = label.removesuffix("-same-weight")
        kinds = [plain, f"{label}-aligned", f"{label}-double-epochs"]
        cells = [f"{mean[kind]:.2f}" for mean in ends.values() for kind in kinds]
        if plain != label:
            cells[0] = cells[3] = "–"
        assert f"| {label} | {' | '.join(cells)} |" in shown
        raises = ends["compensated"][kinds[1:]] > ends["compensated"][plain]
        assert raises.tolist() == [False, label == "joint"]
    by_seed = last["compensated"]
    collapsed = by_seed.index[by_seed["o_lora-double-epochs"] < by_seed["o_lora"] - 10]
    assert collapsed.tolist() == [101, 110]
    stable = by_seed.drop(collapsed)
    assert (stable["o_lora-double-epochs"] > stable["o_lora"]).all()
    before, after, own = stable[["o_lora", "o_lora-double-epochs", "loda"]].mean()
    assert f"from {before:.1f} to {after:.1f} %, and LoDA has {own:.1f} there" in shown
    joint = by_seed[["joint-aligned", "joint-double-epochs"]]
    own, worst = joint.mean(), joint["joint-aligned"].min()
    assert f"as many it ends at {own['joint-double-epochs']:.2f} %" in " ".join(shown.split())
    assert f"{own['joint-aligned']:.2f} % on average, {worst:.1f} in its worst draw" in shown
    plain, twice = ends["compensated"][["joint", "joint-double-epochs"]]
    ceiling = f"ends at {plain:.1f} %, and with [twice the epochs](docs/results.md#equal-passes)"
    assert f"{ceiling} at {twice:.1f} %" in page("../README.md")
    same = [f"null_lora-same-weight-{kind}" for kind in ("aligned", "double-epochs")]
    assert "{:.1f} and {:.1f} % with them".format(*ends["compensated"][same]) in " ".join(
        shown.split()
    )


def test_the_page_of_results_shows_the_authors_settings() -> None:
    shown = page("results.md").partition("### The authors' settings")[2].partition("###")[0]
    methods, _, _, native = of_test("glyphs").sections[:4]
    assert rows(accuracy_table(native, "compensated")) in shown
    measures = pd.concat([methods.measures, native.measures])
    measures = measures.drop_duplicates(["run", "readout"])  # LoDA is in both
    moved, ridge = (
        of_readout(measures, readout).groupby("group")["last"].mean()
        for readout in ("compensated", "ridge")
    )
    pairs = {
        "InfLoRA ends at {:.1f} % ({:.1f} with": "inflora",
        "SD-LoRA at {:.1f} ({:.1f})": "sd_lora",
    }
    for text, method in pairs.items():
        assert text.format(*moved[[f"{method}-native", method]]) in shown
    assert f"end at {ridge['ranpac_frozen-native']:.1f} % under `ridge`" in shown
    frozen = f"end at {ridge['frozen']:.1f} under `ridge` with 1000 of them"
    assert f"{frozen}, and at {moved['frozen']:.1f}" in shown
    assert f"LoDA's at {ridge['loda']:.1f} under `ridge`" in shown
    collapsed = of_readout(native.measures, "compensated").groupby("group")["last"].max()
    assert collapsed["o_lora-native"] < moved["frozen"] / 1.5


def test_the_test_of_the_glyphs_is_whole() -> None:
    ran = {f"{run.name}, seed {run.seed}" for run in runs("glyphs-test.jsonl")}
    assert ran == {job.name for job in plan(read_sweep("glyphs-test"), Path("out"))}


def test_the_page_of_results_shows_the_short_tasks() -> None:
    shown = page("results.md").partition("### Twenty short tasks")[2].partition("###")[0]
    (short,) = [x for x in of_test("glyphs").sections if x.title.endswith(": 20 tasks")]
    (rates,) = Report.over(recorded("glyphs-20-tasks-rates.jsonl")).sections
    for section in (short, rates):
        assert rows(accuracy_table(section, "compensated")) in shown
    last = of_readout(short.measures, "compensated").pivot(
        index="seed", columns="group", values="last"
    )
    assert len(last) == 10
    for other in ("frozen-20-tasks", "inflora-20-tasks"):  # in each of the ten draws
        assert (last["loda-20-tasks"] < last[other]).all()
    behind = (last["frozen-20-tasks"] - last["loda-20-tasks"]).drop(110)  # which collapsed
    assert f"it is {behind.mean():.1f} points behind" in shown
    texts = {"alignment": "at {} %, {} points behind", "ridge": "at {} %, {} behind"}
    for readout, text in texts.items():
        means = of_readout(short.measures, readout).groupby("group")["last"].mean()
        own = means["loda-20-tasks"]
        assert text.format(f"{own:.1f}", f"{means['frozen-20-tasks'] - own:.1f}") in shown


def test_the_orders_of_the_photographs_in_words() -> None:
    (section,) = of_test("caltech101-dinov2").sections
    last = of_readout(section.measures, "compensated").pivot(
        index="seed", columns="group", values="last"
    )
    lead = (last["loda"] - last["sd_lora"]).sort_values()
    assert (lead > 0).tolist() == [False] * 2 + [True] * 5
    assert lead.index[:2].tolist() == [105, 106]
    shown = " ".join(page("results.md").split())
    ahead, behind = lead[lead > 0], -lead[lead < 0]
    assert f"by {ahead.min():.1f} to {ahead.max():.1f} points" in shown
    assert f"by {behind.min():.1f} and by {behind.max():.1f}." in shown
    assert f"ends at {last['loda'][105]:.1f} %, {behind[105]:.1f} points below SD-LoRA" in shown
    assert f"in every other order {last['loda'].drop(105).min():.1f} or more" in shown
    assert f"[{behind[105]:.1f} points behind SD-LoRA]" in page("../README.md")
    own = of_readout(section.measures, "compensated").set_index("group").loc["loda"]
    own = own.set_index("seed")  # it learns less and forgets more there
    assert (own["new"].idxmin(), own["forgetting"].idxmax()) == (105, 105)
    own_lead = last["loda"].mean() - last["frozen"].mean()
    first = last["first_task"].mean() - last["frozen"].mean()
    assert 0.75 < first / own_lead < 0.8  # "more than three quarters"
    by_task = last.drop(columns=["joint", "frozen"])
    assert by_task.mean().idxmax() == "loda"
    rest = by_task.drop(index=105).mean()
    names = {
        "o_lora": "O-LoRA",
        "sd_lora": "SD-LoRA",
        "inflora": "InfLoRA",
        "seq_lora": "sequential LoRA",
        "null_lora": "`null_lora`",
        "first_task": "`first_task`",
    }
    for group, name in names.items():
        assert re.search(rf"{rest['loda'] - rest[group]:.1f} (points )?above {name}", shown)
    still = of_readout(section.measures, "alignment").groupby("group")["last"].mean()
    gained = last.mean() - still
    for group in ("sd_lora", "o_lora"):
        assert f"{names[group]} by {gained[group]:.1f}" in shown
    assert f"sequential LoRA by {gained['seq_lora']:.1f} points" in shown
    assert f"LoDA by {gained['loda']:.1f}" in shown
    assert f"this order ({last['first_task'][105]:.1f} %)" in shown
    joint = last["joint"].drop(104)
    assert f"ends at {joint.min():.1f} to {joint.max():.1f} %" in shown
    assert f"never recovered ({last['joint'][104]:.1f} %)" in shown
    heads = of_readout(section.measures, "heads").groupby("group")["last"].mean()
    assert f"ends lower itself ({heads['loda']:.1f} %)" in shown


def test_the_first_tasks_of_the_photographs_are_as_their_logs_say() -> None:
    (path,) = recorded("caltech101-dinov2-first-task.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses: dict[int, list[float]] = {}
    for line in lines:
        if line["event"] == "epoch":
            losses.setdefault(line["seed"], []).append(line["loss"])
    assert list(losses) == [101, 102, 103, 104, 105, 106, 107]
    rose = {seed for seed, x in losses.items() if any(b > a for a, b in pairwise(x))}
    assert rose == {105}
    tasks = {line["seed"]: line for line in lines if line["event"] == "task"}
    moved = {seed: 100 * task["update"]["relative"] for seed, task in tasks.items()}
    shown = " ".join(page("results.md").split())
    first, second = losses[105][:2]
    assert f"rose in the second epoch, from {first:.2f} to {second:.2f}" in shown
    assert f"the weights by {moved.pop(105):.1f} %" in shown
    assert f"by {min(moved.values()):.1f} to {max(moved.values()):.1f} %" in shown
    again = sorted(runs("caltech101-dinov2-order-105.jsonl"), key=lambda run: run.seed or 0)
    updates = [100 * run.content["log"][0]["update"]["relative"] for run in again]
    assert "moved the weights by {:.1f} and {:.1f} %".format(*updates) in shown
    ends = [100 * run.matrices["compensated"].last for run in again]
    assert "ended at {:.1f} and {:.1f} %, above".format(*ends) in shown
    layers = tasks[105]["update"]["layers"]
    assert max(layers, key=layers.get) == "blocks.11.attn.qkv.weight"
    assert f"the last block ({100 * max(layers.values()):.1f} %)" in shown
    assert f"right after it ({100 * tasks[105]['accuracy']['compensated']:.1f} %)" in shown


def test_what_the_methods_learn_and_forget_in_the_trials() -> None:
    (section,) = Report.over(recorded("glyphs-choose.jsonl")).sections
    means = of_readout(section.measures, "compensated").groupby("group")[["new", "forgetting"]]
    text = page("results.md").partition("The same runs by")[2].partition("###")[0]
    numbers = NUMBER.findall(re.sub(r"[Aa]t\s0\.\d+", "", text))  # without the rates
    wanted = []
    for label in ("loda-0.5", "inflora-0.18", "o_lora-0.18", "seq_lora-0.06"):
        wanted += [f"{value:.1f}" for value in means.mean().loc[label]]
    wanted += [f"{value:.1f}" for value in reversed(means.mean().loc["null_lora-0.5"].tolist())]
    assert numbers == wanted


def test_the_published_settings_end_as_the_page_says() -> None:
    (section,) = Report.over(recorded(PUBLISHED)).sections
    text = page("caltech101.md").partition("## Against the authors'")[2]
    for readout in section.readouts:
        (row,) = accuracy_table(section, readout).cells.itertuples(index=False)
        assert f"| {readout} | {' | '.join(row[:-1])} |" in text
    for run in section.groups["loda-as-published"]:
        if run.seed in (1993, 1996):
            assert f"{100 * run.matrices['heads'].last:.2f}" in text


def test_what_a_control_changes_of_its_own_method() -> None:
    methods, controls = report().sections[:2]
    runs = pd.concat([controls.measures, methods.measures]).drop_duplicates(["run", "readout"])
    labels = set(runs["group"])
    changed = [label for label in labels if label.endswith(("-aligned", "-double-epochs"))]
    assert len(changed) == 9
    for label in changed:
        method = label.removesuffix("-aligned").removesuffix("-double-epochs")
        if method in labels:
            found = [
                leads(of_readout(runs, k), label, "last").loc[[method]] for k in controls.readouts
            ]
            assert {int(lead["pairs"].iloc[0]) for lead in found} == {len(SEEDS)}
            texts = " | ".join(text for lead in found for text in lead_texts(lead))
            assert f"| {label} | {texts} |" in page("caltech101.md")


def test_the_energy_ratios_are_those_of_the_analysis() -> None:
    (run,) = runs(INSIDE)
    by_subspace = pd.DataFrame(run.energies).groupby("subspace")
    for name in ("null", "isolated"):
        ratios = by_subspace.get_group(name)["ratio"]
        assert f"{ratios.min():.2f} to {ratios.max():.2f}" in page("caltech101.md")
    shares = 100 * by_subspace.get_group("isolated")["new_energy"]
    assert f"{shares.min():.1f} to {shares.max():.1f} %" in page("caltech101.md")


def test_records_that_the_pages_name_are_there() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    texts = "".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"docs/records/([\w.-]+\.jsonl)", texts))
    assert len(named) > 10
    assert named <= {path.name for path in (DOCS / "records").iterdir()}


def test_records_name_no_path_of_a_machine() -> None:
    for run in [*report().inventory.runs, *runs(INSIDE), *runs(TRIALS), *runs(PUBLISHED)]:
        data, backbone = run.experiment.data.options, run.experiment.backbone.options
        assert data["root"] == "caltech101"
        assert backbone.get("weights") in (None, "vit_cifar10.safetensors")
        assert run.experiment.out is None


def test_rates_on_cifar_vit_are_the_best_of_equal_trials() -> None:
    last: dict[str, dict[float, float]] = {}
    for run in runs(TRIALS):
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
        assert f"| {name} | {' | '.join(cells)} |" in page("choices.md")
