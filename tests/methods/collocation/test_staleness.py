# SPDX-License-Identifier: Apache-2.0
"""Lipschitz constants of forcings, observed or taken from neighbours."""

from __future__ import annotations

import pytest
import torch

from paradiff import Schedule
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.staleness import beyond_rounding, lipschitz, lipschitz_floor
from paradiff.samplers import ddpm


def test_a_node_evaluated_once_has_the_larger_quotient_of_its_neighbours() -> None:
    recurrence = Recurrence(ddpm(Schedule.linear(), 200), 0.25)
    nodes = torch.arange(0, 120, 10)
    floor, q_u = lipschitz_floor(recurrence, nodes, 4.0), recurrence.q_u[nodes].abs()
    assert torch.equal(lipschitz(torch.zeros_like(floor), q_u, floor), floor)
    quotients = torch.zeros_like(floor)
    quotients[3], quotients[8] = 1e3 * q_u[3], 1e6 * q_u[8]  # of the network's outputs: 1e3 and 1e6
    above = (floor / q_u).tolist()
    found = (lipschitz(quotients, q_u, floor) / q_u).tolist()
    assert found == pytest.approx([max(a, 1e3 if n <= 3 else 1e6) for n, a in enumerate(above)])
    assert max(above[:4]) < 1e3  # so that this can fail
    assert max(above[4:]) < 1e6


def test_the_floor_is_that_of_gaussian_data_at_least_and_grows_with_the_cap() -> None:
    recurrence, nodes = Recurrence(ddpm(Schedule.linear(), 200), 0.25), torch.arange(0, 200, 7)
    floors = torch.stack([lipschitz_floor(recurrence, nodes, cap) for cap in (0.0, 4.0, 16.0)])
    assert torch.equal(floors[0], recurrence.nu[nodes] * recurrence.g[nodes])
    assert (floors.diff(dim=0) >= 0).all()
    assert (floors[1] > 1.5 * floors[0]).any()


def test_changes_near_rounding_are_told_from_others() -> None:
    states = torch.ones(2, 1, 4, dtype=torch.float64)
    changes = states * torch.tensor([1e-9, 1e-6], dtype=torch.float64)[:, None, None]
    assert beyond_rounding(changes.square().sum(2), states, 1e-7).tolist() == [[False], [True]]
