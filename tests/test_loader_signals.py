"""Workers of a loader: deaf to signals from elsewhere, and gone when their parent says so."""

import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest
from small_runs import tiny, tree

from training.data import build_stream, loader, train_transform


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
