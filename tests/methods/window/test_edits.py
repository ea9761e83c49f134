# SPDX-License-Identifier: Apache-2.0
"""Solvers whose caller changes states between steps: inpainting and the like."""

from __future__ import annotations

import math
from collections.abc import Callable

import diffusers
import pytest
import torch
from problems import TABLES
from torch import Tensor

from paradiff import Keyed, Solution, Table, from_scheduler, parasolver, sequential, srds
from paradiff.methods import WindowMethod
from paradiff.methods.window.edits import Edits
from paradiff.samplers import flow_euler
from paradiff.solver import Batch, EditedOutputs, Method, drive
from paradiff.solver.loop import solve

SHAPE = (3, 4, 4)
Edit = Callable[[int, Tensor], Tensor]
"""`edit(i, x)`: what becomes of the state that step i made."""

MASK = (torch.arange(48).view(SHAPE) % 3 == 0).double()


def model(x: Tensor, t: Tensor) -> Tensor:
    """A smooth network that couples all elements."""
    return torch.tanh(0.6 * x + 0.3 * x.mean((1, 2, 3), keepdim=True)) * (0.5 + t.double() / 1000).view(-1, 1, 1, 1).cos()


def known(i: int) -> Tensor:
    """The known picture at the noise level after step i."""
    return torch.linspace(-1, 1, 48, dtype=torch.float64).view(SHAPE) * (1 + 0.1 * i)


EDITS: dict[str, Edit] = {
    "overwrite": lambda i, x: MASK * known(i) + (1 - MASK) * x,
    "blend": lambda i, x: 0.3 * MASK * known(i) + (1 - 0.3 * MASK) * x,
    "add": lambda i, x: x + 0.05 * known(i),
}


def chain(table: Table, noise: Keyed, edit: Edit) -> Tensor:
    """The edited chain by an ordinary loop."""
    x = noise.start(0).double() * table.start_scale
    z = noise.draw(0, range(table.steps)).double()
    states, outputs = [], []
    for i in range(table.steps):
        seen = (table.scale[i] * x)[None]
        states.append(x)
        outputs.append(table.convert(torch.tensor([i]), x[None], model(seen, table.t[i : i + 1]))[0])
        new = table.c[i] * z[i]
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        x = edit(i, new) if i + 1 < table.steps else new
    return x


def solved(table: Table, noise: Keyed, method: WindowMethod, edit: Edit) -> Solution:
    """The same by a solver, whose states are edited where a pipeline's loop would edit them."""
    plain = [table.scale[n] for n in range(table.steps)]
    solver = solve(table, noise, method, dtype=torch.float64)

    def edited(batch: Batch) -> EditedOutputs:
        nodes = batch.nodes.tolist()
        states = torch.stack([x / plain[n] for n, x in zip(nodes, batch.x, strict=True)])
        shown = torch.stack([x if n == 0 else edit(n - 1, x) for n, x in zip(nodes, states, strict=True)])
        seen = torch.stack([x * plain[n] for n, x in zip(nodes, shown, strict=True)])
        return EditedOutputs(model(seen, batch.t), shown)

    return drive(solver, edited)


@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", TABLES)
def test_edited_chain_is_solved(name: str, edit: str, window: int | None) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, 3)
    window = None if window is None else min(window, table.steps)
    solution = solved(table, noise, parasolver(window, tolerance=0.0), EDITS[edit])
    expected = chain(table, noise, EDITS[edit])
    torch.testing.assert_close(solution.sample[0], expected, rtol=1e-10, atol=1e-10)  # float64, sums in another order


def test_overwritten_elements_cost_no_rounds() -> None:
    table, noise = flow_euler(40), Keyed(SHAPE, 3)
    method = parasolver(tolerance=1e-4)
    free = solved(table, noise, method, lambda i, x: x)
    painted = solved(table, noise, method, EDITS["overwrite"])
    assert painted.rounds <= free.rounds + 2 < table.steps
    error = (painted.sample[0] - chain(table, noise, EDITS["overwrite"])).square().mean().sqrt()
    assert error < 1e-3  # ten times the tolerance, which is an estimate


@pytest.mark.parametrize("name", ["flow_euler", "euler", "ddpm"])
def test_an_edit_that_changes_nothing_in_some_sweeps_is_followed(name: str) -> None:
    # A caller that compares states says in each sweep whether it changed any.
    table, noise = TABLES[name], Keyed(SHAPE, 3)
    solver, edited = solve(table, noise, parasolver(tolerance=0.0), dtype=torch.float64), []
    bound = 0.6 * float(chain(table, noise, lambda i, x: x).abs().max())

    def clamped(batch: Batch) -> EditedOutputs | Tensor:
        scale = table.scale[batch.nodes].view(-1, 1, 1, 1)
        states = batch.x / scale
        limits = torch.tensor([bound if node else math.inf for node in batch.nodes.tolist()], dtype=torch.float64)
        limits = limits.view(-1, 1, 1, 1)
        shown = states.clamp(-limits, limits)
        edited.append(bool((shown != states).any()))
        outputs = model(shown * scale, batch.t)
        return EditedOutputs(outputs, shown) if edited[-1] else outputs

    solution = drive(solver, clamped)
    assert True in edited
    assert False in edited[edited.index(True) :]
    expected = chain(table, noise, lambda i, x: x.clamp(-bound, bound))
    torch.testing.assert_close(solution.sample[0], expected, rtol=1e-10, atol=1e-10)  # float64, sums in another order


def test_an_element_is_overwritten_where_it_is_edited_at_every_node_and_never_changes_although_the_iterate_does() -> None:
    handed = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    later = torch.tensor([[1.5, 1.5, 1.0, 1.5], [2.5, 2.5, 2.0, 2.0]])
    shown = torch.tensor([[9.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 2.0]])
    again = torch.tensor([[9.0, 9.0, 9.0, 9.0], [9.0, 8.0, 9.0, 2.0]])
    # In this order: overwritten; changed at a node; its iterate stayed; left alone at a node.
    edits = Edits(mean_squares)
    edits.take(3, handed, shown, handed)
    assert edits.overwritten is None or not bool(edits.overwritten.any())
    edits.take(3, later, again, later)
    assert edits.overwritten is not None
    assert edits.overwritten.tolist() == [True, False, False, False]
    values = edits.spare(torch.ones(2, 4), 0.0)
    assert values.tolist() == [[0.0, 1.0, 1.0, 1.0]] * 2


def mean_squares(values: Tensor) -> Tensor:
    """`[W, 1]`."""
    return values.flatten(1).square().mean(1, keepdim=True)


def test_the_share_of_changes_that_edits_let_go_is_seen() -> None:
    handed = torch.tensor([[2.0, 2.0, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4], [5.0, 0.0, 0.0, 0.0]])
    edits = Edits(mean_squares)
    assert len(edits.shares) == 0
    edits.take(3, handed, handed.clamp(-1, 1), handed)
    assert edits.shares[:, 0].tolist() == [1.0, 0.0, 1.0]  # 1 of edited nodes before any change was seen
    later = handed + torch.tensor([0.1, 0.1, 0.1, 0.1])
    edits.take(3, later, later.clamp(-1, 1), later)
    assert edits.shares[:, 0].tolist() == pytest.approx([0.5, 0.0, 0.25], abs=1e-6)
    edits.take(3, later, later.clamp(-1, 1), later)  # nothing changed, and what is known stays
    assert edits.shares[:, 0].tolist() == pytest.approx([0.5, 0.0, 0.25], abs=1e-6)
    edits.advance(1, torch.zeros(4, 4))
    wider = torch.cat([later[1:], 2 * torch.ones(1, 4), torch.zeros(1, 4)])
    edits.take(4, wider, wider.clamp(-1, 1), wider)
    assert edits.shares[:, 0].tolist() == pytest.approx([0.0, 0.25, 0.25, 0.0], abs=1e-6)  # the largest of an edited one's


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize("window", [2, 5, 12, 21])
@pytest.mark.parametrize("edit", [lambda i, x: x.clamp(-0.5, 0.5), lambda i, x: 0.3 * x], ids=["limit", "factor"])
def test_edits_before_a_step_that_changes_nothing_are_those_of_its_state(
    edit: Callable[[int, Tensor], Tensor], window: int, tolerance: float
) -> None:
    """PNDM ends with a step from time 0 to time 0: no slope is missed there, and an edit may still let go of a change."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(20)
    table, noise = from_scheduler(scheduler), Keyed(SHAPE, 3)
    assert table.a[-1, 0] == 1
    assert not table.b[-1].any()
    found = solved(table, noise, parasolver(window, tolerance=tolerance), edit)
    # Roundings of float64 in sums of another order, or the tolerance.
    torch.testing.assert_close(found.sample[0], chain(table, noise, edit), rtol=0, atol=max(1e-10, 10 * tolerance))


def test_states_left_alone_are_no_edit() -> None:
    table, noise = TABLES["dpmpp_2m"], Keyed(SHAPE, 3)
    one = solved(table, noise, parasolver(4, tolerance=1e-3), lambda i, x: x)
    solver = solve(table, noise, parasolver(4, tolerance=1e-3), dtype=torch.float64)
    other = drive(solver, lambda batch: model(batch.x, batch.t))
    assert other.rounds == one.rounds
    torch.testing.assert_close(one.sample, other.sample, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "method", [parasolver(stride=2), parasolver(stride=[3] * 4), srds(4)], ids=["stride", "strides", "srds"]
)
def test_methods_that_cannot_follow_say_so(method: Method) -> None:
    assert not method.follows_edits
    with pytest.raises(ValueError, match=f"changed between steps, which {method.name} as it was given cannot follow"):
        solved(TABLES["ddim"], Keyed(SHAPE, 3), method, EDITS["overwrite"])


def test_strides_of_one_step_can_follow() -> None:
    assert parasolver(stride=[1] * 12).follows_edits


def test_settled_states_come_in_order_and_once() -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE, 3)
    seen: list[tuple[int, Tensor]] = []
    solver = solve(
        table,
        noise,
        parasolver(6, tolerance=0.0),
        dtype=torch.float64,
        on_final=lambda first, states: seen.extend((first + k, x.clone()) for k, x in enumerate(states)),
    )
    solution = drive(solver, lambda batch: model(batch.x, batch.t))
    assert [n for n, _ in seen] == list(range(1, table.steps + 1))
    assert torch.equal(seen[-1][1], solution.sample[0])
    one = solve(table, noise, sequential(), dtype=torch.float64)
    batch = next(one)
    for _, x in seen[:-1]:
        batch = one.send(model(batch.x, batch.t))
        torch.testing.assert_close(batch.x[0] / table.scale[batch.nodes[0]], x, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="srds keeps the states of a few nodes only"):
        next(solve(table, noise, srds(4), on_final=lambda first, states: None))


def test_members_are_judged_by_the_worst() -> None:
    """A batch that shares a window takes the rounds of its slowest member, however many easy ones there are."""
    table = flow_euler(40)
    stiff = 2.2 * torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def two_kinds(x: Tensor, t: Tensor) -> Tensor:
        hard = torch.sin(stiff * x[:, :1])
        return torch.cat([hard, 0 * x[:, 1:]], 1)

    def rounds(shape: tuple[int, ...], members: bool) -> int:
        solver = solve(table, Keyed(shape, 3), parasolver(tolerance=1e-4), dtype=torch.float64, shared_window=members)
        return drive(solver, lambda batch: two_kinds(batch.x, batch.t)).rounds

    alone = rounds((1, 4, 4), True)
    assert rounds((64, 4, 4), True) >= alone > rounds((64, 4, 4), False)
