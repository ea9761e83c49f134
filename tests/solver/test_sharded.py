# SPDX-License-Identifier: Apache-2.0
"""Rounds shared by ranks: the samples and records of one process, one gather a round, and one sentence for every fault."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import METHODS, SHAPE, TABLES, network
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from paradiff import Evaluator, Keyed, Schedule, Solution, auto, collocation, jacobi, parasolver, quasi_newton, sample, srds
from paradiff.samplers import ddim
from paradiff.solver import Batch, Deadline, Method, Ranks, agreement
from paradiff.solver.crew import dealt, shares_of
from paradiff.solver.sharded import HEAD, by_speed
from paradiff.solver.watch import CALL, ENDED, OWN, WAIT, verdict

SAMPLES = 3
BY_NAME: dict[str, Callable[[], Method]] = {
    "jacobi": lambda: jacobi(window=5),
    "parasolver": parasolver,
    "quasi_newton": lambda: quasi_newton(window=7),
    "srds": lambda: srds(3, tolerance=1e-3),
    "collocation": lambda: collocation(window=4),
}
OF_TABLES = ("sequential", "paradigms", "parasolver, uneven strides", "quasi-Newton", "piadm, 3 blocks in flight")
CASES = [("ddpm", name) for name in (*OF_TABLES, *BY_NAME)] + [("dpmpp_2m", "jacobi"), ("heun", "srds")]


def method_of(name: str, chain: str) -> Method:
    return BY_NAME[name]() if name in BY_NAME else METHODS[name](TABLES[chain])


def mixed(x: Tensor, t: Tensor) -> Tensor:
    """A network whose rounding depends on the number of rows: a product of matrices."""
    flat = x.flatten(1)
    weights = torch.linspace(-1, 1, flat.shape[1] * 64, dtype=x.dtype).view(-1, 64)
    return (0.2 * torch.tanh(flat @ weights) @ weights.T / 8).view(x.shape) + network(x, t)


def told(solution: Solution) -> tuple[Any, ...]:
    """All that a run gives, but for its clock."""
    estimates = [repr(estimate) for estimate in solution.error_estimates]
    records = [record.to_json() for record in solution.history]
    return solution.sample, solution.rounds, solution.evaluations, solution.checked_rows, estimates, records, solution.message


def sampled(chain: str, name: str, dtype: torch.dtype, **options: Any) -> Solution:
    evaluator = Evaluator(mixed, **options)
    return sample(evaluator, TABLES[chain], Keyed(SHAPE, range(SAMPLES)), method_of(name, chain), dtype=dtype)


def every_method(mesh: DeviceMesh, dtype: torch.dtype, max_rows: int | None = None) -> list[tuple[Any, ...]]:
    ranks = Ranks(mesh)
    return [told(sampled(chain, name, dtype, mesh=ranks, max_rows=max_rows)) for chain, name in CASES]


# The most ranks are the first size, so that where each value is run once both dtypes are exchanged by them.
@pytest.mark.parametrize("size", [4, 3, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_and_records_are_those_of_one_process(size: int, dtype: torch.dtype) -> None:
    """The same calls give the same bits, whatever the dtype."""
    max_rows = 4 if size == 2 else None
    ended = on_ranks(size, every_method, dtype, max_rows)
    assert [one.error for one in ended] == [""] * size
    for k, (chain, name) in enumerate(CASES):
        alone = told(sampled(chain, name, dtype, shares=size, max_rows=max_rows))
        for one in ended:
            sample_of_rank, *others = one.value[k]
            assert torch.equal(sample_of_rank, alone[0]), (chain, name)
            assert others == list(alone[1:]), (chain, name)


def test_samples_in_float32_are_those_of_one_call_within_rounding() -> None:
    ended = on_ranks(2, every_method, torch.float32)
    for k, (chain, name) in enumerate(CASES):
        alone = sampled(chain, name, torch.float32)
        # States are of size 1 to 3. Other calls round otherwise, and a rule that is met by a hair takes a sweep more.
        tolerance = 1e-6 if method_of(name, chain).tolerance == 0 else 2e-3
        for one in ended:
            assert float((one.value[k][0] - alone.sample).abs().max()) <= tolerance, (chain, name)


def with_shares(mesh: DeviceMesh | None) -> list[tuple[Any, ...]]:
    """A run, and one whose calls are padded."""
    return [told(sampled("ddpm", "parasolver", torch.float64, mesh=mesh, shares=4, pad=pad)) for pad in (False, True)]


def test_with_shares_of_their_own_samples_do_not_depend_on_the_number_of_ranks() -> None:
    alone = with_shares(None)
    for one in on_ranks(3, with_shares):
        for (found, *others), (wanted, *wanted_others) in zip(one.value, alone, strict=True):
            assert torch.equal(found, wanted)
            assert others == wanted_others


class Knowing(nn.Module):
    """A network that knows some times alone, or all."""

    def __init__(self, times: set[float]) -> None:
        super().__init__()
        self.times, self.setting = times, False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.times and (unknown := {float(one) for one in t} - self.times):
            raise KeyError(unknown)
        return network(x, t)


def three_runs(mesh: DeviceMesh, knows_all: bool) -> list[int]:
    """Rows that are checked in three runs, before the last of which one rank's model is changed."""
    table, ranks, rows = ddim(Schedule.linear(), 20), Ranks(mesh), []
    model = Knowing(set() if knows_all else {float(t) for t in table.t})
    for number in range(3):
        model.setting = number == 2 and ranks.place == 1
        noise = Keyed(SHAPE, [number])
        found = sample(Evaluator(model, mesh=ranks), table, noise, jacobi(6, 0.0), dtype=torch.float64)
        alone = sample(model, table, noise, jacobi(6, 0.0), dtype=torch.float64, check="off")
        assert torch.allclose(found.sample, alone.sample, rtol=0, atol=1e-12)
        rows.append(found.checked_rows)
    return rows


@pytest.mark.parametrize("knows_all", [True, False])
def test_ranks_share_the_last_rows_of_a_check_and_decide_alike_on_what_was_seen(knows_all: bool) -> None:
    first, second, third = on_ranks(3, three_runs, knows_all)
    assert [one.error for one in (first, second, third)] == [""] * 3
    assert first.value == second.value == third.value
    assert [rows > 10 for rows in first.value] == [True, False, True]


def first_check(mesh: DeviceMesh | None, fault: str) -> tuple[list[int], int, str]:
    """The rows of this rank's calls between its first and its second part of a round, all rows that are checked, and what a
    run ends with."""
    ranks, calls = None if mesh is None else Ranks(mesh), list[int]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        if fault == "one time":
            return network(x, t[:1].expand(len(x)))
        return network(x, t) + (x.mean(0, keepdim=True) if fault == "the mean of three rows" and len(x) == 3 else 0)

    begins = []

    class Begun(Evaluator):
        def __call__(self, batch: Batch) -> Tensor:
            outputs = super().__call__(batch)
            begins.append((len(calls), -(-len(batch.x) // (ranks.size if ranks else 1))))
            return outputs

    noise, method = Keyed(SHAPE, range(4)), jacobi(window=6, tolerance=0.0)
    try:
        found = sample(Begun(model, mesh=ranks), ddim(Schedule.linear(), 40), noise, method, dtype=torch.float64)
    except ValueError as error:
        return [], 0, str(error)
    (first, _), (second, rows) = begins[:2]
    assert calls[second - 1] == rows
    return calls[first : second - 1], found.checked_rows, ""


@pytest.mark.parametrize(("size", "most", "rows"), [(2, 4, 7), (4, 3, 7), (8, 3, 14)])
def test_ranks_share_the_check_of_a_first_round(size: int, most: int, rows: int) -> None:
    """Seven rows, of which three have to be evaluated together and two after each other; by eight ranks each of them twice."""
    alone = first_check(None, "")
    assert sum(alone[0]) == 7
    ended = on_ranks(size, first_check, "")
    assert [one.error for one in ended] == [""] * size
    assert {one.value[1] for one in ended} == {alone[1]}
    assert sum(sum(one.value[0]) for one in ended) == rows
    assert max(sum(one.value[0]) for one in ended) == most


@pytest.mark.parametrize("fault", ["one time", "the mean of three rows"])
def test_what_one_rank_sees_in_the_check_of_a_first_round_ends_the_run_on_all(fault: str) -> None:
    wanted = "Its rows influence each other"
    assert wanted in first_check(None, fault)[2]
    for one in on_ranks(4, first_check, fault):
        assert one.error == ""
        assert wanted in one.value[2]


def counted(mesh: DeviceMesh, steps: int) -> tuple[set[int], int, int]:
    """Exchanges of each round but the first, which begins the run, and the bytes that they moved to this rank and had to."""
    ranks, exchanges, moved, needed = Ranks(mesh), set(), [0], [0]

    class Counted(Evaluator):
        def __call__(self, batch: Batch) -> Tensor:
            before = ranks.exchanges, ranks.received
            outputs = super().__call__(batch)
            if self.rounds > 1:
                own = dict(enumerate(shares_of(len(batch.x), ranks.size))).get(ranks.place, range(0))
                exchanges.add(ranks.exchanges - before[0])
                moved[0] += ranks.received - before[1]
                needed[0] += outputs.nbytes // len(batch.x) * (len(batch.x) - len(own))
            return outputs

    evaluator = Counted(lambda x, t: x / 2, mesh=ranks)
    noise = Keyed((4, 16, 16), [0, 1])
    sample(evaluator, ddim(Schedule.linear(), steps), noise, jacobi(window=6, tolerance=0.0))
    return exchanges, moved[0], needed[0]


def test_a_round_is_one_gather_of_hardly_more_bytes_than_have_to_move() -> None:
    for one in on_ranks(3, counted, 40):
        exchanges, moved, needed = one.value
        assert exchanges == {1}
        assert needed < moved <= 1.2 * needed


M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on are mapped each by itself


def growth(mesh: DeviceMesh) -> int:
    """By how many bytes a long chain, after a short one, raises the most memory that a rank had."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # a freed state is the system's again, and no gap among kept ones
    method, noise = parasolver(window=4, tolerance=0.0), Keyed((4, 256, 256), [0])
    ranks, most = Ranks(mesh), []
    for steps in (20, 20, 100):
        sample(Evaluator(lambda x, t: x / 2, mesh=ranks), ddim(Schedule.linear(), steps), noise, method, check="off")
        most.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return most[2] - most[1]


def test_a_ranks_memory_does_not_grow_with_the_number_of_steps() -> None:
    state = 4 * 4 * 256 * 256
    for one in on_ranks(2, growth):
        assert one.value < 10 * state  # of 80 more steps


def idle(mesh: DeviceMesh) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            sample(Evaluator(network, mesh=mesh), TABLES["ddpm"], Keyed(SHAPE, [0]), parasolver(window=2))
    return [str(one.message) for one in caught]


def test_more_ranks_than_rows_work_and_are_told_the_useful_number() -> None:
    first, *others = on_ranks(4, idle)
    assert (
        first.value == ["4 ranks share rounds of at most 2 rows, so 2 of them are useful: start fewer, or widen the window"] * 2
    )
    assert [one.value for one in others] == [[]] * 3


def out_of_memory(mesh: DeviceMesh, limit: int) -> tuple[Any, ...]:
    ranks = Ranks(mesh)

    def small(x: Tensor, t: Tensor) -> Tensor:
        if ranks.place == 1 and len(x) > limit:
            raise torch.OutOfMemoryError(f"no room for {len(x)} rows")
        return network(x, t)

    evaluator = Evaluator(small, mesh=ranks)
    solution = sample(evaluator, TABLES["ddpm"], Keyed(SHAPE, range(4)), jacobi(tolerance=0.0), dtype=torch.float64)
    return solution.sample, evaluator.max_rows


def test_where_one_rank_runs_out_of_memory_all_keep_to_the_smaller_bound() -> None:
    alone = sample(network, TABLES["ddpm"], Keyed(SHAPE, range(4)), jacobi(tolerance=0.0), dtype=torch.float64)
    ended = on_ranks(2, out_of_memory, 5)
    assert [one.error for one in ended] == ["", ""]
    assert len({one.value[1] for one in ended}) == 1
    assert ended[0].value[1] <= 5
    for one in ended:
        assert torch.allclose(one.value[0], alone.sample, rtol=0, atol=1e-13)
    assert all(
        "ran out of memory at one row" in one.error and "rank 1 of 2" in one.error for one in on_ranks(2, out_of_memory, 0)
    )


def meshed(mesh: DeviceMesh, axis: str) -> Any:
    """A run on one axis of two, whose network sums over the other axis, as context parallelism does."""
    import torch.distributed as dist

    group = mesh.get_group("context")

    def half(x: Tensor, t: Tensor) -> Tensor:
        part = network(x, t) * (mesh.get_local_rank("context") + 1)
        dist.all_reduce(part, group=group)
        return part / 3

    table, noise = TABLES["ddpm"], Keyed(SHAPE, range(3))
    return sample(Evaluator(half, mesh=mesh, mesh_axis=axis), table, noise, parasolver(), dtype=torch.float64).sample


def test_the_axis_of_time_composes_with_others() -> None:
    alone = sample(network, TABLES["ddpm"], Keyed(SHAPE, range(3)), parasolver(), dtype=torch.float64).sample
    for one in on_ranks(4, meshed, "time", axes={"time": 2, "context": 2}):
        assert one.error == ""
        assert torch.allclose(one.value, alone, rtol=0, atol=1e-12)


def test_a_mesh_without_the_axis_is_refused_on_every_rank() -> None:
    for one in on_ranks(2, meshed, "when", axes={"time": 1, "context": 2}):
        assert one.error == (
            "ValueError: the mesh has no axis 'when'; its axes are 'time', 'context': give one of them as mesh_axis"
        )
        assert one.code == 1


def by_clock(mesh: DeviceMesh) -> tuple[str, int]:
    """A run with a deadline, on ranks whose own clocks differ."""
    ranks = Ranks(mesh)

    def slow(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.02)
        return network(x, t)

    deadline = Deadline(0.2, clock=ranks.tell)
    noise = Keyed(SHAPE, [0])
    solution = sample(Evaluator(slow, mesh=ranks), TABLES["ddpm"], noise, jacobi(tolerance=0.0), observer=deadline)
    return solution.status.code, solution.rounds


def test_a_deadline_ends_all_ranks_in_the_same_round() -> None:
    first, second = on_ranks(2, by_clock)
    assert first.value == second.value
    assert first.value[0] == "stopped"


def best_in_time(mesh: DeviceMesh) -> tuple[Any, ...]:
    """A run by `auto` with a deadline, on ranks whose own clocks differ, with the number of exchanges beyond those of a run
    without one; and a run with a deadline that is far away."""
    ranks = Ranks(mesh)
    own, ahead = time.monotonic, 1e4 * ranks.place

    def slow(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.02)
        return network(x, t)

    def run(method: Method) -> tuple[Solution, int]:
        before = ranks.exchanges
        found = sample(evaluator, TABLES["ddpm"], Keyed(SHAPE, [0]), method, check="off")
        return found, ranks.exchanges - before - found.rounds

    evaluator = Evaluator(slow, mesh=ranks)
    run(jacobi(2, 0.0))  # the ranks' handshake
    _, usual = run(jacobi(2, 0.0))
    time.monotonic = lambda: own() + ahead
    found, more = run(auto(deadline=0.07))
    whole, _ = run(auto(deadline=1e6))
    return found.status.code, found.rounds, found.sample, found.message, more - usual, whole.status.code, whole.message


def test_auto_keeps_a_deadline_by_one_clock_without_further_exchanges() -> None:
    first, *others = on_ranks(3, best_in_time)
    assert [one.error for one in (first, *others)] == [""] * 3
    code, rounds, _, message, more, whole, said = first.value
    assert (code, whole) == ("stopped", "converged")
    assert 1 <= rounds <= 8
    assert "the deadline of 0.07 s ended it" in message
    assert "ranks choose alike, by no clock" in said
    assert more == 1  # at its begin
    for one in others:
        assert torch.equal(one.value[2], first.value[2])
        assert one.value[3:] == first.value[3:]


def warm(mesh: DeviceMesh | None, alike: bool = True) -> list[tuple[Any, ...]]:
    """Runs that begin from the trajectory of one before."""
    ranks = None if mesh is None else Ranks(mesh)
    evaluator, found, table = Evaluator(mixed, mesh=ranks, shares=2), [], ddim(Schedule.linear(), 30)
    for method in (quasi_newton(8), parasolver(8), collocation()):
        before = sample(evaluator, table, Keyed(SHAPE, [1]), method, keep_trajectory=True)
        assert before.trajectory is not None
        if not alike and ranks is not None and ranks.place == 1:
            with torch.inference_mode():
                before.trajectory.parts[0].states.mul_(1.01)
        found.append(told(sample(evaluator, table, Keyed(SHAPE, [0]), method, start=before)))
    return found


def test_a_run_on_ranks_begins_from_a_trajectory() -> None:
    alone = warm(None)
    for one in on_ranks(2, warm):
        assert one.error == ""
        for (found, *others), (wanted, *wanted_others) in zip(one.value, alone, strict=True):
            assert torch.equal(found, wanted)
            assert others == wanted_others


def test_ranks_that_begin_from_other_trajectories_are_told_apart() -> None:
    for one in on_ranks(2, warm, False):
        assert re.search("rank 1 .* came to other states than rank 0", one.error), one.error
        assert one.code == 1


TIMEOUT = 8.0


def faulty(mesh: DeviceMesh, fault: str, begun: Path | None = None, place: int = 1) -> int:
    """A run in which the rank at a place is at fault, from when on a file is there."""
    ranks, calls = Ranks(mesh, timeout=TIMEOUT), [0]
    bad = ranks.place == place
    if bad and fault == "paradiff":
        agreement.__version__ = "7.7"
    if bad and fault == "torch":
        torch.__version__ = "7.7"
    if bad and fault == "Python":
        agreement.platform.python_version = lambda: "7.7"
    scale = torch.ones(3, dtype=torch.float64)
    if bad and fault == "weights":
        scale[1] += 1e-12

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        m = network(x, t) * scale
        if bad and calls[0] == 9:
            if begun is not None:
                begun.touch()
            if fault == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hangs":
                time.sleep(60)
            if fault == "raises":
                raise RuntimeError("device lost")
            if fault == "NaN":
                m[0, 0, 0] = float("nan")
            if fault == "leaves":
                raise SystemExit(0)
        return m

    def observer(round: Any) -> bool:
        if bad and fault == "state" and round.number == 2:
            round.solvers[0].x.add_(1e-9)
        return bad and fault == "stops" and round.number == 2

    method = jacobi(tolerance=0.0, window=4 if bad and fault == "method" else 6)
    noise = Keyed(SHAPE, [0, 1, 2 + (bad and fault == "noise")])
    evaluator = Evaluator(model, mesh=ranks)
    watching = observer if fault in ("state", "stops") else None
    return sample(evaluator, TABLES["ddpm"], noise, method, dtype=torch.float64, observer=watching, check="off").rounds


FAULTS = {
    "killed": "rank 1 of 3 (process N on H) does not answer at exchange E: died, stopped or cut off",
    "stopped": "rank 1 of 3 (process N on H) does not answer at exchange E: died, stopped or cut off",
    "hangs": "rank 1 of 3 (process N on H) hangs at exchange E: in a network call for S s, where others wait for S s",
    "raises": "rank 1 of 3 (process N on H) failed at exchange E, where others did not: RuntimeError: device lost",
    "NaN": "rank 1 of 3 (process N on H) returned NaN or infinity at exchange E for a row that rank 2 of 3",
    "leaves": "rank 1 of 3 (process N on H) ended after exchange E, while others wait",
    "stops": "rank 1 of 3 (process N on H) ended after exchange E, while others wait",
    "weights": "rank 1 of 3 (process N on H) was started with another weights scale than rank 0 of 3",
    "paradiff": "rank 1 of 3 (process N on H) was started with another version of paradiff than rank 0 of 3",
    "torch": "rank 1 of 3 (process N on H) was started with another version of torch than rank 0 of 3",
    "Python": "rank 1 of 3 (process N on H) was started with another version of Python than rank 0 of 3",
    "method": "rank 1 of 3 (process N on H) was started with another method than rank 0 of 3",
    "noise": "rank 1 of 3 (process N on H) was started with another noise than rank 0 of 3",
    "state": "rank 1 of 3 (process N on H) came to other states than rank 0 of 3",
}


def plain(sentence: str) -> str:
    """A sentence without the numbers that differ from run to run."""
    for pattern, name in (
        (r"process \d+ on [^)]+", "process N on H"),
        (r"exchange \d+", "exchange E"),
        (r"for \d+ s", "for S s"),
    ):
        sentence = re.sub(pattern, name, sentence)
    return sentence


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_ends_all_in_time_with_one_sentence_that_names_it(fault: str, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    first, bad, last = on_ranks(3, faulty, fault, begun)
    if begun.exists():
        assert time.time() - begun.stat().st_mtime < TIMEOUT
    for one in (first, last):
        assert plain(one.error).startswith(f"RanksFailed: {FAULTS[fault]}"), one
        assert one.code == 1
    if fault not in ("stops",):
        assert bad.code != 0


@pytest.mark.skipif(sys.platform != "linux", reason="a stopped process is found in /proc")
def test_a_rank_that_keeps_the_store_and_is_stopped_ends_all_in_time(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    ended = on_ranks(3, faulty, "stopped", begun, 0)
    assert time.time() - begun.stat().st_mtime < TIMEOUT
    for one in ended:
        assert one.error.startswith("RanksFailed: rank 0, or the launcher that keeps the ranks' store, is gone"), ended
        assert one.code == 1


def test_without_a_fault_nothing_is_said() -> None:
    assert [(one.error, one.code) for one in on_ranks(3, faulty, "none")] == [("", 0)] * 3


def answer(doing: str, step: int = 5, seconds: float = 0.0) -> dict[str, Any]:
    return {"doing": doing, "step": step, "for": seconds}


@pytest.mark.parametrize(
    ("why", "answers", "sentence"),
    [
        ("lost", {0: answer(WAIT), 2: answer(CALL)}, "b does not answer at exchange 5: died, stopped or cut off"),
        ("signal", {0: answer(WAIT)}, "b and c do not answer at exchange 5: died, stopped or cut off"),
        ("signal", {0: answer(WAIT), 1: answer(CALL), 2: answer(WAIT)}, "a was ended by a signal at exchange 5"),
        (
            "late",
            {0: answer(WAIT), 1: answer(CALL, 5, 31.2), 2: answer(WAIT)},
            "b hangs at exchange 5: in a network call for 31 s, where others wait for 30 s",
        ),
        (
            "late",
            {0: answer(WAIT), 1: answer(WAIT), 2: answer(OWN, 4)},
            "c does not come to exchange 5 within 30 s, and was last at 4",
        ),
    ],
)
def test_the_verdict_names_who_does_not_answer_hangs_or_does_not_come(
    why: str, answers: dict[int, dict[str, Any]], sentence: str
) -> None:
    fault = {"by": 0, "why": why, "text": "", "step": 5}
    assert verdict(fault, answers, ["a", "b", "c"], 30.0) == sentence


def test_the_verdict_names_a_rank_that_has_ended() -> None:
    answers = {0: answer(WAIT), 1: answer(ENDED, 4), 2: answer(WAIT)}
    assert verdict({"by": 0, "why": "lost", "text": "", "step": 5}, answers, ["a", "b", "c"], 30.0).startswith(
        "b ended after exchange 4, while others wait: start all ranks with the same script"
    )


@pytest.mark.parametrize(
    ("count", "seconds", "lengths"),
    [
        (10, [1.0, 1.0], [5, 5]),
        (9, [1.0, 2.0], [6, 3]),
        (7, [1.0, 1.0, 1.0], [3, 2, 2]),
        (1, [2.0, 1.0], [0, 1]),
        (6, [0.0, 1.0], [3, 3]),
    ],
)
def test_rows_go_to_the_rank_that_has_done_them_first(count: int, seconds: list[float], lengths: list[int]) -> None:
    assert by_speed(count, seconds) == lengths


def uneven(mesh: DeviceMesh) -> tuple[Any, ...]:
    ranks = Ranks(mesh, balance="speed")

    def slower(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.004 * len(x) * (4 if ranks.place == 0 else 1))
        lengths.append(len(x))
        return network(x, t)

    lengths: list[int] = []
    table, noise = TABLES["ddpm"], Keyed(SHAPE, range(2))
    solution = sample(Evaluator(slower, mesh=ranks), table, noise, jacobi(tolerance=0.0), dtype=torch.float64, check="off")
    return solution.sample, lengths[-1]


def test_a_slower_rank_gets_fewer_rows() -> None:
    alone = sample(network, TABLES["ddpm"], Keyed(SHAPE, range(2)), jacobi(tolerance=0.0), dtype=torch.float64).sample
    slow, fast = on_ranks(2, uneven)
    assert slow.value[1] < fast.value[1]
    for one in (slow, fast):
        assert torch.allclose(one.value[0], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("count", "shares", "members", "lengths"),
    [
        (10, 2, 2, [[5], [5]]),
        (10, 4, 2, [[3, 3], [3, 1]]),
        (2, 4, 2, [[1, 1], []]),
        (5, 2, 3, [[3], [2], []]),
        (0, 2, 2, [[], []]),
    ],
)
def test_stretches_follow_each_other_from_member_to_member(
    count: int, shares: int, members: int, lengths: list[list[int]]
) -> None:
    found = dealt(count, shares, members)
    assert [[len(share) for share in own] for own in found] == lengths
    assert [item for own in found for share in own for item in share] == list(range(count))


def test_a_block_is_a_head_and_the_outputs() -> None:
    assert 8 * HEAD == 64  # as docs/devices.md has it


def unnamed(mesh: DeviceMesh) -> None:
    Ranks(mesh, timeout=float("nan"))


def test_a_timeout_that_is_no_time_is_refused() -> None:
    assert all("the time-out, in seconds, is nan" in one.error for one in on_ranks(1, unnamed))


def test_what_is_no_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the mesh is 3; give a DeviceMesh, such as"):
        Evaluator(network, mesh=3)  # pyright: ignore[reportArgumentType]


def no_cuda(mesh: DeviceMesh) -> None:
    ranks = Ranks(mesh)
    ranks._backend = "nccl"
    Evaluator(network, mesh=ranks)


def test_nccl_for_a_network_on_the_cpu_is_refused() -> None:
    [one] = on_ranks(1, no_cuda)
    assert one.error.startswith(
        "ValueError: the ranks of the mesh communicate by nccl, which does not move tensors on cpu; put"
    )
