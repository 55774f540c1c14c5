"""Verifying what a run left on disk: a run of our own, and somebody else's arrays."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_contents import resealed
from small_runs import finished
from torch import nn

from backends.torch import LoDA, LoDASettings
from loda_math import general_subspace, isolated_subspace, recalibration, stack_branches
from loda_math.verify import LayerSettings, read_archive, verification_table, verify_archive
from training.analysis.saved_tasks import task_file
from training.analysis.verify import export_run, verify
from training.config import Experiment, MethodConfig, dump_experiment
from training.run_dir import write_tensors, write_text

LAYERS = ("0", "2")


def configure(folder: Path, **options: Any) -> None:
    experiment = Experiment(method=MethodConfig("loda", options))
    write_text(folder / "config.yaml", dump_experiment(experiment))


def write_run(folder: Path, **options: Any) -> Path:
    """A stream of three tasks through a small network, with the files that training writes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    options = {"target": "[02]", "rank": 3, "history": "both"} | options
    loda = LoDA(model, LoDASettings(**options), record_moments=True)
    folder.mkdir(parents=True, exist_ok=True)
    configure(folder, **options)
    for task in range(1, 4):
        x = torch.randn(40, 8) * torch.rand(8) + torch.randn(8)
        y = torch.randint(5, (40,))
        loda.begin_task([x])
        optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
        for _ in range(3):
            loss = lambda rows, x=x, y=y: nn.functional.cross_entropy(model(x[rows]), y[rows])  # noqa: E731
            loda.step(loss, y, optimizer, radius=0.1)
        record = loda.end_task([x])
        task_file(folder, task, "moments").parent.mkdir(parents=True)
        write_tensors(task_file(folder, task, "moments"), record.moment_tensors())
        write_tensors(task_file(folder, task, "branches"), record.branch_tensors())
    return resealed(folder)


@pytest.mark.parametrize("history", ["merged", "trained", "both"])
@pytest.mark.parametrize("isolated", ["quotient", "null"])
def test_a_run_of_our_own_passes(tmp_path: Path, history: str, isolated: str) -> None:
    checks = verify(write_run(tmp_path / "run", history=history, isolated=isolated))
    assert all(check.passed for check in checks)
    name = "null" if isolated == "null" else "isolated"
    # On the first task the general A is trained, and nothing is recalibrated.
    expected = [
        (task, layer, what)
        for task in "23"
        for layer in LAYERS
        for what in ("general", name, "Λ full")
    ]
    assert [(c.task, c.layer, c.what) for c in checks] == expected
    for check in checks:
        assert check.gap is not None
        assert check.what.startswith("Λ") or check.gap < 1e-9
    table = verification_table(checks).splitlines()
    assert len(table) == len(checks) + 2
    assert table[-1] == "12 of 12 checks passed"
    assert len({len(line) for line in table[:-1]}) == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "trace ratio": {"isolated": "trace_ratio"},
    "energy floor": {"isolated": "trace_ratio", "energy_floor": 0.8},
    "box": {"recalibration": "box"},
    "joint": {"joint": True},
    "joint box": {"joint": True, "recalibration": "box"},
    "joint, one branch": {"joint": True, "branches": "isolated"},
    "decay": {"history_decay": 0.4},
    "weight": {"history_weight": 3.0},
    "mean": {"history_weight": "mean", "history_decay": 0.4},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_under_other_settings_passes_as_what_it_is(tmp_path: Path, option: str) -> None:
    run = write_run(tmp_path / "run", **OPTIONS[option])
    checks = verify(run)
    assert all(check.passed for check in checks)
    assert sum(check.what.startswith("Λ") for check in checks) == 4
    # Read as a run under the default settings it is wrong, so the settings do enter the checks.
    configure(run, rank=3, target="[02]", history="both")
    if option == "joint, one branch":  # nothing of it is recalibrated by default
        assert len(verify(run)) == len(checks) - 4
    elif "joint" in option:
        with pytest.raises(ValueError, match="coefficients"):
            verify(run)
    else:
        assert not all(check.passed for check in verify(run))


def test_the_history_is_that_of_the_named_passes(tmp_path: Path) -> None:
    """Read with another history than the run had, the later tasks fail."""
    run = write_run(tmp_path / "run")
    configure(run, rank=3, target="[02]", history="merged")
    checks = verify(run)
    assert not all(check.passed for check in checks if check.what.startswith("Λ"))
    assert "OFF" in verification_table(checks)


def test_null_lora_is_verified_as_what_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    checks = verify(finished(tmp_path_factory, "null_lora"))
    assert all(check.passed for check in checks)
    assert {check.what for check in checks} == {"null"}


# Arrays of somebody else's code

PUBLISHED = LayerSettings()


def foreign(seed: int = 0) -> dict[str, np.ndarray]:
    """One task of somebody's code: chosen, recalibrated by direction and merged, all correctly."""
    rng = np.random.default_rng(seed)
    new, old = (x.T @ x / 20 for x in rng.standard_normal((2, 20, 6)))
    downs = [
        PUBLISHED.down_scale * general_subspace(new, old, 2).T,
        PUBLISHED.down_scale * isolated_subspace(new, old, 2, ridge=0.0).T,
    ]
    ups = list(rng.standard_normal((2, 5, 2)))
    before = rng.standard_normal((5, 6))
    c = recalibration(ups[0], downs[0], new, old, PUBLISHED.gamma, "direction")
    up, down = stack_branches([ups[0] @ c, ups[1]], downs, [0.25, 0.5])
    return {
        "moment_new": new,
        "moment_old": old,
        "A_general": downs[0],
        "A_isolated": downs[1],
        "B_general": ups[0],
        "B_isolated": ups[1],
        "moment_new_trained": new,
        "moment_old_at_merge": old,
        "weight_before": before,
        "weight_after": before + up @ down,
    }


def save(path: Path, arrays: Mapping[str, np.ndarray], **settings: object) -> Path:
    extra = {"settings": np.array(json.dumps(settings))} if settings else {}
    np.savez(path, **{f"1/block0.qkv/{k}": v for k, v in arrays.items()}, **extra)
    return path


def verdicts(path: Path) -> dict[str, bool]:
    return {check.what: check.passed for check in verify(path)}


def test_correct_arrays_of_somebody_else_pass(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", foreign())
    names = ["general", "isolated", "Λ direction", "merge"]
    assert verdicts(path) == dict.fromkeys(names, True)
    assert {(c.task, c.layer) for c in verify(path)} == {("1", "block0.qkv")}
    # What the settings are by default may also be said.
    assert verdicts(save(path, foreign(), **asdict(PUBLISHED))) == verdicts(path)
    # A fused layer may call its weight by what it is.
    renamed = {k.replace("weight_", "qkv_"): x for k, x in foreign().items()}
    assert verdicts(save(path, renamed)) == dict.fromkeys(names, True)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("A_general", {"general"}),
        ("A_isolated", {"isolated", "Λ direction", "merge"}),
        ("weight_after", {"Λ direction", "merge"}),
        ("moment_old_at_merge", {"Λ direction", "merge"}),
    ],
)
def test_each_mistake_is_found(tmp_path: Path, name: str, broken: set[str]) -> None:
    arrays = foreign()
    arrays[name] = arrays[name] + 0.5 * np.eye(*arrays[name].shape)
    verdict = verdicts(save(tmp_path / "a.npz", arrays))
    assert broken <= {what for what, passed in verdict.items() if not passed}


def test_settings_travel_with_the_arrays(tmp_path: Path) -> None:
    arrays, path = foreign(), tmp_path / "a.npz"
    wrong = verdicts(save(path, arrays, form="full"))
    assert wrong == {"general": True, "isolated": True, "Λ full": False, "merge": False}
    assert not verdicts(save(path, arrays, down_scale=1.0))["general"]
    assert not verdicts(save(path, arrays, ridge=1.0))["isolated"]
    # As on single-precision tokens, the least energies are rounding, and R is regularised.
    assert all(verdicts(save(path, arrays, accumulation_eps=1e-7)).values())
    given = arrays | {
        "coefficients": recalibration(
            *(arrays[k] for k in ("B_general", "A_general", "moment_new", "moment_old")), 3.0
        )
    }
    verdict = verdicts(save(path, given, form="full"))
    assert verdict["Λ full"]
    assert not verdict["merge"]  # the weights were merged with other coefficients


@pytest.mark.parametrize(
    "settings",
    [
        "{oops",
        "[]",
        '{"recalibration": "full"}',
        '{"ridge": "x"}',
        '{"ridge": -1}',
        '{"form": "blah"}',
        '{"energy_floor": 0.5}',
        '{"isolated": null}',
        '{"history_weight": "mean"}',
        '{"accumulation_eps": "x"}',
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: str, tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    arrays = {f"t/l/{name}": array for name, array in foreign().items()}
    np.savez(path, **arrays, settings=settings)
    with pytest.raises(ValueError, match=r"arrays\.npz"):
        verify(path)


def test_the_first_task_and_arrays_that_are_not_there(tmp_path: Path) -> None:
    arrays = foreign()
    arrays = {k: arrays[k] for k in ("moment_new", "A_general", "B_general", "weight_before")}
    general = general_subspace(arrays["moment_new"], None, 2)
    arrays["A_general_init"] = PUBLISHED.down_scale * general.T
    update = 0.25 * arrays["B_general"] @ arrays["A_general"]
    arrays["weight_after"] = arrays["weight_before"] + update
    assert verdicts(save(tmp_path / "a.npz", arrays)) == {"general": True, "merge": True}
    del arrays["A_general_init"], arrays["weight_after"]
    with pytest.raises(ValueError, match="nothing to check"):
        verify(save(tmp_path / "a.npz", arrays))


def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for name, array in {
        "moment_old": np.eye(5),
        "A_general": np.eye(3, 5),
        "B_isolated": np.ones((4, 2)),
        "moment_new": np.eye(6)[None].repeat(2, 0),
        "coefficients": np.eye(3),
    }.items():
        with pytest.raises(ValueError, match=r"a\.npz"):
            verify(save(tmp_path / "a.npz", foreign() | {name: array}))
    arrays = foreign()
    del arrays["A_isolated"]
    with pytest.raises(ValueError, match=r"a\.npz.*A_isolated"):
        verify(save(tmp_path / "a.npz", arrays))


def test_archives_that_unpack_to_far_more_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1/block0.qkv/moment_new.npy", b"no array")
        archive.infolist()[0].file_size = 2**31 - 2  # what it says of itself
    with pytest.raises(ValueError, match=r"bomb\.npz .* unpack"):
        verify(path)
    # What is not asked for is not unpacked either.
    save(path, foreign(), down_scale=3**-0.5)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1/block0.qkv/more.npy", b"no array")
    assert all(verdicts(path).values())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        verify(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz"):
        verify(tmp_path / "text.npz")
    path = save(tmp_path / "arrays.npz", foreign())
    whole = path.read_bytes()
    for size in (0, 200):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"arrays\.npz"):
            verify(path)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_tolerance_is_not_blamed_on_the_run(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance") as caught:
        verify(write_run(tmp_path / "run"), tolerance=tolerance)
    assert str(tmp_path) not in str(caught.value)


def test_task_10_comes_after_task_2(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, **{f"task{k}/block/moment_new": np.eye(2) for k in (10, 2, 1)})
    assert [task for task, _ in read_archive(path).layers] == ["task1", "task2", "task10"]


def test_the_recorded_run(shared: Path) -> None:
    checks = verify(shared / "reference" / "trace.npz")
    assert len(checks) == 20
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("option", ["joint", "mean", "energy floor"])
def test_an_exported_run_is_verified_by_the_mathematics_alone(tmp_path: Path, option: str) -> None:
    run, file = write_run(tmp_path / "run", **OPTIONS[option]), tmp_path / "run.npz"
    export_run(run, file)
    ours, theirs = verify(run), verify_archive(file)
    assert [c[:2] + c[-2:] for c in ours] == [c[:2] + c[-2:] for c in theirs]
    assert all(check.passed for check in theirs)
