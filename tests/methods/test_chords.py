# SPDX-License-Identifier: Apache-2.0
"""CHORDS: the counts of the authors' own code, an independent walk of its cores, its answers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import EXACT, SHAPE, TABLES, chain, gap, network
from torch import Tensor

from paradiff import Evaluator, Keyed, Recorded, Schedule, Solution, Table, chords, sample, sequential
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim
from paradiff.solver import ChordsRecord, Round, Status

CLOSED = ddim(Schedule.linear(), 50, spacing="trailing")
EIGHT = [0, 2, 4, 8, 16, 24, 32, 40]
THEIRS = [(8, 36), (17, 108), (24, 157), (31, 199), (38, 234), (45, 262), (48, 271), (49, 273), (50, 274)]
ONE_STEP = [name for name, table in TABLES.items() if not table.stochastic and table.band == 1]


def solved(table: Table, method: Any, samples: int = 1, **options: Any) -> Solution:
    return sample(network, table, Keyed(SHAPE, 0, samples), method, dtype=torch.float64, **options)


def recorded(seeds: range) -> Recorded:
    return Recorded((1, 8, 8), [torch.Generator().manual_seed(seed) for seed in seeds])


@pytest.mark.parametrize("answer", range(9))
def test_rounds_and_evaluations_are_those_of_the_authors_own_code(answer: int) -> None:
    model = digits().denoiser(CLOSED)
    found = sample(model, CLOSED, recorded(range(4)), chords(answers=answer), dtype=torch.float64)
    assert [(e.rounds, e.evaluations) for e in found.error_estimates] == [THEIRS[answer]] * 4
    plain = sample(model, CLOSED, recorded(range(4)), sequential(), dtype=torch.float64).sample
    errors = (found.sample - plain).square().flatten(1).mean(1).sqrt().tolist()
    if answer == 0:
        assert errors == pytest.approx([1.55e-1, 2.35e-1, 2.1e-2, 9.4e-3], rel=2e-2)  # theirs are given to two or three digits
    else:
        assert max(errors) < 5e-8


def walked(table: Table, starts: list[int]) -> list[Tensor]:
    """All answers, by a walk of each core along the whole of the slower one's path, one after the other, in float64."""
    noise, steps = Keyed(SHAPE), table.steps

    def output(i: int, x: Tensor) -> Tensor:
        m = network((table.scale[i] * x)[None], table.t[i : i + 1])[0]
        if table.clip is not None:
            clean = table.p[i] * x + table.q[i] * m
            m = m + table.clip_weight[i] * (table.clip(clean[None])[0] - clean)
        return m

    def step(i: int, x: Tensor) -> Tensor:
        return table.a[i, 0] * x + table.b[i, 0] * output(i, x)

    def long(left: int, right: int, x: Tensor) -> Tensor:
        clean = table.p[left] * x + table.q[left] * output(left, x)
        for i in range(left, right):
            x = table.a[i, 0] * x + table.b[i, 0] * (clean - table.p[i] * x) / table.q[i]
        return x

    path = {0: noise.start(0).double() * table.start_scale}
    for i in range(steps):
        path[i + 1] = step(i, path[i])
    first, answers = path[0], [path[steps]]
    for core in range(1, len(starts)):
        behind, lag = path, starts[core] - starts[core - 1] - 1  # the core behind is so many nodes behind
        first = long(starts[core - 1], starts[core], first)
        left, path = starts[core], {starts[core]: first}
        for i in range(starts[core], steps):
            path[i + 1] = step(i, path[i])
            if i - lag == left:
                path[i + 1] += long(left, i + 1, behind[left]) - long(left, i + 1, path[left])
                left = i + 1
        answers.append(path[steps])
    return [long(starts[-1], steps, first), *reversed(answers)]


@pytest.mark.parametrize("starts", [[0], [0, 1], [0, 5], [0, 2, 3, 7], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("name", ONE_STEP)
def test_every_answer_is_that_of_an_independent_walk(name: str, starts: list[int]) -> None:
    table, cores = TABLES[name], len(starts)
    answers = walked(table, starts)
    rounds = [cores, *(c + table.steps - starts[c] for c in reversed(range(cores)))]
    for answer, number in enumerate(rounds):
        found = solved(table, chords(starts=starts, answers=answer))
        last = max(k for k, other in enumerate(rounds) if other == number)  # of several in a round the last is taken
        assert found.rounds == number
        assert gap(found.sample[0], answers[last]) < EXACT, f"answer {answer}"


@pytest.mark.parametrize("name", ONE_STEP)
def test_the_last_answer_is_the_chain_and_alone_is_called_exact(name: str) -> None:
    table = TABLES[name]
    last = solved(table, chords(4, answers=4))
    assert gap(last.sample, chain(network, table, Keyed(SHAPE))[-1:]) < EXACT
    assert (last.status, last.estimated_error, last.rounds) == (Status.EXACT, 0, table.steps)
    before = solved(table, chords(4, answers=3))
    assert before.message == "stopped: answer 3 was made, as asked"
    assert before.estimated_error > 0


def test_an_observer_sees_every_answer_in_its_round_and_may_take_one() -> None:
    table, seen = TABLES["ddim"], {}

    def look(round: Round) -> bool:
        (record,) = round.records
        assert isinstance(record, ChordsRecord)
        if record.answer is not None:
            seen[record.answer] = (round.number, round.states()[0])
        return record.answer == 2

    found = solved(table, chords(4, 1e-9), observer=look)
    assert found.status is Status.STOPPED
    for answer, (number, state) in seen.items():
        alone = solved(table, chords(4, answers=answer))
        assert number == alone.rounds
        assert torch.equal(state, alone.sample[0])
    assert set(seen) == {0, 1, 2}
    assert torch.equal(found.sample[0], seen[2][1])


def test_samples_stop_each_at_an_answer_of_its_own_and_together_as_alone() -> None:
    model, table = load("digits"), load("digits").table("ddim", 50)
    together = sample(model, table, recorded(range(600, 606)), chords(tolerance=2e-2))
    assert len({e.rounds for e in together.error_estimates}) > 1
    for k in range(2):
        alone = sample(model, table, recorded(range(600 + k, 601 + k)), chords(tolerance=2e-2))
        assert alone.error_estimates[0].rounds == together.error_estimates[k].rounds
        assert gap(alone.sample[0], together.sample[k]) < 1e-4  # float32 networks differ with the rows of a call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_on_the_trained_digits_stay_below_their_estimates(dtype: torch.dtype) -> None:
    model = load("digits")
    table, evaluator = model.table("ddim", 25), Evaluator(model, dtype=torch.float32)
    plain = sample(evaluator, table, recorded(range(500, 508)), sequential(), dtype=dtype).sample
    found = sample(evaluator, table, recorded(range(500, 508)), chords(tolerance=5e-2), dtype=dtype)
    errors = (found.sample - plain).square().flatten(1).mean(1).sqrt().tolist()
    assert max(errors) > 1e-4
    assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))


def test_answers_that_agree_on_one_wrong_state_are_not_taken() -> None:
    """The last core's start and end follow from one state. Cores behind it were corrected since, so it is known to be wrong."""
    table, noise = ddim(Schedule.linear(), 40), Keyed((8,), 3, 2)

    def saturated(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x + (t / 1500)[:, None].to(x.dtype))

    def by_hand(k: int) -> Tensor:
        x = noise.start(k)
        for i in range(table.steps):
            x = table.a[i, 0].item() * x + table.b[i, 0].item() * saturated(x[None], table.t[i : i + 1])[0]
        return x

    plain = torch.stack([by_hand(k) for k in range(2)])
    for method in (chords(), chords(12), chords(12, rule="change"), chords(answers=1)):
        found = sample(saturated, table, noise, method)
        errors = (found.sample - plain).square().mean(1).sqrt().tolist()
        told = [max(e.estimated_error, 1e-4) for e in found.error_estimates]  # 1e-4: rounding of states of size 75
        assert all(error <= e for error, e in zip(errors, told, strict=True)), method
    model = load("digits")
    table, noise = model.table("ddim", 25), Keyed(model.shape, list(range(12)))
    plain = sample(model, table, noise, sequential()).sample
    found = sample(model, table, noise, chords(12))
    errors = (found.sample - plain).square().flatten(1).mean(1).sqrt().tolist()
    assert all(error <= max(e.estimated_error, 2e-6) for error, e in zip(errors, found.error_estimates, strict=True))


def test_the_published_starts_are_taken_in_proportion() -> None:
    assert chords(8).starts_on(CLOSED) == EIGHT
    assert chords(4).starts_on(ddim(Schedule.linear(), 100)) == [0, 16, 32, 64]
    for cores in range(1, 13):
        starts = chords(cores).starts_on(TABLES["ddim"])
        assert starts[0] == 0
        assert all(a < b for a, b in zip(starts, [*starts[1:], 12], strict=True))


def test_a_model_that_returns_nan_is_named() -> None:
    with pytest.raises(ValueError, match="is not finite after node 3"):
        sample(
            lambda x, t: torch.where((t < TABLES["ddim"].t[2]).view(-1, 1, 1), torch.nan, x),
            TABLES["ddim"],
            Keyed(SHAPE),
            chords(1),
            check="off",
        )


REFUSED: dict[str, Any] = {
    "chords is for deterministic chains.*table 'ddpm' is stochastic": lambda: solved(TABLES["ddpm"], chords(2)),
    "chords is for one-step samplers; a step of table 'dpmpp_2m' reads 2 states": lambda: solved(TABLES["dpmpp_2m"], chords(2)),
    "chords was given 13 cores; the chain has 12 steps": lambda: solved(TABLES["ddim"], chords(13)),
    "a core starts at node 12; the chain has 12 steps": lambda: solved(TABLES["ddim"], chords(starts=[0, 12])),
    r"starts is \[1, 4\]; the nodes must rise from 0": lambda: chords(starts=[1, 4]),
    r"starts is \[0, 4, 4\]; the nodes must rise from 0": lambda: chords(starts=[0, 4, 4]),
    "cores is 3 with 2 starts": lambda: chords(3, starts=[0, 4]),
    "answers is 5; 4 cores give the answers 0 to 4": lambda: chords(4, answers=5),
    "the tolerance is 0.*use sequential": lambda: chords(tolerance=0.0),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused_by_a_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()
