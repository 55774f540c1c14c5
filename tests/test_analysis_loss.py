"""What a run kept gives its models back, and the losses of old and new tasks between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import finished, tiny, tree
from torch import nn

from training.analysis.evaluate import set_up
from training.analysis.loss_landscape import loss_landscape, task_updates
from training.analysis.predict import load
from training.analysis.saved_tasks import read_settings
from training.backbones import build_backbone
from training.config import read_experiment
from training.seeds import derive, seeded
from training.train import evaluation_batches, extract_features, train

LAYER = "blocks.1.attn.qkv"
STEPS = (0.0, 0.5, 1.0, 1.5)


def trained(factory: pytest.TempPathFactory, method: dict[str, Any], **changes: Any) -> Path:
    keep = {"branches": True, "moments": True, "heads": True}
    head = {"also": ["heads"]}
    settings = {"method": method, "keep": keep, "head": head, "train": {"epochs": 1}, **changes}
    return train(tiny(tree(factory), factory.mktemp("trained") / "run", **settings), quiet=True)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    model = load(run).model
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def loss_of(run: Path, age: str, *, own: bool) -> float:
    """Mean CosFace loss of the run's last model on evaluation images, with plain torch."""
    classifier = load(run)
    experiment = classifier.experiment
    stream, accelerator = set_up(run, experiment)
    batches = evaluation_batches(stream.test, experiment, accelerator.device)
    features, labels = extract_features(classifier.model, batches, accelerator)
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
    *_, first = task_updates(run, read_settings(run), final_weights(run), 3)
    assert first.task == 1
    before = backbone.get_submodule(LAYER).weight
    torch.testing.assert_close(first.before[LAYER], before.double(), atol=1e-6, rtol=0)
    assert first.whole[LAYER].norm() > 1e-3


@pytest.mark.parametrize("method", [{}, {"joint": True}], ids=["default", "joint"])
def test_an_earlier_model_is_that_of_a_shorter_stream(
    method: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    full, short = (trained(tmp_path_factory, method, data={"tasks": n}) for n in (3, 2))
    last = next(task_updates(full, read_settings(full), final_weights(full), 3))
    assert last.task == 3
    expected = final_weights(short)[LAYER].double()
    torch.testing.assert_close(last.before[LAYER], expected, atol=1e-6, rtol=0)
    (losses,) = loss_landscape(full, [3], [0.0, 1.5])
    # What is new to the longer run is not there yet, and old heads do not change.
    assert losses["own"]["old"][0] == pytest.approx(loss_of(short, "all", own=True), abs=1e-4)
    assert list(losses["marks"]) == (["merged"] if method else ["recalibrated", "merged"])


def test_losses_are_those_of_the_models_before_and_after(run: Path) -> None:
    landscapes = loss_landscape(run, [2, 3], STEPS)
    assert [task["task"] for task in landscapes] == [2, 3]
    last = landscapes[-1]
    assert last["step"] == list(STEPS)
    for among in ("own", "seen"):
        for age in ("old", "new"):
            merged = loss_of(run, age, own=among == "own")
            assert last["marks"]["merged"][among][age] == pytest.approx(merged, abs=1e-4)
    own, seen = last["own"], last["seen"]
    assert all(a < b for age in ("old", "new") for a, b in zip(own[age], seen[age], strict=True))
    assert len(set(own["new"])) == len(STEPS)
    assert 0 < last["marks"]["recalibrated"]["step"] < 1


def test_without_recalibration_the_mark_lies_on_the_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = trained(tmp_path_factory, {"recalibration": "none", "branches": "general"})
    (last,) = loss_landscape(run, [3], STEPS)
    for mark in last["marks"].values():
        assert mark["step"] == pytest.approx(1)
        assert mark["own"]["new"] == pytest.approx(last["own"]["new"][2], rel=1e-5)


def test_without_a_general_branch_there_is_no_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with pytest.raises(ValueError, match="no general branch"):
        loss_landscape(finished(tmp_path_factory, "null_lora"), [2], STEPS)
