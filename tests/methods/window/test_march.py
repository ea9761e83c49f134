# SPDX-License-Identifier: Apache-2.0
"""The plain chain of all samples in step is that of a window of one node for each, bit for bit, and takes no window."""

from __future__ import annotations

import pytest
import torch
from problems import SHAPE, TABLES, network
from torch import Tensor

from paradiff import Keyed, Recorded, Schedule, jacobi, parasolver, sample, sequential, solve
from paradiff.methods.window import march as march_module
from paradiff.methods.window.solver import WindowSolver
from paradiff.samplers import ddpm
from paradiff.solver import drive
from paradiff.solver.protocol import EditedOutputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", TABLES)
def test_samples_in_step_are_those_of_windows_of_one_node(name: str, samples: int, dtype: torch.dtype) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, 0, samples)
    found = sample(network, table, noise, sequential(), dtype=dtype)
    wanted = sample(network, table, noise, sequential(), dtype=dtype, observer=lambda round: None)  # which windows serve
    assert found == wanted  # samples, counts, estimates and history
    begun = torch.ones(samples, *SHAPE)
    assert sample(network, table, noise, sequential(), start=begun) == sample(
        network, table, noise, sequential(), start=begun, observer=lambda round: None
    )


def test_recorded_noises_are_the_same_in_step() -> None:
    noise = Recorded(SHAPE, torch.Generator().manual_seed(2), 3)
    table = ddpm(Schedule.linear(), 50)  # more steps than are drawn ahead
    one, other = (sample(network, table, noise, sequential(), observer=o) for o in (None, lambda round: None))
    assert one == other


def test_states_that_the_caller_changes_are_followed() -> None:
    def edited(batch: object) -> EditedOutputs:
        x = batch.x.clone()  # pyright: ignore[reportAttributeAccessIssue]
        x[..., 0] = 0.25
        return EditedOutputs(network(x, batch.t), x)  # pyright: ignore[reportAttributeAccessIssue]

    table = TABLES["ddim"]
    one, other = (drive(solve(table, Keyed(SHAPE, 0, 2), sequential(), observer=o), edited) for o in (None, lambda round: None))
    assert torch.equal(one.sample, other.sample)


@pytest.mark.parametrize("node", [0, 20, 49])
def test_a_state_that_is_not_finite_is_named_by_its_node(node: int) -> None:
    table = ddpm(Schedule.linear(), 50)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        out = network(x, t)
        out[1] = torch.where(t[1] == table.t[node], torch.nan, out[1])
        return out

    with pytest.raises(ValueError, match=rf"sample 1 is not finite after node {node} \(time"):
        sample(broken, table, Keyed(SHAPE, samples=2), sequential(), check="off")


def test_no_window_is_made_for_the_plain_chain_and_one_is_for_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    ask = WindowSolver.ask
    monkeypatch.setattr(WindowSolver, "ask", lambda self: made.append(self) or ask(self))
    sample(network, TABLES["ddpm"], Keyed(SHAPE, samples=2), sequential())
    assert not made
    for method in (jacobi(2), parasolver(1), parasolver(stride=12)):
        made.clear()
        sample(network, TABLES["ddpm"], Keyed(SHAPE), method)
        assert made


def test_a_step_that_forgets_the_state_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES["dpmpp_2m"]
    wanted = sample(network, table, Keyed(SHAPE), sequential(), observer=lambda round: None)
    monkeypatch.setattr(march_module, "AHEAD", 5)  # of no influence
    assert sample(network, table, Keyed(SHAPE), sequential()) == wanted
    convert = type(table).convert
    monkeypatch.setattr(type(table), "convert", lambda self, nodes, x, m: convert(self, nodes, x, m) * 1.01)
    assert sample(network, table, Keyed(SHAPE), sequential()) != wanted
