# SPDX-License-Identifier: Apache-2.0
"""What `auto` is asked for beside speed: few evaluations, little memory, the best sample in time, and previews from the start.

No test reads a real clock: the model advances one by the seconds of its curve.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Cli
from torch import Tensor

import paradiff
from paradiff.planning import LatencyCurve
from paradiff.planning.curves import keep
from paradiff.planning.store import FOLDER
from paradiff.solver import Preview, Previews, Status
from paradiff.solver.previews import Timed

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
SCHEDULE = paradiff.Schedule.linear()
DDIM, DDPM = paradiff.samplers.ddim, paradiff.samplers.ddpm
DATA = paradiff.models.Mixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-0.8, 0.1, 0.3], [0.7, -0.2, 0.4]]), torch.tensor([0.02, 0.03])
)
NOISE = paradiff.Keyed((3,))
FLAT, STEEP = LatencyCurve({1: 1.0, 64: 1.2}, {1: 0.0}), LatencyCurve({1: 1.0, 2: 2.0}, {1: 0.0})


class Clock:
    """A clock that stands still, but for what is added."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """The clock of all modules, and a folder in which measurements are kept."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = Clock()
    monkeypatch.setattr("time.perf_counter", found)
    return found


def timed(table: paradiff.Table, curve: LatencyCurve, clock: Clock, *, known: bool = True) -> paradiff.Evaluator:
    """A model whose calls take the seconds of a curve, which is known or not."""
    exact = DATA.denoiser(table)

    def model(x: Tensor, t: Tensor) -> Tensor:
        clock.seconds += curve(len(x))
        return exact(x, t)

    evaluator = paradiff.Evaluator(model)
    if known:
        assert keep(evaluator, NOISE, curve) == []
    return evaluator


def rms(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())


# -- evaluations and memory --------------------------------------------------------------------------------------------


def test_the_fewest_evaluations_are_those_of_collocation_on_a_long_chain_and_of_the_chain_on_a_short_one() -> None:
    long, short = DDPM(SCHEDULE, 1000), DDIM(SCHEDULE, 20)
    found = paradiff.sample(DATA.denoiser(long), long, NOISE, paradiff.auto(objective="evaluations"))
    assert found.evaluations + found.checked_rows < 500
    assert "chosen: collocation(" in found.message
    assert "evaluations for 1000 of the plain chain" in found.message
    found = paradiff.sample(DATA.denoiser(short), short, NOISE, paradiff.auto(objective="evaluations"))
    assert found.evaluations == 20
    assert "chosen: sequential(), since its 20 evaluations are the fewest" in found.message


def test_the_least_memory_is_that_of_one_state(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 50)
    found = paradiff.sample(timed(table, FLAT, clock), table, NOISE, paradiff.auto(objective="memory"))
    assert found.rounds == found.evaluations == 50
    assert "chosen: sequential(), which holds one state a sample, the fewest" in found.message


# -- anytime -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [None, FLAT])
@pytest.mark.parametrize("make", [DDIM, DDPM])
def test_previews_come_from_the_first_rounds_on_and_improve(
    make: Callable[..., paradiff.Table], known: LatencyCurve | None, clock: Clock
) -> None:
    table = make(SCHEDULE, 50)
    model = timed(table, known or FLAT, clock, known=known is not None)
    plain = paradiff.sample(model, table, NOISE, paradiff.sequential()).sample
    shown: list[Preview] = []
    found = paradiff.sample(model, table, NOISE, paradiff.auto(objective="anytime"), observer=Previews(shown.append))
    assert shown[0].round <= 4
    errors = [rms(preview.sample, plain) for preview in shown]
    assert errors[-1] < 4e-3 < errors[0]
    assert len(shown) == found.rounds - shown[0].round + 1
    held = [error <= preview.estimated_error + 1e-6 for error, preview in zip(errors, shown, strict=True)]
    assert sum(held) >= 0.8 * len(held)
    assert [preview.seconds for preview in shown] == sorted(preview.seconds for preview in shown)
    assert shown[-1].evaluations == found.evaluations
    assert found.status is not Status.STOPPED


def test_a_user_may_stop_at_a_preview_and_its_error_is_estimated(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 50)
    model = timed(table, FLAT, clock)
    plain = paradiff.sample(model, table, NOISE, paradiff.sequential()).sample
    shown: list[Preview] = []

    def show(preview: Preview) -> bool:
        shown.append(preview)
        return preview.estimated_error < 0.5

    found = paradiff.sample(model, table, NOISE, paradiff.auto(objective="anytime"), observer=Previews(show))
    assert (found.status, found.cut) == (Status.STOPPED, True)
    assert found.rounds == shown[-1].round < 50
    assert torch.equal(found.sample, shown[-1].sample)
    assert found.estimated_error == shown[-1].estimated_error < 0.5
    assert rms(found.sample, plain) < 0.5
    assert found.message.startswith(f"stopped: the observer asked for it after round {found.rounds}; chosen: ")


def test_a_window_that_slides_has_no_preview_before_it_reaches_the_end() -> None:
    table = DDIM(SCHEDULE, 30)
    shown: list[Preview] = []
    found = paradiff.sample(DATA.denoiser(table), table, NOISE, paradiff.parasolver(4), observer=Previews(shown.append))
    assert 1 < shown[0].round <= found.rounds
    stopped = paradiff.sample(
        DATA.denoiser(table), table, NOISE, paradiff.parasolver(4), observer=Timed(1.0, clock=iter(range(9)).__next__)
    )
    assert stopped.status is Status.STOPPED
    assert math.isinf(stopped.estimated_error)


def test_several_samples_have_an_estimate_each() -> None:
    table = DDIM(SCHEDULE, 50)
    shown: list[Preview] = []
    noise = paradiff.Keyed((3,), samples=3)
    paradiff.sample(DATA.denoiser(table), table, noise, paradiff.quasi_newton(), observer=Previews(shown.append))
    assert {len(preview.estimated_errors) for preview in shown} == {3}
    assert {preview.sample.shape for preview in shown} == {(3, 3)}
    assert shown[-1].estimated_error <= 4e-3


# -- a deadline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", [FLAT, STEEP])
@pytest.mark.parametrize("make", [DDIM, DDPM])
@pytest.mark.parametrize("known", [True, False])
def test_a_deadline_is_kept_or_said_to_be_out_of_reach(
    known: bool, make: Callable[..., paradiff.Table], curve: LatencyCurve, clock: Clock
) -> None:
    table = make(SCHEDULE, 100)
    model = timed(table, curve, clock, known=known)
    for deadline in (4.0, 9.0, 15.0, 30.0, 60.0, 130.0):
        begin = clock.seconds
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = paradiff.sample(model, table, NOISE, paradiff.auto(deadline=deadline))
        late = (clock.seconds - begin) / deadline - 1
        assert late <= 0.1 or said, (deadline, late)
        if found.status is Status.STOPPED:
            assert f"the deadline of {deadline:g} s ended it after round" in found.message
        if known and deadline == 130:
            assert found.rounds == 100
            assert "chosen: sequential(), which fits into 130 s" in found.message
        for one in said:
            assert f"the deadline of {deadline:g} s is out of reach for a finished sample" in str(one.message)


def test_a_deadline_that_only_a_parallel_run_keeps_is_kept_by_one(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 100)
    model = timed(table, FLAT, clock)
    plain = paradiff.sample(model, table, NOISE, paradiff.sequential()).sample
    found = paradiff.sample(model, table, NOISE, paradiff.auto(deadline=45.0))
    assert found.status is Status.CONVERGED
    assert "which fits into 45 s, about" in found.message
    assert rms(found.sample, plain) < 4e-3


def test_what_is_out_of_reach_is_said_before_the_first_call(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 100)
    model = timed(table, STEEP, clock)
    begin = clock.seconds
    sentence = "the deadline of 5 s is out of reach for a finished sample; the fastest, "  # warnings are errors in tests
    with pytest.raises(UserWarning, match=re.escape(sentence)):
        paradiff.sample(model, table, NOISE, paradiff.auto(deadline=5))
    assert clock.seconds == begin


def test_a_run_that_is_ended_in_time_is_not_checked_afterwards(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 100)
    model = timed(table, FLAT, clock)
    for _ in range(2):  # the second one looks up what the first one chose
        begin = clock.seconds
        with pytest.warns(UserWarning, match="out of reach"):
            found = paradiff.sample(model, table, NOISE, paradiff.auto(deadline=7))
        assert found.status is Status.STOPPED
        assert 0 < found.estimated_error < 10
        assert clock.seconds <= begin + 7


def test_where_a_round_of_the_whole_chain_is_too_late_a_coarse_one_gives_the_preview(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 100)
    model = timed(table, LatencyCurve({1: 1.0, 2: 1.4, 64: 26.2}, {1: 0.0}), clock)
    deadline, begin = 32.0, clock.seconds
    with pytest.warns(UserWarning, match="out of reach"):
        found = paradiff.sample(model, table, NOISE, paradiff.auto(deadline=deadline))
    assert "chosen: collocation(tolerance=0.04), whose first round gives a preview of few nodes" in found.message
    assert clock.seconds <= begin + deadline


def test_an_observer_is_still_called_beside_a_deadline(clock: Clock) -> None:
    table = DDIM(SCHEDULE, 50)
    seen: list[int] = []
    paradiff.sample(
        timed(table, FLAT, clock), table, NOISE, paradiff.auto(deadline=1e3), observer=lambda r: seen.append(r.number)
    )
    assert seen == [*range(1, 51)]


# -- what contradicts itself ---------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"deadline": 0}, "the deadline, in seconds, is 0; it must be a number, positive"),
    ({"deadline": -1}, "the deadline, in seconds, is -1; it must be a number, positive"),
    ({"deadline": math.nan}, "the deadline, in seconds, is nan; it must be a number, positive"),
    ({"deadline": "soon"}, "the deadline, in seconds, is 'soon'; it must be a number"),
    ({"objective": "speed"}, "the objective is 'speed'; it must be one of latency, evaluations, memory, anytime"),
    ({"objective": 3}, "the objective is 3; it must be one of"),
    ({"objective": "memory", "deadline": 1}, "the objective is 'memory' and the deadline 1 s, which ask for different samples"),
    ({"objective": "latency", "deadline": 1}, "the objective is 'latency' and the deadline 1 s"),
]


@pytest.mark.parametrize(("given", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        paradiff.auto(**given)


def test_a_plan_decides_alone() -> None:
    table = DDIM(SCHEDULE, 50)
    plan = paradiff.plan(DATA.denoiser(table), table, NOISE, curve=FLAT, pilots=0)
    for given, what in (({"deadline": 1.0}, "a deadline"), ({"objective": "memory"}, "an objective")):
        with pytest.raises(ValueError, match=f"a plan and {what} were given, and either would decide"):
            paradiff.auto(plan=plan, **given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [None, 3, int])
def test_previews_are_shown_to_a_function(bad: Any) -> None:
    with pytest.raises(ValueError, match="what previews are shown to is"):
        Previews(bad)


# -- the command line ----------------------------------------------------------------------------------------------------


def test_the_command_writes_previews_with_their_errors(cli: Cli, tmp_path: Path) -> None:
    line = (
        "sample",
        "digits",
        "--sampler",
        "ddim",
        "--steps",
        50,
        "--previews",
        tmp_path / "previews",
        "--out",
        tmp_path / "o",
    )
    found = cli(*line)
    assert (found.code, found.err) == (0, "")
    written = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert written[0] <= "round-004.png"
    assert len(written) > 4
    assert re.search(r"round 4: estimated error [\d.e-]+, [\d.e-]+ s; ", found.out)
    found = cli(*line[:-1], tmp_path / "again")
    assert (found.code, "is not empty; give another one" in found.err) == (2, True)


def test_the_command_keeps_a_deadline_by_its_choice(cli: Cli, tmp_path: Path) -> None:
    line = ("sample", "digits", "--sampler", "ddim", "--steps", 50, "--out", tmp_path / "out", "--deadline")
    found = cli(*line, 3600)
    assert (found.code, "chosen: " in found.out) == (0, True)


def test_the_command_says_beforehand_what_is_out_of_reach(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    found = cli("sample", "digits", "--sampler", "ddim", "--steps", 50, "--out", tmp_path / "out", "--deadline", 1e-4)
    assert (found.code, found.err) == (3, "")
    text = " ".join(found.out.split())
    assert "warning: the deadline of 0.0001 s is out of reach for a finished sample" in text
    assert "the deadline of 0.0001 s ended it" in text


def test_the_command_takes_an_objective(cli: Cli, tmp_path: Path) -> None:
    line = ("sample", "digits", "--sampler", "ddim", "--steps", 14, "--out", tmp_path / "out", "--objective", "memory")
    found = cli(*line)
    assert found.code == 0
    assert "which holds one state a sample" in " ".join(found.out.split())
    found = cli(*line[:5], 14, "--out", tmp_path / "other", "-m", "objective=memory")
    assert "which holds one state a sample" in " ".join(found.out.split())
