# SPDX-License-Identifier: Apache-2.0
"""A window that follows a clock: it widens where that pays, is narrowed where it does not, and its sample stays the chain's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import paradiff
from paradiff.chain.slope import identity, shifted
from paradiff.methods.adaptive.method import AdaptiveMethod, AdaptiveRun
from paradiff.methods.adaptive.pace import Pace, PaceControl
from paradiff.solver.protocol import Problem

SCHEDULE = paradiff.Schedule.linear()
TABLES = {
    "ddim": paradiff.samplers.ddim(SCHEDULE, 40),
    "ddpm": paradiff.samplers.ddpm(SCHEDULE, 40),
    "dpmpp_2m": paradiff.samplers.dpmpp_2m(SCHEDULE, 30),
}
EXPECTED = {2: 500.0, 4: 300.0, 8: 180.0, 16: 120.0}
MODEL = paradiff.models.Mixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-0.8, 0.1, 0.3], [0.7, -0.2, 0.4]]), torch.tensor([0.02, 0.03])
)


def played(pace: Pace, t: Callable[[int], float], rate: Callable[[int], float], steps: int) -> tuple[float, list[int]]:
    """The seconds and widths of a chain, where a window of W nodes makes `rate(W)` nodes final in a round."""
    final, seconds, widths = 0.0, 0.0, []
    before = 1  # the width that the window still has in the round after it was changed
    while final < steps:
        width = min(before, int(steps - final) or 1)
        final = min(steps, final + max(1.0, rate(width)))
        seconds += t(width)
        widths.append(width)
        before = pace.width
        pace.round(t(width), final)
    return seconds, widths


def test_flat_calls_widen_the_window_to_the_widest() -> None:
    seconds, widths = played(Pace(1000, EXPECTED), lambda w: 1.0, lambda w: w**0.77, 1000)
    assert max(widths) == 16
    assert seconds < 1000 / 5


def test_calls_in_proportion_are_left_within_the_allowance() -> None:
    pace = Pace(1000, EXPECTED)
    seconds, widths = played(pace, float, lambda w: 1.0, 1000)
    assert seconds <= 1000 * 1.035
    assert widths[-1] == 1
    assert pace.walks
    assert "sequential" in pace.why or "fell behind" in pace.why


def test_a_short_chain_is_not_tried_where_a_try_would_cost_too_much() -> None:
    seconds, widths = played(Pace(10, {2: 5.0, 4: 3.0}), float, lambda w: 1.0, 10)
    assert widths == [1] * 10
    assert seconds == 10


def test_the_best_of_the_widths_is_kept() -> None:
    pace = Pace(1000, EXPECTED)
    played(pace, lambda w: 1.0 if w <= 4 else 10.0, lambda w: w**0.8, 1000)
    assert pace.widest <= 8
    times = [pace.rest(w) for w in (2, 4, 8) if w in pace.seen]
    assert min(times) == pace.rest(4)


@pytest.mark.parametrize("known", [None, lambda w: 1.0 + 0.1 * w])
def test_a_window_that_falls_behind_is_narrowed_until_the_rest_is_walked(known: Callable[[int], float] | None) -> None:
    pace = Pace(1000, EXPECTED, known)
    seconds, widths = played(pace, lambda w: 1.0 + 0.1 * w if w == 1 else 3.0, lambda w: 1.0, 1000)
    assert widths[-1] == 1
    assert seconds < 1.2 * 1.1 * 1000
    assert "was made 1" in pace.why or "sequential" in pace.why


def test_one_slow_round_does_not_end_a_window_that_pays() -> None:
    slow = iter([1.0] * 5 + [6.0] + [1.0] * 2000)
    pace = Pace(1000, EXPECTED)
    seconds, widths = played(pace, lambda w: next(slow), lambda w: w**0.8, 1000)
    assert max(widths) >= 8
    assert seconds < 500


def test_what_is_known_beforehand_is_used_at_once() -> None:
    pace = Pace(1000, EXPECTED, lambda w: 1.0)
    assert pace.width == 16
    assert not pace.walks
    steep = Pace(1000, EXPECTED, float)
    assert steep.width == 1
    assert steep.walks


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"first": 1}, "first rounds is 1"),
        ({"tried": 1}, "tried rounds is 1"),
        ({"allowance": 2}, "allowance is 2"),
        ({"worth": -1}, "worth is -1"),
        ({"again": -1}, "further rounds is -1"),
    ],
)
def test_other_numbers_of_a_pace_are_refused(given: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PaceControl(**given)  # pyright: ignore[reportArgumentType]


class Scripted(AdaptiveMethod):
    """An adaptive method whose clock is a script of widths."""

    def prepare(self, problem: Problem) -> AdaptiveRun:
        """The run, with its pace replaced."""
        run = super().prepare(problem)
        widths = iter(SCRIPT)

        def follow(seconds: float, final: float) -> int:
            run.pace.width = next(widths, 1)
            run.pace.widest = max(run.pace.widest, run.pace.width)
            return run.pace.width

        object.__setattr__(run.pace, "round", follow)
        object.__setattr__(run.pace, "_walked", 0)
        return run


SCRIPT = [1, 2, 4, 8, 8, 3, 3, 6, 6, 2, 2, 5, 5]


@pytest.mark.parametrize("slope", [identity, shifted(0.25)])
@pytest.mark.parametrize("secants", [0, 2])
@pytest.mark.parametrize("sampler", TABLES)
def test_the_sample_is_the_chains_however_the_window_changes(sampler: str, secants: int, slope: object) -> None:
    table = TABLES[sampler]
    noise = paradiff.Keyed((3,), samples=2)
    method = Scripted("auto", slope, tolerance=1e-4, secants=secants, expected=((2, 20.0), (8, 12.0)))  # pyright: ignore[reportArgumentType]
    found = paradiff.sample(MODEL.denoiser(table), table, noise, method)
    plain = paradiff.sample(MODEL.denoiser(table), table, noise, paradiff.sequential())
    assert float((found.sample - plain.sample).square().mean().sqrt()) < 1e-3
    assert found.rounds < table.steps
    assert sum(record.passed for record in found.history) == 2 * table.steps


@pytest.mark.parametrize("sampler", TABLES)
def test_a_walk_from_any_node_is_the_chain_itself(sampler: str) -> None:
    table = TABLES[sampler]
    noise = paradiff.Keyed((3,), samples=2)
    method = AdaptiveMethod("auto", identity, expected=((2, 20.0), (4, 12.0)), seconds=((1, 1.0), (4, 4.0)))
    found = paradiff.sample(MODEL.denoiser(table), table, noise, method)
    plain = paradiff.sample(MODEL.denoiser(table), table, noise, paradiff.sequential())
    assert torch.equal(found.sample, plain.sample)
    assert found.rounds == table.steps
    assert found.status is paradiff.solver.Status.EXACT
    assert "sequential is faster" in found.message


def test_final_states_are_told_in_order_by_window_and_walk() -> None:
    table = TABLES["ddim"]
    told: list[tuple[int, Tensor]] = []

    def on_final(first: int, states: Tensor) -> None:
        told.extend((first + k, state.clone()) for k, state in enumerate(states))

    method = Scripted("auto", identity, tolerance=1e-4, expected=((2, 20.0), (8, 12.0)))
    rounds = paradiff.solve(table, paradiff.Keyed((3,)), method, on_final=on_final)
    model = MODEL.denoiser(table)
    found = paradiff.solver.drive(rounds, lambda batch: model(batch.x, batch.t), check="off")
    assert [node for node, _ in told] == [*range(1, table.steps + 1)]
    assert torch.equal(told[-1][1], found.sample[0])


def test_a_walk_says_where_a_state_is_not_finite() -> None:
    table = TABLES["ddim"]
    method = AdaptiveMethod("auto", identity, expected=((2, 20.0),), seconds=((1, 1.0), (2, 2.0)))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t < 500)[:, None], torch.nan, x)

    with pytest.raises(ValueError, match="sample 0 is not finite after node"):
        paradiff.sample(model, table, paradiff.Keyed((3,)), method)
