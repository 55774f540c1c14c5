"""Adapters for PEFT: PEFT's logits are ours, and files are whole or not there."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from tiny_models import batches, fit, inputs, learn, mlp, vit
from torch import Tensor, nn

from backends.torch import LoDA, TaskRecord
from backends.torch.peft import initialise_lora, lora_options, save_adapter, update_record

TASKS = 3
EQUAL = 1e-6


def stream(model: nn.Module, folder: Path, **options: Any) -> tuple[list[nn.Module], LoDA]:
    """Learn some tasks, write each as an adapter, and keep the model from before each and after."""
    loda = LoDA(model, **{"rank": 3, **options})
    models = [copy.deepcopy(model)]
    for task in range(TASKS):
        record = learn(loda, task)
        save_adapter(folder / f"task{task}", model, record)
        models.append(copy.deepcopy(model))
    return models, loda


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Largest difference of the logits, relative to the largest logit."""
    with torch.no_grad():
        ya, yb = a.eval()(x), b.eval()(x)
    return float((ya - yb).abs().max() / yb.abs().max())


def loaded(model: nn.Module, folder: Path, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra peft has it")
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recalibration": "none"},
        {"recalibration": "direction"},
        {"joint": True},
        {"joint": True, "recalibration": "scalar"},
        {"branches": "general"},
        {"branches": "isolated"},
        {"target": ["*.qkv", "*.fc1"], "rank_pattern": {"*.0.mlp.fc1": 2}, "rank": 3},
    ],
    ids=str,
)
def test_peft_computes_what_the_merged_model_does(options: dict[str, Any], tmp_path: Path) -> None:
    models, _ = stream(vit(), tmp_path, **options)
    x, _ = inputs(0, models[0])
    for task in range(TASKS):
        theirs = loaded(models[task], tmp_path / f"task{task}")
        assert difference(theirs, models[task + 1], x) < EQUAL
        assert difference(models[task], models[task + 1], x) > 100 * EQUAL
        assert difference(theirs.merge_and_unload(), models[task + 1], x) < EQUAL


def test_peft_adds_up_the_tasks(tmp_path: Path) -> None:
    # Ranks that differ between the tasks, too: the first one has a single branch.
    models, _ = stream(vit(), tmp_path, target=["*.qkv", "*.fc1"], rank_pattern={"*.fc1": 2})
    theirs = loaded(models[0], tmp_path / "task0", adapter_name="task0")
    for task in range(1, TASKS):
        theirs.load_adapter(tmp_path / f"task{task}", adapter_name=f"task{task}")
    names = [f"task{task}" for task in range(TASKS)]
    theirs.add_weighted_adapter(names, [1.0] * TASKS, "all", combination_type="cat")
    theirs.set_adapter("all")
    x, _ = inputs(0, models[0])
    assert difference(theirs, models[-1], x) < EQUAL
    assert difference(models[1], models[-1], x) > 100 * EQUAL


class Mixed(nn.Module):
    """A pointwise convolution, a transposed layer and names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 1, stride=2)
        self.conv1 = Conv1D(12, 8)
        self.body = nn.ModuleDict({"conv1": Conv1D(12, 12)})
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT.mean(dim=1)
        return self.head(torch.tanh(self.body["conv1"](torch.tanh(self.conv1(x)))))


def test_layers_of_every_kind(tmp_path: Path) -> None:
    model = Mixed()
    loda = LoDA(model, target=["conv", "conv1"], rank=2, trainable=["head.*"])
    x = inputs(0, vit())[0]
    y = torch.arange(24) % 4
    for task in range(2):
        before = copy.deepcopy(model)
        with loda.task(list(x.split(8))) as opened:
            optimizer = torch.optim.SGD(opened.parameters(lr=0.3))
            for _ in range(3):
                opened.step(lambda rows: F.cross_entropy(model(x[rows]), y[rows]), y, optimizer)
        folder = tmp_path / f"task{task}"
        save_adapter(folder, model, opened.record, modules_to_save=["head"])
        assert "body.conv1" not in opened.record.downs
        theirs = loaded(before, folder)
        assert difference(theirs, model, x) < EQUAL
        changed = {n for n, m in theirs.named_modules() if getattr(m, "lora_A", None)}
        assert changed == {"base_model.model.conv", "base_model.model.conv1"}


def test_a_task_that_is_open(tmp_path: Path) -> None:
    model = vit()
    loda = LoDA(model, rank=3)
    learn(loda, 0)
    before = copy.deepcopy(model)
    loda.begin_task(batches(1, model))
    fit(loda, 1)
    save_adapter(tmp_path / "open", model, TaskRecord.of(loda.layers))
    x, _ = inputs(1, model)
    assert difference(loaded(before, tmp_path / "open"), model, x) < EQUAL


@pytest.mark.parametrize("alpha", [1, 7])
@pytest.mark.parametrize("tasks", [0, 1])
def test_lora_started_from_our_directions_learns_as_the_branches_do(tasks: int, alpha: int) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra peft has it")
    model = vit()
    loda = LoDA(model, target=["*.qkv", "*.fc1"], rank=3, rank_pattern={"*.fc1": 2})
    for task in range(tasks):
        learn(loda, task)
    x, y = inputs(tasks, model)
    loda.begin_task(batches(tasks, model))
    record = TaskRecord.of(loda.layers)
    plain = copy.deepcopy(model)
    LoDA.detach(plain)
    scales = {"lora_alpha": alpha, "alpha_pattern": {}}  # any scale of PEFT's
    options = {**lora_options(model, record), **scales}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**options))
    initialise_lora(theirs, record)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == len(loda.layers)
    assert difference(theirs, model, x) < EQUAL
    ups = [layer.branch(b).up for layer in loda.layers.values() for b in layer.branches]
    untrained = copy.deepcopy(theirs)
    for network, parameters in ((model, ups), (theirs, trained)):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    assert difference(theirs, model, x) < 10 * EQUAL
    assert difference(untrained, model, x) > 1000 * EQUAL


def test_peft_must_have_the_layers_and_ranks() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra peft has it")
    model = mlp().float()
    loda = LoDA(model, target=["0", "2"], rank=2)
    loda.begin_task([torch.randn(20, 6)])
    record = TaskRecord.of(loda.layers)
    loda.abandon_task()
    options = lora_options(model, record)
    for change, word in (({"r": 3}, "r must be 2"), ({"target_modules": "0"}, "layers")):
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(**{**options, "rank_pattern": {}, **change})
        )
        before = copy.deepcopy(theirs.state_dict())
        with pytest.raises(ValueError, match=word):
            initialise_lora(theirs, record)
        assert all(torch.equal(before[k], v) for k, v in theirs.state_dict().items())


@pytest.fixture
def learned() -> tuple[nn.Module, TaskRecord]:
    model = mlp().float()
    loda = LoDA(model, target=["0", "2"], rank=2)
    return model, learn(loda, 0)


def test_the_files(learned: tuple[nn.Module, TaskRecord], tmp_path: Path) -> None:
    model, record = learned
    save_adapter(tmp_path / "new" / "a", model, record, modules_to_save=["5"], base_model="base")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    config = json.loads((tmp_path / "new/a/adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "base")
    shapes = {k: tuple(v.shape) for k, v in load_file(
        tmp_path / "new/a/adapter_model.safetensors").items()}  # fmt: skip
    assert shapes == {
        "base_model.model.0.lora_A.weight": (2, 6),
        "base_model.model.0.lora_B.weight": (10, 2),
        "base_model.model.2.lora_A.weight": (2, 10),
        "base_model.model.2.lora_B.weight": (10, 2),
        "base_model.model.5.weight": (4, 6),
        "base_model.model.5.bias": (4,),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_replaced_unasked(learned: tuple[nn.Module, TaskRecord], tmp_path: Path) -> None:
    model, record = learned
    (tmp_path / "a").mkdir()  # an empty folder is free
    save_adapter(tmp_path / "a", model, record)
    before = contents(tmp_path)
    other = record._replace(weights={n: {"general": 2.0} for n in record.weights})
    with pytest.raises(FileExistsError, match="overwrite"):
        save_adapter(tmp_path / "a", model, other)
    assert contents(tmp_path) == before
    save_adapter(tmp_path / "a", model, other, overwrite=True)
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path) != before
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="notes"):
        save_adapter(tmp_path / "a", model, record, overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes"):
        save_adapter(tmp_path / "b", model, record)
    (tmp_path / "b" / "notes.txt").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_cannot_be_written_leaves_nothing(
    learned: tuple[nn.Module, TaskRecord], tmp_path: Path, overwrite: bool
) -> None:
    model, record = learned
    if overwrite:
        save_adapter(tmp_path / "a", model, record)
    before = contents(tmp_path)
    # The tensors are written, and then the configuration cannot be.
    with pytest.raises(TypeError):
        save_adapter(tmp_path / "a", model, record, base_model=object(), overwrite=overwrite)  # type: ignore[arg-type]
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if overwrite else [])


class Attending(nn.Module):
    """Attention that holds its weights itself, as torchvision's transformers and CLIP have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(12, 2, batch_first=True) for _ in "ab")
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(len(x), 3, -1)[..., :6])
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0]
        return self.head(x.mean(dim=1))


@pytest.mark.parametrize(
    "target",
    [
        "*.in_proj",
        ["*.in_proj.q", "*.in_proj.v"],
        ["embed", "blocks.0.in_proj.k", "blocks.1.in_proj"],
    ],
    ids=str,
)
def test_attention_with_weights_of_its_own(target: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra peft has it")
    model = Attending()
    loda = LoDA(model, target=target, rank=2)
    start, x = copy.deepcopy(model), inputs(0, vit())[0]
    y = torch.arange(24) % 4
    for task in range(2):
        before = copy.deepcopy(model)
        with loda.task([x]) as opened:
            optimizer = torch.optim.SGD(opened.parameters(lr=0.5))
            for _ in range(3):
                opened.step(lambda rows: F.cross_entropy(model(x[rows]), y[rows]), y, optimizer)
        save_adapter(tmp_path / f"task{task}", model, opened.record)
        assert difference(loaded(before, tmp_path / f"task{task}"), model, x) < EQUAL
        assert difference(before, model, x) > 100 * EQUAL
    theirs = loaded(start, tmp_path / "task0", adapter_name="task0")
    theirs.load_adapter(tmp_path / "task1", adapter_name="task1")
    theirs.add_weighted_adapter(["task0", "task1"], [1.0, 1.0], "all", combination_type="cat")
    theirs.set_adapter("all")
    assert difference(theirs, model, x) < EQUAL
    begun = peft.get_peft_model(start, peft.LoraConfig(**lora_options(model, opened.record)))
    initialise_lora(begun, opened.record)
    downs = [m.lora_A["default"].weight for m in begun.modules() if hasattr(m, "lora_A")]
    rows = sum(int(down.any(dim=1).sum()) for down in downs)
    assert rows == sum(len(d) for by in opened.record.downs.values() for d in by.values())
    assert difference(begun, start, x) < EQUAL


@pytest.mark.parametrize("target", ["*.in_proj", "*.in_proj.q", "*.out_proj"])
def test_what_peft_would_not_use_or_use_twice_is_refused(target: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    loda = LoDA(model, target=target, rank=2)
    with loda.task([torch.randn(4, 5, 8)]) as task:
        torch.optim.SGD(task.parameters(lr=0.1))
    with pytest.raises(TypeError, match="twice" if "out_proj" in target else "past PEFT"):
        save_adapter(tmp_path / "a", model, task.record)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: nn.ModuleDict({"head": nn.Linear(4, 4), "subhead": nn.Linear(4, 4)}), "head"),
        (lambda: nn.ModuleDict({"head": nn.Linear(4, 4)}), "classifier"),
        (lambda: nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4))}), "head"),
        (lambda: nn.ModuleDict({"head": nn.Linear(4, 4)}), ""),
    ],
    ids=["ends alike", "absent", "holds a layer", "empty"],
)
def test_modules_that_peft_would_mistake_are_refused(
    build: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    model["layer"] = nn.Linear(4, 4)  # type: ignore[operator]
    target = "head.0" if isinstance(model["head"], nn.Sequential) else "layer"  # type: ignore[index]
    downs, ups = {target: {"general": torch.eye(2, 4)}}, {target: {"general": torch.zeros(4, 2)}}
    record = TaskRecord.of({})._replace(downs=downs, ups=ups, weights={target: {"general": 1.0}})
    with pytest.raises(ValueError, match="modules_to_save"):
        save_adapter(tmp_path / "a", model, record, modules_to_save=[name])
    assert not list(tmp_path.iterdir())


def test_a_record_without_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="branches"):
        save_adapter(tmp_path / "a", mlp(), TaskRecord.of({}))


def test_the_difference_of_two_models_is_one_adapter(tmp_path: Path) -> None:
    before = vit()
    after = copy.deepcopy(before)
    stream(after, tmp_path)
    record = update_record(before, after)
    for name, down in record.downs.items():
        # Each of the tasks has added two branches of rank 3.
        assert len(down["update"]) <= min(TASKS * 6, *after.get_submodule(name).weight.shape)
        update = record.ups[name]["update"] @ down["update"]
        expected = after.get_parameter(f"{name}.weight")
        actual = before.get_parameter(f"{name}.weight") + update
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    save_adapter(tmp_path / "whole", before, record)
    adapted = loaded(before, tmp_path / "whole")
    x, _ = inputs(0, after)
    assert difference(adapted, after, x) < 1e-5


def test_rounding_is_no_update() -> None:
    before, after = vit(), vit()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(1 + 2**-24)
    with pytest.raises(ValueError, match="rounding"):
        update_record(before, after)
    with pytest.raises(ValueError, match="same layers"):
        update_record(before, mlp())
