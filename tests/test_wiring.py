"""Settings of the heads and of alignment reach the training, held against the formulas by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_contents import events
from safetensors.torch import load_file
from small_runs import small_vit, tiny
from torch.nn import functional

from backends.torch.readouts import Alignment, ClassStatistics, align_heads
from training.run_dir import nested, read_json, task_folder
from training.seeds import derive
from training.train import train


@pytest.mark.parametrize(("scale", "margin"), [(20.0, 0.0), (20.0, 0.3), (7.0, 0.3)])
def test_the_loss_that_is_trained_has_scale_and_margin(
    tmp_path: Path, root: Path, scale: float, margin: float
) -> None:
    run = train(
        tiny(
            root,
            tmp_path / "run",
            method={"name": "frozen"},
            data={"train_crop": "none", "flip": False, "tasks": 1},
            train={"epochs": 1, "lr": 1e-12},
            head={"scale": scale, "margin": margin},
            keep={"heads": True, "figure": False},
        ),
        quiet=True,
    )
    ((_, weight),) = load_file(task_folder(run, 1) / "heads.safetensors").items()
    model, losses = small_vit().eval(), []
    model.load_state_dict(load_file(run / "model.safetensors"))
    for label, name in enumerate(read_json(run / "classes.json")["class_names"][: len(weight)]):
        for path in sorted((root / "train" / name).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            with torch.no_grad():
                feature = model(pixels[None])[0]
            cosines = functional.cosine_similarity(feature[None], weight, dim=1)
            cosines[label] -= margin
            losses.append(functional.cross_entropy(scale * cosines, torch.tensor(label)))
    (epoch,) = (event for event in events(run) if event["event"] == "epoch")
    assert epoch["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_alignment_follows_its_settings_from_task_to_task(tmp_path: Path, root: Path) -> None:
    given = {"epochs": 2, "temperature": 0.7, "lr": 0.05, "covariance": 0.02}
    run = train(
        tiny(
            root,
            tmp_path / "run",
            head={"readout": "alignment", "alignment": given},
            keep={"heads": True, "statistics": True, "figure": False},
        ),
        quiet=True,
    )
    settings = Alignment(**given)
    aligned = torch.empty(0, 16)
    for task in range(3):
        folder = task_folder(run, task + 1)
        start = torch.cat(list(load_file(folder / "heads.safetensors").values()))
        start[: len(aligned)] = aligned  # old classes start where the last alignment left them
        statistics = ClassStatistics()
        statistics.load_state_dict(load_file(folder / "statistics.safetensors"))
        generator = torch.Generator().manual_seed(derive(1993, task, "alignment"))
        aligned = align_heads(statistics, settings, generator=generator, weight=start)
    found = nested(load_file(run / "readouts.safetensors"), "alignment")["weight"]
    torch.testing.assert_close(found, aligned)
