"""LoDA over whole models: tasks, directions, merging, history, states and failures."""

import copy
import gc
import io
import pickle
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import (
    MLP,
    WIDTHS,
    batches,
    begin,
    breaking,
    end,
    fit,
    inputs,
    learn,
    learn_and_look,
    means,
    mlp,
    never,
    padded_bert,
    same,
    small,
    snapshot,
    totals,
    vit,
)
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings, LoRALinear, adapt
from loda_math import (
    general_subspace,
    isolated_subspace,
    null_subspace,
    recalibration,
    trace_ratio_subspace,
)

# Directions and what is trained on them


def test_first_task_trains_the_general_branch_and_its_down_projection() -> None:
    loda = small()
    begin(loda, 0)
    expected = {n: general_subspace(m, None, 3) for n, m in means(mlp(), 0, MLP["target"]).items()}
    for name, layer in loda.layers.items():
        assert list(layer.branches) == ["general"]
        branch = layer.branch("general")
        assert branch.scale == 0.25
        assert branch.down.requires_grad
        torch.testing.assert_close(branch.down.detach() * 3**0.5, expected[name].mT)
        assert torch.count_nonzero(branch.up) == 0
    before = {n: layer.branch("general").down.clone() for n, layer in loda.layers.items()}
    fit(loda, 0)
    record = end(loda, 0)
    assert all(not torch.equal(record.downs[n]["general"], before[n]) for n in before)
    assert record.weights == {name: {"general": 0.25} for name in WIDTHS}
    assert record.coefficients == {}


def test_later_tasks_train_two_up_projections_on_frozen_directions() -> None:
    loda = small()
    model = loda.model
    learn(loda, 0)
    old, new = totals(loda), means(model, 1, MLP["target"])
    begin(loda, 1)
    for name, layer in loda.layers.items():
        wanted = {
            "general": general_subspace(new[name], old[name], 3),
            "isolated": isolated_subspace(new[name], old[name], 3, ridge=1e-2),
        }
        assert list(layer.branches) == list(wanted)
        for name, basis in wanted.items():
            branch = layer.branch(name)
            torch.testing.assert_close(branch.down.detach() * 3**0.5, basis.mT)
            assert not branch.down.requires_grad
            assert branch.scale == {"general": 0.25, "isolated": 0.5}[name]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layer}.branches.{b}.up" for layer in WIDTHS for b in ("general", "isolated")
    }
    assert {id(p) for p in loda.trainable_parameters()} == {id(p) for p in loda.lora_parameters()}
    downs = [layer.branch(b).down for layer in loda.layers.values() for b in layer.branches]
    before = [d.clone() for d in downs]
    fit(loda, 1)
    assert all(torch.equal(a, b) for a, b in zip(downs, before, strict=True))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"isolated": "null"}, lambda _, old: null_subspace(old, 3)),
        ({"isolated": "trace_ratio"}, lambda new, old: trace_ratio_subspace(new, old, 3)),
        *(
            (
                {"isolated": "trace_ratio", "energy_floor": floor},
                lambda new, old, floor=floor: isolated_subspace(
                    new, old, 3, objective="trace_ratio", energy_floor=floor
                ),
            )
            for floor in (0.0, 0.5, 1.0)
        ),
    ],
    ids=lambda given: ",".join(map(str, given.values())) if isinstance(given, dict) else "",
)
def test_isolated_directions_are_those_of_the_rule(options: dict[str, Any], rule: Any) -> None:
    loda, other = small(**options), small()
    for method in (loda, other):
        learn(method, 0)
    new = means(loda.model, 1, MLP["target"])
    for method in (loda, other):
        begin(method, 1)
    for name, layer in loda.layers.items():
        down = layer.branch("isolated").down.detach()
        basis = rule(new[name], loda.history[name].total)
        torch.testing.assert_close(down * 3**0.5, basis.mT)
        assert not torch.allclose(down, other.layers[name].branch("isolated").down, atol=1e-3)


def test_branches_separate_old_from_new_tasks_better_than_general_ones() -> None:
    loda = small()
    model = loda.model
    learn(loda, 0)
    begin(loda, 1)
    new, old = means(model, 1, "0")["0"], loda.history["0"].total
    ratio = {}
    for branch in ("general", "isolated"):
        down = loda.layers["0"].branch(branch).down.detach()
        ratio[branch] = float(torch.trace(down @ new @ down.T) / torch.trace(down @ old @ down.T))
    assert ratio["isolated"] > 2 * ratio["general"]


# Failures


@pytest.mark.parametrize(
    "given",
    [
        [],
        [torch.full((2, 6), float("nan"), dtype=torch.float64)],
        [torch.zeros(2, 7, dtype=torch.float64)],
        breaking([torch.zeros(2, 6, dtype=torch.float64)], KeyboardInterrupt()),
    ],
)
def test_begin_task_that_fails_leaves_the_model_as_it_was(given: Any) -> None:
    loda = small()
    model = loda.model.eval()
    learn(loda, 0)
    modules, state = list(model.modules()), snapshot(model)
    history = totals(loda)
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        loda.begin_task(given)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert same(snapshot(model), state)
    assert same(totals(loda), history)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    learn(loda, 1)
    assert loda.tasks == 2


def test_model_adapted_by_somebody_else_is_refused_before_any_batch() -> None:
    loda = small()
    model = loda.model
    adapt(model, "2")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}

    with pytest.raises(ValueError, match="already"):
        loda.begin_task(never())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


# Settings that do not fit are known at the start


def test_settings_that_do_not_fit_the_model_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"7.*6"):
        LoDA(mlp(), LoDASettings(target=("0", "2"), rank=7))
    with pytest.raises(ValueError, match="0, 2"):
        LoDA(mlp())


def test_trainable_pattern_without_a_match_is_an_error() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP), trainable=["head.*"])
    with pytest.raises(ValueError, match=r"head\.\*.*0\.weight"):
        begin(loda, 0)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear


# Bases of the caller's own


def bases(task: int = 0) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(7)
    names = ("general",) if task == 0 else ("general", "isolated")
    return {
        layer: {n: torch.linalg.qr(torch.randn(width, 3, dtype=torch.float64))[0] for n in names}
        for layer, width in WIDTHS.items()
    }


def test_injected_bases_are_used_as_they_are() -> None:
    loda = small(down_scale=0.5)
    for task in range(2):
        given = bases(task)
        loda.begin_task(batches(task, loda.model), bases=given)
        for name, layer in loda.layers.items():
            assert list(layer.branches) == list(given[name])
            for branch, basis in given[name].items():
                assert torch.equal(layer.branch(branch).down, basis.mT * 0.5)
        record = end(loda, task)
        torch.testing.assert_close(record.new, means(mlp(), task, MLP["target"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.pop("2"), "name"),
        (lambda b: b.update(x=b["0"]), "name"),
        (lambda b: b["2"].pop("general"), "shapes"),
        (lambda b: b["2"].update(isolated=torch.zeros(10, 3)), "shapes"),
        (lambda b: b["2"].update(general=torch.zeros(3, 10)), "shapes"),
        (lambda b: b["4"]["general"].fill_(float("nan")), "finite"),
    ],
)
def test_bases_that_do_not_fit_are_refused_before_any_batch(spoil: Any, message: str) -> None:
    loda, given = small(), bases()
    spoil(given)
    with pytest.raises(ValueError, match=message):
        loda.begin_task(never(), bases=given)
    assert type(loda.model[0]) is nn.Linear
    loda.begin_task(batches(0, loda.model), bases=bases())


FORMS = ("full", "diagonal", "box", "direction", "scalar")


# History and merging against their definitions


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("history", ["merged", "trained", "both"])
def test_history_is_the_weighted_sum_of_the_passes(history: str, decay: float) -> None:
    loda, weight = small(history=history, history_decay=decay), 0.0
    model = loda.model
    expected = {n: torch.zeros(w, w, dtype=torch.float64) for n, w in WIDTHS.items()}
    for task in range(3):
        before = means(model, task, MLP["target"])
        trained, record = learn_and_look(loda, task)
        merged = means(model, task, MLP["target"])
        weight = decay * weight + (2 if history == "both" else 1)
        for name in WIDTHS:
            torch.testing.assert_close(record.new[name], before[name])
            expected[name] *= decay
            if history != "merged":
                expected[name] += trained[name]
            if history != "trained":
                expected[name] += merged[name]
            torch.testing.assert_close(loda.history[name].total, expected[name])
            assert loda.history[name].weight == pytest.approx(weight)
            for recorded, wanted in ((record.trained, trained), (record.merged, merged)):
                if recorded:
                    torch.testing.assert_close(recorded[name], wanted[name])
        assert bool(record.trained) == (history != "merged" or task > 0)
        assert bool(record.merged) == (history != "trained")
        if task:  # the passes must differ, or this test could not tell them apart
            assert not torch.allclose(before["2"], trained["2"])
            assert not torch.allclose(merged["2"], trained["2"])


WEIGHTS = {  # of the branches, on the first task and on later ones
    "both": [{"general": 0.25}, {"general": 0.25, "isolated": 0.5}],
    "general": [{"general": 0.5}, {"general": 0.5}],
    "isolated": [{"general": 0.5}, {"isolated": 1.0}],
}
MERGES: list[tuple[Any, dict[str, Any]]] = [
    *((build, {"recalibration": form}) for build in (vit, mlp) for form in (*FORMS, "none")),
    *((mlp, {"branches": b, "joint": joint}) for b in WEIGHTS for joint in (False, True)),
    *(
        (mlp, {"history_weight": weight, "history_decay": decay, "history": history})
        for weight, decay in ((0.0, 1.0), (2.5, 1.0), ("mean", 0.5))
        for history in ("merged", "both")
    ),
]


@pytest.mark.parametrize(
    ("build", "options"), MERGES, ids=[f"{build.__name__}-{options}" for build, options in MERGES]
)
def test_merged_weight_is_computed_by_hand_from_the_record(
    build: Any, options: dict[str, Any]
) -> None:
    loda, mass = small(build, gamma=0.7, **options), 0.0
    settings = loda.settings
    close = {"rtol": 1e-4, "atol": 1e-5} if build is vit else {"rtol": 1e-5, "atol": 1e-6}
    for task in range(3):
        before, old = snapshot(loda.model), totals(loda)
        trained, record = learn_and_look(loda, task)
        weights = WEIGHTS[settings.branches][task > 0]
        assert record.weights == dict.fromkeys(loda.history, weights)
        reached = settings.joint or "general" in weights
        recalibrated = task > 0 and settings.recalibration != "none" and reached
        assert set(record.coefficients) == (set(loda.history) if recalibrated else set())
        for name in loda.history:
            ups, downs = record.ups[name], record.downs[name]
            up = torch.cat([w * ups[b] for b, w in weights.items()], dim=1).double()
            down = torch.cat([downs[b] for b in weights]).double()
            middle = torch.eye(len(down), dtype=torch.float64)
            if recalibrated:
                h = 1 / mass if settings.history_weight == "mean" else settings.history_weight
                new, past = trained[name], h * old[name]
                if settings.joint:  # the minimiser over the stacked branches, from Theorem 2.3
                    p, q = (down @ moment @ down.mT for moment in (past, new))
                    middle = 0.7 * torch.linalg.solve(p + 0.7 * q, q, left=False)
                else:
                    factors = ups["general"].double(), downs["general"].double()
                    form: Any = settings.recalibration
                    middle[:3, :3] = recalibration(*factors, new, past, 0.7, form)
                coefficients = record.coefficients[name]
                size = len(middle) if settings.joint else 3
                torch.testing.assert_close(coefficients, middle[:size, :size], **close)
                # A history of weight 0 asks for no change; any other for one that shows.
                change = float((middle - torch.eye(len(middle))).abs().max())
                assert change < 1e-5 if h == 0 else change > 0.05
            expected = before[f"{name}.weight"] + (up @ middle @ down).to(ups[next(iter(ups))])
            torch.testing.assert_close(loda.model.get_submodule(name).weight.detach(), expected)
        mass = settings.history_decay * mass + len(settings.passes())


@pytest.mark.parametrize("isolated", ["null", "quotient"])
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
    loda = small(history="both")
    model = loda.model
    for past in range(task):
        learn(loda, past)
    begin(loda, task)
    fit(loda, task)
    twin = copy.deepcopy(loda)
    state, mine = snapshot(model), {k: v.clone() for k, v in loda.state_dict().items()}
    with pytest.raises(type(failure), match=str(failure)):
        loda.end_task(breaking(batches(task, model), failure, on_walk))
    assert same(snapshot(model), state)
    assert same(loda.state_dict(), mine)
    assert all(not layer.merged for layer in loda.layers.values())
    assert loda.tasks == task
    end(loda, task)
    end(twin, task)
    assert same(snapshot(model), snapshot(twin.model))
    assert same(loda.state_dict(), twin.state_dict())


@pytest.mark.parametrize("history", ["merged", "trained", "both"])
def test_branch_that_is_not_finite_is_never_merged(history: str) -> None:
    loda = small(history=history)
    begin(loda, 0)
    fit(loda, 0)
    last = loda.layers["4"].branch("general")
    good = last.up.detach().clone()
    base = {n: x.base.weight.clone() for n, x in loda.layers.items()}
    with torch.no_grad():
        last.up[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        end(loda, 0)
    assert all(torch.equal(x.base.weight, base[n]) for n, x in loda.layers.items())
    with torch.no_grad():
        last.up.copy_(good)
    end(loda, 0)
    assert loda.tasks == 1


def test_nan_images_at_the_end_keep_the_task_open() -> None:
    loda = small()
    model = loda.model
    learn(loda, 0)
    begin(loda, 1)
    state, history = snapshot(model), totals(loda)
    with pytest.raises(ValueError, match="NaN"):
        loda.end_task([torch.full((2, 6), float("nan"), dtype=torch.float64)])
    assert same(snapshot(model), state)
    assert same(totals(loda), history)
    end(loda, 1)


def test_iterator_is_refused_before_a_pass_where_two_are_needed() -> None:
    loda = small()
    model = loda.model
    loda.begin_task(iter(batches(0, model)))  # one pass: a generator will do
    loda.end_task(iter(batches(0, model)))
    loda.begin_task(iter(batches(1, model)))
    fit(loda, 1)
    state, given = snapshot(model), iter(batches(1, model))
    with pytest.raises(ValueError, match="two passes"):
        loda.end_task(given)
    assert len(list(given)) == 3  # not even begun
    assert same(snapshot(model), state)
    used = iter([torch.ones(1)])
    next(used)
    with pytest.raises(ValueError, match="two passes"):
        loda.end_task(used)
    with pytest.raises(ValueError, match="used up"):
        loda.end_task([])
    assert same(snapshot(model), state)
    end(loda, 1)
    assert loda.tasks == 2


# Coefficients


@pytest.mark.parametrize("joint", [False, True])
def test_box_keeps_every_direction_between_dropped_and_whole(joint: bool) -> None:
    method = small(recalibration="box", joint=joint)
    learn(method, 0)
    record = learn(method, 1)
    for middle in record.coefficients.values():
        diagonal = middle.diagonal()
        assert torch.equal(middle, torch.diag(diagonal))
        assert float(diagonal.min()) >= 0
        assert float(diagonal.max()) <= 1
        assert len(diagonal) == (6 if joint else 3)


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
    loda = small(build)
    model = loda.model.eval()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)  # flags differ, and must all come back
    modules, state = list(model.named_modules()), snapshot(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    past = state
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
    loda = small()
    state = snapshot(loda.model)
    for task in range(2):
        begin(loda, task)
        end(loda, task)
    assert same(snapshot(loda.model), state)


def test_calls_out_of_order_say_what_to_do() -> None:
    loda = small()
    for call in (
        lambda: end(loda, 0),
        loda.trainable_parameters,
        loda.lora_parameters,
        loda.abandon_task,
        lambda: loda.step(lambda rows: rows.sum(), torch.zeros(2), None, radius=0.0, draw=0.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(RuntimeError, match="begin_task"):
            call()
    begin(loda, 0)
    for call in (
        lambda: begin(loda, 0),
        lambda: loda.load_state_dict(loda.state_dict()),
    ):
        with pytest.raises(RuntimeError, match="open"):
            call()
    assert loda.layers


def test_abandoned_task_leaves_no_trace() -> None:
    loda = small()
    model = loda.model
    learn(loda, 0)
    state, mine = snapshot(model), {k: v.clone() for k, v in loda.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    begin(loda, 1)
    fit(loda, 1)
    loda.abandon_task()
    assert same(snapshot(model), state)
    assert same(loda.state_dict(), mine)
    assert [p.requires_grad for p in model.parameters()] == flags
    twin = small()
    learn(twin, 0)
    learn(loda, 1)
    learn(twin, 1)
    assert same(snapshot(model), snapshot(twin.model))


def test_nothing_of_a_task_stays_in_memory_but_the_history() -> None:
    loda = small(vit)
    for task in range(2):
        x = inputs(task, loda.model)[0]
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
    sizes = [v.numel() for key, v in loda.state_dict().items() if key != "settings"]
    assert sorted(sizes) == [1, 144, 144]


# Models with a head of their own, precision, randomness


def test_head_inside_the_model_is_trained_beside_the_branches() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    loda = LoDA(model, LoDASettings(**MLP), trainable=["[025].*"])
    begin(loda, 0)
    own = {n for n, p in model.named_parameters() if p.requires_grad and "branches" not in n}
    assert own == {"5.weight", "5.bias"}  # a target layer stays frozen whatever is asked
    assert len(loda.trainable_parameters()) == len(loda.lora_parameters()) + 2
    before = model[5].weight.detach().clone()
    fit(loda, 0)
    end(loda, 0)
    assert not torch.equal(model[5].weight, before)
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]
    assert all(p.requires_grad for p in model[2].parameters())


def test_optimizer_holds_the_very_tensors_of_the_layers() -> None:
    loda = small()
    model = loda.model
    begin(loda, 0)
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
    branches = {id(p) for n, p in model.named_parameters() if "branches" in n}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == branches
    fit(loda, 0, optimizer)
    assert {id(p) for n, p in model.named_parameters() if "branches" in n} == branches


@pytest.mark.parametrize("whole_model", [False, True])
def test_bfloat16_models_and_autocast_go_through_two_tasks(whole_model: bool) -> None:
    model = vit().to(torch.bfloat16 if whole_model else torch.float32)
    dtype = next(model.parameters()).dtype
    settings = LoDASettings(rank=3, history="both", joint=True, heldout=True, master=True)
    loda = LoDA(model, settings)
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
        loda = small()
        model = loda.model
        x, y = inputs(0, model)
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


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("build", [vit, mlp])
def test_run_continues_bit_for_bit_in_a_fresh_object_between_tasks(build: Any) -> None:
    loda, twin = small(build), small(build)
    learn(loda, 0)
    saved = through_a_file({"loda": loda.state_dict(), "model": loda.model.state_dict()})
    twin.model.load_state_dict(saved["model"])
    twin.load_state_dict(saved["loda"])
    for task in (1, 2):
        learn(loda, task)
        learn(twin, task)
        assert same(snapshot(loda.model), snapshot(twin.model))
        assert same(loda.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (0, {"history": "both"}),
        (1, {"history": "both"}),
        (
            1,
            {
                "isolated": "trace_ratio", "energy_floor": 0.7, "recalibration": "box",
                "joint": True, "history_weight": "mean", "history_decay": 0.5, "heldout": True,
            },
        ),
    ],
    ids=str,
)  # fmt: skip
def test_run_continues_bit_for_bit_from_the_middle_of_a_task(
    task: int, options: dict[str, Any]
) -> None:
    model, settings = mlp(), LoDASettings(**MLP, **options)
    loda = LoDA(model, settings, trainable=["5.*"])
    for past in range(task):
        learn(loda, past)
    begin(loda, task)
    optimizer = fit(loda, task)
    saved = through_a_file(
        {"loda": loda.state_dict(), "model": model.state_dict(), "sgd": optimizer.state_dict()}
    )
    twin = LoDA(mlp(seed=5), settings, trainable=["5.*"])
    # The names of the saved weights are those of the adapted model, so the method comes first.
    twin.load_state_dict(saved["loda"])
    twin.model.load_state_dict(saved["model"])
    assert twin.history.keys() == loda.history.keys()
    assert all(twin.history[n][1:] == loda.history[n][1:] for n in loda.history)  # the weights
    other = torch.optim.SGD(twin.trainable_parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(saved["sgd"])
    fit(loda, task, optimizer)
    fit(twin, task, other)
    flags = [[p.requires_grad for p in x.model.parameters()] for x in (loda, twin)]
    assert flags[0] == flags[1]
    records = [end(x, task) for x in (loda, twin)]
    assert same(snapshot(model), snapshot(twin.model))
    assert same(loda.state_dict(), twin.state_dict())
    assert same(records[0].moment_tensors(), records[1].moment_tensors())
    assert same(records[0].branch_tensors(), records[1].branch_tensors())
    assert records[0].diagnostics() == records[1].diagnostics()
    assert all(p.requires_grad for p in twin.model.parameters())


def test_loaded_state_is_a_copy() -> None:
    loda = small()
    learn(loda, 0)
    begin(loda, 1)
    fit(loda, 1)
    state = {k: v.clone() for k, v in loda.state_dict().items()}
    twin = small()
    twin.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert same(twin.state_dict(), loda.state_dict())


def test_deep_copy_in_the_middle_of_a_task_goes_its_own_way() -> None:
    loda = small()
    begin(loda, 0)
    twin = copy.deepcopy(loda)
    fit(loda, 0)
    fit(twin, 0)
    end(loda, 0)
    assert all(isinstance(twin.model.get_submodule(n), LoRALinear) for n in WIDTHS)
    end(twin, 0)
    assert same(snapshot(loda.model), snapshot(twin.model))
    assert all(p.requires_grad for p in twin.model.parameters())


def test_state_of_another_model_or_other_settings_is_refused_whole() -> None:
    source = small()
    learn(source, 0)
    between = source.state_dict()
    begin(source, 1)
    within = source.state_dict()
    without = {k: v for k, v in within.items() if k != "up/isolated/2"}
    model = mlp()
    for settings, state in (
        ({**MLP, "target": ("0", "2")}, between),
        ({**MLP, "target": ("0", "2", "4", "5")}, between),
        (MLP, {k: v for k, v in between.items() if k != "tasks"}),
        (MLP, between | {"history/0": torch.zeros(7, 7)}),
        (MLP, between | {"history/0": torch.zeros(6, 6, dtype=torch.int32)}),
        (MLP, {}),
        (MLP, without),
        ({**MLP, "branches": "general"}, within),
        ({**MLP, "rank": 2}, within),
    ):
        loda = LoDA(model, LoDASettings(**settings))
        with pytest.raises(ValueError, match="state"):
            loda.load_state_dict(state)
        assert loda.tasks == 0
        assert loda.history == loda.layers == {}
        assert type(model[0]) is nn.Linear
    # Between tasks the rank may change, if that is meant: the history knows nothing of it.
    loda = LoDA(model, LoDASettings(**{**MLP, "rank": 2}))
    loda.load_state_dict(between, strict=False)
    assert loda.tasks == 1


def test_names_with_slashes_survive_the_state() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"a/b": nn.Linear(6, 4)}))

    def forward(model: Any, x: Tensor) -> Any:
        return model[0]["a/b"](x)

    settings = LoDASettings(target="*a/b", rank=2)
    loda = LoDA(build(), settings, forward=forward)
    loda.begin_task([torch.randn(5, 6)])
    loda.end_task([torch.randn(5, 6)])
    loda.begin_task([torch.randn(5, 6)])
    twin = LoDA(build(), settings)
    twin.load_state_dict(loda.state_dict())
    assert same(twin.state_dict(), loda.state_dict())


# Which parameters and layers take part


@pytest.mark.parametrize("frozen", ["", "5.", "5.bias"])
def test_a_parameter_that_is_named_trains_even_if_it_was_frozen(frozen: str) -> None:
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    flags = [p.requires_grad for p in model.parameters()]
    before = snapshot(model)
    loda = LoDA(model, LoDASettings(**MLP), trainable=["5.*"])
    learn(loda, 0)
    after = snapshot(model)
    assert not any(torch.equal(after[n], before[n]) for n in ("5.weight", "5.bias"))
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("pattern", ["0.*", "[02].weight", "steps"])
def test_a_parameter_that_cannot_train_is_refused(pattern: str) -> None:
    model = mlp()
    model.steps = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    flags = [p.requires_grad for p in model.parameters()]
    loda = LoDA(model, LoDASettings(**MLP), trainable=["5.*", pattern])
    with pytest.raises(ValueError, match="trainable"):
        loda.begin_task(never())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.__setitem__(2, nn.Identity()), r"missing: \['2'\]"),
        (lambda model: model.append(nn.Linear(4, 4).double()), r"without a past: \['6'\]"),
        (lambda model: model.__setitem__(5, nn.Linear(9, 4).double()), r"\(6, 9\)"),
        (lambda model: model.insert(0, nn.Identity()), "missing.*without"),
    ],
)
def test_layers_that_changed_between_tasks_are_refused_before_anything_is_touched(
    change: Any, message: str
) -> None:
    model = mlp()
    loda = LoDA(model, target="*", rank=3)
    learn(loda, 0)
    change(model)
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        loda.begin_task(never())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not loda.is_open
    assert loda.tasks == 1


def test_fewer_tokens_than_directions_are_warned_of_with_their_numbers() -> None:
    x = inputs(0, mlp())[0]
    loda = small(rank_pattern={"2": 6})
    with pytest.warns(UserWarning, match=r"rank 6 and 4 tokens in layer '2' \(too few in 1 of 3"):
        loda.begin_task([x[:4]])
    loda.abandon_task()
    loda.begin_task([x[:6]])
    loda.abandon_task()
    loda.begin_task(
        [x[:2]],
        bases={
            n: {"general": torch.eye(w)[:, :3] if n != "2" else torch.eye(w)[:, :6]}
            for n, w in WIDTHS.items()
        },
    )


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"2": 2, "[24]": 4},
    "weight_pattern": {"[02]": 0.5},
}
RANKS, FACTORS = {"0": 3, "2": 2, "4": 4}, {"0": 0.5, "2": 0.5, "4": 1.0}


@pytest.mark.parametrize("options", [{}, {"joint": True, "heldout": True}], ids=str)
def test_rank_and_weight_of_a_layer_follow_the_first_pattern_that_fits(options: Any) -> None:
    loda = small(**PATTERNS, **options, recalibration="full")
    uniform = {rank: small(rank=rank, **options) for rank in (2, 3, 4)}
    for method in (loda, *uniform.values()):
        begin(method, 0)
        end(method, 0)
        begin(method, 1)
    for name, layer in loda.layers.items():
        for branch, weight in (("general", 0.25), ("isolated", 0.5)):
            down = layer.branch(branch).down
            assert torch.equal(down, uniform[RANKS[name]].layers[name].branch(branch).down)
            assert layer.branch(branch).scale == weight * FACTORS[name]
    before = snapshot(loda.model)
    fit(loda, 1)
    record = end(loda, 1)
    for name in WIDTHS:
        weights = {"general": 0.25 * FACTORS[name], "isolated": 0.5 * FACTORS[name]}
        assert record.weights[name] == weights
        up = torch.cat([w * record.ups[name][b] for b, w in weights.items()], dim=1)
        down = torch.cat([record.downs[name][b] for b in weights])
        factor = torch.eye(len(down), dtype=up.dtype)
        size = len(record.coefficients[name])
        factor[:size, :size] = record.coefficients[name]
        assert size == RANKS[name] * (2 if options else 1)
        merged = before[f"{name}.base.weight"] + up @ factor @ down
        torch.testing.assert_close(loda.model.get_submodule(name).weight.detach(), merged)


def test_state_of_other_ranks_by_layer_is_refused() -> None:
    loda, twin = small(**PATTERNS), small(**PATTERNS)
    for task in range(2):
        begin(loda, task)
        twin.load_state_dict(loda.state_dict())
        twin.model.load_state_dict(loda.model.state_dict())
        fit(loda, task)
        fit(twin, task)
        end(loda, task)
        end(twin, task)
        assert same(snapshot(loda.model), snapshot(twin.model))
    begin(loda, 2)
    with pytest.raises(ValueError, match="state"):
        small(rank_pattern={"2": 3}).load_state_dict(loda.state_dict())


def test_patterns_that_fit_no_target_layer_are_refused_at_construction() -> None:
    for name in ("rank_pattern", "weight_pattern"):
        with pytest.raises(ValueError, match=f"{name}.*'5'"):
            small(**{name: {"5": 1}})
    with pytest.raises(ValueError, match=r"7.*6"):
        small(rank_pattern={"0": 7})


# Half precision


def bfloat16_vit() -> nn.Module:
    return vit().bfloat16()


def test_rounding_at_the_merge_is_recorded_and_warned_of() -> None:
    loda = small(bfloat16_vit)
    begin(loda, 0)
    fit(loda, 0)
    with pytest.warns(UserWarning, match="master") as warned:
        record = end(loda, 0)
    assert warned[0].filename == end.__code__.co_filename
    assert record.rounding.keys() == loda.history.keys()
    logged = record.diagnostics()
    for name, rounding in record.rounding.items():
        assert logged[name]["rounding"]["correlation"] == float(rounding.correlation) < 0.99
    assert loda.tasks == 1
    assert learn(small(), 0).rounding == {}


def test_masters_hold_the_sum_of_all_updates_and_go_with_the_state() -> None:
    loda, twin = (small(bfloat16_vit, master=True, recalibration="none") for _ in range(2))
    model, exact = loda.model, {}
    for task in range(4):
        begin(loda, task)
        fit(loda, task)
        if task == 2:  # goes on in another object
            state = through_a_file({"loda": loda.state_dict(), "model": model.state_dict()})
            twin.load_state_dict(state["loda"])
            twin.model.load_state_dict(state["model"])
            loda, model = twin, twin.model
        for name, layer in loda.layers.items():
            start = exact.get(name, layer.base.weight.detach().double())
            exact[name] = start + layer.delta().detach().double()
        end(loda, task)
        for name, weight in exact.items():
            torch.testing.assert_close(loda.masters[name].double(), weight, rtol=1e-5, atol=1e-6)
            assert torch.equal(model.get_submodule(name).weight, loda.masters[name].bfloat16())
    changed, other = loda.masters
    with torch.no_grad():
        model.get_submodule(changed).weight.mul_(2)
    kept = loda.masters[other]
    begin(loda, 4)
    start = loda.layers[changed].base.weight
    assert torch.equal(loda.layers[changed].master, start.float())
    assert torch.equal(loda.layers[other].master, kept)
    loda.abandon_task()
    assert small(master=True).masters == {}


# Models of other kinds through whole tasks


@pytest.mark.slow  # imports the compiler
@pytest.mark.parametrize("compiled", ["model", "copy"])
def test_a_compiled_model_is_validated_inside_a_task(compiled: str) -> None:
    results = []

    def through_tasks(loda: LoDA, run: Any) -> None:
        model = loda.model
        for task in range(2):
            x, y = inputs(task, model)
            loda.begin_task([x])
            optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.05)
            for seed in range(2):
                run.train()
                loda.step(
                    lambda rows, x=x, y=y: F.cross_entropy(run(x[rows]), y[rows]), y, optimizer,
                    radius=0.3, generator=torch.Generator().manual_seed(seed),
                )  # fmt: skip
                run.eval()
                with torch.no_grad():
                    run(x)
            loda.end_task([x])
            with torch.no_grad():
                results.append(run(x))

    through_tasks(plain := small(), plain.model)
    loda = small()
    if compiled == "model":
        loda.model.compile(backend="eager")
    run = loda.model if compiled == "model" else torch.compile(loda.model, backend="eager")
    through_tasks(loda, run)
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one, other)


def test_an_encoder_with_packed_projections_goes_through_tasks() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    loda = LoDA(model, target="all-linear", rank=2, heldout=True, history="both")
    names, parameters = list(model.state_dict()), list(model.parameters())
    for _task in range(2):
        x = torch.randn(8, 4, 6, dtype=torch.float64)
        loda.begin_task([x])
        assert len(loda.layers) == 8
        optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
        loda.step(
            lambda rows, x=x: model(x[rows]).pow(3).mean(),
            torch.arange(8) % 2,
            optimizer,
            radius=0.1,
        )
        before = {name: layer.weight.detach().clone() for name, layer in loda.layers.items()}
        with pytest.raises(OSError, match="gone"):
            loda.end_task(breaking([x], OSError("gone"), on_walk=2))
        assert all(torch.equal(layer.weight, before[n]) for n, layer in loda.layers.items())
        record = loda.end_task([x])
    assert record.effects.keys() == record.heldout.keys() == loda.history.keys()
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad for p in parameters)


# A task as a context


def test_a_task_as_a_context_is_begun_and_ended() -> None:
    loda, twin = small(radius=0.3), small()
    with loda.task(batches(0, loda.model)) as task:
        assert loda.is_open
        x, y = inputs(0, loda.model)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            task.step(
                lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]),
                y, optimizer, generator=generator,
            )  # fmt: skip
    learn(twin, 0)
    assert loda.tasks == 1
    assert not loda.is_open
    assert set(task.record.new) == set(WIDTHS)
    assert same(snapshot(loda.model), snapshot(twin.model))


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["inside", "in a half"])
def test_an_error_abandons_the_task(failure: type[BaseException], when: str) -> None:
    loda = small()
    learn(loda, 0)
    state = snapshot(loda.model)

    def train() -> None:
        data = batches(1, loda.model)
        with loda.task(data) as task:
            fit(loda, 1)
            if when == "inside":
                raise failure("stop")
            if when == "in a half":
                optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
                for half in task.halves(4, optimizer):
                    loda.model(data[0][half.source[0].rows]).sum().backward()
                    half.look_ahead()
                    raise failure("stop")

    with pytest.raises(failure, match="stop"):
        train()
    assert same(snapshot(loda.model), state)
    assert loda.tasks == 1
    assert not loda.is_open
    learn(loda, 1)


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_an_end_that_fails_keeps_what_was_learned(failure: type[BaseException]) -> None:
    loda, twin = small(), small()

    def train() -> None:
        with loda.task(breaking(batches(0, loda.model), failure("stop"), on_walk=2)):
            fit(loda, 0)

    with pytest.raises(failure, match="stop"):
        train()
    end(loda, 0)
    learn(twin, 0)
    assert same(snapshot(loda.model), snapshot(twin.model))


def test_a_task_may_be_ended_or_abandoned_inside_its_context() -> None:
    loda = small()
    with loda.task(batches(0, loda.model)):
        end(loda, 0)
    with loda.task(batches(1, loda.model)):
        loda.abandon_task()
    with pytest.raises(ValueError, match="several times"):
        loda.task(iter(batches(1, loda.model)))
    assert loda.tasks == 1


def test_keywords_are_fields_of_the_settings() -> None:
    loda = LoDA(mlp(), LoDASettings(**MLP, gamma=2.0), rank=2, radius=0.7)
    assert loda.settings == LoDASettings(target=MLP["target"], gamma=2.0, rank=2, radius=0.7)
    with pytest.raises(TypeError, match="rnk"):
        LoDA(mlp(), target="0", rnk=2)
    with pytest.raises(ValueError, match="rank"):
        LoDA(mlp(), target="0", rank=0)


def test_groups_for_an_optimiser_hold_every_trained_tensor_once() -> None:
    loda = LoDA(mlp(), **MLP, trainable=["5.*"])
    begin(loda, 0)
    outside = nn.Linear(4, 2)
    own = [id(p) for p in loda.model[5].parameters()]
    branches = [id(p) for p in loda.lora_parameters()]
    for options, rates in (
        ({"lr": 0.1, "head_lr": 0.01}, [0.1, 0.01]),
        ({"lr": 0.1}, [0.1, 0.1]),
        ({"head_lr": 0.01}, [None, 0.01]),
        ({}, [None, None]),
    ):
        groups = loda.parameters(**options, head=outside.parameters())
        assert [[id(p) for p in group["params"]] for group in groups] == [
            branches,
            own + [id(p) for p in outside.parameters()],
        ]
        assert [group.get("lr") for group in groups] == rates
    twice = loda.parameters(head=loda.model[5].parameters())
    assert [id(p) for p in twice[1]["params"]] == own
    bare = small()
    begin(bare, 0)
    assert len(bare.parameters(lr=0.1)) == 1
    with pytest.raises(ValueError, match="head_lr"):
        bare.parameters(head_lr=0.1)


def test_radius_is_that_of_the_settings_unless_it_is_given() -> None:
    def trained(setting: float, given: float | None) -> dict[str, Tensor]:
        loda = small(radius=setting)
        begin(loda, 0)
        x, y = inputs(0, loda.model)
        optimizer = torch.optim.SGD(loda.parameters(), lr=0.1)
        loda.step(
            lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]),
            y, optimizer, radius=given, draw=0.5, permutation=torch.arange(4),
        )  # fmt: skip
        return snapshot(loda.model)

    assert same(trained(0.7, None), trained(0.1, 0.7))
    assert not same(trained(0.7, None), trained(0.1, None))


@pytest.mark.parametrize("groups", ["labels", "window", "number"])
def test_step_in_phases_is_the_step_of_one_call(groups: str) -> None:
    def trained(in_phases: bool) -> dict[str, Tensor]:
        loda = LoDA(mlp(), **MLP, trainable=["5.*"], radius=0.5)
        begin(loda, 0)
        x, y = inputs(0, loda.model)
        optimizer = torch.optim.SGD(loda.parameters(lr=0.1), momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        labels = len(y) if groups == "number" else y
        for _ in range(3):
            if not in_phases:
                loda.step(
                    lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]),
                    labels, optimizer, generator=generator,
                )  # fmt: skip
                continue
            parts = 4 if groups == "window" else 1
            xs, ys = x.chunk(parts), y.chunk(parts)
            given = list(ys) if groups == "window" else labels
            for half in loda.halves(given, optimizer, generator=generator):
                for some, leave in ((half.source, half.look_ahead), (half.target, half.share)):
                    for part in some:
                        logits = loda.model(xs[part.batch][part.rows])
                        loss = F.cross_entropy(logits, ys[part.batch][part.rows])
                        (part.weight * loss).backward()
                    leave()
                optimizer.step()
                half.restore()
        return snapshot(loda.model)

    whole, phases = trained(in_phases=False), trained(in_phases=True)
    assert whole.keys() == phases.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(phases[name], tensor, rtol=1e-9, atol=1e-12)


def test_nothing_is_saved_or_ended_while_the_branches_are_moved() -> None:
    loda = small()
    begin(loda, 0)
    x, _ = inputs(0, loda.model)
    optimizer = torch.optim.SGD(loda.parameters(), lr=0.1)
    before = snapshot(loda.model)
    steps = iter(loda.halves(4, optimizer))
    half = next(steps)
    loda.model(x[half.source[0].rows]).sum().backward()
    half.look_ahead()
    for call in (loda.state_dict, lambda: end(loda, 0)):
        with pytest.raises(RuntimeError, match="restore"):
            call()
    # An error that the caller caught: the next step starts from where this one did.
    loda.halves(4, optimizer)
    assert same(snapshot(loda.model), before)


# Losses and optimisers that miss the open task


def test_optimiser_of_the_last_task_is_refused() -> None:
    loda = small()
    begin(loda, 0)
    kept = fit(loda, 0)
    end(loda, 0)
    begin(loda, 1)
    with pytest.raises(ValueError, match="after the task has begun"):
        fit(loda, 1, kept)
    fit(loda, 1)


@pytest.mark.parametrize("phases", [False, True], ids=["one call", "phases"])
@pytest.mark.parametrize("trains", [False, True])
def test_freezing_or_training_the_whole_model_inside_a_task_is_refused(
    trains: bool, phases: bool
) -> None:
    loda = small()
    begin(loda, 0)
    optimizer = torch.optim.SGD(loda.parameters(lr=0.1))
    loda.model.requires_grad_(trains)
    step = loda.halves if phases else partial(loda.step, never)
    with pytest.raises(RuntimeError, match="requires_grad"):
        step(4, optimizer)


# What is meant to be trained, but is not


def train(loda: LoDA, optimizer: torch.optim.Optimizer, way: str) -> None:
    """Two steps: in one call, in phases, or of a loop that knows nothing of LoDA."""
    x, y = inputs(0, loda.model)
    loss = lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows])  # noqa: E731
    for _ in range(2):
        if way == "one call":
            loda.step(loss, y, optimizer)
        elif way == "phases":
            for half in loda.halves(y, optimizer):
                loss(half.source[0].rows).backward()
                half.look_ahead()
                loss(half.target[0].rows).backward()
                optimizer.step()
                half.restore()
        else:
            optimizer.zero_grad()
            loss(torch.arange(len(y))).backward()
            optimizer.step()


WAYS = ("one call", "phases", "plain loop")


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_head_that_no_optimiser_holds_is_refused_where_it_gets_a_gradient(way: str) -> None:
    loda = LoDA(mlp(), **MLP, trainable=["5.*"])  # type: ignore[arg-type]
    begin(loda, 0)
    before = snapshot(loda.model)
    with pytest.raises(RuntimeError, match=r"5\.weight"):
        train(loda, torch.optim.SGD(loda.lora_parameters(), lr=0.1), way)
    assert same(snapshot(loda.model), before)
    # Another optimiser may hold the head, if it is passed too.
    for half in loda.halves(4, [torch.optim.SGD(g["params"], lr=0.1) for g in loda.parameters()]):
        for rows, leave in ((half.source, half.look_ahead), (half.target, half.share)):
            loda.model(inputs(0, loda.model)[0][rows[0].rows]).square().mean().backward()
            leave()
        half.restore()


def test_a_closure_is_no_way_around() -> None:
    loda = LoDA(mlp(), **MLP, trainable=["5.*"])  # type: ignore[arg-type]
    begin(loda, 0)
    x = inputs(0, loda.model)[0]
    optimizer = torch.optim.SGD(loda.lora_parameters(), lr=0.1)

    def closure() -> Tensor:
        loss: Tensor = loda.model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    halves = iter(loda.halves(4, optimizer))  # kept: where it is lost, a half is undone
    half = next(halves)
    closure()
    half.look_ahead()
    with pytest.raises(RuntimeError, match=r"5\.weight"):
        optimizer.step(closure)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> Any:
        return self.heads[0](self.body(x))


@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_the_loss_does_not_use_needs_no_optimiser(way: str) -> None:
    loda = LoDA(TwoHeads().double(), target="body", rank=2, trainable=["heads.*"])
    begin(loda, 0)
    used = [*loda.lora_parameters(), *loda.model.get_submodule("heads.0").parameters()]
    train(loda, torch.optim.SGD(used, lr=0.1), way)
    end(loda, 0)  # without a warning


@pytest.mark.parametrize(
    ("way", "held", "rates", "named"),
    [
        *[(way, "all", (0.0, 0.1), "0.branches") for way in WAYS],
        *[(way, "all", (0.1, 0.0), "5.weight") for way in WAYS],
        ("plain loop", "branches", (0.1, 0.1), "5.weight"),
        ("plain loop", "head", (0.1, 0.1), "0.branches"),
        ("plain loop", "of the last task", (0.1, 0.1), "0.branches"),
    ],
)
def test_what_never_moved_although_it_had_gradients_is_named_at_the_end(
    way: str, held: str, rates: tuple[float, float], named: str
) -> None:
    loda = LoDA(mlp(), **MLP, trainable=["5.*"])  # type: ignore[arg-type]
    begin(loda, 0)
    groups = loda.parameters(*rates)
    if held == "of the last task":
        end(loda, 0)
        begin(loda, 0)
    groups = {"branches": groups[:1], "head": groups[1:]}.get(held, groups)
    train(loda, torch.optim.SGD(groups), way)
    with pytest.warns(UserWarning, match="did not change") as warned:
        end(loda, 0)
    assert warned[0].filename == end.__code__.co_filename
    said = str(warned[0].message)
    assert named in said
    assert ("5.weight" in said) == (named == "5.weight")
    assert loda.tasks in (1, 2)  # the task is over all the same
    assert not loda.is_open


@pytest.mark.parametrize("size", [0.9, 3.0])
def test_an_update_larger_than_the_weights_is_warned_of(size: float) -> None:
    loda = LoDA(mlp(), **MLP)  # type: ignore[arg-type]
    begin(loda, 0)
    for layer in loda.layers.values():  # each layer gets an update of that size
        for up in (layer.branch(name).up for name in layer.branches):
            up.data.normal_()
        up.data.mul_(size * layer.frozen.norm() / layer.delta().norm())
    if size < 1:
        end(loda, 0)  # warnings are errors
        return
    with pytest.warns(UserWarning, match="is 3 times as large") as warned:
        end(loda, 0)
    assert warned[0].filename == end.__code__.co_filename
    assert loda.tasks == 1


@pytest.mark.parametrize("way", WAYS)
def test_training_all_that_is_to_be_trained_gives_no_warning(way: str) -> None:
    loda = LoDA(mlp(), **MLP, trainable=["5.*"])  # type: ignore[arg-type]
    for task in range(2):
        begin(loda, task)
        train(loda, torch.optim.SGD(loda.parameters(lr=0.01)), way)
        end(loda, task)


# Modes of torch in which nothing can be trained


@pytest.mark.parametrize("call", ["begin", "end", "load", "step", "task"])
def test_inference_mode_around_a_task_is_an_error_of_one_line(call: str) -> None:
    loda = small()
    state = loda.state_dict()
    x, y = inputs(0, loda.model)
    if call in ("end", "step"):
        begin(loda, 0)
    optimizer = torch.optim.SGD(loda.model.parameters(), lr=0.1)
    calls = {
        "begin": lambda: begin(loda, 0),
        "end": lambda: end(loda, 0),
        "load": lambda: loda.load_state_dict(state),
        "task": lambda: loda.task([x]).__enter__(),
        "step": lambda: loda.step(
            lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]), y, optimizer
        ),
    }
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        calls[call]()
    if call in ("end", "step"):
        fit(loda, 0)  # nothing is lost
        end(loda, 0)
    else:
        learn(loda, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_says_so_and_leaves_the_model(mode: Any) -> None:
    loda = small()
    begin(loda, 0)
    x, y = inputs(0, loda.model)
    optimizer = torch.optim.SGD(loda.parameters(lr=0.1))
    before = snapshot(loda.model)
    for labels in (y, torch.zeros_like(y)):  # of one class: a plain step
        with pytest.raises(RuntimeError, match="no_grad"), mode():
            loda.step(lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]), labels, optimizer)
    assert same(snapshot(loda.model), before)


@pytest.mark.parametrize("made", ["0", "5"], ids=["a target layer", "another layer"])
def test_parameters_made_under_inference_mode_are_refused_at_construction(made: str) -> None:
    model = mlp()
    with torch.inference_mode():
        setattr(model, made, copy.deepcopy(model.get_submodule(made)))
    with pytest.raises(TypeError, match=rf"{made}\.weight"):
        LoDA(model, **MLP)  # type: ignore[arg-type]


def test_a_task_may_begin_under_no_grad_and_train_in_evaluation_mode() -> None:
    loda, other = small(vit), small(vit)
    with torch.no_grad():
        begin(loda, 0)
    begin(other, 0)
    other.model.eval()
    for one in (loda, other):
        fit(one, 0)
        end(one, 0)
    assert same(snapshot(loda.model), snapshot(other.model))


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 4), reentrant

    def forward(self, x: Tensor) -> Any:
        from torch.utils.checkpoint import checkpoint

        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("in_phases", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_works_or_is_an_error(
    reentrant: bool, in_phases: bool, needs_grad: bool
) -> None:
    def trained(model: nn.Module, loss_through: Any) -> Tensor:
        x, y = inputs(0, mlp())
        x = x.float().requires_grad_(needs_grad)
        loda = LoDA(model, target="block", rank=2, trainable=["head.*"])
        loda.begin_task([x.detach()])
        optimizer = torch.optim.SGD(loda.parameters(lr=0.1))

        def loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(loss_through(x[rows]), y[rows])

        draws: dict[str, Any] = {"draw": 0.5, "permutation": torch.arange(4)}
        if in_phases:
            for half in loda.halves(y, optimizer, **draws):
                loss(half.source[0].rows).backward()
                half.look_ahead()
                loss(half.target[0].rows).backward()
                optimizer.step()
                half.restore()
        else:
            loda.step(loss, y, optimizer, **draws)
        return loda.layers["block"].branch("general").up.detach()

    plain = Checkpointed(reentrant=False)
    expected = trained(plain, lambda x: plain.head(plain.block(x)))
    model = Checkpointed(reentrant=reentrant)
    # Without an input that requires a gradient, or under autograd.grad, the reentrant kind gives
    # none.
    if reentrant and not (in_phases and needs_grad):
        with pytest.raises(RuntimeError, match="use_reentrant"):
            trained(model, model)
    else:
        torch.testing.assert_close(trained(model, model), expected)


# One LoDA a model


def test_a_second_loda_is_refused_while_a_task_is_open() -> None:
    model = mlp()
    loda, other = LoDA(model, **MLP), LoDA(model, **MLP)
    between = other.state_dict()
    begin(loda, 0)
    flags = [p.requires_grad for p in model.parameters()]
    whole, part = nn.Sequential(model), model[5:]
    for call in (
        lambda: LoDA(model, **MLP),
        lambda: LoDA(whole, target="0.0", rank=2),
        lambda: LoDA(part, target="0", rank=2),
        lambda: LoDA(copy.deepcopy(model), **MLP),
        lambda: begin(other, 0),
        lambda: other.load_state_dict(between),
    ):
        with pytest.raises(RuntimeError, match="detach"):
            call()
    assert [p.requires_grad for p in model.parameters()] == flags
    learn_on = fit(loda, 0)
    assert learn_on is not None
    end(loda, 0)
    LoDA(model, **MLP)


COPIES = {"a copy": copy.deepcopy, "a file": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("through", ["itself", "a part of it", "what holds it", *COPIES])
def test_a_model_whose_loda_is_lost_is_recovered(through: str) -> None:
    model = mlp().train()
    model.append(nn.BatchNorm1d(4).double())
    model[0].requires_grad_(False)
    flags, state = [p.requires_grad for p in model.parameters()], snapshot(model)
    modules = list(model.modules())
    loda = LoDA(model, **MLP)
    begin(loda, 0)
    fit(loda, 0)
    loda.halves(4, torch.optim.SGD(loda.parameters(), lr=0.1))
    held = COPIES[through](model) if through in COPIES else model
    given = {"a part of it": held[2:], "what holds it": nn.Sequential(held)}.get(through, held)
    if through != "itself":
        del loda
        gc.collect()
    LoDA.detach(given)
    LoDA.detach(given)  # nothing is left to do
    assert same(snapshot(held), state)
    assert [p.requires_grad for p in held.parameters()] == flags
    assert held.train()[6].training
    if through in COPIES:
        LoDA.detach(model)
    assert list(model.modules()) == modules
    fresh = LoDA(model, **MLP)
    learn(fresh, 0)
    if through == "itself":
        with pytest.raises(RuntimeError, match="no task"):
            end(loda, 0)


# Running statistics


def with_norms() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 8),
        nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    return model.double()


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_running_statistics_stay_or_move_as_the_settings_say(freeze: bool, ended: bool) -> None:
    model = with_norms().train()
    model[1].eval()  # a layer that was apart from the rest stays so
    loda = LoDA(model, target=("0", "3"), rank=3, freeze_statistics=freeze)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, y = inputs(0, mlp())

    def moved() -> set[str]:
        return {n for n, buffer in model.named_buffers() if not torch.equal(buffer, buffers[n])}

    loda.begin_task([x])
    assert not moved()
    assert [model[i].training for i in (1, 2, 5)] == [False, True, not freeze]
    model.train()
    assert [model[i].training for i in (1, 2, 5)] == [not freeze, True, not freeze]
    optimizer = torch.optim.SGD(loda.parameters(), lr=0.1)
    loda.step(lambda rows: F.cross_entropy(model(x[rows]), y[rows]), y, optimizer)
    changed = moved()
    assert bool(changed) is not freeze
    if ended:
        loda.end_task([x])
        assert moved() == changed
    else:
        loda.abandon_task()
        assert not moved()
    assert not any("train" in module.__dict__ for module in model.modules())
    assert model[5].training
    assert all(module.training for module in model.train().modules())


# Settings in the state


def test_settings_travel_with_the_state_and_are_compared() -> None:
    loda = small(gamma=2.0)
    learn(loda, 0)
    between = through_a_file(loda.state_dict())
    begin(loda, 1)
    within = through_a_file(loda.state_dict())
    for options, trainable in (
        ({"gamma": 1.0}, ()), ({"rank": 2}, ()), ({"general_weight": 0.1}, ()), ({}, ("5.*",)),
    ):  # fmt: skip
        other = LoDA(mlp(), LoDASettings(**{**MLP, "gamma": 2.0, **options}), trainable=trainable)
        named = next(iter(options), "trainable")
        for state in (between, within):
            with pytest.raises(ValueError, match=named):
                other.load_state_dict(state)
        with pytest.raises(ValueError, match=named):
            other.load_state_dict(within, strict=False)
        other.load_state_dict(between, strict=False)
        assert other.tasks == 1
    for options in ({"history": "both"}, {"history_decay": 0.5}):
        other = small(gamma=2.0, **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            other.load_state_dict(between, strict=False)
    small(gamma=2.0, radius=0.9).load_state_dict(within)
    for broken in (b"{", b"[1]", b"\xff"):
        with pytest.raises(ValueError, match="settings"):
            small().load_state_dict(between | {"settings": torch.tensor(list(broken)).byte()})


# Autocast around everything


def test_autocast_around_a_task_is_autocast_inside_its_losses() -> None:
    def trained(outside: bool) -> dict[str, Tensor]:
        model = mlp().float()
        loda = LoDA(model, **MLP, trainable=["5.*"])
        x, y = (
            tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(0, model)
        )
        probe = []
        # Not autocast(enabled=False): inside it the cache would outlive the losses as well.
        with torch.autocast("cpu", dtype=torch.bfloat16) if outside else nullcontext():
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    probe.append(model(x).detach())
                loda.forward = lambda net, batch: cast(net)(batch)
                with loda.task([x]) as task:
                    optimizer = torch.optim.SGD(task.parameters(), lr=0.5)
                    for _ in range(3):
                        task.step(
                            lambda rows: F.cross_entropy(cast(model)(x[rows]).float(), y[rows]),
                            y, optimizer, draw=0.5, permutation=torch.arange(4),
                        )  # fmt: skip
            with torch.autocast("cpu", dtype=torch.bfloat16):
                probe.append(model(x).detach())
        return {**snapshot(model), **dict(zip("abc", probe, strict=True))}

    def cast(model: nn.Module) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result: Tensor = model(x)
                return result

        return call

    assert same(trained(outside=False), trained(outside=True))


# Second moments: which tokens, how they are stored, how long


def test_padding_does_not_move_the_directions() -> None:
    """One sequence at a time needs no padding, and gives the same tasks."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for kind in ("masked", "alone", "padded"):
        model, padded, sequences = padded_bert()
        alone = [{"input_ids": x} for x in sequences]
        given: list[Any] = alone if kind == "alone" else padded
        mask = "attention_mask" if kind == "masked" else None
        loda = LoDA(model, target="*.attention.self.query", rank=3, heldout=True, mask=mask)
        bases: dict[str, list[Tensor]] = {}
        for _ in range(2):
            with loda.task(given):
                for name, layer in loda.layers.items():
                    downs = [layer.branch(b).down.detach() for b in layer.branches]
                    bases.setdefault(name, []).extend(3**0.5 * down for down in downs)
        found[kind] = bases
        found[f"{kind} history"] = {n: [past.total.float()] for n, past in loda.history.items()}
    for name, wanted in found["alone"].items():
        assert len(wanted) == 3

        def cosine(kind: str, name: str = name, wanted: list[Tensor] = wanted) -> float:
            pairs = zip(found[kind][name], wanted, strict=True)
            return min(float(torch.linalg.svdvals(a @ b.mT).min()) for a, b in pairs)

        assert cosine("masked") > 1 - 1e-4 > 0.99 > cosine("padded")
        history = found["masked history"][name], found["alone history"][name]
        torch.testing.assert_close(*history, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),
        ({"recalibration": "none"}, True),
        ({"history": "both", "heldout": True}, False),
        ({"recalibration": "none", "history": "trained"}, False),
    ],
    ids=str,
)
def test_a_task_is_the_same_whether_its_moments_are_recorded(
    options: dict[str, Any], needed: bool
) -> None:
    finals = []
    for record_moments in (False, True):
        loda = LoDA(mlp(), LoDASettings(**MLP, **options), record_moments=record_moments)
        learn(loda, 0)
        begin(loda, 1)
        fit(loda, 1)
        state = loda.state_dict()
        assert any(key.startswith("new/") for key in state) == (needed or record_moments)
        saved = through_a_file({"loda": state, "model": loda.model.state_dict()})
        twin = LoDA(mlp(seed=3), LoDASettings(**MLP, **options), record_moments=record_moments)
        twin.load_state_dict(saved["loda"])
        twin.model.load_state_dict(saved["model"])
        records = [end(method, 1) for method in (loda, twin)]
        assert same(loda.state_dict(), twin.state_dict())
        for record in records:
            assert bool(record.new) == bool(record.moment_tensors()) == record_moments
            finals.append((snapshot(loda.model), totals(loda), record.branch_tensors()))
            assert record.diagnostics() == records[0].diagnostics()
    assert all(same(a, b) for final in finals for a, b in zip(final, finals[0], strict=True))


def test_moments_that_are_to_be_recorded_must_be_in_the_state() -> None:
    loda = LoDA(mlp(), LoDASettings(**MLP))
    begin(loda, 0)
    other = LoDA(mlp(), LoDASettings(**MLP), record_moments=True)
    with pytest.raises(ValueError, match="new/"):
        other.load_state_dict(loda.state_dict())


def test_an_end_that_fails_can_be_repeated_without_recorded_moments() -> None:
    finals = []
    for fails in (False, True):
        loda = LoDA(mlp(), LoDASettings(**MLP))
        learn(loda, 0)
        begin(loda, 1)
        fit(loda, 1)
        if fails:
            with pytest.raises(KeyboardInterrupt):
                loda.end_task(breaking(batches(1, loda.model), KeyboardInterrupt(), on_walk=2))
        end(loda, 1)
        finals.append((snapshot(loda.model), totals(loda)))
    assert all(same(a, b) for a, b in zip(*finals, strict=True))


def test_moments_in_single_precision_on_a_device_of_choice() -> None:
    """They are rounded once a task, and all that is computed of them stays close."""
    methods = [
        LoDA(vit(), rank=3, moment_dtype=kind, moment_device="cpu", record_moments=True)
        for kind in ("float64", "float32")
    ]
    records = [[learn_and_look(loda, task)[1] for task in range(3)] for loda in methods]
    for name, past in methods[1].history.items():
        assert past.total.dtype == torch.float32
        assert past.total.device.type == "cpu"
        assert past.unit == torch.finfo(torch.float32).eps
        wanted = methods[0].history[name]
        assert wanted.total.dtype == torch.float64
        torch.testing.assert_close(past.total.double(), wanted.total, rtol=1e-3, atol=1e-4)
        for a, b in zip(*records, strict=True):
            assert b.new[name].dtype == torch.float32
            torch.testing.assert_close(b.new[name].double(), a.new[name], rtol=1e-3, atol=1e-4)
    weights = [{n: p.detach() for n, p in loda.model.named_parameters()} for loda in methods]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    begin(methods[1], 3)
    twin = LoDA(vit(), rank=3, moment_dtype="float32", record_moments=True)
    twin.load_state_dict(through_a_file(methods[1].state_dict()))
    assert same(twin.state_dict(), methods[1].state_dict())
    assert all(twin.history[n][1:] == methods[1].history[n][1:] for n in twin.history)
    assert all(twin.history[n].total.dtype == torch.float32 for n in twin.history)
    with pytest.raises(ValueError, match="moment_dtype"):
        LoDA(vit(), rank=3).load_state_dict(methods[1].state_dict())


def test_the_unit_of_the_moments_comes_with_the_history() -> None:
    loda = LoDA(vit(), rank=3)
    learn(loda, 0)
    twin = LoDA(vit(), rank=3)
    twin.load_state_dict(loda.state_dict())
    single = torch.finfo(torch.float32).eps
    assert [past.unit for past in (*loda.history.values(), *twin.history.values())] == [single] * 4
