"""The folder of a run: files whole or not there, one process at a time, and what a run leaves."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from run_contents import FILES, below, contents, events
from safetensors.torch import load_file
from small_runs import KEPT, READOUTS, VIT, finished, plain, small_vit, squares, tiny

from training.cli import main
from training.config import Experiment, dump_experiment, read_experiment
from training.metrics import AccuracyMatrix
from training.run_dir import (
    LOCK,
    FolderLock,
    RunFolder,
    choose_folder,
    held_by,
    is_finished,
    read_json,
    read_tensors,
    readable,
    task_folder,
    update_manifest,
    write_atomically,
    write_json,
    write_tensors,
)
from training.train import Run, prepare, run_to_end, train

# Files


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write longer files, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failing_writer_leaves_the_file_before_it(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, "disk full")

    path = tmp_path / "file"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match=r"file: disk full"):
        write_atomically(path, half)
    assert read_json(path) == {"a": 1}
    assert below(tmp_path) == {"file"}


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(3)})
    write_json(tmp_path / "a.json", [1])
    with files_of_at_most(1000):
        with pytest.raises(OSError, match=r"t\.safetensors"):
            write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(3000)})
        with pytest.raises(OSError, match=r"a\.json"):
            write_json(tmp_path / "a.json", ["long" * 1000])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_tensors(tmp_path / "t.safetensors")["a"].tolist() == [1, 1, 1]
    assert read_json(tmp_path / "a.json") == [1]
    assert below(tmp_path) == {"t.safetensors", "a.json"}


def test_a_folder_that_cannot_be_synced_is_passed_over_but_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int, folders: bool) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
                raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL, folders=True))
    write_json(tmp_path / "a.json", 1)  # as on some network disks
    for number, folders in ((errno.ENOSPC, True), (errno.EINVAL, False)):
        monkeypatch.setattr(os, "fsync", refuse(number, folders))
        with pytest.raises(OSError, match=os.strerror(number)):
            write_json(tmp_path / "a.json", 2)


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
def test_damaged_and_missing_files_are_named(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    path = tmp_path / "damaged"
    with pytest.raises(FileNotFoundError, match="damaged"):
        read(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    "take_apart",
    [
        lambda: {}["a"],
        lambda: [][0],
        lambda: int("x"),
        lambda: len(3),  # type: ignore[arg-type]
        lambda: None.a,  # type: ignore[attr-defined]
        lambda: int(float("inf")),
        lambda: torch.zeros(2).reshape(3),
    ],
)
def test_content_of_another_shape_is_one_line_that_names_the_file(
    take_apart: Callable[[], object],
) -> None:
    with (
        pytest.raises(ValueError, match=r"x\.json, task 2") as said,
        readable(Path("x.json"), "task 2"),
    ):
        take_apart()
    assert "\n" not in str(said.value)
    with pytest.raises(OSError), readable(Path("x.json")):
        raise FileNotFoundError


# The lock


def test_who_asks_for_the_owner_does_not_keep_a_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = (tmp_path / LOCK).open("w")
    fcntl.flock(asking, fcntl.LOCK_SH)  # as `held_by` does, for a moment
    monkeypatch.setattr("time.sleep", lambda _: asking.close())
    held = FolderLock(tmp_path)
    assert held_by(tmp_path) == str(os.getpid())
    held.release()
    assert held_by(tmp_path) is None


def test_a_folder_that_stays_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    held = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError, match="in use"):
        FolderLock(tmp_path)
    held.release()


def test_a_file_that_its_holder_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, list[int]()

    def late(handle: int, how: int) -> None:
        flock(handle, how)
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(handle)

    monkeypatch.setattr("fcntl.flock", late)
    held = FolderLock(tmp_path)
    assert (tmp_path / LOCK).is_file()
    held.release()
    assert removed


# What a run leaves


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps nothing more than by default."""
    return plain(tmp_path_factory, keep={"figure": True})


def test_a_run_leaves_these_files_and_no_others(bare: Path) -> None:
    assert below(bare) == FILES


def test_files_have_the_rights_that_new_files_have(bare: Path) -> None:
    (bare.parent / "plain").write_text("")
    rights = stat.S_IMODE((bare.parent / "plain").stat().st_mode)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in bare.iterdir()}
    assert found == dict.fromkeys(FILES, rights)


def test_the_manifest_has_the_hash_of_every_file(run: Path, copy: Path) -> None:
    def hashes(run: Path) -> dict[str, str]:
        files = {k: v for k, v in contents(run).items() if k != "manifest.json"}
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    assert read_json(run / "manifest.json")["files"] == hashes(run)
    assert "tasks/001/heads.safetensors" in hashes(run)
    write_json(copy / "analysis.json", {"subspaces": []})
    update_manifest(copy, "analysis.json")
    assert read_json(copy / "manifest.json")["files"] == hashes(copy)


def test_the_configuration_is_complete_and_reloads(run: Path) -> None:
    experiment = read_experiment(run / "config.yaml")
    assert dump_experiment(experiment) == (run / "config.yaml").read_text("utf-8")
    assert experiment.head.also == list(READOUTS[1:])
    assert experiment.out == str(run)


def test_the_environment_says_what_ran(run: Path, tmp_path: Path) -> None:
    environment = read_json(run / "environment.json")
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["packages"]["timm"] == timm.__version__
    backbone = environment["backbone"]
    assert (backbone["timm_name"], backbone["options"]) == ("vit_tiny_patch16_224", VIT)
    assert (backbone["weights_sha256"], backbone["tag"]) == (None, None)  # random weights
    assert len(backbone["tensors_sha256"]) == 64
    prepare(Experiment(out=str(tmp_path / "out"), device="cpu")).folder.close()
    packaged = read_json(tmp_path / "out" / "environment.json")["backbone"]
    assert len(packaged["weights_sha256"]) == 64


def test_the_classes_are_in_the_order_of_learning(run: Path, root: Path) -> None:
    classes = read_json(run / "classes.json")
    names = sorted(p.name for p in (root / "train").iterdir())
    assert classes["class_names"] == [names[number] for number in classes["order"]]
    assert sorted(classes["order"]) == list(range(6))
    assert classes["tasks"] == [[0, 1], [2, 3], [4, 5]]
    assert classes["images"] == [12] * 3
    assert isinstance(classes["fingerprint"], str)


def test_the_metrics_hold_a_line_an_epoch_and_a_task(run: Path) -> None:
    told = events(run)
    assert [e["event"] for e in told] == [*["epoch", "epoch", "task"] * 3, "state"]
    epochs = [e for e in told if e["event"] == "epoch"]
    places = [(task, epoch) for task in (1, 2, 3) for epoch in (1, 2)]
    assert [(e["task"], e["epoch"]) for e in epochs] == places
    assert [e["lr"] for e in epochs] == pytest.approx([0.05, 0.025] * 3)  # cosine
    assert all(e["loss"] > 0 and 0 <= e["accuracy"] <= 1 for e in epochs)
    summary = read_json(run / "summary.json")
    for number, event in enumerate((e for e in told if e["event"] == "task"), 1):
        assert event["task"] == number
        for kind in READOUTS:
            correct, total = event["counts"][kind]
            assert correct == summary["counts"][kind]["correct"][number - 1]
            assert total == [3] * 2 * number
            assert event["accuracy"][kind] == sum(correct) / sum(total)
        assert all(value >= 0 for value in event["seconds"].values())


def test_metrics_are_valid_lines_while_a_run_goes_on(tmp_path: Path, root: Path) -> None:
    run, seen = prepare(tiny(root, tmp_path / "run", data={"tasks": 2})), list[str]()

    def look(run: Run) -> None:
        path = run.folder.path / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        seen.append(" ".join(json.loads(line)["event"] for line in lines))
        assert not (run.folder.path / "summary.json").exists()

    run.on_step = look
    run_to_end(run, quiet=True)
    after = ("", "epoch", "epoch epoch task", "epoch epoch task epoch")
    assert seen == [events for events in after for _ in range(3)]  # steps an epoch


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
    model, weights = small_vit(), load_file(run / "model.safetensors")
    assert list(weights) == sorted(model.state_dict())
    model.load_state_dict(weights, strict=True)
    readouts = load_file(run / "readouts.safetensors")
    assert {key.partition("/")[0] for key in readouts} == set(READOUTS)
    assert readouts["heads/weight"].shape == (6, 16)


def test_the_figure_is_an_image(bare: Path) -> None:
    with Image.open(bare / "accuracy.png") as image:
        image.load()
        assert min(image.size) > 200


def test_what_is_kept_of_each_task(run: Path) -> None:
    tasks = ("001", "002", "003")
    folders = {"tasks", *(f"tasks/{task}" for task in tasks)}
    assert below(run) - FILES == folders | {
        f"tasks/{task}/{group}.safetensors" for task in tasks for group in KEPT
    }
    layers = [f"blocks.{k}.attn.qkv" for k in range(2)]
    for task in (1, 2, 3):
        kept = {p.stem: load_file(p) for p in task_folder(run, task).iterdir()}
        names = ["general"] if task == 1 else ["general", "isolated"]
        expected = {f"{kind}/{b}/{n}" for kind in ("down", "up") for b in names for n in layers}
        expected |= {f"coefficients/{n}" for n in layers} if task > 1 else set()
        assert set(kept["branches"]) == expected
        assert kept["branches"]["down/general/blocks.0.attn.qkv"].shape == (4, 16)
        assert kept["branches"]["up/general/blocks.0.attn.qkv"].shape == (48, 4)
        assert kept["branches"]["up/general/blocks.0.attn.qkv"].abs().max() > 0
        for name in layers:
            moment = kept["moments"][f"merged/{name}"]
            assert moment.shape == (16, 16)
            torch.testing.assert_close(moment, moment.mT)
        assert [tuple(w.shape) for w in kept["heads"].values()] == [(2, 16)] * task
        assert kept["statistics"]["mean"].shape == (2 * task, 16)
        assert kept["statistics"]["count"].tolist() == [6] * 2 * task


def test_kept_branches_rebuild_the_merged_weight(run: Path, tmp_path: Path) -> None:
    # The weights at the start and the updates of all tasks must give the saved model.
    experiment = read_experiment(run / "config.yaml")
    experiment.out = str(tmp_path / "again")
    name = "blocks.1.attn.qkv"
    start = prepare(experiment).state.model.state_dict()
    expected = start[f"{name}.weight"].double()
    for task in (1, 2, 3):
        kept = load_file(task_folder(run, task) / "branches.safetensors")
        for branch, scale in (("general", 0.25), ("isolated", 0.5)):
            if f"up/{branch}/{name}" not in kept:
                continue
            down = kept[f"down/{branch}/{name}"].double()
            if branch == "general" and task > 1:
                down = kept[f"coefficients/{name}"].double() @ down
            expected = expected + scale * kept[f"up/{branch}/{name}"].double() @ down
    merged = load_file(run / "model.safetensors")[f"{name}.weight"].double()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", [*KEPT, "nothing"])
def test_each_switch_keeps_its_own_file_only(tmp_path: Path, root: Path, group: str) -> None:
    # The read-out "heads" needs no statistics: they are kept because they were asked for.
    keep = {"state": False, **({} if group == "nothing" else {group: True})}
    settings = {"data": {"tasks": 1}, "train": {"epochs": 1}, "head": {"readout": "heads"}}
    folder = train(tiny(root, tmp_path / "run", keep=keep, **settings), quiet=True)
    left = FILES - {"accuracy.png", "state.safetensors"}
    if group != "nothing":
        left |= {"tasks", "tasks/001", f"tasks/001/{group}.safetensors"}
    assert below(folder) == left


def test_branches_of_sequential_lora_are_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = load_file(
        task_folder(finished(tmp_path_factory, "seq_lora"), 3) / "branches.safetensors"
    )
    assert {key.partition("/")[0] for key in kept} == {"down", "up"}
    assert len(kept) == 4


# What a run leaves alone


def test_a_folder_that_is_not_empty_is_left_alone(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    experiment = read_experiment(copy / "config.yaml")
    experiment.out = str(copy)
    with pytest.raises(FileExistsError, match="--overwrite"):
        train(experiment, quiet=True)
    assert contents(copy) == before


def test_a_hidden_file_is_content_too(tmp_path: Path) -> None:
    (tmp_path / ".keep").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        choose_folder(str(tmp_path), "digits")


def test_overwriting_leaves_nothing_of_the_old_run(copy: Path, root: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    (copy / ".model.safetensors.123.tmp").write_text("half of a file, left by a crash")
    settings = {"data": {"tasks": 1}, "keep": {"figure": True}, "seed": 5}
    train(tiny(root, copy, **settings), overwrite=True, quiet=True)
    assert below(copy) == FILES | {"notes.txt"}  # a file that is not ours stays
    after = contents(copy)
    assert after.pop("notes.txt") == b"mine"
    assert {name for name, content in after.items() if content == before[name]} == set()


def test_only_files_that_a_run_writes_are_replaced(copy: Path) -> None:
    foreign = [
        copy / "tasks" / "001" / "mine.safetensors",
        copy / "tasks" / "mine" / "heads.safetensors",
        copy / "checkpoints" / "1000.safetensors",
        copy / "checkpoints" / "1000" / "000001.safetensors",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (copy / "tasks" / "empty").mkdir()
    RunFolder(copy, overwrite=True).close()
    assert all(path.is_file() for path in foreign)
    assert (copy / "tasks" / "empty").is_dir()
    assert not (copy / "summary.json").exists()


def test_a_folder_of_others_is_never_replaced(tmp_path: Path, root: Path) -> None:
    for name in ("config.yaml", "model.safetensors", "accuracy.png", ".hidden"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for attempt in (True, "unfinished"):
        with pytest.raises(FileExistsError, match=r"accuracy\.png, config\.yaml, model\.safe"):
            train(tiny(root, tmp_path), overwrite=attempt, quiet=True)
    assert contents(tmp_path) == before


def test_a_run_that_was_finished_meanwhile_stays(copy: Path, root: Path) -> None:
    """The folder was free, or its run unfinished, when it was chosen; it is locked later."""
    before = contents(copy)
    for attempt in (False, "unfinished"):
        with pytest.raises(FileExistsError):
            RunFolder(copy, overwrite=attempt)
        with pytest.raises(FileExistsError):
            train(tiny(root, copy), overwrite=attempt, quiet=True)
    assert contents(copy) == before
    RunFolder(copy, resume=True).close()  # the lock was released
    (copy / "summary.json").write_text("")  # as a power cut may leave it
    assert not is_finished(copy)
    RunFolder(copy, overwrite="unfinished").close()
    assert not (copy / "model.safetensors").exists()


def test_a_run_that_is_half_removed_is_not_finished(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()  # so that removing it fails, like a kill at that moment
    with pytest.raises(OSError, match="model"):
        RunFolder(copy, overwrite=True)
    assert not is_finished(copy)


def test_every_changed_file_is_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--files"]) == 0
    kept = copy / "tasks" / "002" / "heads.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    (copy / "environment.json").unlink()
    (copy / "analysis.json").write_text("{}")  # not in the manifest
    assert main(["verify", str(copy), "--files"]) == 1
    changed = ["analysis.json", "environment.json", "tasks/002/heads.safetensors"]
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in said] == [str(copy / name) for name in changed]


def test_overwriting_removes_results_before_training_begins(copy: Path) -> None:
    experiment = read_experiment(copy / "config.yaml")
    experiment.out = str(copy)
    prepare(experiment, overwrite=True).folder.close()
    assert below(copy) == {"config.yaml", "classes.json", "environment.json", "manifest.json"}


def test_bad_settings_leave_the_old_run_whole_even_with_overwrite(copy: Path, root: Path) -> None:
    before = contents(copy)
    experiment = tiny(root, copy, method={"target": "*.nothing"})
    with pytest.raises(ValueError, match="nothing"):
        prepare(experiment, overwrite=True)
    assert contents(copy) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"):
        choose_folder(str(tmp_path / "out"), "digits", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, root: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file.run"):
        train(tiny(root, tmp_path / "file" / "run"), quiet=True)


def test_relative_paths_are_recorded_as_absolute_and_home_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares(tmp_path / "data", train=2, test=1)
    monkeypatch.chdir(tmp_path)
    prepare(tiny(Path("data"), "out", train={"epochs": 0})).folder.close()
    text = (tmp_path / "out" / "config.yaml").read_text("utf-8")
    assert f"root: {tmp_path / 'data'}\n" in text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_folder("~/run", "digits") == tmp_path / "run"


def test_runs_that_begin_in_the_same_second_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Both ask before either has made its folder, as two processes would.
    wanted = [choose_folder(None, "digits-loda-seed1993") for _ in range(2)]
    assert wanted[0].name.startswith("digits-loda-seed1993-")
    made = [RunFolder(path, fresh=True).path for path in (wanted[0], wanted[0])]
    assert len(set(made)) == 2
    shutil.rmtree(tmp_path / "runs")
    made = [prepare(tiny(root, None)).folder.path for _ in range(3)]
    assert len(set(made)) == 3
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {p.name for p in made}
