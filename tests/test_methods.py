"""The methods under their common interface: what they change in a model, and what they leave."""

import re

import pytest
import torch
from learning import LABELS, batches, images, learn, made, weights
from small_runs import small_vit
from torch import nn
from torch.nn import functional

from training.methods import METHODS, Context, Method, MethodConfig, steps_a_batch

NAMES = tuple(METHODS.paths)
STILL = {"frozen", "ncm", "ranpac_frozen"}
ALIGNED = sorted({*NAMES} - STILL)
BY_DEFAULT = {"loda", "first_task"}  # take aligned steps unless told otherwise


@pytest.mark.parametrize("name", NAMES)
def test_between_tasks_the_model_is_the_original_architecture(name: str, model: nn.Module) -> None:
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    shapes = {n: w.shape for n, w in model.state_dict().items()}
    before = weights(model)
    method = made(name, model)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    for task in range(2):
        learn(method, model, task)
        assert [(n, type(m)) for n, m in model.named_modules()] == kinds
        assert {n: w.shape for n, w in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_only_the_target_layers_change(name: str, model: nn.Module) -> None:
    before = weights(model)
    target = {} if name in STILL else {"target": "blocks.1.attn.qkv"}
    method = made(name, model, **target)
    learn(method, model, 0)
    after = learn(method, model, 1)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == (set() if name in STILL else {"blocks.1.attn.qkv.weight"})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_model_is_trained_in_the_open(name: str, model: nn.Module) -> None:
    method = made(name, model)
    method.begin_task(batches(0))
    own = {id(p) for p in method.parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(".branches." in n for n in trained)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_carries_a_method_over(name: str, model: nn.Module) -> None:
    method = made(name, model)
    between = learn(method, model, 0)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    expected = learn(method, model, 1)

    other = small_vit()
    for weight in other.parameters():  # the state and the experiment decide
        nn.init.normal_(weight)
    taking_over = made(name, other)
    other.load_state_dict(between)
    taking_over.load_state_dict(state)
    assert all(torch.equal(w, between[n]) for n, w in other.state_dict().items())
    weights = learn(taking_over, other, 1)
    assert all(torch.equal(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ALIGNED)
def test_an_open_task_is_taken_over(name: str, model: nn.Module) -> None:
    method = made(name, model)
    closed = learn(method, model, 0)
    method.begin_task(batches(1))
    with torch.no_grad():
        for number, parameter in enumerate(method.parameters()):
            parameter.add_(0.1 * (number + 1))
    opened, state = weights(model), method.state_dict()
    other = small_vit()
    other.load_state_dict(closed)
    taking_over = made(name, other)
    taking_over.load_state_dict({key: value.clone() for key, value in state.items()})
    assert all(torch.equal(w, opened[n]) for n, w in other.state_dict().items())
    assert [p.requires_grad for p in taking_over.parameters()] == [True] * len(method.parameters())


@pytest.mark.parametrize("name", ALIGNED)
def test_steps_are_gradient_aligned_where_it_is_asked_for(name: str, model: nn.Module) -> None:
    state = weights(model)
    learned = []
    for options in ({}, {"gao": True, "radius": 0.5}, {"gao": False, "radius": 0.9}):
        model.load_state_dict(state)
        learned.append(learn(made(name, model, **options), model, 0, lr=0.02))
    default, aligned, plain = learned
    published = aligned if name in BY_DEFAULT else plain  # LoDA's own radius is another one
    assert all(torch.equal(default[k], published[k]) for k in plain) == (name not in BY_DEFAULT)
    assert any(not torch.equal(plain[k], aligned[k]) for k in plain)
    assert steps_a_batch(MethodConfig(name)) == (2 if name in BY_DEFAULT else 1)
    assert steps_a_batch(MethodConfig(name, {"gao": True, "radius": 0.0})) == 2
    assert steps_a_batch(MethodConfig(name, {"gao": False})) == 1


def test_a_method_without_tensors_takes_plain_steps(model: nn.Module) -> None:
    class Heads(Method):
        radius = 0.5

    method = Heads()
    method.start(model, Context(0, 1))
    method.begin_task([])
    head = torch.zeros(3, 16, requires_grad=True)
    optimizer = torch.optim.SGD([head], lr=1.0)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    step = method.step(
        lambda rows: functional.cross_entropy(model(images(0)[rows]) @ head.mT, LABELS[rows]),
        LABELS,
        optimizer,
        generator=generator,
        backward=torch.Tensor.backward,
    )
    assert float(step.loss) == pytest.approx(1.0986, abs=1e-3)
    assert head.abs().max() > 0
    assert torch.equal(generator.get_state(), before)
    assert method.end_task([]) is None
    assert method.state_dict() == {}
    method.load_state_dict({})


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("loda", {"rank": 0}, "rank"),
        ("loda", {"radius": -0.1}, "radius"),
        ("loda", {"gamma": -3.0}, "gamma"),
        ("loda", {"ridge": -0.1}, "ridge"),
        ("loda", {"general_weight": -0.1}, "general_weight"),
        ("loda", {"isolated_weight": float("inf")}, "isolated_weight"),
        ("loda", {"isolated": "trace_ratio", "energy_floor": 1.1}, "energy_floor"),
        ("loda", {"energy_floor": 0.5}, "energy_floor"),  # the rule of the theorem has no floor
        ("loda", {"joint": True, "recalibration": "none"}, "joint"),
        ("loda", {"history_decay": 1.01}, "history_decay"),
        ("loda", {"history_decay": float("nan")}, "history_decay"),
        ("loda", {"history_weight": -1.0}, "history_weight"),
        ("loda", {"history_weight": "sum"}, "history_weight"),
        ("loda", {"directions": "best"}, "directions"),
        ("loda", {"penalty": 1.0}, "gamma"),  # the message lists those that there are
        ("null_lora", {"isolated": "quotient"}, "isolated"),
        ("null_lora", {"gamma": 1.0}, "gamma"),
        ("seq_lora", {"rank": 0}, "rank"),
        ("seq_lora", {"parts": "q"}, "parts"),
        ("frozen", {"gao": True}, "gao"),
        ("ncm", {"rank": 4}, "rank"),
        ("o_lora", {"penalty": -1.0}, "penalty"),
        ("o_lora", {"alpha": 0.0}, "alpha"),
        ("o_lora", {"alpha": "big"}, "alpha"),
        ("o_lora", {"penalty": None}, "penalty"),
        ("o_lora", {"start": 1.0}, "start"),
        ("inflora", {"lamb": 0.9, "lame": 0.8}, "lame"),
        ("inflora", {"down_scale": 0.0}, "down_scale"),
        ("inflora", {"parts": "kq"}, "parts"),
        ("sd_lora", {"parts": "qqq"}, "parts"),
        ("sd_lora", {"start": float("inf")}, "start"),
        ("sd_lora", {"radius": float("nan")}, "radius"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        MethodConfig(name, options)
    assert name in str(caught.value) or "method." in str(caught.value)


def test_zeros_that_switch_something_off_are_options() -> None:
    zeros = dict.fromkeys(("radius", "gamma", "ridge", "general_weight", "isolated_weight"), 0.0)
    assert MethodConfig("loda", zeros).options.items() >= zeros.items()


def test_an_unknown_method_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="lora") as caught:
        MethodConfig("lora")
    assert all(re.search(rf"\b{name}\b", str(caught.value)) for name in NAMES)


@pytest.mark.parametrize("name", ALIGNED)
def test_options_that_do_not_suit_a_model_leave_it_alone(name: str, model: nn.Module) -> None:
    trained = [p.requires_grad for p in model.parameters()]
    for options in ({"rank": 17}, {"target": "*.none"}):
        with pytest.raises(ValueError, match=r"rank|\*\.none"):
            made(name, model, **options)
    assert [p.requires_grad for p in model.parameters()] == trained
