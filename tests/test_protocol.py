"""The comparison of docs/protocol.md: its sweep files, and the rules by which trials decide it."""

import subprocess
import sys
from pathlib import Path

import protocol
import pytest
import yaml
from fake_runs import fake_run
from protocol_records import DIVERGED, TRIED, recorded

from backends.torch import LoDASettings
from training.config import (
    BackboneConfig,
    DataConfig,
    Experiment,
    HeadConfig,
    MethodConfig,
    flat_settings,
    load_experiment,
)
from training.report import find_runs
from training.sweep import plan, read_sweep, write_groups

ROOT = Path(__file__).parents[1]
# What the commands in the heads of the sweeps are given.
GIVEN = {"glyphs": [], "caltech101-dinov2": ["--data.root=x", "--backbone.weights=y"]}


def is_held_out(experiment: Experiment, alphabet: str, share: float) -> bool:
    """Whether a run is on the images to choose on, or on those of the test."""
    data = experiment.data
    if data.name == "glyphs":
        return (data.options["alphabet"], data.held_out) == (alphabet, 0.0)
    return data.held_out == share


def page() -> str:
    return (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def trials(best: float = 0.18, grid: tuple[float, ...] = protocol.RATES) -> protocol.Trials:
    """Every method is best at one rate; inflora is the best of the baselines."""
    ahead = {"loda": 5.0, "inflora": 3.0, "joint": 9.0}
    made: protocol.Trials = {
        method: {
            rate: {
                seed: 30 + ahead.get(method, 0.0) - 10 * abs(rate - best) + (seed - 11)
                for seed in protocol.CHOOSING_SEEDS
            }
            for rate in grid
        }
        for method in protocol.METHODS
    }
    made["frozen"] = {protocol.ONLY_RATE: {11: 28.0, 12: 29.0}}
    return made


@pytest.mark.parametrize("stream", protocol.STREAMS)
def test_the_sweep_of_trials_is_the_one_of_the_protocol(stream: str) -> None:
    path = ROOT / "training" / "configs" / "sweeps" / f"{stream}-choose.yaml"
    assert path.read_text(encoding="utf-8") == protocol.choosing_sweep(stream, recorded(stream))


@pytest.mark.parametrize("stream", TRIED)
def test_the_sweep_of_the_test_is_what_the_trials_decide(stream: str) -> None:
    path = ROOT / "training" / "configs" / "sweeps" / f"{stream}-test.yaml"
    decided = recorded(stream)
    assert decided is not None
    assert path.read_text(encoding="utf-8") == protocol.results_sweep(decided, stream)
    if stream != protocol.WHOLE:  # whose test has the controls
        path = path.with_name(f"{stream}-controls.yaml")
        expected = protocol.results_sweep(decided, stream, protocol.CONTROLS)
        assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("stream", TRIED)
def test_the_page_shows_the_trials(stream: str) -> None:
    for readout in ("compensated", "alignment"):
        shown = recorded(stream, readout)
        assert shown is not None
        assert protocol.rate_table(shown) in page()
    for name in DIVERGED[stream]:
        assert name in page()


def test_the_default_experiment_is_the_stream_of_the_comparison() -> None:
    values = flat_settings(load_experiment([]))
    expected = protocol.STREAMS["glyphs"].settings
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("stream", protocol.STREAMS)
def test_every_method_gets_the_same_trials(stream: str) -> None:
    sweep = read_sweep(f"{stream}-choose")
    rates: dict[str, list[float]] = {}
    for job in plan(sweep, Path("out"), GIVEN[stream]):
        experiment = job.experiment
        protocol._require(experiment, stream, protocol.CHOOSE, job.name)
        assert is_held_out(experiment, "choose", 0.2)
        if job.experiment.seed == protocol.CHOOSING_SEEDS[0]:
            rates.setdefault(experiment.method.name, []).append(experiment.train.lr)
    assert rates.pop("frozen") == [protocol.ONLY_RATE]
    assert set(rates) == set(protocol.METHODS)
    grids = {tuple(own) for own in rates.values()}
    assert len(grids) == 1
    assert set(protocol.STREAMS[stream].rates) <= set(*grids)


def test_the_recorded_room_is_that_of_its_sweep() -> None:
    wanted = {
        (job.experiment.method.name, job.experiment.train.lr): job.experiment
        for job in plan(read_sweep("glyphs-room"), Path("out"))
    }
    for run in find_runs([ROOT / "docs" / "records" / "glyphs-room.jsonl"]).runs:
        own, planned = run.experiment, wanted[run.experiment.method.name, run.experiment.train.lr]
        assert own.data.options == planned.data.options == {"alphabet": "choose", "images": 60}
        assert own.train.epochs == planned.train.epochs == 12
        assert own.seed == planned.seed


def test_the_page_shows_the_recorded_room() -> None:
    for readout in ("alignment", "ridge"):
        recorded = protocol.read_trials(
            [ROOT / "docs" / "records" / "glyphs-room.jsonl"],
            protocol.CANDIDATE,
            readout,
            ["joint-1.0/seed11"],
        )
        assert protocol.rate_table(recorded) in page()


def test_the_page_shows_the_first_trials() -> None:
    for readout in ("alignment", "ridge"):
        recorded = protocol.read_trials(
            [ROOT / "docs" / "records" / "glyphs-first-trials.jsonl"],
            readout=readout,
            diverged=["sd_lora-1.0/seed11"],
            seeds=[11],
        )
        assert set(recorded) == {*protocol.METHODS, "frozen"}
        assert protocol.rate_table(recorded) in page()


@pytest.mark.parametrize(
    ("name", "room"),
    [("caltech101-dinov2", True), ("tiny-imagenet", False), ("tiny-imagenet-drawn", False)],
)
def test_the_page_shows_the_room_of_photographs(name: str, room: bool) -> None:
    path = ROOT / "docs" / "records" / f"{name}-room.jsonl"
    recorded = protocol.read_trials([path], protocol.CANDIDATE, "alignment")
    assert protocol.rate_table(recorded) in page()
    best = max(last for seeds in recorded["joint"].values() for last in seeds.values())
    assert (best >= recorded["frozen"][protocol.ONLY_RATE][11] + 5) == room
    assert (name in protocol.STREAMS) == room


@pytest.mark.parametrize(
    ("stream", "record"), [("glyphs", "glyphs-240-room"), (protocol.CANDIDATE, "glyphs-room")]
)
def test_a_stream_has_room(stream: str, record: str) -> None:
    path = ROOT / "docs" / "records" / f"{record}.jsonl"
    # Neither frozen nor joint has outdated statistics, so compensation changes nothing for them.
    recorded = protocol.read_trials([path], stream, "alignment")
    assert stream != "glyphs" or protocol.rate_table(recorded) in page()
    best = max(last for seeds in recorded["joint"].values() for last in seeds.values())
    assert best >= recorded["frozen"][protocol.ONLY_RATE][11] + 5


def test_the_best_rate_is_taken_and_of_equals_the_lower() -> None:
    assert protocol.best_rates(trials()) == dict.fromkeys(protocol.METHODS, 0.18)
    equal = trials()
    equal["loda"][0.06] = dict(equal["loda"][0.18])
    assert protocol.best_rates(equal)["loda"] == 0.06


def test_a_best_rate_at_an_edge_asks_for_trials_of_all_beyond_it() -> None:
    with pytest.raises(ValueError, match=r"at 2\.0"):
        protocol.best_rates(trials(best=1.0))
    with pytest.raises(ValueError, match=r"at 0\.002"):
        protocol.best_rates(trials(best=0.006))
    low = trials(best=0.006)
    assert protocol.due_rates(low) == [0.002]
    sweep = yaml.safe_load(protocol.choosing_sweep("glyphs", low))
    new = {name: own for name, own in sweep["variants"].items() if own["train.lr"] == 0.002}
    assert {own["method.name"] for own in new.values()} == set(protocol.METHODS)
    photographs = "caltech101-dinov2"
    own = protocol.STREAMS[photographs].rates
    assert protocol.due_rates(trials(best=own[0], grid=own), photographs) == [0.0002]
    assert protocol.due_rates(trials(best=own[-1], grid=own), photographs) == [0.5]
    for best, grid in ((0.00006, (0.00006, 0.0002, *own)), (1.0, (*own, 0.5, 1.0))):  # two steps
        assert protocol.due_rates(trials(best=best, grid=grid), photographs) == []
    with pytest.raises(ValueError, match="follow each other"):
        protocol.due_rates(trials(best=1.0, grid=(*protocol.RATES, 4.0)))
    wider = (*protocol.RATES, 2.0, 4.0)
    assert protocol.best_rates(trials(best=4.0, grid=wider))["loda"] == 4.0


def test_unequal_trials_are_refused() -> None:
    fewer = trials()
    del fewer["o_lora"][0.02][12]
    with pytest.raises(ValueError, match="o_lora"):
        protocol.best_rates(fewer)
    more = trials()
    more["seq_lora"][2.0] = {11: 1.0, 12: 1.0}
    with pytest.raises(ValueError, match="seq_lora"):
        protocol.best_rates(more)


def test_a_trial_that_diverged_counts_as_nothing() -> None:
    assert protocol.read_trials([], diverged=["joint-1.0/seed11"]) == {"joint": {1.0: {11: 0.0}}}
    some = trials()
    some["joint"][1.0] = dict.fromkeys(protocol.CHOOSING_SEEDS, 0.0)
    assert protocol.best_rates(some)["joint"] == 0.18
    assert "| diverged |" in protocol.rate_table(some)


def test_the_number_of_seeds_grows_with_the_spread_of_the_leads() -> None:
    calm, bounds = trials(), (10, 20)
    chosen = protocol.best_rates(calm)
    assert protocol.number_of_seeds(calm, chosen, bounds) == 10
    for method in ("seq_lora", "o_lora", "sd_lora", "frozen"):
        for rate in calm[method]:
            calm[method][rate][12] += 5
    assert 10 < protocol.number_of_seeds(calm, chosen, bounds) <= 20
    calm["frozen"][protocol.ONLY_RATE][12] += 50
    assert protocol.number_of_seeds(calm, chosen, bounds) == 20


@pytest.mark.parametrize("part", [protocol.TEST, protocol.CONTROLS])
@pytest.mark.parametrize("stream", protocol.STREAMS)
def test_the_test_sweep_is_on_the_other_alphabet_and_other_seeds(
    stream: str, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "glyphs-test.yaml"
    grid = protocol.STREAMS[stream].rates
    best = trials(best=0.06, grid=grid)
    path.write_text(protocol.results_sweep(best, stream, part), encoding="utf-8")
    assert "is inflora" in path.read_text(encoding="utf-8")
    sweep = read_sweep(str(path))
    assert not set(sweep.seeds) & set(protocol.CHOOSING_SEEDS)
    jobs = plan(sweep, tmp_path / "out", GIVEN[stream])
    assert len({job.folder for job in jobs}) == len(sweep.variants) * len(sweep.seeds)
    for job in jobs:
        data = job.experiment.data
        assert is_held_out(job.experiment, "test", 0.0)
        if data.name == "glyphs":
            assert data.init_cls + data.increment * ((data.tasks or 0) - 1) == 40
        if job.folder.parent.name.endswith("double-epochs"):
            assert job.experiment.train.epochs == 2 * protocol.STREAMS[stream].epochs()
    groups = sweep.groups or {}
    assert set(groups["methods"]) == {*protocol.METHODS, "frozen"}
    folder = f"--out runs/{stream}-test"
    assert folder in path.read_text(encoding="utf-8")
    if part == protocol.TEST:
        assert (len(groups) > 1) == (stream == protocol.WHOLE)
    else:
        assert len(sweep.seeds) == 3
        assert set(groups["LoDA's parts"]) == {"loda", *protocol.LODA_PARTS}
        assert "joint-aligned" in groups["controls"]


def test_the_contrasts_are_paired_and_hold_together(tmp_path: Path) -> None:
    lasts = {"loda": (50, 60, 70), "frozen": (40, 52, 58), "inflora": (48, 59, 71)}
    for variant, values in lasts.items():
        for seed, last in enumerate(values):
            fake_run(
                tmp_path / "test" / variant / f"seed{seed}",
                rows=((90,), (last, last)),
                seed=seed,
                data=DataConfig("glyphs", {"alphabet": "test"}, image_size=32),
                backbone=BackboneConfig("cifar_vit"),
                method=MethodConfig(variant),
                head=HeadConfig(readout=protocol.READOUT),
            )
    printed = protocol.contrasts(trials(), [tmp_path / "test"])
    fallen = protocol.contrasts(trials(), [tmp_path / "test"], diverged=["sd_lora/seed2"])
    assert "| sd_lora | +70.00 | 1 |" in fallen
    with pytest.raises(ValueError, match="frozen/seed2"):
        protocol.contrasts(trials(), [tmp_path / "test"], diverged=["frozen/seed2"])
    with pytest.raises(ValueError, match="caltech101-dinov2"):
        protocol.contrasts(trials(), [tmp_path / "test"], "caltech101-dinov2")
    primary = printed.partition("\n\n#### ")[0]
    # Differences 10, 8, 12: mean 10, s = 2, and t of two degrees of freedom at 98.75 % is 6.2053.
    half = 6.2053 * 2 / 3**0.5
    assert f"| frozen | +10.00 [{10 - half:+.2f}, {10 + half:+.2f}] | 3 |" in primary
    assert "| inflora | +0.67 [" in primary
    # A part of the sweep is a table of its own, with intervals for its own number of rows.
    write_groups(tmp_path / "test", {"methods": list(lasts), "controls": ["loda", "inflora"]})
    parts = protocol.contrasts(trials(), [tmp_path / "test"]).split("#### ")[2:]
    assert ["| frozen |" in part for part in parts] == [True, False]
    assert all("| inflora | +0.67 [" in part for part in parts)
    # Differences 2, 1, −1: mean 2/3, s² = 7/3; t at 97.5 % for one row, at 98.75 % for two.
    for part, quantile in zip(parts, (6.2053, 4.3027), strict=True):
        half = quantile * (7 / 9) ** 0.5
        assert (
            f"| inflora | +0.67 [{2 / 3 - half:+.2f}, {2 / 3 + half:+.2f}] | 3 |".replace("-", "−")
            in part
        )
    write_groups(
        tmp_path / "test", {"methods": [*lasts, "sd_lora"], "controls": ["loda", "inflora"]}
    )
    parts = protocol.contrasts(trials(), [tmp_path / "test"], diverged=["sd_lora/seed2"]).split(
        "#### "
    )[2:]
    assert ["| sd_lora |" in part for part in parts] == [True, False]
    with pytest.raises(ValueError, match="o_lora/seed2"):
        protocol.contrasts(trials(), [tmp_path / "test"], diverged=["o_lora/seed2"])
    other = trials()
    other["o_lora"][0.18] = {11: 90.0, 12: 90.0}
    with pytest.raises(ValueError, match="o_lora"):
        protocol.contrasts(other, [tmp_path / "test"])


def test_a_single_branch_has_the_weight_that_it_has_beside_the_other() -> None:
    both = LoDASettings()
    for name in ("general-only", "isolated-only"):
        method = protocol.LODA_PARTS[name]
        own = LoDASettings(**{k.removeprefix("method."): v for k, v in method.items()})  # type: ignore[arg-type]
        for first in (True, False):
            for branch in own.names(first):
                assert own.weight(branch) == both.weight(branch)
    full = find_runs([ROOT / "docs" / "records" / "glyphs-full-weight.jsonl"]).runs
    lasts = [100 * run.matrices[protocol.READOUT].last for run in full]
    assert f"between {min(lasts):.1f} and {max(lasts):.1f} %" in page()


def test_the_command_prints_what_the_functions_give(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "docs" / "protocol.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    printed = run("choose")
    assert yaml.safe_load(printed.stdout) == yaml.safe_load(protocol.choosing_sweep())
    refused = run("test", str(tmp_path))
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
