"""What the baselines share: which rows of a fused layer are adapted."""

import pytest
from small_runs import small_vit

from training.methods import Context, MethodConfig
from training.methods.branches import Parts, output_rows


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ("all", {"all": None}),
        ("q", {"q": (0, 2)}),
        ("k", {"k": (2, 4)}),
        ("v", {"v": (4, 6)}),
        ("qk", {"qk": (0, 4)}),
        ("kv", {"kv": (2, 6)}),
        ("qv", {"q": (0, 2), "v": (4, 6)}),
    ],
)
def test_neighbouring_parts_share_a_branch(parts: Parts, rows: dict[str, object]) -> None:
    assert output_rows(6, parts) == rows


def test_parts_of_a_layer_that_is_not_fused_are_refused() -> None:
    with pytest.raises(ValueError, match="qkv"):
        output_rows(16, "kv")
    method = MethodConfig("inflora", {"parts": "kv", "rank": 2, "target": "*.attn.proj"}).build()
    with pytest.raises(ValueError, match="qkv"):
        method.start(small_vit(), Context(0, 1))
