"""The recorded run of the authors' implementation, replayed through the public layers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from backends.torch import LoDA, LoDASettings
from backends.torch.readouts import CosineHead
from training.loss import cosface

TOLERANCE = 2e-5
LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")


@pytest.fixture(scope="module")
def trace(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "reference" / "trace.npz") as file:
        return dict(file)


def relative_error(found: Tensor, recorded: np.ndarray) -> float:
    truth = torch.from_numpy(recorded).double()
    return float((found.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30))


class Replay:
    """Feeds the recorded batches and draws to the product and compares what comes out."""

    def __init__(self, trace: dict[str, np.ndarray]) -> None:
        self.trace = trace
        self.c: dict[str, Any] = json.loads(str(trace["config"]))
        self.model = VisionTransformer(
            img_size=self.c["img"],
            patch_size=self.c["patch"],
            embed_dim=self.c["dim"],
            depth=self.c["depth"],
            num_heads=self.c["heads"],
            num_classes=0,
        )
        init = {k.removeprefix("init/"): v for k, v in trace.items() if k.startswith("init/")}
        self.model.load_state_dict(
            {k: torch.from_numpy(v) for k, v in init.items() if not k.startswith("head.")}
        )
        settings = LoDASettings(
            rank=self.c["rank"], recalibration="direction", gamma=3.0, history="both"
        )
        self.loda = LoDA(self.model, settings, record_moments=True)
        self.x, self.y = (torch.from_numpy(trace[f"train_{name}"]) for name in "xy")
        self.heads: list[CosineHead] = []
        self.errors: dict[str, float] = {}

    def compare(self, key: str, found: Tensor) -> None:
        self.errors[key] = relative_error(found, self.trace[key])

    def run(self) -> dict[str, float]:
        for task in range(self.c["tasks"]):
            self.task(task)
        return self.errors

    def task(self, t: int) -> None:
        inc = self.c["inc"]
        rows = ((self.y >= t * inc) & (self.y < (t + 1) * inc)).nonzero().flatten()
        x, y = self.x[rows], self.y[rows] - t * inc
        batches = [(x, y)]
        for i, name in enumerate(LAYERS):
            if t > 0:
                self.compare(f"task{t}/layer{i}/moment_old", self.loda.history[name].total)
        self.loda.begin_task(batches, bases=self.bases(t))
        head = CosineHead(inc, self.c["dim"])
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.trace[f"init/head.{t}"]))
        self.heads.append(head)
        self.train(t, x, y, head)
        self.compare(f"task{t}/head", head.weight)
        record = self.loda.end_task(batches)
        state = dict(self.model.named_modules())
        for i, name in enumerate(LAYERS):
            key = f"task{t}/layer{i}"
            self.compare(f"{key}/moment_new", record.new[name])
            self.compare(f"{key}/moment_new_trained", record.trained[name])
            self.compare(f"{key}/history_after", self.loda.history[name].total)
            self.compare(f"{key}/A_general", record.downs[name]["general"])
            self.compare(f"{key}/B_general", record.ups[name]["general"])
            if t > 0:
                self.compare(f"{key}/B_isolated", record.ups[name]["isolated"])
            layer = state[name]
            assert type(layer) is torch.nn.Linear
            self.compare(f"{key}/qkv_after", layer.weight)
        self.model.eval()
        with torch.no_grad():
            features = self.model(torch.from_numpy(self.trace["test_x"]))
            logits = torch.cat([h(features) for h in self.heads], dim=1)
        self.compare(f"task{t}/test_logits", logits)

    def bases(self, t: int) -> dict[str, dict[str, Tensor]]:
        branches = {"general": "A_general_init"} | ({"isolated": "A_isolated"} if t > 0 else {})
        return {
            name: {
                branch: torch.from_numpy(self.trace[f"task{t}/layer{i}/{key}"]).mT * math.sqrt(3)
                for branch, key in branches.items()
            }
            for i, name in enumerate(LAYERS)
        }

    def steps(self, t: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        s = 0
        while f"task{t}/step{s}/batch" in self.trace:
            key = f"task{t}/step{s}"
            yield (
                torch.from_numpy(self.trace[f"{key}/batch"]),
                torch.from_numpy(self.trace[f"{key}/class_perm"]),
                float(self.trace[f"{key}/u"]),
            )
            s += 1

    def train(self, t: int, x: Tensor, y: Tensor, head: CosineHead) -> None:
        parameters = [*self.loda.trainable_parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(
            parameters, lr=self.c["lr"], momentum=0.9, weight_decay=self.c["wd"]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.c["epochs"])
        an_epoch = math.ceil(len(x) / self.c["batch"])
        self.model.train()
        for s, (batch, order, u) in enumerate(self.steps(t)):
            images, labels = x[batch], y[batch]

            def loss(rows: Tensor, images: Tensor = images, labels: Tensor = labels) -> Tensor:
                cosines = head(self.model(images[rows]))
                return cosface(cosines, labels[rows], scale=20.0, margin=self.c["margin"])

            self.loda.step(
                loss,
                labels,
                optimizer,
                radius=self.c["rho"],
                draw=u,
                permutation=labels.unique()[order],
            )
            if (s + 1) % an_epoch == 0:
                schedule.step()


def test_recorded_run_is_matched_array_by_array(trace: dict[str, np.ndarray]) -> None:
    errors = Replay(trace).run()
    worst = max(errors, key=errors.__getitem__)
    assert len(errors) == 3 * (1 + 1 + 2 * 6) + 2 * 2 * 2
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"


def test_replay_notices_steps_without_the_perturbation(trace: dict[str, np.ndarray]) -> None:
    replay = Replay(trace)
    step = replay.loda.step
    replay.loda.step = lambda *args, **kwargs: step(*args, **kwargs | {"draw": 0.0})  # type: ignore[method-assign]
    assert max(replay.run().values()) > 50 * TOLERANCE
