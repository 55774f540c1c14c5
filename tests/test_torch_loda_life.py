"""LoDA over whole models: the life of a model over tasks, heads of its own, precision, draws."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import MLP, batches, fit, inputs, learn, mlp, same, snapshot, vit, totals
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings

# The user's story, as in the documentation


def test_two_tasks_in_a_training_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    body, heads = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()), []
    loda, accuracy = LoDA(body, LoDASettings(target="*", rank=4)), []
    tasks = [(3 * torch.randn(2, 8).repeat(40, 1) + torch.randn(80, 8)) for _ in range(2)]
    y = torch.arange(80) % 2
    for x in tasks:
        loda.begin_task(x.split(20))
        heads.append(nn.Linear(16, 2))
        optimizer = torch.optim.SGD([*loda.trainable_parameters(), *heads[-1].parameters()], lr=0.2)
        for rows in torch.randperm(80).repeat(10).split(20):
            loda.step(
                lambda half, x=x, rows=rows: F.cross_entropy(
                    heads[-1](body(x[rows][half])), y[rows][half]
                ),
                y[rows], optimizer, radius=0.1,
            )  # fmt: skip
        loda.end_task(x.split(20))
    for x, head in zip(tasks, heads, strict=True):
        accuracy.append(float((head(body(x)).argmax(1) == y).float().mean()))
    assert min(accuracy) > 0.95
    assert [type(m) for m in body] == [nn.Linear, nn.Tanh] * 2


# Life cycle


@pytest.mark.parametrize("build", [vit, mlp])
def test_model_has_its_original_shape_after_every_task(build: Any) -> None:
    model = build()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)  # flags differ, and must all come back
    model.eval()
    settings = LoDASettings(**MLP) if isinstance(model, nn.Sequential) else LoDASettings(rank=3)
    modules, state = list(model.named_modules()), snapshot(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    loda, past = LoDA(model, settings), state
    for task in range(3):
        learn(loda, task)
        after = list(model.named_modules())
        assert [n for n, _ in after] == [n for n, _ in modules]
        assert all(a is b for (_, a), (_, b) in zip(after, modules, strict=True))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert not any(m.training for m in model.modules())
        now = snapshot(model)
        moved = {k for k in now if not torch.equal(now[k], past[k])}
        assert moved == {f"{name}.weight" for name in loda.history}
        assert loda.tasks == task + 1
        assert loda.layers == {}
        past = now
    assert list(past) == list(state)


def test_a_task_without_training_leaves_every_weight_as_it_was() -> None:
    model = mlp()
    state, loda = snapshot(model), LoDA(model, LoDASettings(**MLP))
    for task in range(2):
        loda.begin_task(batches(task, model))
        loda.end_task(batches(task, model))
    assert same(snapshot(model), state)


def test_calls_out_of_order_say_what_to_do() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    for call in (
        lambda: loda.end_task(batches(0, model)),
        loda.trainable_parameters,
        loda.lora_parameters,
        loda.abandon_task,
        lambda: loda.step(lambda rows: rows.sum(), torch.zeros(2), None, radius=0.0, draw=0.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(RuntimeError, match="call begin_task first"):
            call()
    loda.begin_task(batches(0, model))
    for call in (
        lambda: loda.begin_task(batches(0, model)),
        lambda: loda.load_state_dict(loda.state_dict()),
    ):
        with pytest.raises(RuntimeError, match="open already"):
            call()
    assert loda.layers


def test_abandoned_task_leaves_no_trace() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    learn(loda, 0)
    state, mine = snapshot(model), {k: v.clone() for k, v in loda.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    loda.begin_task(batches(1, model))
    fit(loda, 1)
    loda.abandon_task()
    assert same(snapshot(model), state)
    assert same(loda.state_dict(), mine)
    assert [p.requires_grad for p in model.parameters()] == flags
    twin = LoDA(mlp(), LoDASettings(**MLP))
    learn(twin, 0)
    learn(loda, 1)
    learn(twin, 1)
    assert same(snapshot(model), snapshot(twin.model))


def test_nothing_of_a_task_stays_in_memory_but_the_history() -> None:
    model = vit()
    loda = LoDA(model, LoDASettings(rank=3))
    for task in range(2):
        x = inputs(task, model)[0]
        loda.begin_task([x])
        references = [weakref.ref(layer) for layer in loda.layers.values()]
        references += [weakref.ref(p) for p in loda.lora_parameters()]
        images = weakref.ref(x)
        fit(loda, task)
        loda.end_task([x])
        del x
        gc.collect()
        assert images() is None
        assert all(reference() is None for reference in references)
    sizes = [v.numel() for v in loda.state_dict().values()]
    assert sorted(sizes) == [1, 144, 144]


# Models with a head of their own, precision, randomness


def test_head_inside_the_model_is_trained_beside_the_branches() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    loda = LoDA(model, LoDASettings(**MLP), trainable=["5.*", "0.weight", "2.weight"])
    loda.begin_task(batches(0, model))
    own = {n for n, p in model.named_parameters() if p.requires_grad and "branches" not in n}
    assert own == {"5.weight", "5.bias"}  # a target layer stays frozen whatever is asked
    assert len(loda.trainable_parameters()) == len(loda.lora_parameters()) + 2
    before = model[5].weight.detach().clone()
    fit(loda, 0)
    loda.end_task(batches(0, model))
    assert not torch.equal(model[5].weight, before)
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]
    assert all(p.requires_grad for p in model[2].parameters())


def test_optimizer_holds_the_very_tensors_of_the_layers() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    loda.begin_task(batches(0, model))
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
    inside = {id(p) for n, p in model.named_parameters() if "branches" in n}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == inside
    fit(loda, 0, optimizer)
    assert {id(p) for n, p in model.named_parameters() if "branches" in n} == inside


@pytest.mark.parametrize("whole_model", [False, True])
def test_bfloat16_models_and_autocast_go_through_two_tasks(whole_model: bool) -> None:
    model = vit().to(torch.bfloat16 if whole_model else torch.float32)
    dtype = next(model.parameters()).dtype
    loda = LoDA(model, LoDASettings(rank=3, history="both", joint=True, heldout=True))
    state = snapshot(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not whole_model):
        for task in range(2):
            learn(loda, task)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(m.dtype == torch.float64 for m in totals(loda).values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    for name, moment in totals(loda).items():
        values = torch.linalg.eigvalsh(moment)
        assert float(values[0]) > -1e-6 * float(values[-1])  # a bf16 Gram matrix is indefinite
        assert not torch.equal(model.get_submodule(name).weight, state[f"{name}.weight"])


def test_draws_follow_the_generator_and_can_be_injected() -> None:
    def trained(seed: int | None, **draws: Any) -> dict[str, Tensor]:
        model = mlp()
        x, y = inputs(0, model)
        loda = LoDA(model, LoDASettings(**MLP))
        loda.begin_task([x])
        optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for _ in range(2):
            done = loda.step(
                lambda rows: F.cross_entropy(model(x[rows]), y[rows]),
                y, optimizer, radius=0.5, generator=generator, **draws,
            )  # fmt: skip
            assert done.steps == 2
        return snapshot(model)

    order = torch.tensor([3, 1, 0, 2])
    assert same(trained(1), trained(1))
    assert not same(trained(1), trained(2))
    fixed = trained(None, draw=0.4, permutation=order)
    assert same(fixed, trained(9, draw=0.4, permutation=order))
    assert not same(fixed, trained(9, draw=0.5, permutation=order))
    assert not same(fixed, trained(9, draw=0.4, permutation=torch.tensor([0, 3, 1, 2])))
