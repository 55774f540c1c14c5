"""The moment collector against recorded inputs, halves of the images against halves by hand."""

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from tiny_models import HostReads, inputs, mlp, never, padded_bert, vit
from torch import Tensor, nn
from torchvision.models import SwinTransformer
from torchvision.models import VisionTransformer as TorchvisionViT

from backends.torch import MomentCollector, adapt, collect_moments
from backends.torch.moments import HalvingCollector, collect_halves
from loda_math import second_moment
from loda_math.moments import GRAM_TOKENS

BROKEN = "it broke on purpose"
QKV = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def recorded_inputs(model: nn.Module, names: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
    """Rows that reach each layer in evaluation mode, float64."""
    seen: dict[str, Tensor] = {}
    layers = dict(model.named_modules())
    handles = [
        layers[n].register_forward_hook(
            lambda _, args, __, n=n: seen.update({n: args[0].detach().double().flatten(0, -2)})
        )
        for n in names
    ]
    mode = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(mode)
    for handle in handles:
        handle.remove()
    return seen


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@given(seed=seeds, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_moments_are_the_gram_matrices_of_the_inputs(seed: int, sizes: list[int]) -> None:
    model, x = vit(), images(sum(sizes), seed % 2**31)
    moments = collect_moments(model, list(x.split(sizes)))
    assert tuple(moments) == QKV
    for name, rows in recorded_inputs(model, QKV, x).items():
        assert moments[name].count == len(rows) == 5 * len(x)
        assert moments[name].total.dtype == torch.float64
        expected = rows.T @ rows
        assert float((moments[name].total - expected).norm() / expected.norm()) < 1e-6
        torch.testing.assert_close(moments[name].mean, expected / len(rows), rtol=1e-5, atol=1e-6)


def test_batches_may_be_tensors_tuples_dictionaries_or_what_forward_takes() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc(input=scale * x)  # type: ignore[no-any-return]

    model, x = Keywords(), torch.randn(4, 3)
    expected = (x.double().T @ x.double()).float()
    keywords = {"x": x, "scale": 1.0}
    mappings = (keywords, UserDict(keywords), OrderedDict(keywords), MappingProxyType(keywords))
    for batch in (x, (x, torch.zeros(4)), [x], *mappings, (UserDict(keywords), torch.zeros(4))):
        total = collect_moments(model, [batch], "fc")["fc"].total
        torch.testing.assert_close(total.float(), expected)
    twice = collect_moments(model, [x], "fc", forward=lambda m, b: m(b, 2.0))
    torch.testing.assert_close(twice["fc"].total.float(), 4 * expected)
    with pytest.raises(TypeError, match="forward="):
        collect_moments(model, ["text"], "fc")


def test_batches_of_transformers_are_mappings() -> None:
    transformers = pytest.importorskip("transformers")
    model, x = nn.Sequential(OrderedDict(fc=nn.Linear(3, 2))), torch.randn(4, 3)
    expected = collect_moments(model, [x], "fc")["fc"].total
    for kind in (transformers.BatchFeature, transformers.BatchEncoding):
        batch = kind({"input": x})
        assert torch.equal(collect_moments(model, [batch], "fc")["fc"].total, expected)


def test_a_single_token_without_a_batch_axis_counts_as_one() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.tensor([1.0, 2.0, 3.0])
    moments = collect_moments(model, [x, x], "0")["0"]
    assert moments.count == 2
    torch.testing.assert_close(moments.total, 2 * torch.outer(x, x).double())


def test_layer_called_twice_counts_both_times() -> None:
    shared = nn.Linear(2, 2)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(3, 2)
    moments = collect_moments(model, [x], "0")["0"]
    second = shared(x).tanh().detach().double()
    expected = x.double().T @ x.double() + second.T @ second
    assert moments.count == 6
    torch.testing.assert_close(moments.total, expected, rtol=1e-5, atol=1e-6)


def test_adapted_layers_count_under_their_original_names_and_see_the_branches() -> None:
    model, x = vit(), images(6)
    plain = collect_moments(model, [x])
    layers = adapt(model)
    zero = collect_moments(model, [x])
    for layer in layers.values():
        layer.add_branch("general", torch.randn(2, 12), up=torch.randn(36, 2))
    trained = collect_moments(model, [x])
    reached = recorded_inputs(model, QKV, x)
    assert tuple(zero) == tuple(trained) == QKV
    for name in QKV:
        assert torch.equal(zero[name].total, plain[name].total)
        rows = reached[name]
        torch.testing.assert_close(trained[name].total, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained[QKV[1]].total, plain[QKV[1]].total)


def test_the_pass_is_in_evaluation_mode_and_every_flag_comes_back() -> None:
    model, x = vit(proj_drop_rate=0.5).train(), images(4)
    model.blocks[0].eval()
    model.blocks[1].mlp.train()
    flags = {n: m.training for n, m in model.named_modules()}
    assert len(set(flags.values())) == 2
    first, second = collect_moments(model, [x]), collect_moments(model, [x])
    # Drop-out, were it on, would make two passes differ.
    assert all(torch.equal(first[n].total, second[n].total) for n in QKV)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert hooks(model) == 0
    assert all(not m.total.requires_grad for m in first.values())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_hooks_and_flags_come_back_after_an_exception(failure: type[BaseException]) -> None:
    def broken() -> Iterator[Tensor]:
        yield images(2)
        raise failure(BROKEN)

    model = vit().train()
    with pytest.raises(failure, match=BROKEN):
        collect_moments(model, broken())
    assert hooks(model) == 0
    assert all(m.training for m in model.modules())
    with pytest.raises(RuntimeError):
        collect_moments(model, [torch.zeros(1, 5, 8, 8)])  # the model itself fails
    assert hooks(model) == 0
    collector = MomentCollector(model)
    with collector:
        assert hooks(model) > 0
    with pytest.raises(failure, match=BROKEN), collector:
        raise failure(BROKEN)
    assert hooks(model) == 0
    model(images(1))
    assert collector.moments == {}


def test_collector_keeps_adding_while_open_and_allows_training() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 3, requires_grad=True)
    with MomentCollector(model, "*") as collector:
        model(x[:2]).sum().backward()
        model(x[2:]).sum().backward()
    assert x.grad is not None
    assert collector.moments["2"].count == 6
    expected = x.detach().double().T @ x.detach().double()
    torch.testing.assert_close(collector.moments["0"].total, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_does_not_reach_the_gram_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    rounded = x.bfloat16().double()
    model = nn.Sequential(nn.Identity(), nn.Linear(16, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = collect_moments(model, [x], "1")["1"].total
        half = collect_moments(model.bfloat16(), [x.bfloat16()], "1")["1"].total
    exact = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(auto, x.double().T @ x.double(), **exact)
    torch.testing.assert_close(half, rounded.T @ rounded, **exact)
    assert float((half - auto).abs().max()) > 1e-3  # a Gram matrix in half precision would show


def test_nothing_is_read_back_during_the_run() -> None:
    model, x = vit().eval(), images(4)
    with torch.no_grad(), HostReads() as plain:
        for _ in range(3):
            model(x)
    with torch.no_grad(), HostReads() as reads, MomentCollector(model) as collector:
        for _ in range(3):
            model(x)
    assert reads.seen == plain.seen == []
    with HostReads() as control:
        assert float(collector.moments[QKV[0]].total.trace()) > 0
    assert control.seen == ["_local_scalar_dense"]


def test_whole_pass_reads_a_fixed_number_of_values() -> None:
    model = vit()
    counts = []
    for batches in (1, 4):
        with HostReads() as reads:
            collect_moments(model, [images(2)] * batches)
        counts.append(reads.seen.count("_local_scalar_dense"))
    assert counts[0] == counts[1] <= len(QKV)


def test_no_batch_is_an_error() -> None:
    model = vit()
    used = iter([images(1)])
    list(used)
    for batches in ([], used):
        with pytest.raises(ValueError, match="no tokens"):
            collect_moments(model, batches)
    assert hooks(model) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_images_that_are_not_finite_are_an_error_that_names_the_layers(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.ones(4, 3)
    x[2, 1] = value
    with pytest.raises(ValueError, match=r"'0', '1'.*NaN"):
        collect_moments(model, [torch.ones(2, 3), x], "*")


def test_layer_that_is_never_called_is_an_error() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            # Reading a weight is no call: no hook sees what it is multiplied with.
            return self.used(x) @ self.spare.weight  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="spare"):
        collect_moments(Unused(), [torch.ones(1, 2)], "*")


def test_pattern_without_a_match_is_known_before_any_batch() -> None:
    with pytest.raises(ValueError, match="pattern"):
        collect_moments(vit(), never(), "*.attn.query")


# Halves of the images


class Layer(nn.Module):
    """Sends what the function makes of the images through one layer."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.before = nn.Linear(3, 3), before

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.before(x))
        return out


def assert_halves(halves: tuple[Tensor, Tensor], tokens: Callable[[slice], Tensor]) -> None:
    """Each is the mean moment of the tokens of every other image."""
    for half, images in zip(halves, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        rows = tokens(images).reshape(-1, half.shape[-1])
        torch.testing.assert_close(half, rows.mT @ rows / len(rows))


@pytest.mark.parametrize(("build", "target"), [(vit, QKV[1]), (mlp, "2")], ids=["vit", "mlp"])
@pytest.mark.parametrize("size", [24, 7, 1])
def test_halves_are_every_other_image_over_all_batches(
    build: Callable[[], nn.Module], target: str, size: int
) -> None:
    model = build().double()
    x = inputs(0, model)[0]
    moments, halves = collect_halves(model, x.split(size), target)
    plain = collect_moments(model, x.split(size), target)
    # The moment over all images is the one that decides: it must not change.
    assert torch.equal(moments[target].total, plain[target].total)
    assert moments[target].count == plain[target].count
    assert_halves(halves[target], lambda i: recorded_inputs(model, (target,), x[i])[target])


def test_halves_in_single_precision_are_as_exact_as_its_gram_matrices() -> None:
    model, x = vit(), images(24)
    halves = collect_halves(model, [x], QKV[0])[1][QKV[0]]
    for half, start in zip(halves, (0, 1), strict=True):
        tokens = recorded_inputs(model, QKV[:1], x[start::2])[QKV[0]]
        truth = tokens.mT @ tokens / len(tokens)
        assert float((half - truth).norm() / truth.norm()) < 1e-6
        assert torch.equal(half, half.mT)


def test_windows_of_an_image_stay_together() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 3, dtype=torch.float64)
    windows = Layer(lambda x: x.reshape(-1, 5, 3)).double()
    halves = collect_halves(windows, [x[:3], x[3:]], "layer")[1]["layer"]
    assert_halves(halves, lambda i: x[i])


def test_a_part_of_the_model_counts_images_by_its_own_input() -> None:
    model = mlp()
    x = inputs(0, model)[0]
    forward: Any = lambda model, batch: model[:3](batch)  # noqa: E731
    _, halves = collect_halves(model, x.split(6), "0", forward=forward)
    assert_halves(halves["0"], lambda i: x[i])


def test_a_layer_used_twice_sees_the_same_images_in_the_same_half() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(9, 3, dtype=torch.float64), nn.Linear(3, 3).double()
    model = nn.Sequential(layer, layer)
    halves = collect_halves(model, [x[:3], x[3:]], "0")[1]["0"]
    with torch.no_grad():
        assert_halves(halves, lambda i: torch.cat([x[i], layer(x[i])]))


def test_what_cannot_be_halved_is_left_out() -> None:
    model = vit()
    moments, halves = collect_halves(model, [images(1)])
    assert moments
    assert not halves
    tokens_first = Layer(lambda x: x.transpose(0, 1))
    moments, halves = collect_halves(tokens_first, [torch.randn(4, 5, 3)], "layer")
    assert moments["layer"].count == 20
    assert not halves
    with pytest.raises(ValueError, match="no tokens"):
        collect_halves(model, [])
    assert hooks(model) == 0


def test_the_collector_needs_no_loop_of_ours() -> None:
    model, x = vit().eval(), images(10).split(4)
    with torch.no_grad(), HalvingCollector(model) as collector:
        for batch in x:
            model(batch)
    expected, halves = collect_halves(model, x)[1], collector.halves()
    assert list(halves) == list(expected)
    assert all(
        torch.equal(a, b) for n in halves for a, b in zip(halves[n], expected[n], strict=True)
    )


# Models that read weights instead of calling layers


def attention_inputs(model: nn.Module, kind: str, x: Tensor) -> dict[str, Tensor]:
    """What the attentions of a model are called on, by their name."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, []).append(
                args[0] if args else kwargs["query"]
            ),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if type(module).__name__ == kind
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).flatten(0, -2) for name, parts in seen.items()}


EYE: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2),
    "window_size": 4, "num_classes": 3,
}  # fmt: skip
READERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "BEiT": (lambda: Beit(**EYE, qkv_bias=True), "Attention", "qkv"),
    "EVA-02": (lambda: Eva(**EYE, qkv_fused=True), "EvaAttention", "qkv"),
    "Swin V2": (lambda: SwinTransformerV2(**WINDOWS), "WindowAttention", "qkv"),
    "torchvision Swin": (
        lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=3),
        "ShiftedWindowAttention",
        "qkv",
    ),
    "torchvision ViT": (
        lambda: TorchvisionViT(16, 4, 2, 2, 12, 24, num_classes=3),
        "MultiheadAttention",
        "in_proj",
    ),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("state", ["plain", "adapted", "merged"])
def test_moments_of_weights_that_are_read_are_those_of_what_they_are_applied_to(
    kind: str, state: str
) -> None:
    build, attention, layer = READERS[kind]
    torch.manual_seed(0)
    model = build().double().eval()
    size = 32 if "Swin" in kind else 16
    x = torch.randn(6, 3, size, size, dtype=torch.float64)
    target = f"*.{layer}"
    if state != "plain":
        for adapted in adapt(model, target).values():
            adapted.add_branch("a", torch.randn(2, adapted.in_features))
            torch.nn.init.normal_(adapted.branch("a").up, std=0.1)
            if state == "merged":
                adapted.merge()
    expected = attention_inputs(model, attention, x)
    moments, halves = collect_halves(model, x.split(4), target)
    assert set(moments) == {f"{name}.{layer}" for name in expected}
    for name, tokens in expected.items():
        moment = moments[f"{name}.{layer}"]
        assert moment.count == len(tokens)
        torch.testing.assert_close(moment.total, tokens.mT @ tokens, rtol=1e-7, atol=1e-7)
        # Every other image, in windows or whole.
        by_image = tokens.reshape(len(x), -1, tokens.shape[-1])
        assert_halves(halves[f"{name}.{layer}"], lambda i, by_image=by_image: by_image[i])


def attended(attention: nn.MultiheadAttention, x: Tensor, memory: Tensor) -> Tensor:
    """What goes into the output projection, step by step."""
    size = attention.embed_dim
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    projected = [
        F.linear(y, weight[i * size : (i + 1) * size], bias[i * size : (i + 1) * size])
        for i, y in enumerate((x, memory, memory))
    ]
    q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in projected)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_moments_of_an_attention_are_of_its_four_inputs(
    cross: bool, need_weights: bool, batch_first: bool
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            y, memory = (z if batch_first else z.transpose(0, 1) for z in (x, remembered(x)))
            memory = memory if cross else y
            out: Tensor = self.attention(y, memory, memory, need_weights=need_weights)[0]
            return out

    def remembered(x: Tensor) -> Tensor:
        return x[:, :3].tanh()

    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(6, 5, 8, dtype=torch.float64)
    memory = remembered(x) if cross else x
    out = attended(model.attention, x, memory).detach()
    parts = dict(zip("qkv", (x, memory, memory), strict=True))
    inputs = {f"attention.in_proj.{part}": y for part, y in parts.items()}
    inputs["attention.out_proj"] = out
    moments, halves = collect_halves(model, x.split(4), list(inputs))
    for name, y in inputs.items():
        tokens = y.flatten(0, -2)
        torch.testing.assert_close(moments[name].total, tokens.mT @ tokens, rtol=1e-9, atol=1e-9)
        assert_halves(halves[name], lambda i, y=y: y[i])
    if cross:
        with pytest.raises(ValueError, match=r"in_proj\.q"):
            collect_moments(model, [x], "in_proj")
    else:
        torch.testing.assert_close(
            collect_moments(model, [x], "in_proj")["attention.in_proj"].mean,
            moments["attention.in_proj.q"].mean,
        )


def test_a_layer_that_is_called_and_read_counts_each_use_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.linear(input=self.layer(x), weight=self.layer.weight)
            return y

    model, x = Both().double(), torch.randn(5, 3, dtype=torch.float64)
    rows = torch.cat([x, model.layer(x)]).detach()
    for adapted in (False, True):
        if adapted:
            layer = adapt(model, "layer")["layer"]
            layer.add_branch("a", torch.randn(1, 3))
        moment = collect_moments(model, [x], "layer")["layer"]
        assert moment.count == 10
        torch.testing.assert_close(moment.total, rows.mT @ rows)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (4, 5, 6)])
def test_points_of_a_convolution_are_its_tokens(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 3, 1, stride=2)).double(), torch.randn(shape).double()
    rows = x[..., ::2, ::2].movedim(-3, -1).reshape(-1, 4)
    moment = collect_moments(model, [x], "0")["0"]
    assert moment.count == len(rows)
    torch.testing.assert_close(moment.total, rows.mT @ rows)


def test_a_layer_that_fails_does_not_hide_later_reads() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with MomentCollector(model, "0") as collector:
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 4))
        collector.moments.clear()
        F.linear(torch.ones(2, 3), model[0].weight)
    assert collector.moments["0"].count == 2


def test_compiled_models_are_seen_after_a_pass_without_hooks() -> None:
    """A compiled model does not look for hooks that are added later."""
    x = torch.randn(6, 4)
    for compile_it in (torch.compile, lambda model, **options: model.compile(**options) or model):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
        expected = collect_moments(model, [x], "2")["2"]
        compiled = compile_it(model, backend="eager")
        with torch.no_grad():
            compiled(x)
            seen = collect_moments(compiled, [x], "*2")
            compiled(x)
        assert torch.equal(next(iter(seen.values())).total, expected.total)


# Tokens that are left out


BERT = ("*.attention.self.query", "*.output.dense", "pooler.dense")


def test_masked_moments_are_those_of_the_real_tokens() -> None:
    model, batches, sequences = padded_bert()
    masked = collect_moments(model, batches, BERT, mask="attention_mask")
    padded = collect_moments(model, batches, BERT)
    tokens = sum(x.shape[1] for x in sequences)
    assert len(masked) == 7
    for name, found in masked.items():
        rows = [recorded_inputs(model, (name,), x)[name] for x in sequences]
        truth = sum((x.mT @ x for x in rows), torch.zeros(()))
        # One token a sequence enters the pooler.
        assert found.count == (len(sequences) if name == "pooler.dense" else tokens)
        assert float((found.total - truth).norm() / truth.norm()) < 1e-5
        if name != "pooler.dense":
            wrong = padded[name].mean - found.mean
            assert float(wrong.norm() / found.mean.norm()) > 0.05  # padding would show


@pytest.mark.parametrize("wrapped", [False, True], ids=["mapping", "pair"])
def test_masks_by_key_by_function_and_by_layer_agree(wrapped: bool) -> None:
    model, batches, _ = padded_bert()
    target = "*.attention.self.query"
    given: list[Any] = [(batch, torch.zeros(4)) for batch in batches] if wrapped else batches
    by_key = collect_moments(model, given, target, mask="attention_mask")
    keywords: Callable[[Any], Any] = lambda batch: batch[0] if wrapped else batch  # noqa: E731
    padding: Callable[[Any], Tensor] = lambda b: keywords(b)["attention_mask"] == 1  # noqa: E731
    first = "encoder.layer.0.*"
    by_layer = collect_moments(model, given, target, mask={first: "attention_mask"})
    by_function = collect_moments(model, given, target, mask=padding)
    everything = collect_moments(model, given, target)
    names = list(by_key)
    assert all(torch.equal(by_key[n].total, by_function[n].total) for n in names)
    assert torch.equal(by_layer[names[0]].total, by_key[names[0]].total)
    assert torch.equal(by_layer[names[1]].total, everything[names[1]].total)


def test_halves_leave_the_same_tokens_out() -> None:
    model, batches, sequences = padded_bert()
    names = ("encoder.layer.1.attention.self.query", "pooler.dense")
    moments, halves = collect_halves(model, batches, names, mask="attention_mask")
    plain = collect_moments(model, batches, names, mask="attention_mask")
    for name in names:
        assert torch.equal(moments[name].total, plain[name].total)
        for half, start in zip(halves[name], (0, 1), strict=True):
            rows = [recorded_inputs(model, (name,), x)[name] for x in sequences[start::2]]
            tokens = torch.cat(rows)
            truth = tokens.mT @ tokens / len(tokens)
            assert float((half - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize(
    ("before", "mask", "rows"),
    [
        (lambda x: x, (4, 6), lambda x, m: x[m]),
        (lambda x: x.reshape(24, 3), (4, 6), lambda x, m: x[m]),
        (lambda x: x.reshape(4, 2, 3, 3), (4, 6), lambda x, m: x[m]),
        (lambda x: x, (4, 2, 3), lambda x, m: x[m.reshape(4, 6)]),
        (lambda x: x, (4,), lambda x, m: x[m]),
        (lambda x: torch.stack([x, 2 * x], 2), (4, 6), lambda x, m: torch.stack([x, 2 * x], 2)[m]),
        (lambda x: x[:, 0], (4, 6), lambda x, m: x[m.any(1), 0]),
    ],
    ids=["plain", "flat", "grid", "grid mask", "whole sequences", "heads", "class token"],
)
def test_a_mask_fits_inputs_of_several_shapes(
    before: Callable[[Tensor], Tensor], mask: tuple[int, ...], rows: Any
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    counts = torch.rand(mask) < 0.5
    counts[1] = False  # a sequence that is all padding
    counts[2] = True
    model = Layer(before).double()
    found = collect_moments(model, [x], "layer", mask=lambda _: counts)["layer"]
    tokens = rows(x, counts).reshape(-1, 3)
    assert found.count == len(tokens) > 0
    torch.testing.assert_close(found.total, tokens.mT @ tokens)


@pytest.mark.parametrize(
    "before",
    [
        lambda x: x[:, :5],
        lambda x: x.transpose(0, 1),
        lambda x: x.reshape(8, 3, 3),
        lambda x: torch.cat([x, x[:, :1]], 1),
        lambda x: x[0, 0],
        lambda x: x[:3, 0],
    ],
    ids=["a part", "tokens first", "windows", "class token added", "one token", "sequences gone"],
)
def test_inputs_that_do_not_fit_a_mask_are_refused_by_the_name_of_the_layer(before: Any) -> None:
    model, x = Layer(before), torch.randn(4, 6, 3)
    with pytest.raises(ValueError, match="'layer'") as error:
        collect_moments(model, [x], "layer", mask=lambda _: torch.ones(4, 6).bool())
    assert "\n" not in str(error.value)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("mask", "error", "word"),
    [
        ("padding", ValueError, "attention_mask"),
        (lambda b: b["attention_mask"].float(), TypeError, "float32"),
        (lambda b: b["attention_mask"].tolist(), TypeError, "list"),
        (lambda b: b["attention_mask"].sum(), ValueError, "single"),
        (lambda b: b["attention_mask"] * 0, ValueError, "other way"),
        ({"decoder.*": "attention_mask"}, ValueError, "decoder"),
    ],
    ids=["unknown key", "float", "list", "number", "nothing counts", "no such layer"],
)
def test_masks_that_cannot_be_meant_are_refused(mask: Any, error: Any, word: str) -> None:
    model, batches, _ = padded_bert()
    with pytest.raises(error, match=word):
        collect_moments(model, batches, "*.attention.self.query", mask=mask)


def test_what_is_left_out_may_be_anything() -> None:
    x, real = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[real == 0] = float("nan")
    model = nn.Sequential(nn.Linear(4, 2))
    found = collect_moments(model, [(x, real)], "0", mask=lambda batch: batch[1])["0"]
    assert found.count == 3
    assert bool(found.total.isfinite().all())


def test_a_mask_is_read_once_a_batch_and_not_once_a_layer() -> None:
    model, batches, _ = padded_bert()
    with HostReads() as reads:
        collect_moments(model, batches, "*.output.dense", mask="attention_mask")
    assert reads.seen.count("nonzero") == len(batches)


# Sums in place


def test_moments_that_were_read_do_not_change_later() -> None:
    model, x = nn.Sequential(nn.Linear(5, 2)), torch.randn(2, 7, 5)
    with MomentCollector(model, "0") as collector:
        model(x[0])
        first = collector.moments["0"]
        before = first.total.clone()
        model(x[1])
        both = collector.moments["0"]
    assert (first.count, both.count) == (7, 14)
    assert torch.equal(first.total, before)
    assert torch.equal(both.total, both.total.mT)
    rows = x.reshape(-1, 5).double()
    torch.testing.assert_close(both.total, rows.mT @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_of_inference_mode_are_the_same(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(5, 2)).to(dtype), torch.randn(9, 5).to(dtype)

    @torch.inference_mode()
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)
        return out

    plain = collect_moments(model, [x, x], "0")["0"]
    found = collect_moments(model, [x, x], "0", forward=forward)["0"]
    assert torch.equal(found.total, plain.total)
    assert not found.total.is_inference()
    assert found.unit == plain.unit == torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def test_long_inputs_are_summed_in_pieces() -> None:
    x = 1 + torch.rand(100_000, 3)
    found = collect_moments(nn.Sequential(nn.Linear(3, 1)), [x], "0")["0"].total.diag()
    parts = sum(second_moment(p, check=False).total.diag() for p in x.split(GRAM_TOKENS))
    whole = (x.mT @ x).diag().double()
    torch.testing.assert_close(found, parts, rtol=1e-8, atol=0)
    assert not torch.allclose(found, whole, rtol=1e-8, atol=0)
