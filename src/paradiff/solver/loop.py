# SPDX-License-Identifier: Apache-2.0
"""The loop: in every round all solvers are asked for rows, one batch is evaluated, and each is told its outputs (protocol.py).

`solve` is a generator that yields a `Batch` and is sent the outputs; it returns a `Solution`. `drive` runs it with an
evaluator. One transfer a round, the numbers of all solvers together, waits for the device (a Parareal run's end waits once
more, to see that its sample is finite, and its size). Memory is O(window) states a sample, times the stride.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.home import at_home
from paradiff.chain.noise import Noise, noise_along
from paradiff.chain.plain import plain
from paradiff.chain.table import Table
from paradiff.errors import NotFinite, shown
from paradiff.solver.agreement import described
from paradiff.solver.arguments import (
    Start,
    begun,
    device_of,
    evaluates,
    norms_of,
    outputs_of,
    query_of,
    record_of,
    require_callable,
    require_dtype,
    require_problem,
    require_start,
    require_warm,
)
from paradiff.solver.by_row import ByRow
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.judge import STOPPED, Judge
from paradiff.solver.plain_loop import PlainOutputs, compare
from paradiff.solver.protocol import (
    Batch,
    Chooses,
    EditedOutputs,
    Estimates,
    Evaluate,
    Explains,
    Kept,
    March,
    Marched,
    Marches,
    Method,
    Observer,
    OnFinal,
    Problem,
    Round,
    Run,
    Solver,
)
from paradiff.solver.records import Record
from paradiff.solver.row_check import Check, RowCheck
from paradiff.solver.seen import Look
from paradiff.solver.solution import Solution, Status
from paradiff.solver.told_rounding import rounds_apart, with_roundoff
from paradiff.solver.trajectory import Trajectory, require_trajectory, trajectory_of

UNCHECKED = "not checked: that the model's output for a row depends on that row alone"
IDLE = 100_000  # rounds beyond the chain's steps without the end of a sweep: no stride and no corrector in use has so many
HUGE = 1e4  # times a chain's first level: no data are as large, and networks answer to none
Rounds = Generator[Batch, Tensor | EditedOutputs, Solution]


def solve(
    table: Table,
    noise: Noise,
    method: Method,
    *,
    start: Start = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
    shared_window: bool = False,
    on_final: OnFinal | None = None,
    resolution: float | None = None,
    smooth: bool = True,
    symmetry: Callable[[Tensor], Tensor] | None = None,
    renewed: Tensor | None = None,
    trajectory: Trajectory | None = None,
    keep_trajectory: bool = False,
) -> Rounds:
    """Solves all samples of `noise`; yields batches of rows and is sent the network's outputs.

    Args:
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (`paradiff.methods`).
        start: `[B, ...]` states at node 0 to use instead of the noise's; or what to begin from: a solution of a run on this
            table that kept its trajectory, the trajectory, or the path of its file (docs/warm_starts.md).
        device: Where states live.
        dtype: Dtype of states, float32 or float64.
        observer: Called after each round; it may ask the run to stop.
        shared_window: Each sample is a batch `[b, ...]` of members that share its window (protocol.py).
        on_final: Called with the states of every stretch of nodes that became final, in order; for one sample, and methods with
            dense output.
        resolution: Relative precision of the network's outputs; that of the states by default.
        smooth: Whether outputs vary little from node to node for like states; collocation, which interpolates them, leaves the
            chain to the window method if not.
        symmetry: What the generators of a group, under which the network answers alike, make of states or outputs
            (`Problem.symmetry`): `quasi_newton` then knows the network's derivative in these directions.
        renewed: Which elements of a state each step makes anew (`Problem.renewed`): their changes are not carried along.
        trajectory: A trajectory to begin from, beside a `start` of states at node 0.
        keep_trajectory: Whether `Solution.trajectory` is kept: the state of every node that the method evaluates.

    Returns:
        The solution, as the generator's value.

    Raises:
        ValueError: If an argument is of another kind, the method does not fit the table, `start` does not fit the noise,
            `dtype` is neither float32 nor float64, a trajectory is of another table or shape, or the method cannot begin from
            one or keep one, the model returns NaN or infinity where the sequential chain would meet it
            too, or states were changed under a method that cannot follow that.
    """
    begin = time.perf_counter()
    require_problem(table, noise, method)
    require_callable("the observer", observer, "a function of a round")
    if isinstance(method, Chooses):
        observer = method.observing(observer)
    if on_final is not None and not method.dense_output:
        raise ValueError(
            f"{method.name} keeps the states of a few nodes only, and cannot tell those of every node; use parasolver"
        )
    states, trajectory = begun(start, trajectory)
    require_start(table, states, (noise.samples, *noise.shape))
    require_warm(method, trajectory, keep_trajectory)
    if isinstance(method, Chooses) and (keep_trajectory or trajectory is not None):
        method = method.remembering(begins=trajectory is not None, keeps=keep_trajectory)
    if trajectory is not None:
        require_trajectory(trajectory, table, noise.samples, noise.shape)
    require_callable("on_final", on_final, "a function of a fine node and states")
    problem = Problem(
        table=table,
        noise=noise_along(noise, table.draws, table.first),
        start=None if states is None else plain(states),
        device=device_of(device),
        dtype=dtype,
        shared_window=shared_window,
        resolution=resolution,
        smooth=smooth,
        symmetry=symmetry,
        renewed=renewed,
        on_final=on_final,
        trajectory=trajectory,
        keep=keep_trajectory,
    )
    return _undisturbed(_rounds(problem, method, observer, begin), problem)


def _undisturbed(rounds: Rounds, problem: Problem) -> Rounds:
    """The rounds of a solver that is resumed with the CPU as torch's default device, and without autocast, which would make its
    products in half precision. What fails since a sample begins at NaN or infinity, or far above its level, is told so."""
    answer: Tensor | EditedOutputs | None = None
    while True:
        try:
            with contextlib.ExitStack() as modes:
                modes.enter_context(at_home())
                for kind in {problem.device.type, "cpu"}:
                    if torch.is_autocast_enabled(kind):
                        modes.enter_context(torch.autocast(kind, enabled=False))
                batch = next(rounds) if answer is None else rounds.send(answer)
        except StopIteration as end:
            return end.value
        except ValueError as error:
            _require_finite_start(problem, error)
            if isinstance(error, NotFinite):
                _require_start_of_its_level(problem, error)
            raise
        answer = yield batch


def _require_finite_start(problem: Problem, met: ValueError) -> None:
    """Raises ValueError if a sample of a run that met an error begins at NaN or infinity."""
    for k in range(problem.noise.samples):
        start = problem.noise.start(k) if problem.start is None else problem.start[k]
        if not torch.isfinite(start).all():
            raise ValueError(
                f"sample {k} begins at a state that holds NaN or infinity, which no method follows: give "
                f"{'noise that begins at a finite state' if problem.start is None else 'a finite start'}"
            ) from met


def _require_start_of_its_level(problem: Problem, met: NotFinite) -> None:
    """Raises ValueError if the sample that met NaN or infinity begins far above the chain's first level."""
    level = math.hypot(float(problem.table.alpha[0]), float(problem.table.sigma[0]))
    for k in range(problem.noise.samples):
        _, named, where = str(met).partition(":")[0].partition(f"sample {k} is not finite")
        start = problem.noise.start(k) if problem.start is None else problem.start[k]
        size = float(start.double().square().mean().sqrt())
        if named and size > HUGE * level:
            raise ValueError(
                f"sample {k} begins at a state of root mean square {size:.2g}, and its square overflows "
                f"{problem.dtype}{where}; the chain's first level is {level:.2g} for data of mean square 1: give a start of "
                "about that size"
            ) from met


@torch.inference_mode()
def _rounds(problem: Problem, method: Method, observer: Observer | None, begin: float) -> Rounds:
    """The loop of `solve`, which knows no method by name."""
    run = method.prepare(problem)
    march = run.march() if observer is None and not problem.keep and isinstance(run, Marches) else None
    if march is not None:
        return (yield from _in_step(run, march, begin, problem, method))
    solvers = [run.solver(k) for k in range(problem.noise.samples)]
    widest = method.width(problem.table) * problem.noise.samples
    history: list[Record] = []
    rounds = evaluations = idle = 0
    stopped = False
    while not stopped and (active := [s for s in solvers if not s.done]):
        queries = [query_of(s.ask(), method.name) for s in active]
        counts = [len(q.nodes) for q in queries]
        nodes = torch.cat([q.nodes for q in queries])
        samples = torch.cat([torch.full((n,), s.sample) for s, n in zip(active, counts, strict=True)])
        x = queries[0].rows if len(queries) == 1 else torch.cat([q.rows for q in queries])
        answer = yield Batch(x, run.t[nodes], nodes, samples, run.t[:-1], widest)
        rounds += 1
        evaluations += len(nodes)
        outputs, states = outputs_of(answer, x)
        if states is not None and not method.follows_edits:
            raise ValueError(
                f"states were changed between steps, which {method.name} as it was given cannot follow, since it does not keep "
                "the state after every step; use parasolver or quasi_newton with a stride of 1"
            )
        parts = [None] * len(active) if states is None else states.split(counts)
        told = [
            norms_of(s.tell(q, m, x), method.name)
            for s, q, m, x in zip(active, queries, outputs.split(counts), parts, strict=True)
        ]
        swept = [(s, norms) for s, norms in zip(active, told, strict=True) if norms is not None]
        records: list[Record] = []
        if swept:
            numbers = torch.cat([norms for _, norms in swept]).tolist()  # the round's one wait for the device
            for solver, norms in swept:
                records.append(record_of(solver.advance(numbers[: len(norms)], rounds), method.name))
                numbers = numbers[len(norms) :]
        history += records
        idle = 0 if swept else idle + 1
        if idle > problem.table.steps + IDLE:
            raise RuntimeError(f"the solvers of {method.name} ended no sweep in {idle} rounds; `tell` has to return norms")
        if observer is not None:
            wish = observer(Round(rounds, tuple(records), tuple(solvers)))
            if wish is not None and not isinstance(wish, bool):
                raise ValueError(f"the observer returned {shown(wish)}; return True to stop, None or False to go on")
            stopped = wish is True and not all(s.done for s in solvers)
    estimates = [s.error_estimate for s in solvers]
    if stopped:
        errors, wish = [math.inf] * len(solvers), "the observer asked for it"
        if isinstance(observer, Estimates):
            errors, wish = observer.errors, observer.wish
        estimates = [
            e if s.done else dataclasses.replace(e, estimated_error=error)
            for s, e, error in zip(solvers, estimates, errors, strict=True)
        ]
        status, message = Status.STOPPED, Status.STOPPED.message(f"{wish} after round {rounds}")
        if isinstance(run, Explains):
            message = run.explained(message)
    else:
        run.close()
        status, message = run.status(estimates)
    sample = torch.stack([s.final if s.done else s.newest for s in solvers])
    if rounds_apart(method, problem):
        estimates, status, message = with_roundoff(run, problem, method.tolerance, sample, estimates, status, message)
    return Solution(
        sample=sample,
        status=status,
        message=message,
        rounds=rounds,
        evaluations=evaluations,
        seconds=time.perf_counter() - begin,
        error_estimates=estimates,
        history=history,
        cut=stopped,
        trajectory=_kept(problem, solvers) if problem.keep else None,
    )


def _kept(problem: Problem, solvers: Sequence[Solver[Any]]) -> Trajectory:
    """The trajectory of a run."""
    parts = [solver.part() for solver in solvers if isinstance(solver, Kept)]
    assert len(parts) == len(solvers), "the methods that say that they remember have solvers that do"
    shape = problem.noise.shape if problem.start is None else tuple(problem.start.shape[1:])
    return trajectory_of(problem.table, shape, parts)


def _in_step(run: Run, march: March, begin: float, problem: Problem, method: Method) -> Rounds:
    """All samples in step; the whole of a run without an observer."""
    batch, rounds, evaluations = next(march), 0, 0
    while True:
        answer = yield batch
        rounds += 1
        evaluations += len(batch.x)
        try:
            batch = march.send(outputs_of(answer, batch.x))
        except StopIteration as end:
            marched: Marched = end.value
            break
    run.close()
    estimates = marched.estimates
    status, message = run.status(estimates)
    if rounds_apart(method, problem):
        estimates, status, message = with_roundoff(run, problem, method.tolerance, marched.sample, estimates, status, message)
    return Solution(
        sample=marched.sample,
        status=status,
        message=message,
        rounds=rounds,
        evaluations=evaluations,
        seconds=time.perf_counter() - begin,
        error_estimates=estimates,
        history=list(marched.history),
    )


def drive(rounds: Rounds, evaluate: Callable[[Batch], Tensor | EditedOutputs], *, check: Check = "first") -> Solution:
    """Runs a solver, as `solve` returns it, with an evaluator, or with any function of a batch that returns its outputs.

    Args:
        rounds: What `solve` returned.
        evaluate: The function. It may return the same memory at every call.
        check: Which rounds have rows evaluated again, each by itself, and compared (row_check.py). `first` costs three rows
            at the first round, four more where its network calls hold a part of the chain only, one at each further quarter
            of the chain that the rounds come to, and rows of all rounds at the end, at most 4 and 2 % of the run's, in two
            calls with at most 9 that are made up (witnesses.py), which several devices share. They are counted in
            `Solution.checked_rows` alone.

    Raises:
        ValueError: As the solver and the evaluator do, and if the check finds that a row's output depends on more than its own
            state, time and sample.
        RuntimeError: If the evaluator raises StopIteration.
    """
    return _driven(rounds, evaluate, check, None)


def _driven(
    rounds: Rounds,
    evaluate: Callable[[Batch], Tensor | EditedOutputs],
    check: Check,
    look: Look | None,
    *,
    plain: bool = False,
) -> Solution:
    """As `drive`, with what is known of the model, and of whether the rounds are the plain chain's steps."""
    if not hasattr(rounds, "send"):
        raise ValueError(f"drive was given {shown(rounds)}; give what paradiff.solve returns")
    again, dealt, apart = (getattr(evaluate, f"evaluate_{name}", None) for name in ("again", "dealt", "apart"))
    owned = isinstance(evaluate, Evaluator) and evaluate.alike
    checked = RowCheck(evaluate, check, again=again, dealt=dealt, apart=apart, look=look, owned=owned, plain=plain)
    batch = next(rounds)
    while True:
        try:
            answer = checked(batch)
        except StopIteration as error:
            raise RuntimeError(STOPPED) from error
        try:
            batch = rounds.send(answer)
        except StopIteration as end:
            return _finished(end.value, checked, check)


def _finished(solution: Solution, checked: RowCheck, check: Check) -> Solution:
    """The solution with the end of the check; without a check, "exact" says what it rests on."""
    if check == "off" and solution.status is Status.EXACT:
        return dataclasses.replace(solution, message=f"{solution.message}; {UNCHECKED}")
    begin = time.perf_counter()
    if not solution.cut:
        checked.finish()
    return dataclasses.replace(solution, checked_rows=checked.rows, seconds=solution.seconds + time.perf_counter() - begin)


def sample(
    denoiser: Denoiser | Evaluate,
    table: Table,
    noise: Noise,
    method: Method,
    *,
    start: Start = None,
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
    check: Check = "first",
    trajectory: Trajectory | None = None,
    keep_trajectory: bool = False,
) -> Solution:
    """Samples with one model: drives `solve` with an evaluator, on one device or on several ranks.

    Args:
        denoiser: The model as a function `(x, t) -> m` of rows (evaluator.py), or an evaluator: anything with the members of
            `Evaluate`.
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (`paradiff.methods`).
        start: `[B, ...]` states at node 0 to use instead of the noise's; or what to begin from: a solution of a run on this
            table that kept its trajectory, the trajectory, or the path of its file (docs/warm_starts.md).
        dtype: Dtype of states, float32 or float64.
        observer: Called after each round; it may ask the run to stop.
        check: Which rounds have rows evaluated again and compared, as `drive` has it: `first`, `every` or `off`. With `first`,
            a model that passed in a run of the same kind in this process, and was not changed since, has two rows evaluated
            again (seen.py). With `every` the plain loop is walked, too, twice, and its samples are compared with those of the
            run.
        trajectory: A trajectory to begin from, beside a `start` of states at node 0.
        keep_trajectory: Whether `Solution.trajectory` is kept: the state of every node that the method evaluates.

    Raises:
        ValueError: As `solve`, `Evaluator` and `drive` do.
        RanksFailed: If one of several ranks fails, or was given other arguments.
    """
    evaluate = denoiser if evaluates(denoiser) else Evaluator(denoiser)
    require_problem(table, noise, method)
    by_row = evaluate.denoiser if isinstance(evaluate, Evaluator) and isinstance(evaluate.denoiser, ByRow) else None
    if by_row is not None:
        by_row.fits(table, noise, method)
    states, trajectory = begun(start, trajectory)
    require_dtype(evaluate.dtype)
    _refuse_other_lengths(evaluate, noise)
    if isinstance(evaluate, Evaluator):
        arguments = {"table": table, "noise": noise, "method": method, "start": states, "dtype of states": dtype}
        arguments |= {"trajectory": trajectory}
        evaluate.begin(arguments, method.width(table) * noise.samples)
    if isinstance(method, Chooses):
        method = method.for_model(evaluate, table, noise)
    resolution = None if evaluate.dtype is None else torch.finfo(evaluate.dtype).eps
    rounds = solve(
        table,
        noise,
        method,
        start=states,
        device=evaluate.device,
        dtype=dtype,
        observer=observer,
        resolution=resolution,
        smooth=by_row is None or by_row.smooth,
        symmetry=None if by_row is None else by_row.symmetry,
        renewed=None if by_row is None else by_row.renewed,
        trajectory=trajectory,
        keep_trajectory=keep_trajectory,
    )
    look, plain = None, False
    if check == "first":
        chosen = method.chosen(table, noise.samples) if isinstance(method, Chooses) else method
        plain = chosen.name == chosen.reference().name
        if isinstance(evaluate, Evaluator) and evaluate.alike:
            run = described({"": [table, chosen, dtype, noise.samples, noise.shape, states is None]})
            look = evaluate.look(f"{run} {chosen!r}")  # which names what is no preset's plain value by its place in memory
    found = _driven(rounds, evaluate, check, look, plain=plain)
    if check == "every" and not found.cut and method.name != method.reference().name:
        return _beside_the_plain_loop(found, evaluate, table, noise, method, states, dtype, resolution)
    return found


def _beside_the_plain_loop(
    found: Solution,
    evaluate: Evaluate,
    table: Table,
    noise: Noise,
    method: Method,
    start: Tensor | None,
    dtype: torch.dtype,
    resolution: float | None,
) -> Solution:
    """A run's solution, if its samples are those of the plain loop (plain_loop.py).

    Raises:
        ValueError: If not.
    """
    begin = time.perf_counter()
    judge = Judge(getattr(evaluate, "evaluate_again", evaluate), evaluate.dtype)
    plain, moved = (
        drive(
            solve(table, noise, method.reference(), start=start, device=evaluate.device, dtype=dtype, resolution=resolution),
            PlainOutputs(judge, moved=moved),
            check="off",
        ).sample
        for moved in (False, True)
    )
    compare(found, plain, moved, judge.limit(plain))
    rows, seconds = found.checked_rows + judge.rows, found.seconds + time.perf_counter() - begin
    return dataclasses.replace(found, checked_rows=rows, seconds=seconds)


def _refuse_other_lengths(evaluate: Evaluate, noise: Noise) -> None:
    """Refuses conditioning that has not one row for each sample.

    Raises:
        ValueError: If an evaluator has such.
    """
    for name, value in (evaluate.conditioning if isinstance(evaluate, Evaluator) else {}).items():
        if len(value) != noise.samples:
            raise ValueError(
                f"the conditioning {name!r} has {len(value)} rows; the noise has {noise.samples} samples, and each needs one "
                "row"
            )
