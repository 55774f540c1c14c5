"""What a run kept gives its models and energies back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_runs import finished, flags, tiny, tree
from torch import nn

from training import cli
from training.analyse import analyse
from training.analyse.rebuild import task_updates
from training.backbones import build_backbone
from training.config import Experiment, read_experiment
from training.data import build_stream, loader, test_transform
from training.evaluate import extract_features, make_accelerator
from training.finished.inference import load_classifier
from training.finished.kept import keeps_nothing
from training.finished.ranks import layer_ranks
from training.finished.verify import verify
from training.train import train
from training.seeds import derive, seeded
from training.run_dir import RunFolder
from training.sweeps import plan, read_sweep

STEPS = 4  # 0, 0.5, 1, 1.5
LAYER = "blocks.1.attn.qkv"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory, "loda")


@pytest.fixture(scope="module")
def analysed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    copy = shutil.copytree(run, tmp_path_factory.mktemp("analysed") / "run")
    path, notes = analyse(copy, points=STEPS)
    assert notes == []
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def trained(factory: pytest.TempPathFactory, method: dict[str, Any], **changes: Any) -> Path:
    keep = {"branches": True, "moments": True, "heads": True}
    head = {"also": ["heads"]}
    settings = {"method": method, "keep": keep, "head": head, "train": {"epochs": 1}, **changes}
    return train(tiny(tree(factory), factory.mktemp("trained") / "run", **settings), quiet=True)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    model = load_classifier(run).model
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def loss_of(run: Path, age: str, *, own: bool) -> float:
    """Mean CosFace loss of the run's last model on evaluation images, with plain torch."""
    classifier = load_classifier(run)
    experiment = classifier.experiment
    stream = build_stream(experiment.data, experiment.seed)
    images = stream.test.with_transform(test_transform(experiment.data))
    batches = loader(images, 64, shuffle=False, seed=0)
    features, labels = extract_features(classifier.model, batches, make_accelerator(experiment))
    newest = min(stream.tasks[-1])
    rows = {"new": labels >= newest, "old": labels < newest, "all": labels >= 0}[age]
    cosines = classifier.readouts["heads"].logits(features[rows])
    if own:
        sizes = torch.tensor([len(task) for task in stream.tasks])
        task_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        cosines[task_of[labels[rows]][:, None] != task_of] = -torch.inf
    return float(nn.functional.cross_entropy(experiment.head.scale * cosines, labels[rows]))


def test_the_first_weights_are_those_of_the_backbone(run: Path) -> None:
    experiment = read_experiment(run / "config.yaml")
    with seeded(derive(experiment.seed, 0, "backbone")):
        backbone = build_backbone(experiment.backbone).module
    *_, first = task_updates(run, experiment.method, final_weights(run), 3)
    assert first.task == 0
    before = backbone.get_submodule(LAYER).weight
    torch.testing.assert_close(first.before[LAYER], before.double(), atol=1e-6, rtol=0)
    assert first.whole[LAYER].norm() > 1e-3


@pytest.mark.parametrize("method", [{}, {"joint": True}], ids=["default", "joint"])
def test_an_earlier_model_is_that_of_a_shorter_stream(
    method: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    full, short = (trained(tmp_path_factory, method, data={"tasks": n}) for n in (3, 2))
    last = next(task_updates(full, read(full).method, final_weights(full), 3))
    assert last.task == 2
    expected = final_weights(short)[LAYER].double()
    torch.testing.assert_close(last.before[LAYER], expected, atol=1e-6, rtol=0)
    path, _ = analyse(full, parts=["losses"], points=2, tasks=[3])
    (found,) = json.loads(path.read_text())["losses"]
    # What is new to the longer run is not there yet, and old heads do not change.
    assert found["own"]["old"][0] == pytest.approx(loss_of(short, "all", own=True), abs=1e-4)
    assert list(found["marks"]) == (["merged"] if method else ["recalibrated", "merged"])


def read(run: Path) -> Experiment:
    return read_experiment(run / "config.yaml")


def test_losses_are_those_of_the_models_before_and_after(
    run: Path, analysed: dict[str, Any]
) -> None:
    assert [task["task"] for task in analysed["losses"]] == [1, 2]
    last = analysed["losses"][-1]
    assert last["step"] == [0, 0.5, 1, 1.5]
    for kind in ("own", "seen"):
        for age in ("old", "new"):
            merged = loss_of(run, age, own=kind == "own")
            assert last["marks"]["merged"][kind][age] == pytest.approx(merged, abs=1e-4)
    own, seen = last["own"], last["seen"]
    assert all(a < b for age in ("old", "new") for a, b in zip(own[age], seen[age], strict=True))
    assert len(set(own["new"])) == STEPS
    assert 0 < last["marks"]["recalibrated"]["step"] < 1


def test_without_recalibration_the_mark_lies_on_the_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = trained(tmp_path_factory, {"recalibration": "none", "branches": "general"})
    path, _ = analyse(run, parts=["losses"], points=STEPS, tasks=[3])
    (last,) = json.loads(path.read_text())["losses"]
    for mark in last["marks"].values():
        assert mark["step"] == pytest.approx(1)
        assert mark["own"]["new"] == pytest.approx(last["own"]["new"][2], rel=1e-5)


def test_energies_are_those_that_verify_finds(run: Path, analysed: dict[str, Any]) -> None:
    found = {(c.task, c.layer, c.what): c for c in verify(run)}
    assert [task["task"] for task in analysed["subspaces"]] == [1, 2]
    for task in analysed["subspaces"]:
        for layer, measures in task["layers"].items():
            for branch in ("general", "isolated"):
                check = found[f"{task['task']:03d}", layer, branch]
                assert measures[branch]["new_energy"] == pytest.approx(check.new, rel=1e-5)
                assert measures[branch]["old_energy"] == pytest.approx(check.old, rel=1e-5)
                ratio = measures[branch]["new_energy"] / measures[branch]["old_energy"]
                assert measures[branch]["ratio"] == pytest.approx(ratio, rel=1e-6)


def test_the_null_space_is_that_of_the_history(run: Path, analysed: dict[str, Any]) -> None:
    first = load_file(run / "tasks" / "000" / "moments.safetensors")
    second = load_file(run / "tasks" / "001" / "moments.safetensors")
    old, new = first[f"merged/{LAYER}"], second[f"new/{LAYER}"]  # the history is of one task
    quiet = np.linalg.eigh(old)[1][:, : read(run).method.rank]
    expected = np.trace(quiet.T @ new @ quiet)
    measures = analysed["subspaces"][0]["layers"][LAYER]["null"]
    assert measures["new_energy"] == pytest.approx(expected / np.trace(new), rel=1e-4)
    assert measures["new_magnitude"] == pytest.approx(np.sqrt(expected), rel=1e-4)


def test_what_a_run_lacks_is_said(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "tasks" / "001" / "heads.safetensors").unlink()
    path, notes = analyse(copy, points=STEPS)
    assert notes == [f"losses left out: {copy} was trained without --keep.heads true"]
    content = json.loads(path.read_text())
    assert content["losses"] is None
    assert len(content["subspaces"]) == 2
    shutil.rmtree(copy / "tasks")
    with pytest.raises(FileNotFoundError, match=r"--keep\.branches true --keep\.moments true; los"):
        analyse(copy)
    RunFolder(copy)  # a new run in the folder
    assert not path.exists()


def test_from_a_run_to_its_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    (copy / "tasks" / "001" / "heads.safetensors").unlink()
    assert cli.main(["analyse", str(copy)]) == 0
    said = capsys.readouterr()
    assert said.out == f"analysis: {copy / 'analysis.json'}\n"
    assert said.err.startswith("loda analyse: losses left out")
    assert cli.main(["report", str(copy), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    assert {"ratio-loda.svg", "energy-loda.png"} <= {p.name for p in (out / "figures").iterdir()}
    assert cli.main(["report", str(copy), "--out", str(out)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert cli.main(["report", str(copy), "--figure", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").is_file()
    # A run's log names the memory that the report shows.
    costs = capsys.readouterr().out.partition("### Costs")[2]
    row = next(line for line in costs.splitlines() if line.startswith("| loda |"))
    assert float(row.split(" | ")[-2]) > 50


def test_runs_that_cannot_be_analysed(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        analyse(tmp_path)
    with pytest.raises(ValueError, match="run of frozen"):
        analyse(finished(tmp_path_factory, "frozen"))
    with pytest.raises(ValueError, match=r"from 2 .* to 3, got"):
        analyse(run, tasks=[1])
    with pytest.raises(ValueError, match="points must be at least 2"):
        analyse(run, points=1)
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        analyse(copy)
    isolated = trained(tmp_path_factory, {"branches": "isolated"})
    with pytest.raises(ValueError, match="no general branch"):
        analyse(isolated, parts=["losses"])


def test_a_later_analysis_keeps_what_an_earlier_one_found(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path, _ = analyse(copy, parts=["losses"], points=2, tasks=[2])
    first = json.loads(path.read_text())
    assert first["subspaces"] is None
    analyse(copy, parts=["subspaces"])
    second = json.loads(path.read_text())
    assert second["losses"] == first["losses"]
    assert len(second["subspaces"]) == 2
    analyse(copy, parts=["losses"], points=3, tasks=[3])
    third = json.loads(path.read_text())
    assert third["subspaces"] == second["subspaces"]
    assert third["losses"][0] == first["losses"][0]
    assert [(task["task"], len(task["step"])) for task in third["losses"]] == [(1, 2), (2, 3)]
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"it is \[\]; expected a mapping"):
        analyse(copy, parts=["subspaces"])


def test_runs_of_null_lora_are_read_as_what_they_are(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    null = finished(tmp_path_factory, "null_lora")
    checks = verify(null)
    assert all(check.passed for check in checks)
    assert {check.what for check in checks} == {"null"}
    rank, lines = layer_ranks(null, [0.9])
    assert rank == read(null).method.rank
    assert len(lines) == 3 * 2
    copy = shutil.copytree(null, tmp_path / "run")
    path, notes = analyse(copy, points=STEPS)
    assert notes == [
        f"losses left out: {copy} has no general branch after its first task: no direction to "
        "follow"
    ]
    measures = json.loads(path.read_text())["subspaces"][0]["layers"][LAYER]
    assert measures["isolated"]["old_energy"] == pytest.approx(measures["null"]["old_energy"])
    other = finished(tmp_path_factory, "inflora")
    for ask in (verify, analyse, lambda run: layer_ranks(run, [0.9])):
        with pytest.raises(ValueError, match=r"run of inflora; .* loda and null_lora alone"):
            ask(other)


def test_switches_that_keep_nothing_are_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--keep.moments=true", "--keep.branches=true", "--keep.heads=true"]
    settings = flags(tiny(tree(tmp_path_factory), tmp_path / "run"))
    assert cli.main(["train", *settings, *keep, "--method.name=ncm", "--data.tasks=1"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "loda train: keep.branches keeps nothing: ncm has no branches",
        "loda train: keep.moments keeps nothing: ncm has no moments",
    ]
    (tmp_path / "sweep.yaml").write_text(
        "seeds: [0]\nvariants: {loda: {}, o_lora: {method.name: o_lora}}\n"
    )
    jobs = plan(read_sweep(tmp_path / "sweep.yaml"), tmp_path / "out", keep)
    assert [keeps_nothing(job.experiment) for job in jobs] == [
        [],
        ["keep.moments keeps nothing: o_lora has no moments"],
    ]
