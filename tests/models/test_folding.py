# SPDX-License-Identifier: Apache-2.0
"""The bundled denoiser of chains: it turns with its input, knows left from right, and folds in fewer rounds than steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paradiff import Evaluator, Keyed, quasi_newton, sample, sequential, slopes
from paradiff.models import Folding, Frames
from paradiff.models.folding import MOLECULES
from paradiff.samplers import alphafold3

CHAINS = ["HHHHHHHHHHTTSSSSSSTTHHHHHHHH", "SSSSSSTTTHHHHHHHHHHH"]


def rotation(seed: int) -> Tensor:
    found = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return found * torch.linalg.det(found)


def noisy(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, levels and kinds of both chains, the shorter one filled up."""
    kinds = Folding.kinds_of(CHAINS)
    x = 9 * torch.randn(2, kinds.shape[1], 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.tensor([3.0, 20.0], dtype=torch.float64), kinds


def test_it_turns_and_shifts_with_its_input_and_tells_mirror_images_apart() -> None:
    network, (x, sigma, kinds) = Folding.bundled().double(), noisy()
    atoms, turn = (kinds > 0)[..., None], rotation(1)
    plain = network(x, sigma, kinds)
    turned = network(x @ turn.T + 5.0, sigma, kinds)
    torch.testing.assert_close(turned, (plain @ turn.T + 5.0) * atoms, rtol=0, atol=1e-6)
    mirrored = network(-x, sigma, kinds)
    assert float((mirrored + plain).abs().max()) > 1e-2


def test_places_that_fill_a_chain_up_change_nothing() -> None:
    network, (x, sigma, kinds) = Folding.bundled().double(), noisy()
    alone = network(x[1:, :20], sigma[1:], kinds[1:, :20])
    both = network(x, sigma, kinds)
    assert not both[1, 20:].any()
    torch.testing.assert_close(both[1:, :20], alone, rtol=0, atol=1e-8)


def test_its_chains_have_bonds_of_their_length_in_fewer_rounds_than_steps() -> None:
    network, table, noise = Folding.bundled(), alphafold3(60), Keyed((28, 3), seed=[3, 4])
    kinds = Folding.kinds_of([CHAINS[0]] * 2)
    frames = Frames.drawn(table, noise)
    evaluator = Evaluator(frames.model(network), conditioning={"kinds": kinds})
    plain = sample(evaluator, table, frames.moving(), sequential())
    method = quasi_newton(window=16, tolerance=0.064, neighbours=2, slope=slopes.shifted(16.0))
    found = sample(evaluator, table, frames.moving(), method)
    assert found.rounds < 30
    off = (found.sample - plain.sample).square().sum(2).sqrt().amax(1)
    assert bool((off < 1e-2 * plain.sample.square().mean((1, 2)).sqrt()).all())
    bonds = frames.placed(found.sample).diff(dim=1).norm(dim=2)
    assert 3.5 < float(bonds.mean()) < 4.0
    assert float(bonds.std()) < 0.3


def test_the_bundled_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in MOLECULES.iterdir()) < 2_000_000


@pytest.mark.parametrize("chains", ["HHH", [], [""], ["HHX"], [3]])
def test_what_spells_no_chain_is_refused(chains: object) -> None:
    with pytest.raises(ValueError, match="give a list of texts made of H, S and T"):
        Folding.kinds_of(chains)  # type: ignore[arg-type]
