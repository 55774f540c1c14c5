"""What works on models of timm, torchvision and transformers; prints the table of models.md.

    python docs/model_matrix.py

The models are small and have random weights; nothing is downloaded.
"""

# ruff: noqa: T201
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings

IMAGES, TOKENS = (16, 3, 32, 32), (16, 12)
Batch = Tensor | dict[str, Tensor]


class Case(NamedTuple):
    """A model, what is adapted of it and what it is run on."""

    build: Callable[[], nn.Module]
    target: str
    batch: Callable[[], Batch]


class Row(NamedTuple):
    """What was seen of a model."""

    model: str
    target: str
    layers: int
    adapted_is_merged: bool
    restored: bool
    resumed: bool


def images(size: int = 32) -> Batch:
    """Images of random pixels."""
    return torch.randn(IMAGES[0], 3, size, size)


def text(*, padded: bool) -> Batch:
    """Random tokens, the second half of every other text being padding."""
    ids = torch.randint(1, 40, TOKENS)
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones(TOKENS, dtype=torch.long)
    mask[::2, TOKENS[1] // 2 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


NEXT: dict[str, Any] = {"depths": (1,) * 4, "dims": (8, 8, 12, 12), "num_classes": 5}
SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2),
    "window_size": 4, "num_classes": 5,
}  # fmt: skip
HUGGING: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
EYES: dict[str, Any] = {"image_size": 32, "patch_size": 8}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


def _swin() -> nn.Module:
    small = {"depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4], "num_classes": 5}
    return torchvision.models.SwinTransformer(patch_size=[2, 2], embed_dim=12, **small)


def _vit() -> nn.Module:
    small = {"num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48, "num_classes": 5}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, **small)


def _gpt2() -> nn.Module:
    small = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **ends))


def _hugging(name: str, **options: Any) -> Callable[[], nn.Module]:
    model, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    return lambda: model(config(**HUGGING, **options))


CASES: dict[str, Case] = {
    "timm ViT": Case(_timm("vit_tiny_patch16_224", **SMALL), "timm", images),
    "timm DeiT (distilled)": Case(
        _timm("deit_tiny_distilled_patch16_224", **SMALL), "timm", images
    ),
    "timm BEiT": Case(_timm("beit_base_patch16_224", **SMALL), "timm", images),
    "timm EVA-02": Case(_timm("eva02_tiny_patch14_224", **SMALL, qkv_fused=True), "timm", images),
    "timm Swin": Case(_timm("swin_tiny_patch4_window7_224", **SWIN), "timm", images),
    "timm Swin V2": Case(_timm("swinv2_tiny_window8_256", **SWIN), "timm", images),
    "timm ConvNeXt": Case(_timm("convnext_atto", **NEXT), "*.mlp.fc1", images),
    "timm ConvNeXt, convolutions": Case(
        _timm("convnext_atto", **NEXT, conv_mlp=True), "*.mlp.fc1", images
    ),
    "torchvision ViT": Case(_vit, "torchvision-vit", images),
    "torchvision ViT, all": Case(_vit, "all-linear", images),
    "torchvision Swin": Case(_swin, "torchvision-swin", images),
    "transformers ViT": Case(_hugging("ViT", **EYES), "transformers-vit", images),
    "transformers DINOv2": Case(_hugging("Dinov2", **EYES), "transformers-dinov2", images),
    "transformers CLIP (vision)": Case(_hugging("CLIPVision", **EYES), "transformers-clip", images),
    "transformers SigLIP (vision)": Case(
        _hugging("SiglipVision", **EYES), "transformers-siglip", images
    ),
    "transformers BERT, padded": Case(
        _hugging("Bert", vocab_size=40), "transformers-bert", lambda: text(padded=True)
    ),
    "transformers GPT-2": Case(_gpt2, "transformers-gpt2", lambda: text(padded=False)),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the hints of transformers about made-up configurations."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """One row of numbers for every element of a batch."""
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    if not isinstance(out, Tensor):  # of transformers: the first tensor, logits or hidden states
        out = out[0]
    return out if out.ndim == 2 else out.mean(dim=1)


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some elements of a batch."""
    return {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else batch[rows]


def learn(loda: LoDA, batch: Batch) -> None:
    """Open a task and train it a little."""
    labels = torch.arange(IMAGES[0]) % 3
    loda.begin_task([batch])
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.5)

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs(loda.model, rows_of(batch, rows)), labels[rows])

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        loda.step(loss, labels, optimizer, radius=0.1, generator=generator)


def structure(model: nn.Module) -> list[Any]:
    """Names, identities and flags of everything in a model."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return [*modules, *parameters, *model.state_dict()]


def seen(name: str) -> Row:
    """Two tasks with a model of the table."""
    case = CASES[name]

    def fresh() -> LoDA:
        with quiet():
            model = case.build().eval()
        for name, parameter in model.named_parameters():
            # Layers start switched off, or as good as: what changes in a block would not show.
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif not name.endswith("bias"):
                nn.init.ones_(parameter)
        model.requires_grad_(False)
        next(model.parameters()).requires_grad_(True)
        return LoDA(model, LoDASettings(target=case.target, rank=3, recalibration="none"))

    torch.manual_seed(0)
    loda = fresh()
    model, batch, second = loda.model, case.batch(), case.batch()
    before = structure(model)
    learn(loda, batch)
    loda.end_task([batch])
    between = structure(model)
    with torch.no_grad():
        untrained = outputs(model, second)
    learn(loda, second)
    layers = len(loda.layers)
    with torch.no_grad():
        adapted = outputs(model, second)
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        twin = fresh()
        twin.load_state_dict({k: v.clone() for k, v in loda.state_dict().items()})
        twin.model.load_state_dict(saved)
        resumed = torch.equal(outputs(twin.model, second), adapted)
        loda.end_task([second])
        twin.end_task([second])
        merged = outputs(model, second)
        resumed = resumed and torch.equal(outputs(twin.model, second), merged)
    size = float(adapted.abs().max())
    learned = float((adapted - untrained).abs().max()) > 1e-3 * size
    error = float((adapted - merged).abs().max()) / size
    restored = before == between == structure(model)
    return Row(name, case.target, layers, learned and error <= 1e-5, restored, resumed)


def table() -> str:
    """The table as Markdown."""
    head = ("model", "target", "layers", "adapted = merged", "restored", "resumed in mid-task")
    lines = [head, ("---",) * len(head)]
    for name in CASES:
        row = seen(name)
        flags = ("yes" if flag else "**no**" for flag in row[3:])
        lines.append((row.model, f"`{row.target}`", str(row.layers), *flags))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
