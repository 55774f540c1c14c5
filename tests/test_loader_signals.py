"""Workers of a loader: deaf to signals from elsewhere, and gone when their parent says so."""

import os
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest
from interrupted import at_step
from small_runs import flags, tiny, tree

from training import cli
from training.data import build_stream, loader, train_transform
from training.checkpoint import newest_checkpoint


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_workers_heed_their_parent_alone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = tiny(tree(tmp_path_factory), None).data
    images = build_stream(data, seed=0).train.with_transform(train_transform(data))
    batches = iter(loader(images, 4, shuffle=True, seed=0, workers=1))
    others = {*active_children()}  # of other tests in this process
    next(batches)
    (worker,) = {*active_children()} - others
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
        worker.join(0.3)
        assert worker.is_alive()
    assert len(list(batches)) > 1  # it still works
    again = iter(loader(images, 4, shuffle=True, seed=0, workers=1))
    next(again)
    (worker,) = {*active_children()} - others
    worker.terminate()  # as Python does at its end, where a pass is still open
    worker.join(30)
    assert worker.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the children of a process are read in /proc")
def test_a_run_whose_loading_process_is_killed_says_so(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As the system does when memory runs out.
    run, others = tmp_path / "run", {*active_children()}

    def kill() -> None:
        for worker in {*active_children()} - others:
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join(30)

    arguments = [*flags(tiny(root, run)), "--data.workers=1", "--train.epochs=3"]
    with at_step(8, kill):
        assert cli.main(["train", *arguments, "--checkpoint.steps=2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("loda train: a process that loads images has ended (DataLoader worker")
    assert f"loda train --resume {run} goes on from the newest checkpoint" in said
    assert newest_checkpoint(run / "checkpoints").record["open"] is not None
    assert cli.main(["train", "--resume", str(run)]) == 0
