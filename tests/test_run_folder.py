"""What a run leaves behind, and what it never touches."""

import json
import stat
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from run_contents import FILES, below, events
from safetensors.torch import load_file
from small_runs import READOUTS, VIT, finished, small_vit, squares, tiny, tree

from training.config import Experiment, dump_experiment, read_experiment
from training.run_dir import read_json
from training.train import train
from training.metrics import AccuracyMatrix
from training.run_dir import RunFolder
from training.train import prepare


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tree(tmp_path_factory), tmp_path_factory.mktemp("bare")), quiet=True)


def test_a_run_leaves_these_files_and_no_others(bare: Path) -> None:
    assert below(bare) == FILES


def test_files_have_the_rights_that_new_files_have(bare: Path) -> None:
    (bare.parent / "plain").write_text("")
    plain = stat.S_IMODE((bare.parent / "plain").stat().st_mode)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in bare.iterdir()}
    assert found == dict.fromkeys(FILES, plain)


def test_the_configuration_is_complete_and_reloads(run: Path) -> None:
    experiment = read_experiment(run / "config.yaml")
    assert dump_experiment(experiment) == (run / "config.yaml").read_text("utf-8")
    assert experiment.method.rank == 4
    assert experiment.head.also == list(READOUTS[1:])
    assert experiment.out == str(run)


def test_relative_paths_are_recorded_as_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares(tmp_path / "data", train=2, test=1)
    monkeypatch.chdir(tmp_path)
    given = tiny(Path("data"), "out", train={"epochs": 0})
    prepare(given)
    read = read_experiment("out/config.yaml")
    assert read.data.root == str(tmp_path / "data")


def test_the_environment_says_what_ran(run: Path) -> None:
    environment = read_json(run / "environment.json")
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["packages"]["timm"] == timm.__version__
    assert environment["backbone"]["timm_name"] == "vit_tiny_patch16_224"
    assert environment["backbone"]["options"] == VIT
    assert environment["backbone"]["weights_sha256"] is None  # random weights
    assert environment["backbone"]["tag"] is None
    assert len(environment["backbone"]["tensors_sha256"]) == 64


def test_the_hash_of_the_weights_is_recorded(tmp_path: Path) -> None:
    experiment = Experiment(out=str(tmp_path / "out"), device="cpu")
    backbone = prepare(experiment).backbone
    environment = read_json(tmp_path / "out" / "environment.json")
    assert environment["backbone"]["weights_sha256"] == backbone.weights_sha256
    assert len(backbone.weights_sha256 or "") == 64


def test_the_classes_are_in_the_order_of_learning(run: Path) -> None:
    classes = read_json(run / "classes.json")
    names = sorted(
        p.name
        for p in (Path(read_experiment(run / "config.yaml").data.root or "") / "train").iterdir()
    )
    assert classes["class_names"] == [names[number] for number in classes["order"]]
    assert sorted(classes["order"]) == list(range(6))
    assert classes["tasks"] == [[0, 1], [2, 3], [4, 5]]


def test_the_metrics_hold_a_line_an_epoch_and_a_task(run: Path) -> None:
    told = events(run)
    assert [e["event"] for e in told] == ["epoch", "epoch", "task"] * 3
    epochs = [e for e in told if e["event"] == "epoch"]
    assert [(e["task"], e["epoch"]) for e in epochs] == [(t, e) for t in range(3) for e in range(2)]
    assert [e["lr"] for e in epochs] == pytest.approx([0.05, 0.025] * 3)  # cosine
    assert all(e["loss"] > 0 and 0 <= e["accuracy"] <= 1 for e in epochs)
    summary = read_json(run / "summary.json")
    for task, event in enumerate(e for e in told if e["event"] == "task"):
        for kind in READOUTS:
            correct, total = event["counts"][kind]
            assert correct == summary["counts"][kind]["correct"][task]
            assert total == [3] * (2 * task + 2)
            assert event["accuracy"][kind] == sum(correct) / sum(total)
        assert all(value >= 0 for value in event["seconds"].values())


def test_metrics_are_valid_lines_while_a_run_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    log = RunFolder.log

    def spy(self: RunFolder, event: str, **values: object) -> None:
        log(self, event, **values)
        lines = (self.path / "metrics.jsonl").read_text("utf-8").splitlines()
        seen.append(json.loads(lines[-1])["event"])
        assert not (self.path / "summary.json").exists()

    monkeypatch.setattr(RunFolder, "log", spy)
    train(tiny(tree(tmp_path_factory), tmp_path / "run", data={"tasks": 1}), quiet=True)
    assert seen == ["epoch", "epoch", "task"]


def test_the_summary_holds_every_metric_of_every_readout(run: Path) -> None:
    summary = read_json(run / "summary.json")
    assert summary["readout"] == "nearest_mean"
    assert list(summary["readouts"]) == list(READOUTS)
    for kind, values in summary["readouts"].items():
        assert AccuracyMatrix.from_dict(summary["counts"][kind]).summary() == values
    # 2 layers: A (4x16) and B (48x4) of the general branch, then B of two; a head of 2x16.
    assert summary["trainable_parameters"] == [2 * (64 + 192) + 32, *[2 * 2 * 192 + 32] * 2]
    parts = {"begin", "load", "train", "end", "readouts", "evaluate"}
    assert set(summary["seconds"]) == parts


def test_the_model_loads_strictly_into_the_original_architecture(run: Path) -> None:
    model = small_vit()
    weights = load_file(run / "model.safetensors")
    assert list(weights) == sorted(model.state_dict())
    model.load_state_dict(weights, strict=True)


def test_the_readouts_hold_all_classes(run: Path) -> None:
    readouts = load_file(run / "readouts.safetensors")
    assert {key.partition("/")[0] for key in readouts} == set(READOUTS)
    assert readouts["heads/weight"].shape == (6, 16)


def test_the_figure_is_an_image(run: Path) -> None:
    with Image.open(run / "accuracy.png") as image:
        image.load()
        assert min(image.size) > 200


def test_what_is_kept_of_each_task(run: Path) -> None:
    assert below(run) - FILES == {"tasks", *(f"tasks/{t:03d}" for t in range(3))} | {
        f"tasks/{t:03d}/{group}.safetensors"
        for t in range(3)
        for group in ("branches", "moments", "heads", "statistics")
    }
    layers = [f"blocks.{k}.attn.qkv" for k in range(2)]
    for task in range(3):
        kept = {p.stem: load_file(p) for p in (run / "tasks" / f"{task:03d}").iterdir()}
        names = ["general"] if task == 0 else ["general", "isolated"]
        expected = {f"{kind}/{b}/{n}" for kind in ("down", "up") for b in names for n in layers}
        expected |= {f"coefficients/{n}" for n in layers} if task else set()
        assert set(kept["branches"]) == expected
        assert kept["branches"]["down/general/blocks.0.attn.qkv"].shape == (4, 16)
        assert kept["branches"]["up/general/blocks.0.attn.qkv"].shape == (48, 4)
        assert kept["branches"]["up/general/blocks.0.attn.qkv"].abs().max() > 0
        for name in layers:
            moment = kept["moments"][f"merged/{name}"]
            assert moment.shape == (16, 16)
            torch.testing.assert_close(moment, moment.mT)
        assert [tuple(w.shape) for w in kept["heads"].values()] == [(2, 16)] * (task + 1)
        assert kept["statistics"]["mean"].shape == (2 * task + 2, 16)
        assert kept["statistics"]["count"].tolist() == [6] * (2 * task + 2)


def test_kept_branches_rebuild_the_merged_weight(run: Path) -> None:
    # The last task's update added to the weights before it must give the saved model; the
    # weights before it follow from the start and the updates of the first two tasks.
    start = prepare_again(run)
    weights = load_file(run / "model.safetensors")
    name = "blocks.1.attn.qkv"
    expected = start[f"{name}.weight"].double()
    for task in range(3):
        kept = load_file(run / "tasks" / f"{task:03d}" / "branches.safetensors")
        for branch, scale in (("general", 0.25), ("isolated", 0.5)):
            if f"up/{branch}/{name}" not in kept:
                continue
            down = kept[f"down/{branch}/{name}"].double()
            if branch == "general" and task:
                down = kept[f"coefficients/{name}"].double() @ down
            expected = expected + scale * kept[f"up/{branch}/{name}"].double() @ down
    torch.testing.assert_close(weights[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)


def prepare_again(run: Path) -> dict[str, torch.Tensor]:
    """The weights that the run started from."""
    experiment = read_experiment(run / "config.yaml")
    experiment.out = str(run.parent / "again")
    experiment.overwrite = True
    return {k: v.clone() for k, v in prepare(experiment).state.model.state_dict().items()}


@pytest.mark.parametrize("group", ["branches", "moments", "heads", "statistics"])
def test_each_switch_keeps_its_own_file_only(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, group: str
) -> None:
    # The read-out "heads" needs no statistics: they are kept because they were asked for.
    experiment = tiny(
        tree(tmp_path_factory),
        tmp_path / "run",
        data={"tasks": 1},
        train={"epochs": 1},
        head={"readout": "heads"},
        keep={group: True},
    )
    folder = train(experiment, quiet=True)
    assert below(folder) - FILES == {"tasks", "tasks/000", f"tasks/000/{group}.safetensors"}


def test_branches_of_sequential_lora_are_kept(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = finished(tmp_path_factory, "seq_lora")
    kept = load_file(run / "tasks" / "002" / "branches.safetensors")
    assert {key.partition("/")[0] for key in kept} == {"down", "up"}
    assert len(kept) == 4
