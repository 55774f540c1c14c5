"""What checkpoints cost: the share of the time of a run that is spent on saving it.

The digits experiment of the package, cut to its first two tasks. Time is that of the clock on the
wall, since most of a checkpoint is waiting for the disk: ``make bench``.
"""

import cProfile
import pstats
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config import CheckpointConfig, DataConfig, Experiment
from training.run_dir import checkpoint_files
from training.train import Run, prepare, run_to_end

SETTINGS = {
    "tasks and every 5 minutes": CheckpointConfig(),
    "also every 10 steps": CheckpointConfig(steps=10),
}


def test_checkpoints_cost_little(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    lines = []

    def run(number: int, name: str) -> float:
        sizes: dict[Path, int] = {}
        experiment = Experiment(
            data=DataConfig(tasks=2), checkpoint=SETTINGS[name], out=str(tmp_path / str(number))
        )

        def weigh(run: Run) -> None:  # older ones are gone soon
            sizes.update({p: p.stat().st_size for p in checkpoint_files(run.folder.path)})

        profile = cProfile.Profile(builtins=False)
        with profile:
            trained = prepare(experiment)
            trained.on_step = weigh
            run_to_end(trained, quiet=True)
        stats = pstats.Stats(profile).get_stats_profile()
        whole, functions = stats.total_tt, stats.func_profiles
        spent = sum(functions[save].cumtime for save in ("save_in_task", "save_between_tasks"))
        lines.append(
            f"  {name:26} {len(sizes):3} of {sum(sizes.values()) / len(sizes) / 2**20:.1f} MiB, "
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
