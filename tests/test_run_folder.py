"""What a run leaves behind, and what it never touches."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import READOUTS, VIT, finished, squares, tiny, tree

from training.config import Experiment, dump_experiment, read_experiment
from training.files import read_json, read_tensors, write_atomically, write_json, write_tensors
from training.loop import train
from training.metrics import AccuracyMatrix
from training.run_folder import RunFolder, choose_folder
from training.setup import prepare

FILES = {
    "accuracy.png",
    "classes.json",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "model.safetensors",
    "readouts.safetensors",
    "summary.json",
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tree(tmp_path_factory), tmp_path_factory.mktemp("bare")), quiet=True)


def below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["epoch", "epoch", "task"] * 3
    epochs = [e for e in events if e["event"] == "epoch"]
    assert [(e["task"], e["epoch"]) for e in epochs] == [(t, e) for t in range(3) for e in range(2)]
    assert [e["lr"] for e in epochs] == pytest.approx([0.05, 0.025] * 3)  # cosine
    assert all(e["loss"] > 0 and 0 <= e["accuracy"] <= 1 for e in epochs)
    summary = read_json(run / "summary.json")
    for task, event in enumerate(e for e in events if e["event"] == "task"):
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
    assert set(summary["seconds"]) == {"begin", "train", "end", "readouts", "evaluate"}


def test_the_model_loads_strictly_into_the_original_architecture(run: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
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


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, run: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    experiment = read_experiment(run / "config.yaml")
    experiment.out = str(copy)
    with pytest.raises(FileExistsError, match=r"is not empty.*--overwrite true"):
        train(experiment, quiet=True)
    assert contents(copy) == before


def test_a_hidden_file_is_content_too(tmp_path: Path) -> None:
    (tmp_path / ".keep").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        choose_folder(Experiment(out=str(tmp_path)))


def test_overwriting_leaves_nothing_of_the_old_run(
    tmp_path: Path, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    (copy / ".model.safetensors.123.tmp").write_text("half of a file, left by a crash")
    experiment = tiny(tree(tmp_path_factory), copy, overwrite=True, data={"tasks": 1}, seed=5)
    train(experiment, quiet=True)
    assert below(copy) == FILES | {"notes.txt"}  # a file that is not ours stays
    after = contents(copy)
    assert after.pop("notes.txt") == b"mine"
    assert {name for name, content in after.items() if content == before[name]} == set()


def test_overwriting_removes_results_before_training_begins(tmp_path: Path, run: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    experiment = read_experiment(run / "config.yaml")
    experiment.out, experiment.overwrite = str(copy), True
    prepare(experiment)
    assert below(copy) == {"config.yaml", "classes.json", "environment.json"}


def test_bad_settings_leave_the_old_run_whole_even_with_overwrite(
    tmp_path: Path, run: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = contents(copy)
    experiment = read_experiment(run / "config.yaml")
    experiment.out, experiment.overwrite = str(copy), True
    experiment.method.target = "*.nothing"
    with pytest.raises(ValueError, match="matches no linear layer"):
        prepare(experiment)
    assert contents(copy) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="which is a file"):
        choose_folder(Experiment(out=str(tmp_path / "out"), overwrite=True))
    assert (tmp_path / "out").read_text() == "mine"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_folder(Experiment(out="~/run")) == tmp_path / "run"


def test_runs_that_begin_in_the_same_second_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Both ask before either has made its folder, as two processes would.
    wanted = [choose_folder(Experiment()) for _ in range(2)]
    made = [RunFolder(path, fresh=True).path for path in (wanted[0], wanted[0])]
    assert len(set(made)) == 2
    assert all(path.is_dir() and path.parent.name == "runs" for path in made)
    assert wanted[0].name.startswith("digits-loda-seed1993-")


def test_unnamed_runs_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tree(tmp_path_factory)
    monkeypatch.chdir(tmp_path)
    made = [prepare(tiny(root, None)).folder.path for _ in range(3)]
    assert len(set(made)) == 3
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {p.name for p in made}


def half(path: Path) -> None:
    path.write_bytes(b"half of i")
    msg = "disk full"
    raise OSError(msg)


def test_a_failing_writer_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert read_json(path) == {"a": 1}
    assert below(tmp_path) == {"file"}


def test_tensors_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def failing(tensors: object, target: Path) -> None:
        half(Path(target))

    monkeypatch.setattr("training.files.save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert read_tensors(path)["a"].tolist() == [1, 1, 1]
    assert below(tmp_path) == {"t.safetensors"}


def test_json_that_cannot_be_written_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == [1]
    assert below(tmp_path) == {"a.json"}


def test_views_and_shared_tensors_can_be_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t", {"a": base.mT, "b": base[0], "c": base})
    back = read_tensors(tmp_path / "t")
    assert torch.equal(back["a"], base.mT)
    assert torch.equal(back["b"], base[0])
    assert torch.equal(back["c"], base)


@pytest.mark.parametrize(
    ("read", "content"),
    [(read_json, b"{"), (read_json, b"\xff\xfe"), (read_tensors, b""), (read_tensors, b"x" * 90)],
)
def test_damaged_files_are_named(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*damaged"):
        read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for read in (read_json, read_tensors):
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path / "none")
