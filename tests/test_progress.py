"""What a run prints, and how it sums up its mini-batches."""

from pathlib import Path

import pytest
import torch
from small_runs import tiny

from training.train import train
from training.logging import Meter

pytestmark = pytest.mark.usefixtures("no_figure")


def test_the_table_and_the_folder_are_printed_whole(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / "run [red] with a rather long name so that it would be wrapped"
    data = {"init_cls": 1, "increment": 1}
    train(tiny(root, out, data=data, train={"epochs": 0}))
    printed = capsys.readouterr().out
    assert f"results: {out}\n" in printed
    assert f"figure:  {out / 'accuracy.png'}\n" in printed
    assert " ".join(f"task {n}" for n in range(1, 7)) in " ".join(printed.split())
    assert "task 6/6: accuracy over all classes so far" in printed
    train(tiny(root, out, data=data, train={"epochs": 0}, overwrite=True), quiet=True)
    assert capsys.readouterr().out == ""


def test_the_meter_weighs_batches_by_their_images() -> None:
    meter = Meter()
    assert meter.read() == {"loss": 0.0, "accuracy": 0.0}
    meter.add(torch.tensor(1.0), 3)
    meter.add(torch.tensor(5.0), 1)
    meter.count(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    assert meter.read() == {"loss": 2.0, "accuracy": 0.5}
