# SPDX-License-Identifier: Apache-2.0
"""The growth of a path, read off its own evaluations, against that by the exact derivative of the clean-data estimate."""

from __future__ import annotations

import math

import pytest
import torch

from paradiff import Keyed, Schedule, sample, sequential
from paradiff.methods.collocation.growth import caution, path_growth
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.models.exact import Empirical
from paradiff.samplers import ddpm

HALF = 1.0
"""Half the distance of two points on a line, which are -HALF and HALF."""
TABLE = ddpm(Schedule.linear(), 400)
BOUND = 2.0


def growths(samples: int, numbers: int = 1) -> list[tuple[float, float]]:
    """The growth of the chain's own paths by `path_growth`, and by the exact derivative (HALF^2 - D^2)."""
    data = torch.zeros(2, numbers, dtype=torch.float64)
    data[:, 0] = torch.tensor([-HALF, HALF], dtype=torch.float64)
    network = Empirical(data).denoiser(TABLE)
    found = sample(network, TABLE, Keyed((numbers,), 0, samples), sequential(), keep_trajectory=True)
    assert found.trajectory is not None
    rec = Recurrence(TABLE, 0.25)
    system = CollocationSystem(rec, list(range(TABLE.steps + 1)), 0)
    pairs = []
    for part in found.trajectory.parts:
        states, clean = part.states.double(), part.clean.double()
        forcings = rec.nu[:, None] * (clean - rec.g[:, None] * states)
        told = path_growth(system, states[:, None], forcings[:, None], BOUND)
        gaussian = rec.variance / (1 + rec.variance * rec.snr)
        derivative = HALF**2 - clean[:, 0].square()
        along = torch.cat([torch.zeros(1), ((derivative - gaussian)[:-1] * rec.snr.diff()).cumsum(0)])
        pairs.append((float(told), float((along - along.cummin(0).values).max())))
    return pairs


def test_the_growth_is_that_of_the_exact_derivative() -> None:
    """Up to what a Rayleigh quotient over single steps scatters, in the log: 0.45 in the mean, of 1 to 6."""
    pairs = growths(12)
    assert all(told > 0 for told, _ in pairs)
    off = [abs(told - exact) for told, exact in pairs]
    assert sum(off) / len(off) < 0.7, pairs
    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    assert float(torch.corrcoef(ranks.T)[0, 1]) > 0.8, pairs


def test_a_single_node_has_no_growth() -> None:
    system = CollocationSystem(Recurrence(TABLE, 0.25), [0, TABLE.steps], 0)
    nothing = torch.zeros(1, 1, 2, dtype=torch.float64)
    assert float(path_growth(system, nothing, nothing, BOUND)) == 0


@pytest.mark.parametrize(("growth", "factor"), [(0.0, 1.0), (math.log(4), 1.0), (math.log(16), 2.0), (math.log(64), 4.0)])
def test_states_have_to_be_nearer_by_the_root_of_what_grows_beyond_the_free_growth(growth: float, factor: float) -> None:
    assert caution(growth, 4.0) == pytest.approx(factor)
