"""The solves of a task give every layer what it would get alone, in one call or in many."""

import pytest
import torch
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings, random_bases
from backends.torch.solve import _calls, solve_bases, solve_heldout
from loda_math import general_subspace, isolated_subspace, remember


def moment(size: int, seed: int) -> Tensor:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return (x.mT @ x) * torch.linspace(1, 3, size) * torch.linspace(1, 3, size)[:, None]


@pytest.mark.parametrize("sizes", [(8, 8, 12), (256, 8, 256)])
def test_every_layer_gets_its_own_directions(sizes: tuple[int, ...]) -> None:
    new = {f"layer{n}": moment(size, n) for n, size in enumerate(sizes)}
    old = {f"layer{n}": moment(size, 10 + n) for n, size in enumerate(sizes)}
    settings = LoDASettings(rank=3)
    history = {name: remember(None, moment) for name, moment in old.items()}
    solved = solve_bases(settings, new, history, 0.0)
    assert list(solved) == list(new)
    for name, bases in solved.items():
        general = torch.as_tensor(general_subspace(new[name], old[name], 3))
        isolated = isolated_subspace(new[name], old[name], 3, ridge=settings.ridge)
        torch.testing.assert_close(bases["general"], general)
        torch.testing.assert_close(bases["isolated"], torch.as_tensor(isolated))
    halves = {name: (new[name], new[name]) for name in new}
    for name, ratios in solve_heldout(settings, halves, history, 0.0).items():
        # Both halves are the same, so what holds on one holds on the other.
        for ratio in ratios.values():
            torch.testing.assert_close(ratio.chosen, ratio.heldout)
        assert set(ratios) == {"general", "isolated"}, name


def test_the_ridge_is_relative_to_what_the_settings_say() -> None:
    own = torch.ones(32, dtype=torch.float64)
    own[:2] = 1e-3
    shared = torch.ones(32, dtype=torch.float64)
    shared[-1] = 1e6
    new, old = {"layer": torch.diag(shared)}, {"layer": remember(None, torch.diag(shared * own))}
    found = {}
    for scale in ("mean", "channels", "eigenvalues"):
        settings = LoDASettings(rank=2, ridge_scale=scale)  # type: ignore[arg-type]
        basis = solve_bases(settings, new, old, 0.0)["layer"]["isolated"]
        found[scale] = float((basis[:2] ** 2).sum())
    assert found["mean"] < 1.5
    assert found["channels"] == pytest.approx(2) == found["eigenvalues"]


def test_layers_are_solved_where_they_are_and_large_ones_apart() -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    places = {"a": (cpu, 8, 2), "b": (other, 8, 2), "c": (cpu, 8, 2), "d": (cpu, 8, 3)}
    assert _calls(places) == [(["a", "c"], cpu), (["b"], other), (["d"], cpu)]
    for device, width, sizes in (
        (cpu, 768, [1] * 12),
        (other, 768, [7, 5]),
        (other, 3072, [1] * 12),
    ):
        calls = _calls({str(n): (device, width, 2) for n in range(12)})
        assert [len(group) for group, _ in calls] == sizes
        assert {place for _, place in calls} == {device}


def test_moments_in_single_precision_give_the_same_directions() -> None:
    new = {"layer": moment(40, 0)}
    old = {"layer": remember(None, moment(40, 1))}
    new32 = {"layer": new["layer"].float()}
    old32 = {"layer": old["layer"]._replace(total=old["layer"].total.float())}
    settings, eps = LoDASettings(rank=3), torch.finfo(torch.float32).eps
    wanted = solve_bases(settings, new, old, eps)["layer"]
    found = solve_bases(settings, new32, old32, eps, {"layer": torch.device("cpu")})["layer"]
    for branch in ("general", "isolated"):
        cosines = torch.linalg.svdvals(wanted[branch].mT @ found[branch].double())
        assert float(cosines.min()) > 1 - 1e-6


@pytest.mark.parametrize("joint", [False, True])
def test_recalibration_drops_a_direction_that_holds_only_rounding(joint: bool) -> None:
    """Two channels that agree but for 1e-5: a Gram matrix in float32 cannot tell them apart."""
    torch.manual_seed(0)
    wide = torch.randn(500, 3)
    inputs = torch.cat([wide, wide[:, :1] + 1e-5 * torch.randn(500, 1)], dim=1)
    sound, empty = torch.eye(4)[:, 1], torch.tensor([1.0, 0.0, 0.0, -1.0]) / 2**0.5
    model = nn.Sequential(nn.Linear(4, 3))
    loda = LoDA(model, target="0", rank=2, joint=joint)
    loda.begin_task([inputs])
    loda.end_task([inputs])
    directions = torch.stack([sound, empty], dim=1)
    bases = dict.fromkeys(loda.settings.names(first_task=False), directions)
    loda.begin_task([inputs], bases={"0": bases})
    with torch.no_grad():
        for branch in loda.layers["0"].branches:
            loda.layers["0"].branch(branch).up.normal_()
    record = loda.end_task([inputs])
    kept = torch.linalg.svdvals(torch.as_tensor(record.coefficients["0"]))
    assert int((kept > 1e-3).sum()) == 1


@pytest.mark.parametrize("first_task", [True, False])
def test_random_directions_are_orthonormal_and_follow_the_generator(first_task: bool) -> None:
    layers, settings = {"a": nn.Linear(6, 3), "b": nn.Linear(9, 3)}, LoDASettings(rank=2)

    def draw(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        bases = random_bases(settings, layers, first_task=first_task, generator=generator)
        assert [list(by_branch) for by_branch in bases.values()] == [branches] * 2
        return [basis for by_branch in bases.values() for basis in by_branch.values()]

    branches = ["general"] if first_task else ["general", "isolated"]
    drawn = draw(0)
    for basis in drawn:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(2))
    assert all(torch.equal(a, b) for a, b in zip(drawn, draw(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn, draw(1), strict=True))
