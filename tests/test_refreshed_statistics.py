"""Read-outs fitted again on all images: nothing changes where no statistic is outdated."""

from pathlib import Path

import pytest
import refreshed_statistics
from small_runs import READOUTS, tiny, tree

from training.train import train


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory)


def run(root: Path, out: Path, method: str, lr: float) -> Path:
    head = {"readout": READOUTS[0], "also": list(READOUTS[1:])}
    epochs = {"epochs": 2, "lr": lr}
    made = tiny(root, out, method={"name": method}, head=head, train=epochs)
    return train(made, quiet=True)


def test_a_frozen_backbone_has_no_outdated_statistics(root: Path, tmp_path: Path) -> None:
    values = refreshed_statistics.refreshed(run(root, tmp_path / "frozen", "frozen", 0.1))
    assert set(values.index) == {*READOUTS} - {"heads"}
    assert values["recorded"].tolist() == pytest.approx(values["refreshed"].tolist(), abs=1e-9)


def test_the_command_prints_a_row_a_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = run(root, tmp_path / "seq_lora" / "seed1", "seq_lora", 2.0)
    values = refreshed_statistics.refreshed(moved)
    assert not values["recorded"].equals(values["refreshed"])
    refreshed_statistics.main([str(moved)])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| seq_lora/seed1 |")
    assert row.count("|") == 2 + 2 * len(values)
    with pytest.raises(SystemExit):
        refreshed_statistics.main([str(tmp_path / "none")])
