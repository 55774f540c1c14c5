"""Sweeps that are stopped, or meet another process at a run of theirs: with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import squares
from small_sweeps import settings

from training.run_dir import FolderLock, held_by
from training.sweeps import Sweep, plan, read_sweep, run_job, run_sweep, standing
from training.sweeps.children import Children
from training.sweeps.jobs import can_go_on

# Starts a child that writes a file, and one more when it gets SIGTERM; then waits for it.
PARENT = """
import os, signal, sys
from pathlib import Path
from training.sweeps.children import Children
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup, which has it ignored
child = '''
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(0.3)
    Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: Path(sys.argv[1], "twice").touch())
Path(sys.argv[1], "ready").touch()
time.sleep(60)
'''
folder = Path(sys.argv[1])
with Children() as children:
    if "breaks" in sys.argv:
        import threading
        command = [sys.executable, "-c", child, str(folder)]
        begin = lambda: children.run(command, folder / "log", os.environ, append=False)
        threading.Thread(target=begin).start()
        while not (folder / "ready").exists():
            pass
        raise OSError("disk full")
    command = [sys.executable, "-c", child, str(folder)]
    print(children.run(command, folder / "log", os.environ, append=False), flush=True)
    children.leave()
"""


def wait_for(there: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGHUP, 129)],
)
def test_a_signal_to_the_parent_alone_ends_its_children_first(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for((tmp_path / "ready").exists, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == b"143\n"
    assert (tmp_path / "saved").exists()


def test_ctrl_c_in_a_terminal_reaches_a_child_once(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path], stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for((tmp_path / "ready").exists, process)
    os.killpg(process.pid, signal.SIGINT)  # to all of the group, as a terminal does
    process.communicate(timeout=30)
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "twice").exists()


def test_an_error_leaves_no_child_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, tmp_path, "breaks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert "disk full" in done.stderr
    assert (tmp_path / "saved").exists()


def test_a_stopped_sweep_leaves_runs_that_go_on(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    long = [*settings(root), "--train.epochs=5000"]
    path = tmp_path / "sweep.yaml"
    path.write_text("variants: [loda, frozen]\nseeds: [0]\n", "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "training.cli", "sweep", path, f"--out={out}", *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    jobs = plan(read_sweep(path), out, long)
    wait_for((jobs[0].folder / "metrics.jsonl").is_file, process)
    # Meanwhile a second sweep would leave the run to the first.
    assert [standing(job) for job in jobs] == ["running elsewhere", "to do"]
    owner = held_by(jobs[0].folder)
    assert run_job(jobs[0], out)[1::2] == ("running elsewhere", f"process {owner}")

    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert b"SIGTERM: stopping as soon as every run is saved" in errors
    assert printed == b"loda, seed 0: stopped (the sweep goes on with it when started again)\n"
    assert held_by(jobs[0].folder) is None
    assert can_go_on(jobs[0])
    assert not jobs[1].folder.exists()


def test_a_run_at_which_another_process_is_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    jobs = plan(Sweep({"a": {}, "b": {}, "c": {}, "d": {}}, [0]), out, settings(root))
    locks = {}
    for job in jobs[:2]:
        job.folder.mkdir(parents=True)
        locks[job.folder.parent.name] = FolderLock(job.folder)
    begun: list[str] = []

    def run(_: Children, command: list[str], log: Path, *__: object, **___: object) -> int:
        begun.append(log.name)
        locks["a"].release()  # the other process ends, with nothing to show for it
        if log.name == "c-seed0.log":  # and another one was faster than this
            jobs[2].folder.mkdir(parents=True)
            locks["c"] = FolderLock(jobs[2].folder)
            return 2
        return 0

    monkeypatch.setattr("training.sweeps.run.Children.run", run)
    said: list[str] = []
    found = run_sweep(jobs, out, tell=said.append)
    elsewhere = f"running elsewhere (process {os.getpid()})"
    assert said == [
        *(f"{name}, seed 0: {elsewhere}" for name in "abc"),
        "d, seed 0: finished",
        "a, seed 0: finished",  # looked at once more in the end
        *(f"{name}, seed 0: {elsewhere}" for name in "bc"),
    ]
    ended = {o.job.folder.parent.name: o.status for o in found}
    assert ended == {"a": "finished", **dict.fromkeys("bc", "running elsewhere"), "d": "finished"}
    assert begun == ["c-seed0.log", "d-seed0.log", "a-seed0.log"]
