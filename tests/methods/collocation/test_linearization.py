# SPDX-License-Identifier: Apache-2.0
"""The linearized collocation system, against networks whose derivative is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import paradiff.methods.collocation.linearization
import paradiff.methods.collocation.pairs
import paradiff.methods.stretch
from paradiff.methods.collocation.linearization import Linearization, Moves
from paradiff.methods.collocation.pairs import Pairs, PairStore, in_slots
from paradiff.methods.stretch import NUMBERS

NODES, SIZE = 5, 3
KNOWN = 0.25


def linear(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A causal influence `[M+1, M]` with own forcings, derivatives `[M, d, d]` of the forcings, and pairs that span all
    directions."""
    generator = torch.Generator().manual_seed(seed)
    influence = 0.3 * torch.randn(NODES + 1, NODES, generator=generator, dtype=torch.float64).tril()
    slope = 0.3 * torch.randn(NODES, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return influence, slope, torch.eye(SIZE, dtype=torch.float64).expand(NODES, SIZE, SIZE)


def pairs_of(dx: Tensor, du: Tensor) -> Pairs | None:
    """Pairs `[M, k, b, d]` of all nodes."""
    nodes = list(range(len(dx)))
    store = PairStore(len(dx), dx.shape[1], dx.new_zeros(dx.shape[2:]), dx.dtype)
    for x, u in zip(dx.unbind(1), du.unbind(1), strict=True):
        store.observe(nodes, x, u, torch.ones(x.shape[:2], dtype=torch.bool))
    return store.newest()


def response(influence: Tensor, slope: Tensor, dx: Tensor, *, causal: bool = True) -> Linearization:
    du = torch.einsum("nij,nkj->nki", slope, dx)
    pairs, slots = pairs_of(dx[:, :, None], du[:, :, None]), dx.shape[1]
    reach = -influence[:-1].repeat_interleave(slots, 0).repeat_interleave(slots, 1)
    return Linearization(influence, reach, torch.arange(NODES), pairs, KNOWN, causal=causal)


def followed(influence: Tensor, slope: Tensor, forced: Tensor) -> Tensor:
    """States and sample whose forcings follow them: y = forced + R J y, solved node by node."""
    found = forced.clone()
    for k in range(NODES + 1):
        forcings = torch.einsum("nij,nj->ni", slope, found[:NODES])
        if k < NODES:
            own = torch.eye(SIZE, dtype=torch.float64) - influence[k, k] * slope[k]
            found[k] = torch.linalg.solve(own, forced[k] + influence[k, :k] @ forcings[:k])
        else:
            found[k] = forced[k] + influence[k] @ forcings
    return found


@pytest.fixture(params=["short states", "long states"])
def stretched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long states are worked on a number at a time."""
    if request.param == "long states":
        monkeypatch.setattr(paradiff.methods.collocation.pairs, "DENSE", 0)
        for module in (paradiff.methods.collocation.linearization, paradiff.methods.stretch):
            monkeypatch.setattr(module, "NUMBERS", 1)


@pytest.mark.usefixtures("stretched")
@pytest.mark.parametrize("causal", [True, False])
def test_with_pairs_in_all_directions_the_step_is_newtons(causal: bool) -> None:
    influence, slope, dx = linear(0)
    generator = torch.Generator().manual_seed(9)
    base, known = (torch.randn(n, SIZE, generator=generator, dtype=torch.float64) for n in (NODES + 1, NODES))
    found = response(influence, slope, dx, causal=causal).follow(base[:, None].clone(), known[:, None])[:, 0]
    forced = base - torch.einsum("mn,nij,nj->mi", influence, slope, known)
    # Pairs are damped by a hundredth.
    assert (found - followed(influence, slope, forced)).norm() < 0.05 * (found - base).norm()
    assert (found - base).norm() > 0.1 * base.norm()


def sampled(influence: Tensor, slope: Tensor, changes: Tensor) -> Tensor:
    """`[M, d]` the sample's changes by forcings that change by `[M, d]`, each alone."""
    return torch.stack([followed(influence, slope, influence[:, k, None] * changes[k])[-1] for k in range(NODES)])


@pytest.mark.usefixtures("stretched")
@pytest.mark.parametrize("causal", [True, False])
def test_a_change_reaches_the_sample_as_the_forcings_carry_it(causal: bool) -> None:
    influence, slope, dx = linear(1)
    generator = torch.Generator().manual_seed(9)
    changes = torch.randn(NODES, SIZE, generator=generator, dtype=torch.float64)
    linearization = response(influence, slope, dx, causal=causal)
    wanted = sampled(influence, slope, changes)
    found = linearization.effects(changes[:, None], influence).sqrt()
    plain = influence[-1].abs() * changes.square().mean(1).sqrt()
    wanted_size = wanted.square().mean(1).sqrt()
    # Pairs are damped by a hundredth.
    assert ((found - wanted_size).abs() < 0.05 * (wanted_size - plain).abs() + 0.01 * wanted_size).all()
    assert ((plain - wanted_size).abs() > 0.02 * wanted_size).any()


@pytest.mark.usefixtures("stretched")
@pytest.mark.parametrize("causal", [True, False])
def test_a_change_reaches_the_states_as_the_forcings_carry_it(causal: bool) -> None:
    influence, slope, dx = linear(3)
    linearization = response(influence, slope, dx, causal=causal)
    generator = torch.Generator().manual_seed(4)
    defects, weights = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, SIZE), (NODES + 1, 2)))
    wanted = torch.stack([followed(influence, slope, w[:, None] * d) for w, d in zip(weights.mT, defects, strict=True)], 1)
    found = linearization.state_effects(defects[:, None], weights, torch.tensor([1, 3])).sqrt()
    plain, wanted = weights[[1, 3]].abs() * defects.square().mean(1).sqrt(), wanted[[1, 3]].square().mean(2).sqrt()
    # Pairs are damped by a hundredth.
    assert ((found - wanted).abs() < 0.05 * (wanted - plain).abs() + 0.01 * wanted).all()
    assert ((plain - wanted).abs() > 0.05 * wanted).all()
    bare = response(influence, slope, dx[:, :0], causal=causal)
    torch.testing.assert_close(bare.state_effects(defects[:, None], weights, torch.tensor([1, 3])).sqrt(), plain)


@pytest.mark.usefixtures("stretched")
def test_a_change_is_carried_in_its_neighbours_directions_at_its_own_size() -> None:
    influence, slope, dx = linear(4)
    changes = torch.randn(NODES, SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    linearization, sizes = response(influence, slope, dx), changes.norm(dim=1)
    several = []
    for step in (-1, 0, 1):
        source = (torch.arange(NODES) + step).clamp(0, NODES - 1)
        turned = changes[source] * (sizes / sizes[source])[:, None]
        several.append(linearization.effects(turned[:, None], influence))
    torch.testing.assert_close(linearization.effects(changes[:, None], influence, 1), torch.stack(several).mean(0))


@pytest.mark.usefixtures("stretched")
@pytest.mark.parametrize("pairs", [0, 2])
def test_only_what_pairs_have_seen_is_known(pairs: int) -> None:
    influence, slope, dx = linear(2)
    generator = torch.Generator().manual_seed(7)
    states, known = (torch.randn(NODES, 1, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    constants = 0.5 + torch.rand(NODES, 1, generator=generator, dtype=torch.float64)
    linearization = response(influence, slope, dx[:, :pairs])
    changes = states - known
    seen = (torch.arange(SIZE) < pairs) / 1.01  # of the directions that pairs cover, damped by a hundredth
    unknown = changes * (1 - (1 - KNOWN) * seen) * constants[..., None]
    moves = Moves(states, known)
    torch.testing.assert_close(moves.squares, changes.square().sum(2))
    torch.testing.assert_close(linearization.staleness(moves, constants)[0], linearization.effects(unknown, influence))
    # All together is more than their squares: two changes that are one and its opposite, or twice the same.
    twice = [torch.zeros_like(constants) for _ in range(2)]
    twice[0][:2], twice[1][1] = constants[:2], constants[1]
    (first, second), both = linearization.staleness(moves, twice[0])[0][:2], linearization.staleness(moves, twice[0])[1]
    assert abs(float(both - first - second)) <= 2 * float((first * second).sqrt()) + 1e-12
    torch.testing.assert_close(linearization.staleness(moves, twice[1])[1], second[None])


def test_without_pairs_forcings_do_not_follow() -> None:
    influence, slope, dx = linear(3)
    alone, base = response(influence, slope, dx[:, :0]), torch.ones(NODES + 1, 1, SIZE, dtype=torch.float64)
    assert torch.equal(alone.follow(base.clone(), base[:-1] + 1), base)
    torch.testing.assert_close(alone.effects(base[:-1], influence), influence[-1].square())
    each, together = alone.staleness(Moves(2 * base[:-1], base[:-1]), torch.ones(NODES, 1, dtype=torch.float64))
    torch.testing.assert_close(each, influence[-1].square())
    torch.testing.assert_close(together, influence[-1].sum().square()[None])


@pytest.mark.parametrize("numbers", [NUMBERS, 1])  # short states, and long ones
def test_the_newest_pairs_are_kept_and_nodes_without_a_change_keep_theirs(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paradiff.methods.collocation.pairs, "DENSE", numbers)
    monkeypatch.setattr(paradiff.methods.stretch, "NUMBERS", numbers)
    store = PairStore(3, 2, torch.zeros(1, 2, dtype=torch.float64), torch.float64)

    def seen(nodes: list[int], value: float, large: bool = True) -> None:
        change = torch.full((len(nodes), 1, 2), value, dtype=torch.float64)
        store.observe(nodes, change, 10 * change, torch.full((len(nodes), 1), large))

    def kept(store: PairStore) -> list[list[float]]:
        """Changes in the slots of each node, with those of the forcings and the products as they have to be."""
        found = store.newest()
        if found is None:
            return []
        dx, du = (in_slots(v, found.rows, slice(None)) for v in (found.dx, found.du))
        assert torch.equal(du, 10 * dx)
        assert torch.equal(found.cross, dx @ du.mT)
        own = dx.unflatten(1, (-1, store.most))
        assert torch.equal(found.own, own @ own.mT)
        return dx[0, :, 0].view(-1, store.most).tolist()

    assert kept(store) == []
    seen([0, 2], 1.0)
    seen([2], 2.0)
    seen([2], 3.0)
    assert kept(store) == [[1.0, 0.0], [0.0, 0.0], [3.0, 2.0]]
    seen([2], 4.0, large=False)  # the pair that was to be replaced stays, as the newest
    assert kept(store) == [[1.0, 0.0], [0.0, 0.0], [3.0, 2.0]]
    seen([2], 5.0)
    assert kept(store) == [[1.0, 0.0], [0.0, 0.0], [5.0, 2.0]]
    nearest, ratios = [2, 0, 0, 1], torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    for most, wanted in ((2, [[2.0, 5.0], [1.0, 0.0], [0.5, 0.0]]), (1, [[5.0], [1.0], [0.5]])):
        moved = store.remesh(nearest, ratios, most)
        found = moved.newest()
        assert found is not None
        dx, du = (in_slots(v, found.rows, slice(None)) for v in (found.dx, found.du))
        assert dx[0, :, 0].view(-1, most).tolist() == wanted
        scaled = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64).repeat_interleave(most)
        assert torch.equal(du[0, :, 0] * scaled, 10 * dx[0, :, 0])
        assert torch.equal(found.cross, dx @ du.mT)
        assert torch.equal(found.own, dx.unflatten(1, (-1, most)) @ dx.unflatten(1, (-1, most)).mT)
    assert store.emptied().newest() is None


def test_a_linearization_is_kept_beside_the_next() -> None:
    influence, slope, dx = linear(5)
    store = PairStore(NODES, SIZE, dx.new_zeros(1, SIZE), dx.dtype)
    reach = -influence[:-1].repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)

    def seen(scale: float) -> Linearization:
        for x in dx.unbind(1):
            large = torch.ones(NODES, 1, dtype=torch.bool)
            store.observe([*range(NODES)], x[:, None], scale * torch.einsum("nij,nj->ni", slope, x)[:, None], large)
        return Linearization(influence, reach, torch.arange(NODES), store.newest(), KNOWN, causal=True)

    changes = torch.randn(NODES, 1, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first = seen(1.0).kept()
    before = first.effects(changes, influence)
    after = seen(2.0).effects(changes, influence)
    assert torch.equal(first.effects(changes, influence), before)
    assert not torch.allclose(after, before, rtol=1e-2)
