"""What checkpoints cost: the share of the time of a run that is spent on saving it.

The digits experiment of the package, cut to its first two tasks. Time is that of the clock on the
wall, since most of a checkpoint is waiting for the disk: ``make bench``.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import training.train
from training.config import CheckpointConfig, DataConfig, Experiment
from training.run_dir import checkpoint_files
from training.train import prepare, run_to_end

SETTINGS = {
    "tasks and every 5 minutes": CheckpointConfig(),
    "also every 10 steps": CheckpointConfig(steps=10),
}


def test_checkpoints_cost_little(
    benchmark: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    spent, sizes = 0.0, []

    def timed(function: Any) -> Any:
        def called(*arguments: Any, **settings: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                spent += time.perf_counter() - start

        return called

    for name in ("save_in_task", "save_between_tasks"):
        monkeypatch.setattr(training.train, name, timed(getattr(training.train, name)))
    lines = []

    def run(number: int, name: str) -> float:
        nonlocal spent
        spent = 0.0
        sizes.clear()
        experiment = Experiment(
            data=DataConfig(tasks=2), checkpoint=SETTINGS[name], out=str(tmp_path / str(number))
        )
        start = time.perf_counter()
        trained = prepare(experiment)
        write = trained.checkpoints.write

        def weighed(*arguments: Any) -> None:
            write(*arguments)
            sizes.append(checkpoint_files(trained.folder.path)[-1].stat().st_size)

        trained.checkpoints.write = weighed  # type: ignore[method-assign]
        run_to_end(trained, quiet=True)
        whole = time.perf_counter() - start
        lines.append(
            f"  {name:26} {len(sizes):3} of {sum(sizes) / len(sizes) / 2**20:.1f} MiB, "
            f"{1e3 * spent / len(sizes):5.0f} ms each, {100 * spent / whole:.2f} % of {whole:.0f} s"
        )
        return spent / whole

    shares = benchmark.pedantic(
        lambda: [run(number, name) for number, name in enumerate(SETTINGS)], rounds=1
    )
    with capsys.disabled():
        print("\ncheckpoints of the digits experiment, two tasks:\n" + "\n".join(lines))
    assert shares[0] < 0.02
    assert shares[1] < 0.05
