"""Linear maps of all kinds: which modules are, who holds their weights, adapted and restored."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from backends.torch import (
    InProjection,
    LoDA,
    LoRALinear,
    adapt,
    attach,
    find_layers,
    plain_state,
    restore,
    untie,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branched(layers: dict[str, LoRALinear]) -> None:
    """A branch with something in it in every layer."""
    for seed, layer in enumerate(layers.values()):
        up = random(layer.out_features, 2, seed=seed) / 4
        layer.add_branch("general", random(2, layer.in_features, seed=seed + 9), up=up)


# Weights that several modules hold


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def same_parameter() -> nn.Module:
    model = pair()
    model[2].weight = model[0].weight
    return model


def same_data() -> nn.Module:
    model = pair()
    model[2].weight = nn.Parameter(model[0].weight.data)
    return model


def transposed() -> nn.Module:
    model = pair()
    model[2].weight = nn.Parameter(model[0].weight.data.mT)
    return model


def overlapping_slices() -> nn.Module:
    model, rows = pair(), torch.randn(6, 4)
    model[0].weight, model[2].weight = nn.Parameter(rows[:4]), nn.Parameter(rows[2:])
    return model


def bytes_of_another_type() -> nn.Module:
    model = pair()
    model.register_buffer("bits", model[0].weight.data.view(torch.int16))
    return model


def buffer() -> nn.Module:
    model = pair()
    model.register_buffer("copy", model[0].weight.data)
    return model


def second_name() -> nn.Module:
    model = pair()
    model[0].register_parameter("alias", model[0].weight)
    return model


def embedding() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    model[1].weight = model[0].weight
    return model


SHARED = {
    same_parameter: "2.weight",
    same_data: "2.weight",
    transposed: "2.weight",
    overlapping_slices: "2.weight",
    bytes_of_another_type: "bits",
    buffer: "copy",
    second_name: "0.alias",
    embedding: "1.weight",
}


@pytest.mark.parametrize(
    ("build", "other"), SHARED.items(), ids=lambda x: getattr(x, "__name__", x)
)
def test_shared_weight_is_refused_under_the_names_of_all_owners(
    build: Callable[[], nn.Module], other: str
) -> None:
    model = build()
    flags = [p.requires_grad for p in model.parameters()]
    modules = list(model.modules())
    for refused in (lambda: adapt(model, "0"), lambda: LoDA(model, target="0", rank=2)):
        with pytest.raises(ValueError, match=rf"got 0 with {other};.*untie"):
            refused()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("build", SHARED, ids=lambda x: x.__name__)
def test_untied_weight_is_merged_without_the_others(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    loda = LoDA(model, target="0", rank=2, untie=True, forward=lambda model, x: model[0](x))
    x = random(16, 4)
    for _ in range(2):
        loda.begin_task([x])
        for layer in loda.layers.values():
            for name in layer.branches:
                nn.init.normal_(layer.branch(name).up)
        loda.end_task([x])
    after = model.state_dict()
    assert list(after) == list(before)
    assert {k for k in before if not torch.equal(after[k], before[k])} == {"0.weight"}
    assert {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)} == flags


def test_both_of_two_tied_targets_get_a_weight_of_their_own() -> None:
    model = same_parameter()
    with pytest.raises(ValueError, match=r"0 with 2\.weight; 2 with 0\.weight"):
        adapt(model, ["0", "2"])
    untie(model, find_layers(model, ["0", "2"]))
    layers = adapt(model, ["0", "2"])
    branched(layers)
    x = random(5, 4)
    adapted = model(x)
    for layer in layers.values():
        layer.merge()
    torch.testing.assert_close(model(x), adapted)


def flat_vector() -> nn.Module:
    model = pair()
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    return model


def halves_of_the_columns() -> nn.Module:
    model, columns = pair(), torch.randn(4, 8)
    model[0].weight, model[2].weight = nn.Parameter(columns[:, :4]), nn.Parameter(columns[:, 4:])
    return model


def one_module_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize("build", [flat_vector, halves_of_the_columns, one_module_twice])
def test_neighbours_in_memory_are_not_owners(build: Callable[[], nn.Module]) -> None:
    model, x = build(), random(5, 4)
    same = ("0.weight", "2.weight") if build is one_module_twice else ("0.weight",)
    rest = {k: v.clone() for k, v in model.state_dict().items() if k not in same}
    layers = adapt(model, "0")
    branched(layers)
    adapted = model(x)
    layers["0"].merge()
    restore(model, layers)
    torch.testing.assert_close(model(x), adapted)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in rest.items())


# Weights that cannot be added to


class Wrapped(Tensor):
    """What quantised and sharded weights are: a tensor that is more than its numbers."""


def with_weight(weight: Tensor) -> nn.Module:
    model = pair()
    model[2]._parameters["weight"] = nn.Parameter(weight, weight.is_floating_point())
    return model


class Cosine(nn.Linear):
    """The cosines of its inputs with its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "int8": (lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8)), "quanti"),
    "4 bits": (lambda: with_weight(torch.zeros(8, 1, dtype=torch.uint8)), "quanti"),
    "float8": (lambda: with_weight(torch.zeros(4, 4).to(torch.float8_e4m3fn)), "quanti"),
    "subclass": (lambda: with_weight(torch.zeros(4, 4).as_subclass(Wrapped)), "Wrapped"),
    "no values": (lambda: with_weight(torch.zeros(4, 4, device="meta")), "load"),
    "not linear": (lambda: nn.Sequential(*pair()[:2], Cosine(4, 4)), "Cosine"),
    "lazy": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LazyLinear(4)), "batch"),
    "parametrised": (
        lambda: nn.Sequential(*pair()[:2], nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        "parametris",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weight_that_cannot_be_added_to_is_refused_in_one_line_with_the_layer(kind: str) -> None:
    build, cure = UNFIT[kind]
    model = build()
    flags = [p.requires_grad for p in model.parameters()]
    for refused in (lambda: adapt(model, "*"), lambda: LoDA(model, target="*", rank=2)):
        with pytest.raises(TypeError, match=f"^layer '2' .*{cure}[^\n]*$"):
            refused()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert list(find_layers(model, "*", exclude="2")) == ["0"]


# The packed projection of an attention


class Block(nn.Module):
    """Self-attention as torchvision has it, or attention to a memory of its own."""

    def __init__(self, *, cross: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.memory = nn.Parameter(torch.randn(1, 3, 8)) if cross else None

    def forward(self, x: Tensor) -> Tensor:
        memory = x if self.memory is None else self.memory.expand(len(x), -1, -1)
        y: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return y


PARTS = ["attention.in_proj.q", "attention.in_proj.k", "attention.in_proj.v"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    "target", ["attention.in_proj", PARTS, PARTS[1:2], ["in_proj", "out_proj"], "out_proj"], ids=str
)
def test_attention_is_that_of_the_dense_weights_adapted_merged_and_restored(
    target: Any, cross: bool, bias: bool
) -> None:
    model, x = Block(cross=cross, bias=bias), random(4, 5, 8)
    plain = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kind, parameters = type(model.attention), list(model.parameters())
    layers = adapt(model, target)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    torch.testing.assert_close(model(x), plain)
    branched(layers)

    dense = copy.deepcopy(model)
    rows = {"in_proj": (0, 24), "q": (0, 8), "k": (8, 16), "v": (16, 24)}
    for name, layer in layers.items():
        end = name.rpartition(".")[2]
        first, last = rows.get(end, (0, 8))
        own = state[
            "attention.out_proj.weight" if end == "out_proj" else "attention.in_proj_weight"
        ]
        branch = layer.branch("general")
        own[first:last] += (branch.up @ branch.down).detach()
    dense = Block(cross=cross, bias=bias)
    dense.load_state_dict(state)
    expected = dense(x)
    assert not torch.allclose(plain, expected, atol=1e-2)
    for training in (True, False):  # in evaluation the fused attention reads the weights
        model.train(training)
        torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    for layer in layers.values():
        layer.merge()
    torch.testing.assert_close(model(x), expected)
    restore(model, layers)
    restore(model, layers)
    torch.testing.assert_close(model(x), expected)
    assert type(model.attention) is kind
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for layer in layers.values():
        layer.unmerge()
    torch.testing.assert_close(model(x), plain)
    attach(model, layers)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("target", ["in_proj", "in_proj.v"])
def test_gradients_of_a_packed_projection_are_those_of_the_dense_weights(target: str) -> None:
    model, x = Block().double(), random(4, 5, 8).double()
    layers = adapt(model, target)
    branched(layers)
    branch = next(iter(layers.values())).branch("general")
    model(x).square().sum().backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in learned if "in_proj" in n} == {f"attention.{target}.branches.general.up"}

    up = branch.up.detach().clone().requires_grad_()
    first = 0 if target == "in_proj" else 16
    update = F.pad(up @ branch.down, (0, 0, first, 24 - first - len(up)))
    weight = model.attention._parameters["in_proj_weight"] + update
    names = dict(model.attention.named_parameters())
    out = F.multi_head_attention_forward(
        *(3 * [x.transpose(0, 1)]), 8, 2, weight, names["in_proj_bias"], None, None, False, 0.0,
        names["out_proj.weight"], names["out_proj.bias"],
    )[0]  # fmt: skip
    out.square().sum().backward()
    torch.testing.assert_close(branch.up.grad, up.grad)


def test_whole_projection_and_parts_cannot_both_be_named() -> None:
    model = Block()
    assert list(find_layers(model, "*")) == ["attention.in_proj", "attention.out_proj"]
    assert list(find_layers(model, "*.in_proj.[qv]")) == [PARTS[0], PARTS[2]]
    with pytest.raises(ValueError, match="parts"):
        find_layers(model, ["*.in_proj", "*.in_proj.q"])
    assert list(find_layers(model, "*", exclude="in_proj")) == ["attention.out_proj"]


def test_attention_with_three_weights_offers_its_output_alone() -> None:
    model = Block(kdim=8, vdim=6)
    assert list(find_layers(model, "*")) == ["attention.out_proj"]


def test_an_adapted_attention_goes_through_a_file() -> None:
    model, x = Block(), random(4, 5, 8)
    branched(adapt(model, "in_proj"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    plain = plain_state(model)
    assert list(plain) == list(Block().state_dict())


def test_projection_has_the_parameters_of_its_attention() -> None:
    attention = nn.MultiheadAttention(4, 2)
    part = InProjection(attention, "k")
    assert list(part.state_dict()) == []
    assert [p is q for p, q in zip(part.parameters(), attention.parameters(), strict=False)]
    torch.testing.assert_close(part.weight, attention.in_proj_weight[4:8])
    part.requires_grad_(False)
    assert not attention.in_proj_weight.requires_grad
    assert not attention.in_proj_bias.requires_grad


def test_layers_between_attentions_are_merged_through_a_whole_encoder() -> None:
    """The fused path of ``nn.TransformerEncoder`` reads every weight itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), random(3, 5, 8)
    layers = adapt(model, "all-linear")
    assert len(layers) == 8
    branched(layers)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)
        for layer in layers.values():
            layer.merge()
        restore(model, layers)
        torch.testing.assert_close(model(x), trained)


# Transposed layers and convolutions


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


MAPS = {
    "Conv1D": (lambda: Conv1D(6, 4), (3, 5, 4)),
    "square Conv1D": (lambda: Conv1D(4, 4), (3, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 1), (3, 4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 5, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 1, padding="same"), (2, 4, 3, 2, 3)),
    "strided": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 3), bias=False), (3, 4, 5, 7)),
    "no batch": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 6)),
    "channels last": (
        lambda: nn.Conv2d(4, 6, 1).to(memory_format=torch.channels_last), (3, 4, 5, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAPS)
def test_other_maps_agree_with_their_dense_weight_adapted_and_merged(kind: str) -> None:
    build, shape = MAPS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(build()), random(*shape)
    plain, weight = model(x), model[0].weight.detach().clone()
    layers = adapt(model, "0")
    branched(layers)
    layer = layers["0"]
    branch = layer.branch("general")
    update = (branch.up @ branch.down).detach()
    whole = weight + (update.mT if kind.endswith("Conv1D") else update.reshape(weight.shape))
    torch.testing.assert_close(layer.weight, whole)
    twin = copy.deepcopy(layer.base)
    twin.weight.copy_(whole)
    expected = twin(x)
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    restore(model, layers)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(model[0].weight, weight)
    assert model[0].weight.stride() == weight.stride()


def test_convolutions_that_mix_points_or_groups_are_no_linear_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1),
        nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4),
    )  # fmt: skip
    assert list(find_layers(model, "*")) == ["4", "5"]
    assert list(find_layers(model, "all-linear")) == ["5"]
