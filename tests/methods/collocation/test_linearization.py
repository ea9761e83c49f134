# SPDX-License-Identifier: Apache-2.0
"""The linearized collocation system, against networks whose derivative is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paradiff.methods.collocation.linearization import Linearization

NODES, SIZE = 5, 3
KNOWN = 0.25


def linear(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A causal influence `[M+1, M]` with own forcings, derivatives `[M, d, d]` of the forcings, and pairs that span all
    directions."""
    generator = torch.Generator().manual_seed(seed)
    influence = 0.3 * torch.randn(NODES + 1, NODES, generator=generator, dtype=torch.float64).tril()
    slope = 0.3 * torch.randn(NODES, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return influence, slope, torch.eye(SIZE, dtype=torch.float64).expand(NODES, SIZE, SIZE)


def response(influence: Tensor, slope: Tensor, dx: Tensor) -> Linearization:
    du = torch.einsum("nij,nkj->nki", slope, dx)
    return Linearization(influence, torch.arange(NODES), dx[:, :, None], du[:, :, None], KNOWN)


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


def test_with_pairs_in_all_directions_the_step_is_newtons() -> None:
    influence, slope, dx = linear(0)
    generator = torch.Generator().manual_seed(9)
    base, known = (torch.randn(n, SIZE, generator=generator, dtype=torch.float64) for n in (NODES + 1, NODES))
    found = response(influence, slope, dx).states(base[:, None], known[:, None])[:, 0]
    forced = base - torch.einsum("mn,nij,nj->mi", influence, slope, known)
    # Pairs are damped by a hundredth.
    assert (found - followed(influence, slope, forced)).norm() < 0.05 * (found - base).norm()
    assert (found - base).norm() > 0.1 * base.norm()


def test_a_change_reaches_the_sample_as_the_forcings_carry_it() -> None:
    influence, slope, dx = linear(1)
    generator = torch.Generator().manual_seed(9)
    changes = torch.randn(NODES, SIZE, generator=generator, dtype=torch.float64)
    found = response(influence, slope, dx).on_sample(changes[:, None], influence)[:, 0]
    for k in range(NODES):
        wanted = followed(influence, slope, influence[:, k, None] * changes[k])[-1]
        assert (found[k] - wanted).norm() < 0.05 * (wanted - influence[-1, k] * changes[k]).norm() + 1e-9


@pytest.mark.parametrize("pairs", [0, 2])
def test_only_what_pairs_have_seen_is_known(pairs: int) -> None:
    influence, slope, dx = linear(2)
    found = response(influence, slope, dx[:, :pairs]).unknown(torch.ones(NODES, 1, SIZE, dtype=torch.float64))
    for i in range(SIZE):
        assert found[..., i].flatten().tolist() == pytest.approx([KNOWN if i < pairs else 1.0] * NODES, rel=0.05)


def test_without_pairs_forcings_do_not_follow() -> None:
    influence, slope, dx = linear(3)
    alone, base = response(influence, slope, dx[:, :0]), torch.ones(NODES + 1, 1, SIZE, dtype=torch.float64)
    assert torch.equal(alone.states(base, base[:-1] + 1), base)
    assert torch.equal(alone.on_sample(base[:-1], influence), influence[-1][:, None, None] * base[:-1])
