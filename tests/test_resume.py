"""A run that is cut off anywhere and goes on ends with the same bits as one that is left alone.

Most runs here are cut off in this process. Where real processes are ended, or the system refuses
to write, `forked` starts them; `test_soak` and the slow tests end them at random moments.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import holds, loda, members, saves_itself, status, wait_until
from image_folders import repaint
from interrupted import at_step, cut_off, differences, go_on, stopped
from run_contents import contents, events, resealed
from small_runs import KEPT, READOUTS, changed, finished, flags, plain, squares, tiny, tree

from training import cli
from training.checkpoint import newest_checkpoint, read_checkpoint, write_checkpoint
from training.config import Experiment, MethodConfig, begun_experiment
from training.distributed import Processes
from training.methods import METHODS
from training.run_dir import checkpoint_files, is_finished, read_json, write_json
from training.train import prepare, resume, run_to_end, train

TRAINED = [name for name in METHODS.paths if name not in ("ncm", "ranpac_frozen")]


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tiny` that nothing interrupted."""
    return plain(tmp_path_factory)


def compared(experiment: Experiment, tmp_path: Path, steps: list[int]) -> list[str]:
    """What differs between a run that was cut off after these steps and one that was not."""
    whole = train(changed(experiment, out=str(tmp_path / "whole")), quiet=True)
    cut = cut_off(changed(experiment, out=str(tmp_path / "cut")), steps)
    assert not (cut / "checkpoints").exists()
    return differences(cut, whole)


def everything(root: Path, **changes: Any) -> Experiment:
    """All read-outs, all that can be kept, a checkpoint after every second step."""
    settings: dict[str, Any] = {
        "head": {"also": list(READOUTS[1:]), "alignment.epochs": 1, "compensated.epochs": 1},
        "keep": dict.fromkeys(KEPT, True),
        "checkpoint": {"steps": 2},
        "data": {"tasks": 2},
        **changes,
    }
    return tiny(root, "unused", **settings)


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_goes_on_inside_a_task(tmp_path: Path, root: Path, method: str) -> None:
    # 12 steps (10 of joint), 6 a task: cut off inside both tasks.
    steps = [5, 6] if method != "joint" else [5]
    assert compared(everything(root, method={"name": method}), tmp_path, steps) == []


@pytest.mark.parametrize(
    "changes",
    [
        {
            "method": {"heldout": True, "history": "both"},
            "train": {"optimizer": "adam", "lr": 0.01},
        },
        {"method": {"name": "sd_lora", "parts": "qv"}},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"method": {"name": "loda", "directions": "random"}},
                {"method": {"name": "seq_lora", "gao": True}},
                {"method": {"name": "o_lora", "parts": "qv", "alpha": 8.0}},
                {"method": {"name": "inflora", "parts": "kv"}},
                {"data": {"workers": 1, "tasks": 2}},
                {"precision": "bf16"},
            )
        ),
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_other_settings_go_on_too(tmp_path: Path, root: Path, changes: dict[str, Any]) -> None:
    assert compared(everything(root, **changes), tmp_path, [8]) == []


def test_drop_out_goes_on_where_it_was(tmp_path: Path, root: Path) -> None:
    experiment = everything(root)
    options = {**experiment.backbone.options["options"], "proj_drop_rate": 0.3}
    torch.manual_seed(3)
    assert compared(changed(experiment, backbone={"options": options}), tmp_path, [8]) == []


@pytest.mark.parametrize("limit", [1, 6, 18])
def test_a_run_goes_on_from_every_kind_of_place(
    tmp_path: Path, root: Path, whole: Path, limit: int
) -> None:
    # After the first step, at the end of the last epoch of a task, and after the very last step.
    experiment = tiny(root, tmp_path / "cut", checkpoint={"steps": 1})
    assert differences(cut_off(experiment, [limit]), whole) == []


def test_a_method_that_cannot_save_an_open_task_goes_on_from_the_last_one(
    tmp_path: Path, root: Path, whole: Path
) -> None:
    settings = {"method": {"name": "own_methods.Unsaved"}, "checkpoint": {"steps": 1}}
    path = stopped(tiny(root, tmp_path / "cut", **settings), 8)
    record = newest_checkpoint(path).record
    assert (record["open"], record["tasks"]) == (None, 1)
    experiment = begun_experiment(path, allow=["own_methods.Unsaved"])
    assert differences(resume(path, experiment, quiet=True), whole) == []


def test_without_checkpoints_nothing_can_go_on(tmp_path: Path, root: Path) -> None:
    stopped(tiny(root, tmp_path / "cut", checkpoint={"keep": 0}), 8)
    assert not (tmp_path / "cut" / "checkpoints").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        resume(tmp_path / "cut", quiet=True)
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        resume(tmp_path, quiet=True)


def test_the_log_says_where_every_process_ran_that_goes_on(tmp_path: Path, root: Path) -> None:
    path = cut_off(tiny(root, tmp_path / "cut", checkpoint={"steps": 1}), [4, 5])
    begun = read_json(path / "environment.json")
    resumed = [event for event in events(path) if event["event"] == "resumed"]
    assert len(resumed) == 2
    for event in resumed:
        assert event["packages"] == begun["packages"]
        assert {*event, "backbone"} == {*begun, "event"}


def test_other_settings_are_refused(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped(tiny(root, tmp_path / "cut"), 8)
    assert cli.main(["train", "--resume", str(path), "--train.lr=0.3", "--seed=5"]) == 2
    assert "train.lr, seed" in capsys.readouterr().err
    assert cli.main(["train", f"--resume={path}", "--train.lr=0.05"]) == 0  # as it was begun
    assert "task 3/3" in capsys.readouterr().out


def test_a_run_goes_on_with_moved_data_and_other_workers(
    tmp_path: Path, root: Path, whole: Path
) -> None:
    shutil.copytree(root, tmp_path / "moved")
    path = stopped(tiny(tmp_path / "moved", tmp_path / "cut"), 8)
    (tmp_path / "moved").rename(tmp_path / "there")
    moved = [f"--data.root={tmp_path / 'there'}", "--data.workers=1", "--checkpoint.steps=2"]
    assert cli.main(["train", "--resume", str(path)]) == 2
    assert cli.main(["train", "--resume", str(path), *moved]) == 0
    assert differences(path, whole) == []


@pytest.mark.parametrize("what", ["order", "fingerprint"])
def test_other_data_are_refused(tmp_path: Path, root: Path, what: str) -> None:
    path = stopped(tiny(root, tmp_path / "cut"), 8)
    classes = read_json(path / "classes.json")
    write_json(path / "classes.json", {**classes, what: classes[what][::-1]})
    with pytest.raises(ValueError, match="not the file that the run wrote"):
        resume(path, quiet=True)
    resealed(path)
    with pytest.raises(ValueError, match="data have changed"):
        resume(path, quiet=True)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_signal_that_arrives_while_the_processes_agree_is_not_lost(
    tmp_path: Path, root: Path, call: int
) -> None:
    """It arrives in the call that asks whether anybody has one, too late to be counted."""

    class Asked(Processes):
        calls = 0

        def maximum(self, number: int) -> int:
            Asked.calls += 1
            if Asked.calls == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return number

    run = prepare(tiny(root, tmp_path / "run"))
    run.processes = Asked()
    with pytest.raises(SystemExit, match="143"):
        run_to_end(run, quiet=True)
    assert call < Asked.calls <= call + 3  # at the next step, which asks twice
    assert checkpoint_files(tmp_path / "run")


def test_images_with_other_pixels_are_refused(tmp_path: Path) -> None:
    root = squares(tmp_path / "squares")
    repaint(root / "train" / "red" / "0.png", 1)
    path = stopped(tiny(root, tmp_path / "cut"), 8)
    repaint(root / "train" / "red" / "0.png", 2)
    with pytest.raises(ValueError, match="data have changed"):
        resume(path, quiet=True)
    record = read_json(path / "environment.json")
    write_json(path / "environment.json", {**record, "backbone": None})
    with pytest.raises(ValueError, match="environment"):
        resume(path, quiet=True)


def test_a_finished_run_says_so(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished(tmp_path_factory)
    assert cli.main(["train", "--resume", str(path)]) == 0
    assert capsys.readouterr().out == f"the run in {path} is finished\n"
    with pytest.raises(ValueError, match="is finished"):
        resume(path)


def test_checkpoints_that_a_finished_run_left_are_removed(copy: Path) -> None:
    # Its process was killed after the results were written.
    before = contents(copy)
    write_checkpoint(copy, {}, {}, b"", keep=2)
    assert cli.main(["train", "--resume", str(copy)]) == 0
    assert contents(copy) == before


# Checkpoints that cannot be used, or not written


def test_a_damaged_checkpoint_costs_only_time_and_takes_no_place_of_a_sound_one(
    tmp_path: Path, root: Path, whole: Path
) -> None:
    path = stopped(tiny(root, tmp_path / "cut", checkpoint={"steps": 2}), 10)
    older, newest = checkpoint_files(path)
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="is damaged"):
        go_on(path, 3)
    left = checkpoint_files(path)
    assert [p.name for p in left] == [older.name, f"{int(newest.stem) + 1:06d}.safetensors"]
    for checkpoint in left:
        read_checkpoint(checkpoint)
    assert differences(resume(path, quiet=True), whole) == []


@pytest.mark.parametrize("other", [{"seed": 5}, {"train": {"lr": 0.01}}, {"data": {"tasks": 2}}])
def test_checkpoints_of_another_run_are_passed_over(
    tmp_path: Path, root: Path, whole: Path, other: dict[str, Any]
) -> None:
    steps = {"checkpoint": {"steps": 2}}
    path = stopped(tiny(root, tmp_path / "cut", **steps), 10)
    foreign = stopped(tiny(root, tmp_path / "other", **steps, **other), 10)
    shutil.copy(checkpoint_files(foreign)[-1], path / "checkpoints" / "000077.safetensors")
    with pytest.warns(RuntimeWarning, match="other settings"):
        resume(path, quiet=True)
    assert differences(path, whole) == []


def test_a_run_whose_files_cannot_grow_stops_and_goes_on(
    tmp_path: Path, root: Path, whole: Path
) -> None:
    # The system itself refuses to write, as it does on a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = prepare(tiny(root, tmp_path / "cut", checkpoint={"steps": 4}))
    run.on_step = at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1])))
    try:
        with pytest.raises(OSError, match=r"could not be saved: .*File too large"):
            run_to_end(run, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert differences(resume(tmp_path / "cut", quiet=True), whole) == []


def arguments(root: Path, run: Path, *more: str) -> list[str]:
    return ["train", *flags(tiny(root, run)), *more]


def said(log: Path) -> str:
    """The output of a process that ended with a clear error: no traceback."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return text


def test_a_full_disk_when_the_run_begins(tmp_path: Path, root: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert status(loda(arguments(root, run), log, file_size=1 << 10)) == 2
    assert f"loda train: cannot write {run / 'config.yaml'}: File too large" in said(log)
    assert not run.exists()  # nothing half-written is left


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, root: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert status(loda(arguments(root, run), log, file_size=1 << 14)) == 2
    text = said(log)
    assert "File too large" in text
    assert "no earlier checkpoint" in text
    assert not run.exists()


def test_a_full_disk_after_the_last_task_is_mended_by_resuming(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The figure is the largest file of a run as small as this one.
    run, log = tmp_path / "run", tmp_path / "log"
    whole = plain(tmp_path_factory, keep={"figure": True})
    size = (whole / "accuracy.png").stat().st_size
    drawn = arguments(tree(tmp_path_factory), run, "--keep.figure=true")
    assert status(loda(drawn, log, file_size=size - 1)) == 2
    assert f"cannot write {run / 'accuracy.png'}: File too large" in said(log)
    assert not (run / "summary.json").exists()
    assert newest_checkpoint(run).record["tasks"] == 2
    assert differences(resume(run, quiet=True), whole) == []


def test_a_folder_without_the_right_to_write(tmp_path: Path, root: Path) -> None:
    log, locked = tmp_path / "log", tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        for run in (locked / "run", locked):
            assert status(loda(arguments(root, run), log, ordinary=True)) == 2
    finally:
        locked.chmod(0o755)
    assert said(log).count("Permission denied") == 2
    assert list(locked.iterdir()) == []


def test_checkpoints_that_can_no_longer_be_written(tmp_path: Path, root: Path, whole: Path) -> None:
    run, log = stopped(tiny(root, tmp_path / "run"), 8), tmp_path / "log"
    (run / "checkpoints").chmod(0o555)
    try:
        more = ["train", "--resume", str(run), "--checkpoint.steps=3"]
        assert status(loda(more, log, ordinary=True)) == 2
    finally:
        (run / "checkpoints").chmod(0o755)
    assert "could not be saved" in said(log)
    assert "Permission denied" in said(log)
    assert differences(resume(run, quiet=True), whole) == []


# Processes


def test_one_process_at_a_time(tmp_path: Path, root: Path, whole: Path) -> None:
    path, log = stopped(tiny(root, tmp_path / "cut"), 8), tmp_path / "log"
    (path / ".lock").write_text("999999\n")  # of a process that is gone
    held = prepare(begun_experiment(path), resume_from=path)
    before = sorted(path.rglob("*"))
    attempts: list[Callable[[], object]] = [
        lambda: resume(path, quiet=True),
        lambda: train(tiny(root, path), overwrite=True, quiet=True),
    ]
    for attempt in attempts:
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()}"):
            attempt()
    assert status(loda(["train", "--resume", str(path)], log)) == 2
    assert f"in use by another run (process {os.getpid()})" in said(log)
    assert sorted(path.rglob("*")) == before
    held.folder.close()
    assert differences(resume(path, quiet=True), whole) == []
    assert not (path / ".lock").exists()


def test_a_method_needs_no_base_class_and_is_allowed_again(tmp_path: Path, root: Path) -> None:
    run = prepare(replace(tiny(root, tmp_path / "cut"), method=MethodConfig("own_methods.Alone")))
    run.on_step = at_step(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as left:
        run_to_end(run, quiet=True)
    _, command = str(left.value).split("resume with: loda ")
    assert "--allow own_methods.Alone" in command
    assert cli.main(command.split()) == 0
    assert is_finished(tmp_path / "cut")


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGTERM, SystemExit),
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGUSR1, SystemExit),  # a job that SLURM is to put into its queue again
    ],
)
def test_a_signal_saves_the_run_and_ends_it(
    tmp_path: Path, root: Path, whole: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    run = prepare(tiny(root, tmp_path / "cut"))
    run.on_step = at_step(8, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error) as left:
        run_to_end(run, quiet=True)
    assert signal.getsignal(number) == before
    if error is SystemExit:
        assert left.value.args == ({signal.SIGTERM: 143, signal.SIGUSR1: 0}[number],)
    path = tmp_path / "cut"
    go_on(path, 1)  # it was saved before, steps are left, and nothing is saved after one
    record = newest_checkpoint(path).record
    at = record["tasks"], record["open"]["epoch"], record["open"]["batch"]
    assert at == (1, 0, 2)  # six steps a task, three an epoch
    assert differences(resume(path, quiet=True), whole) == []


@pytest.mark.parametrize(
    ("name", "to", "workers"),
    [
        ("SIGINT", "process", 0),
        ("SIGTERM", "group", 2),
        pytest.param("SIGINT", "group", 2, marks=[pytest.mark.slow, pytest.mark.gate]),
    ],
)
def test_a_stopped_process_saves_itself_and_leaves_nobody_behind(
    tmp_path: Path, root: Path, whole: Path, name: str, to: str, workers: int
) -> None:
    run, log, method = tmp_path / "run", tmp_path / "log", "own_methods.Signalled"
    more = [f"--method={method}", f"--data.workers={workers}", "--checkpoint.minutes=60"]
    process = loda(arguments(root, run, *more), log, environment={"SIGNALLED": f"8 {name} {to}"})
    assert status(process) == {"SIGINT": 130, "SIGTERM": 143}[name], log.read_text()
    wait_until(process, lambda: not members(process.pid or 0))
    assert members(process.pid or 0) == []
    assert said(log).count("stopping as soon as the run is saved") == 1
    assert said(log).count("a checkpoint was written") == 1
    record = newest_checkpoint(run).record
    assert (record["tasks"], record["open"]["batch"]) == (1, 2)
    resumed = resume(run, begun_experiment(run, allow=[method]), quiet=True)
    assert differences(resumed, whole) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the children of a process are read in /proc")
def test_a_run_whose_loading_process_is_killed_says_so(tmp_path: Path, root: Path) -> None:
    # As the system does when memory runs out.
    others = {*active_children()}

    def kill() -> None:
        for worker in {*active_children()} - others:
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()

    settings: dict[str, Any] = {"data": {"workers": 1}, "train": {"epochs": 3, "lr": 0.02}}
    run = prepare(tiny(root, tmp_path / "run", **settings))
    run.on_step = at_step(12, kill)
    with pytest.raises(ChildProcessError, match=rf"SIGKILL.*--resume {tmp_path / 'run'}"):
        run_to_end(run, quiet=True)
    # It was saved as the last step had left it, later than at its last checkpoint.
    record = newest_checkpoint(tmp_path / "run").record
    assert record["open"] is not None
    assert run.state.open is not None
    at = run.state.open.epoch, run.state.open.batch
    assert (record["open"]["epoch"], record["open"]["batch"]) == at
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_run_is_saved_before_it_ends_at_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    root = squares(tmp_path / "squares")
    uncached = {"data": {"cache": False}}
    whole = train(tiny(root, tmp_path / "whole", **uncached), quiet=True)
    files = {path: path.read_bytes() for path in (root / "train").rglob("*.png")}

    def spoil() -> None:
        for path in files:
            path.write_bytes(b"gone bad")

    run = prepare(tiny(root, tmp_path / "run", **uncached))
    run.on_step = at_step(8, spoil)
    with pytest.raises(ValueError, match="cannot read the image"):
        run_to_end(run, quiet=True)
    assert newest_checkpoint(tmp_path / "run").record["open"]["batch"] == 2
    for path, content in files.items():
        path.write_bytes(content)
    assert differences(resume(tmp_path / "run", quiet=True), whole) == []


# Ends at random moments

EPOCHS = 8  # long enough to be hit inside


def hit(process: BaseProcess, run: Path, number: signal.Signals, delay: float) -> int:
    """Send a signal some time after the process has touched the run folder; its status."""
    # There is a moment in which nothing can be saved yet. SIGKILL may hit it like any other.
    ready = holds if number == signal.SIGKILL else saves_itself
    wait_until(process, lambda: ready(process, run))
    process.join(delay)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)
    return status(process)


def survives(experiment: Experiment, whole: Path, signals: list[signal.Signals], seed: int) -> int:
    """Kill, go on, and kill again; then all files are those of the whole run. How often it was."""
    draw, run = random.Random(seed), Path(str(experiment.out))
    # A machine that is fast, or busy with other work, must not be through before it is hit.
    seconds = sum(json.loads((whole / "summary.json").read_text())["seconds"].values())
    log, left, ends = run.with_suffix(".log"), -1, 0
    first = [
        "train",
        *flags(experiment),
        f"--train.epochs={EPOCHS}",
        "--train.lr=0.01",
        "--checkpoint.steps=3",
    ]
    saved = False

    def command() -> list[str]:
        # SIGKILL may come before there is anything to resume; nothing that was there may be lost.
        nonlocal saved
        saved = saved or bool(checkpoint_files(run)) or (run / "summary.json").is_file()
        return ["train", "--resume", str(run)] if saved else [*first, "--overwrite"]

    for number in signals:
        delay = draw.uniform(0.0, min(1.0, 0.4 * seconds))
        left = hit(loda(command(), log), run, number, delay)
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        if (run / "summary.json").is_file():  # it was through before, or just leaving
            assert left in (0, -number), log.read_text()
            break
        assert left == expected, log.read_text()
        ends += 1
    if left != 0:
        assert status(loda(command(), log)) == 0, log.read_text()
    assert differences(run, whole) == []
    return ends


@pytest.mark.slow
@pytest.mark.gate
def test_a_run_survives_a_dozen_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = plain(tmp_path_factory, train={"epochs": EPOCHS, "lr": 0.01})
    ends = seed = 0
    while ends < 12 and seed < 12:  # a run may be through before all of its ends
        experiment = tiny(tree(tmp_path_factory), tmp_path / f"run{seed}")
        signals = [signal.SIGKILL, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[seed % 3]]
        ends += survives(experiment, whole, [*signals, signal.SIGKILL], seed)
        seed += 1
    assert ends >= 12
