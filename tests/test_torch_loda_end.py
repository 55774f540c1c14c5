"""LoDA over whole models: history, merging and ablations at the end of a task, and its failures."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import MLP, WIDTHS, batches, breaking, fit, learn, means, mlp, same, snapshot, vit, totals
from torch import nn

from backends.torch import LoDA, LoDASettings
from loda_math import recalibration

FORMS = ("full", "diagonal", "direction", "scalar")


# History and merging against their definitions


@pytest.mark.parametrize("history", ["merged", "trained", "both"])
def test_history_is_the_sum_of_the_passes(history: str) -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP, history=history))  # type: ignore[arg-type]
    expected = {n: torch.zeros(w, w, dtype=torch.float64) for n, w in WIDTHS.items()}
    for task in range(3):
        before = means(model, task, MLP["target"])
        loda.begin_task(batches(task, model))
        fit(loda, task)
        trained = means(model, task, MLP["target"])
        record = loda.end_task(batches(task, model))
        merged = means(model, task, MLP["target"])
        for name in WIDTHS:
            torch.testing.assert_close(record.new[name], before[name])
            if history != "merged":
                expected[name] += trained[name]
            if history != "trained":
                expected[name] += merged[name]
            torch.testing.assert_close(loda.history[name].total, expected[name])
            for found, wanted in ((record.trained, trained), (record.merged, merged)):
                if found:
                    torch.testing.assert_close(found[name], wanted[name])
        assert bool(record.trained) == (history != "merged" or task > 0)
        assert bool(record.merged) == (history != "trained")
        if task:  # the passes must differ, or this test could not tell them apart
            assert not torch.allclose(before["2"], trained["2"])
            assert not torch.allclose(merged["2"], trained["2"])


@pytest.mark.parametrize("form", [*FORMS, "none"])
@pytest.mark.parametrize("build", [vit, mlp])
def test_merged_weight_is_computed_by_hand_from_the_record(build: Any, form: str) -> None:
    model = build()
    options: dict[str, Any] = MLP if isinstance(model, nn.Sequential) else {"rank": 3}
    loda = LoDA(model, LoDASettings(**options, recalibration=form, gamma=0.7))  # type: ignore[arg-type]
    for task in range(2):
        weights, old = snapshot(model), totals(loda)
        loda.begin_task(batches(task, model))
        fit(loda, task)
        trained = means(model, task, loda.settings.target)
        record = loda.end_task(batches(task, model))
        for name, history in old.items():
            up, down = (part[name]["general"] for part in (record.ups, record.downs))
            update = 0.5 * record.ups[name]["isolated"] @ record.downs[name]["isolated"]
            if form == "none":
                assert record.coefficients == {}
                update = update + 0.25 * up @ down
            else:
                new = trained[name]
                middle = recalibration(up.double(), down.double(), new, history, 0.7, form=form)  # type: ignore[arg-type]
                torch.testing.assert_close(record.coefficients[name], middle, rtol=1e-4, atol=1e-5)
                assert float((middle - torch.eye(3)).abs().max()) > 0.05
                update = update + 0.25 * up @ middle.to(up) @ down
            expected = weights[f"{name}.weight"] + update
            torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected)
        if not task:
            for name in loda.history:
                update = 0.25 * record.ups[name]["general"] @ record.downs[name]["general"]
                found = model.get_submodule(name).weight.detach()
                torch.testing.assert_close(found, weights[f"{name}.weight"] + update)


@pytest.mark.parametrize(
    ("branches", "weights"),
    [
        ("both", [{"general": 0.25}, {"general": 0.25, "isolated": 0.5}]),
        ("general", [{"general": 0.5}, {"general": 0.5}]),
        ("isolated", [{"general": 0.5}, {"isolated": 1.0}]),
    ],
)
def test_branches_of_the_ablations(branches: str, weights: list[dict[str, float]]) -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP, branches=branches))  # type: ignore[arg-type]
    for task in range(2):
        before = snapshot(model)
        record = learn(loda, task)
        assert record.weights == weights[task]
        assert bool(record.coefficients) == ("general" in weights[task] and task > 0)
        for name in WIDTHS:
            update = torch.zeros_like(before[f"{name}.weight"])
            for branch, weight in weights[task].items():
                middle = record.coefficients.get(name) if branch == "general" else None
                down = record.downs[name][branch]
                down = down if middle is None else middle @ down
                update += weight * record.ups[name][branch] @ down
            found = model.get_submodule(name).weight.detach()
            torch.testing.assert_close(found, before[f"{name}.weight"] + update)


@pytest.mark.parametrize("isolated", ["null", "pencil"])
def test_update_in_the_null_space_of_the_history_leaves_old_outputs(isolated: str) -> None:
    """Old inputs in four dimensions, new ones in all eight; four null directions carry the update.

    The isolated rule with a vanishing ridge finds the same space by itself.
    """
    torch.manual_seed(1)
    axes = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    old = torch.randn(30, 4, dtype=torch.float64) @ axes[:, :4].T
    new = torch.randn(30, 8, dtype=torch.float64) @ axes.T
    model = nn.Sequential(nn.Linear(8, 4)).double()
    settings = LoDASettings(
        target="0", rank=3, branches="isolated", isolated=isolated, ridge=1e-10,  # type: ignore[arg-type]
    )  # fmt: skip
    loda = LoDA(model, settings)
    y = torch.arange(30) % 4
    loda.begin_task([old])
    loda.end_task([old])
    before_old, before_new = model(old).detach(), F.cross_entropy(model(new), y).detach()
    loda.begin_task([new])
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.5)
    for _ in range(20):
        loda.step(lambda rows: F.cross_entropy(model(new[rows]), y[rows]), y, optimizer, radius=0.1)
    loda.end_task([new])
    torch.testing.assert_close(model(old).detach(), before_old, rtol=0, atol=1e-6)
    assert float(F.cross_entropy(model(new), y).detach() - before_new) < -0.02


# Failures


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("on_walk", [1, 2])
@pytest.mark.parametrize("failure", [OSError("unreadable image"), KeyboardInterrupt("stopped")])
def test_end_task_that_fails_can_be_tried_again(
    task: int, on_walk: int, failure: BaseException
) -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP, history="both"))
    for past in range(task):
        learn(loda, past)
    loda.begin_task(batches(task, model))
    fit(loda, task)
    twin = copy.deepcopy(loda)
    state, mine = snapshot(model), {k: v.clone() for k, v in loda.state_dict().items()}
    with pytest.raises(type(failure), match=str(failure)):
        loda.end_task(breaking(batches(task, model), failure, on_walk))
    assert same(snapshot(model), state)
    assert same(loda.state_dict(), mine)
    assert all(not layer.merged for layer in loda.layers.values())
    assert loda.tasks == task
    loda.end_task(batches(task, model))
    twin.end_task(batches(task, model))
    assert same(snapshot(model), snapshot(twin.model))
    assert same(loda.state_dict(), twin.state_dict())


@pytest.mark.parametrize("history", ["merged", "trained", "both"])
def test_branch_that_is_not_finite_is_never_merged(history: str) -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP, history=history))  # type: ignore[arg-type]
    loda.begin_task(batches(0, model))
    fit(loda, 0)
    last = loda.layers["4"].branch("general")
    good, base = (
        last.up.detach().clone(),
        {n: x.base.weight.clone() for n, x in loda.layers.items()},
    )
    with torch.no_grad():
        last.up[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        loda.end_task(batches(0, model))
    assert all(torch.equal(x.base.weight, base[n]) for n, x in loda.layers.items())
    with torch.no_grad():
        last.up.copy_(good)
    loda.end_task(batches(0, model))
    assert loda.tasks == 1


def test_nan_images_at_the_end_keep_the_task_open() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    learn(loda, 0)
    loda.begin_task(batches(1, model))
    state, history = snapshot(model), totals(loda)
    with pytest.raises(ValueError, match=r"inputs of .* hold NaN"):
        loda.end_task([torch.full((2, 6), float("nan"), dtype=torch.float64)])
    assert same(snapshot(model), state)
    assert same(totals(loda), history)
    loda.end_task(batches(1, model))


def test_iterator_is_refused_before_a_pass_where_two_are_needed() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    loda.begin_task(iter(batches(0, model)))  # one pass: a generator will do
    loda.end_task(iter(batches(0, model)))
    loda.begin_task(iter(batches(1, model)))
    fit(loda, 1)
    state, given = snapshot(model), iter(batches(1, model))
    with pytest.raises(ValueError, match=r"walks the batches twice.*DataLoader or a list"):
        loda.end_task(given)
    assert len(list(given)) == 3  # not even begun
    assert same(snapshot(model), state)
    used = iter([torch.ones(1)])
    next(used)
    with pytest.raises(ValueError, match="walks the batches twice"):
        loda.end_task(used)
    with pytest.raises(ValueError, match="used up"):
        loda.end_task([])
    assert same(snapshot(model), state)
    loda.end_task(batches(1, model))
    assert loda.tasks == 2
