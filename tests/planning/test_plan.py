# SPDX-License-Identifier: Apache-2.0
"""A plan says what is fastest on a curve: parallel where calls are flat, sequential where they are in proportion, and why."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Cli
from torch import Tensor

import paradiff
from paradiff.planning import LatencyCurve, Plan
from paradiff.planning.candidates import FAMILIES, windows_of
from paradiff.planning.cost import Devices, Trace
from paradiff.planning.library import _at_tolerance, _library, alternative, beyond, known
from paradiff.planning.pilots import pilot
from paradiff.planning.store import FOLDER
from paradiff.planning.trials import Trials
from paradiff.planning.wish import Wish
from paradiff.solver.evaluator import Evaluator

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
SCHEDULE = paradiff.Schedule.linear()
DDIM, DDPM = paradiff.samplers.ddim, paradiff.samplers.ddpm
MODEL = paradiff.models.Mixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-0.8, 0.1, 0.3], [0.7, -0.2, 0.4]]), torch.tensor([0.02, 0.03])
)
FLAT = LatencyCurve({1: 0.05, 64: 0.06})
STEEP = LatencyCurve({1: 0.05, 2: 0.1, 64: 3.2})


def planned(steps: int = 50, curve: LatencyCurve = FLAT, samples: int = 1, make: Any = DDIM, **more: Any) -> Plan:
    table = make(SCHEDULE, steps)
    noise = paradiff.Keyed((3,), samples=samples)
    return paradiff.plan(MODEL.denoiser(table), table, noise, curve=curve, **{"pilots": 0, **more})


def test_flat_calls_pay_and_the_words_say_how_much() -> None:
    found = planned()
    assert found.pays
    assert found.gain > 2
    low, high = found.spread_of(found.best)
    assert low <= found.gain <= high
    assert re.match(r"a call on \d+ rows costs 1\.[0-2] single calls; 50 steps in \d+ rounds: \d\.\d times faster", found.why())
    assert found.best.label in found.why()
    assert found.simulated
    assert "simulated: the seconds are of the curve that was given" in str(found)


def test_calls_in_proportion_do_not_pay_on_a_short_chain_and_the_words_say_so() -> None:
    found = planned(10, STEEP)
    assert not found.pays
    assert found.method == paradiff.sequential()
    assert found.gain == 1
    assert found.why().startswith("sequential is faster here: a call on")
    assert "it would pay where such a call costs less than" in found.why()


def test_a_long_chain_pays_even_in_proportion_by_fewer_evaluations() -> None:
    found = planned(1000, STEEP, make=DDPM)
    assert found.best.family == "collocation"
    assert found.best.cost.rows < 1000


def test_choices_are_ranked_and_their_seconds_are_those_of_the_curve() -> None:
    found = planned()
    seconds = [one.seconds for one in found.choices]
    assert seconds == sorted(seconds)
    assert {one.family for one in found.choices} == {*FAMILIES, "sequential"}
    one = found.parallel
    assert one is not None
    assert one.seconds == pytest.approx(sorted(t.seconds(FLAT) for t in one.cost.traces)[len(one.cost.traces) // 2], rel=0.2)


def test_a_bound_on_rows_is_kept() -> None:
    found = planned(most=4)
    assert {one.window for one in found.choices if not one.sequential} == {2, 4}


def test_a_pilot_replaces_the_library_and_is_not_given_to_be_another() -> None:
    table = DDIM(SCHEDULE, 50)
    found = planned(pilots=1)
    assert found.best.cost.source == "trace"
    method = found.best.method
    run = paradiff.sample(MODEL.denoiser(table), table, paradiff.Keyed((3,), 2**40, 1), method)
    assert (found.best.cost.rounds, found.best.cost.rows) == (run.rounds, run.evaluations)
    assert "pilot runs of" in "".join(found.notes)


def test_a_pilot_is_made_where_none_looks_like_paying_so_that_the_refusal_is_of_this_model() -> None:
    found = planned(10, STEEP, pilots=1)
    assert not found.pays
    parallel = found.parallel
    assert parallel is not None
    assert parallel.cost.source == "trace"
    assert planned(10, STEEP, pilots=0).parallel.cost.source == "library"  # type: ignore[union-attr]


def test_a_pilot_of_a_short_run_is_of_a_model_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the rows which check a model for the first time are not taken for a part of every run."""
    checks: list[int] = []
    again = Evaluator.evaluate_again

    def counted(self: Evaluator, batch: Any) -> Tensor:
        checks.append(len(batch.x))
        return again(self, batch)

    monkeypatch.setattr(Evaluator, "evaluate_again", counted)
    table = DDIM(SCHEDULE, 25)
    evaluator = Evaluator(MODEL.denoiser(table))
    rows: list[int] = []
    for _ in range(2):
        pilot(evaluator, table, paradiff.Keyed((3,)), paradiff.parasolver(8), FLAT, 1e9, own=False)
        rows.append(sum(checks))
        checks.clear()
    assert rows[0] > 8
    assert rows[1] == 2 * 2  # both of its runs


def test_a_tolerance_between_measured_ones_costs_between_them() -> None:
    rows = [{"tolerance": 1e-3, "rounds": [40], "evaluations": [400], "own": 1.0}]
    rows += [{"tolerance": 4e-3, "rounds": [10], "evaluations": [100], "own": 1.0}]
    assert _at_tolerance(rows, 2e-3) == [pytest.approx((20, 200, 1))]
    assert _at_tolerance(rows, 1e-5) == [pytest.approx((40, 400, 1))]


@pytest.mark.parametrize(("tolerance", "change"), [(1e-5, "more"), (4e-3, None), (0.1, "fewer")])
def test_a_plan_says_where_its_rounds_are_of_another_tolerance(tolerance: float, change: str | None) -> None:
    said = [note for note in planned(tolerance=tolerance).notes if "are those of tolerance" in note]
    assert [note.split()[-1] for note in said] == ([] if change is None else [change])


def test_tolerances_are_those_that_were_measured_at_both_lengths_next_to_a_chains() -> None:
    assert beyond(DDIM(SCHEDULE, 50), 2e-3) is None
    assert beyond(DDPM(SCHEDULE, 1000), 1e-3) == (
        "rounds by the library's models are those of tolerance 0.004; at 0.001 there are more"
    )
    assert beyond(paradiff.samplers.flow_euler(28), 5e-3) is None


@pytest.mark.parametrize("steps", [10, 20, 28, 50])
def test_the_usual_lengths_of_flow_matching_were_measured(steps: int) -> None:
    lengths = {row["steps"] for row in _library()["rows"] if row["flow"]}
    assert steps in lengths


def test_pilots_that_lie_apart_are_followed_by_others_and_the_prediction_is_of_all() -> None:
    table = DDPM(SCHEDULE, 1000)

    def pilot(one: Any, number: int, plain: float) -> Trace:
        return Trace(((4.0, (20, 60, 25, 30, 28)[number]),), 1, 0.0)

    curve = LatencyCurve({1: 1.0, 4: 1.1})
    trials = Trials(table, 1, 4e-3, curve, Devices(), None, {})
    trials.make(2, lambda: Trace(((1.0, 1000),), 1, 0.0), pilot)
    traces = next(found for label, found in trials.made.items() if len(found) > 1)
    assert [trace.rounds for trace in traces] == [20, 60, 25, 30, 28]
    best = trials.plan([], Wish(4e-3), simulated=False).best
    assert best.seconds == pytest.approx(28 * 1.1)
    assert (best.fastest, best.slowest) == (pytest.approx(20 * 1.1), pytest.approx(60 * 1.1))


def test_pilots_that_agree_are_enough() -> None:
    trials = Trials(DDPM(SCHEDULE, 1000), 1, 4e-3, LatencyCurve({1: 1.0, 4: 1.1}), Devices(), None, {})
    trials.make(2, lambda: Trace(((1.0, 1000),), 1, 0.0), lambda one, number, plain: Trace(((4.0, 20 + number),), 1, 0.0))
    assert {len(found) for label, found in trials.made.items() if "sequential" not in label} == {2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("make", "steps"), [(DDIM, 25), (DDIM, 70), (DDPM, 100), (DDPM, 1000)])
def test_every_method_tells_its_cost(family: str, make: Any, steps: int) -> None:
    table = make(SCHEDULE, steps)
    costs = [known(table, family, window, 4e-3) for window in windows_of(steps)]
    found = [cost for cost in costs if cost is not None]
    assert found
    for cost in found:
        assert 1 <= cost.rounds < steps
        assert cost.rows >= cost.rounds


def test_samples_together_cost_the_rounds_of_the_slowest_and_the_rows_of_all() -> None:
    table = DDIM(SCHEDULE, 50)
    one, four = known(table, "parasolver", 8, 4e-3, 1), known(table, "parasolver", 8, 4e-3, 4)
    assert one is not None
    assert four is not None
    assert four.rows == pytest.approx(4 * one.rows, rel=0.05)
    assert four.rounds >= one.rounds


def test_devices_share_rows_and_pay_for_the_exchange() -> None:
    curve = LatencyCurve({1: 1.0, 2: 2.0})
    assert Devices(4, latency=0.0).seconds(curve, 8) == 2
    assert Devices(4, latency=0.0).seconds(curve, 9) == 3
    assert Devices(4, latency=0.5, seconds_a_row=0.1).seconds(curve, 8) == pytest.approx(2 + 0.5 + 0.8)
    assert Devices(4).seconds(curve, 1) == 1
    alone, eight = planned(curve=STEEP), planned(curve=STEEP, devices=8)
    assert eight.gain > max(2, alone.gain)
    assert eight.sequential.seconds == alone.sequential.seconds
    assert "simulated: the seconds are of 8 devices" in str(eight)


def test_the_alternative_is_sequential_and_on_equal_terms() -> None:
    found = alternative(DDIM(SCHEDULE, 50))
    assert found is not None
    assert 4 <= found.fewest <= found.most < 50
    assert f"{found.solver} of" in planned().sequential_alternative()
    assert alternative(DDPM(SCHEDULE, 50)) is None
    assert "depends on every step's noise" in planned(100, make=DDPM).sequential_alternative()


def test_a_plan_answers_an_objective_and_a_deadline() -> None:
    flat = planned(curve=FLAT)
    assert flat.answer is None
    assert planned(curve=FLAT, objective="latency").answer is None
    fewest = planned(curve=FLAT, objective="evaluations")
    assert str(fewest.answer).startswith("for the fewest evaluations: sequential(), since its 50 evaluations")
    assert fewest.method.name == "sequential" != flat.method.name
    assert planned(500, curve=STEEP, objective="evaluations").method.name == "collocation"
    assert planned(curve=FLAT, objective="memory").call == "sequential()"
    soon = planned(curve=FLAT, objective="anytime")
    assert "whose first round gives a preview of the sample" in str(soon)
    plain, best = flat.sequential.seconds, flat.best.slowest
    assert planned(curve=FLAT, deadline=2 * plain).call == "sequential()"
    between = planned(curve=FLAT, deadline=(plain + best) / 2)
    assert between.method.name != "sequential"
    assert f"for a deadline of {(plain + best) / 2:g} s: " in str(between)
    assert between.to_json()["answer"]["call"] == between.call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beyond_reach = planned(curve=FLAT, deadline=best / 100)
    assert "is out of reach for a finished sample" in str(beyond_reach)
    for asked in ({"objective": "speed"}, {"deadline": 0}, {"deadline": 1.0, "objective": "memory"}):
        with pytest.raises(ValueError, match=r"objective|deadline"):
            planned(curve=FLAT, **asked)
    auto = paradiff.auto(plan=between)
    assert f"as planned: for a deadline of {(plain + best) / 2:g} s" in auto.reason(DDIM(SCHEDULE, 50))


def test_a_plan_is_written_and_drawn(tmp_path: Path) -> None:
    found = planned()
    found.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["best"] == found.best.label
    assert len(content["choices"]) == len(found.choices)
    assert LatencyCurve.of_json(content["curve"]).points == FLAT.points
    found.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_this_machines_curve_and_traces_are_kept_and_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    table, calls = DDIM(SCHEDULE, 12), 0
    exact = MODEL.denoiser(table)

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return exact(x, t)

    first = paradiff.plan(model, table, paradiff.Keyed((3,)), seconds=0.3)
    assert calls > 0
    calls = 0
    again = paradiff.plan(model, table, paradiff.Keyed((3,)))
    assert calls == 0
    assert again.best.label == first.best.label
    assert first.sequential.cost.source == again.sequential.cost.source == "trace"
    trace = next(tmp_path.glob("trace-*.json"))
    trace.write_text(trace.read_text().replace('"paradiff trace 1"', '"paradiff trace 0"'))
    assert "was left out, since it does not say 'paradiff trace 1'" in str(
        paradiff.plan(model, table, paradiff.Keyed((3,)), pilots=0)
    )


def test_traces_go_through_json_and_others_are_refused() -> None:
    trace = Trace.of_widths([1, 4, 4, 4, 2], 1, 0.5)
    assert trace.runs == ((1, 1), (4, 3), (2, 1))
    assert (trace.rounds, trace.rows) == (5, 15)
    assert Trace.of_json(json.loads(json.dumps(trace.to_json()))) == trace
    good = trace.to_json()
    for bad in (
        {},
        3,
        None,
        good | {"runs": []},
        good | {"runs": [[1, 0]]},
        good | {"samples": 0},
        good | {"beside": float("inf")},
    ):
        with pytest.raises(ValueError, match="the trace is"):
            Trace.of_json(bad)


def test_a_model_that_takes_few_rows_is_planned_within_them() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("too many")
        time.sleep(1e-3)
        return x

    found = paradiff.plan(model, DDIM(SCHEDULE, 10), paradiff.Keyed((3,)), pilots=0, seconds=0.1)
    assert found.curve.most == 3
    assert "a call has at most 3 rows: the model failed on more (RuntimeError: too many)" in str(found)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tolerance": 0}, "the tolerance is 0"),
    ({"tolerance": "x"}, "the tolerance is 'x'"),
    ({"pilots": -1}, "pilots is -1"),
    ({"pilots": 10**9}, "at most 1000"),
    ({"devices": 0}, "devices is 0"),
    ({"most": 0}, "the most rows of a sample is 0"),
    ({"curve": {1: 1.0}}, "give a LatencyCurve"),
    ({"seconds": 0, "curve": None}, "the seconds of the measurement is 0"),
]


@pytest.mark.parametrize(("given", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_other_arguments_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        planned(10, **given)


def test_a_plan_needs_a_chain_and_a_shape() -> None:
    with pytest.raises(ValueError, match="the chain is None; it must be a Table"):
        paradiff.plan(lambda x, t: x)
    with pytest.raises(ValueError, match="the model does not tell the shape of its samples"):
        paradiff.plan(lambda x, t: x, DDIM(SCHEDULE, 10))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--devices", "0"], "--devices is 0"),
        (["--batch", "0"], "--batch is 0"),
        (["--tolerance", "0"], "the tolerance is 0"),
        (["--curve", "1"], "the latency curve is '1'"),
        (["--plot", "/nowhere/plan.png"], "in a folder that does not exist"),
        (["--pilots", "-1"], "pilots is -1"),
        (["--prompt", "x"], "--prompt was given, but 'digits' is an unconditional pixel model"),
    ],
)
def test_the_command_refuses_in_a_sentence(given: list[str], sentence: str, cli: Cli) -> None:
    found = cli("plan", "digits", "--steps", "10", "--sampler", "ddim", *given)
    assert found.code == 2
    assert sentence in found.err


def test_the_command_prints_draws_and_writes(cli: Cli, tmp_path: Path) -> None:
    files = ["--plot", str(tmp_path / "plan.png"), "--json", str(tmp_path / "plan.json")]
    found = cli("plan", "digits", "--sampler", "ddim", "--steps", "50", "--pilots", "0", "--curve", "1:1,64:1.2", *files)
    assert found.code == 0
    assert "50 steps in" in found.out
    assert {p.name for p in tmp_path.iterdir()} == {"plan.png", "plan.json"}


def test_the_command_plans_a_pipelines_call(cli: Cli) -> None:
    call = ["--prompt", "a red circle", "--steps", "6", "--guidance", "4"]
    found = cli("plan", "shapes", *call, "--pilots", "0")
    assert found.code == 0
    assert "DDIMScheduler, 6 steps, deterministic" in found.out
    found = cli("plan", "shapes", *call, "--batch", "2")
    assert found.code == 2
    assert "is called once a seed" in found.err
