"""Read-outs: cosines, what is stored of them, and what is refused."""

import pytest
import torch
from made_up_features import gathered, made_up, seeded

from backends.torch.readouts import (
    AlignmentSettings,
    ClassStatistics,
    Readout,
    RidgeStatistics,
    align_heads,
    alignment,
    heads,
    load_readout,
    nearest_mean,
    ridge,
)


def test_nearest_mean_and_heads_are_cosines() -> None:
    x, y = made_up()
    statistics = gathered(x, y, torch.float64)
    x = x.double()
    expected = torch.nn.functional.cosine_similarity(x[:, None], statistics.mean[None], dim=-1)
    torch.testing.assert_close(nearest_mean(statistics).logits(x), expected)
    torch.testing.assert_close(heads(statistics.mean).logits(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stored_read_outs_give_the_same_logits_bit_for_bit(dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    x, y = made_up()
    statistics, sums = gathered(x, y), RidgeStatistics(x.shape[1], features=30)
    sums.add_task(x, y)
    readouts: list[Readout] = [
        heads(statistics.mean),
        nearest_mean(statistics),
        alignment(statistics, generator=seeded()),
        ridge(sums),
    ]
    for readout in readouts:
        file = tmp_path / f"{readout.kind}.safetensors"
        save_file(readout.tensors(), file)
        again = load_readout(readout.kind, load_file(file))
        assert again.kind == readout.kind
        features = x.to(dtype)
        assert torch.equal(again.logits(features), readout.logits(features))
        assert readout.logits(features).shape == (len(x), 6)


def test_read_out_errors() -> None:
    empty = ClassStatistics()
    with pytest.raises(ValueError, match="no class yet"):
        nearest_mean(empty)
    with pytest.raises(ValueError, match="no class yet"):
        ridge(RidgeStatistics(3, features=4))
    with pytest.raises(ValueError, match="no class yet"):
        alignment(empty, generator=seeded())
    with pytest.raises(ValueError, match="Unknown read-out 'svm'"):
        load_readout("svm", {})
    with pytest.raises(ValueError, match="is stored as"):
        load_readout("ridge", {"weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="NaN"):
        load_readout("heads", {"weight": torch.full((1, 2), float("nan"))})
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        heads(torch.eye(2)).logits(torch.ones(1, 3))
    with pytest.raises(ValueError, match="features hold NaN"):
        heads(torch.eye(2)).logits(torch.full((1, 2), float("nan")))
    statistics = gathered(*made_up())
    with pytest.raises(ValueError, match="give their weight"):
        align_heads(statistics, AlignmentSettings(epochs=5), generator=seeded())
    with pytest.raises(ValueError, match=r"\(6, 12\)"):
        align_heads(statistics, generator=seeded(), weight=torch.ones(2, 12))
