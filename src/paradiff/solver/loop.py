"""The window loop.

A window of sub-intervals n = lo ... hi - 1 is solved at once. One sweep evaluates the network at every state of the window
(S rounds for sub-intervals of S steps, each round one batch), takes the residual

    r[n] = Phi_n(x) - x[n+1],                                                                                   (1)

and updates all nodes by an approximate Newton step with the slope G (chain/slope.py),

    x[n+1] <- Phi_n(x) + sum_{k<n} L[n,k] r[k],        I + L = (I - G)^-1.                                      (2)

Written so, a node whose predecessors do not change gets exactly Phi_n: after k sweeps the first k nodes of a window are
exact, whatever G. Then the leading nodes whose change is within the tolerance pass, with the one after them, and the window
slides; nodes that enter it are filled as the method's `start` says. A method may cut the chain into blocks
(methods/window/blocks.py), which the window enters one after the other, and follow each by a corrector
(methods/window/corrector.py).

A solver evaluates nothing itself. `solve` is a generator that yields a `Batch` and is sent the outputs; it returns a
`Solution`. Each sample has a window of its own (methods/window/solver.py); one transfer a round, the changes of all windows
together, waits for the device (a wavefront's end waits once more, to see that its sample is finite). Memory is O(window) states
a sample, times the stride.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.solver import CollocationSolver
from paradiff.methods.parareal.method import PararealMethod
from paradiff.methods.parareal.solver import PararealSetup, PararealSolver
from paradiff.methods.presets import Method
from paradiff.methods.window.method import WindowMethod
from paradiff.methods.window.solver import Settled, WindowSetup, WindowSolver
from paradiff.solver.evaluator import Batch, Denoiser, Evaluator
from paradiff.solver.solution import ErrorEstimate, Record, Solution

RULES = {
    "error": "the estimated error of every sample is at most {:g}",
    "change": "every node passed with a change of at most {:g} times its step's noise",
    "sample": "the last iteration changed every sample by at most {:g}, root mean square",
    "image": "the last iteration changed every picture by at most {:g} grey levels, on average",
}
EXACT = "exact: every node was reached by the chain's own steps"
Progress = Callable[[Sequence[Record]], None]


@dataclass(frozen=True)
class EditedOutputs:
    """What a solver is sent in place of plain outputs where its caller changed states before the network saw them
    (methods/window/edits.py).

    Attributes:
        outputs: `[R, ...]` the network's outputs at the changed states.
        states: `[R, ...]` the changed states, not scaled.
    """

    outputs: Tensor
    states: Tensor


@torch.inference_mode()
def solve(
    table: Table,
    noise: Noise,
    method: Method,
    *,
    start: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    members: bool = False,
    settled: Settled | None = None,
    resolution: float | None = None,
) -> Generator[Batch, Tensor | EditedOutputs, Solution]:
    """Solves all samples of `noise`; yields batches of rows and is sent the network's outputs.

    Args:
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (methods/presets.py).
        start: `[B, ...]` states at node 0 to use instead of the noise's.
        device: Where states live.
        dtype: Dtype of states, float32 or float64.
        progress: Called after each round with the sweeps that ended in it.
        members: Each sample is a batch `[b, ...]` of members that share its window: a node changes as much as the member
            that changes most, and errors are estimated for the worst member.
        settled: Called with the states of every stretch of nodes that became final, in order, and the first of these nodes;
            for one sample, and methods that keep the states of all nodes (not Parareal).
        resolution: Relative precision of the network's outputs, for methods with secants; that of the states by default.

    Returns:
        The solution, as the generator's value.

    Raises:
        ValueError: If the method does not fit the table, `start` does not fit the noise, `dtype` is neither float32 nor
            float64, the model returns NaN or infinity where the sequential chain would meet it too, or states were changed
            under a method that cannot follow that.
    """
    begin = time.perf_counter()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"states were asked for in {dtype}; they are kept in float32 or float64 (the network's own dtype is given to the "
            "evaluator)"
        )
    expected = (noise.samples, *noise.shape)
    if start is not None and tuple(start.shape) != expected:
        raise ValueError(f"start has shape {tuple(start.shape)}; the noise has {expected}: samples, then one sample's shape")
    plan, windows = _prepare(table, noise, method, start, torch.device(device), dtype, members, settled, resolution)
    history: list[Record] = []
    rounds = evaluations = 0
    while active := [w for w in windows if not w.done]:
        asked = [w.rows() for w in active]
        nodes = torch.cat([n for n, _ in asked])
        samples = torch.cat([torch.full((len(n),), w.sample) for w, (n, _) in zip(active, asked, strict=True)])
        x = asked[0][1] if len(asked) == 1 else torch.cat([x for _, x in asked])
        answer = yield Batch(x, plan.t[nodes], nodes, samples)
        rounds += 1
        evaluations += len(nodes)
        counts = [len(n) for n, _ in asked]
        if isinstance(answer, EditedOutputs):
            answers = zip(active, answer.outputs.split(counts), answer.states.split(counts), strict=True)
            swept = [w for w, outputs, states in answers if w.absorb(outputs, states)]
        else:
            swept = [w for w, outputs in zip(active, answer.split(counts), strict=True) if w.absorb(outputs)]
        sweeps: list[Record] = []
        if swept:
            changes = torch.cat([w.change for w in swept]).tolist()  # the round's one wait for the device
            for w in swept:
                count = len(w.change)
                sweeps.append(w.slide(changes[:count], rounds))
                changes = changes[count:]
        history += sweeps
        if progress is not None:
            progress(sweeps)
    if isinstance(plan, CollocationSetup):
        plan.keep()
    error_estimates = [w.error_estimate for w in windows]
    sample = torch.stack([w.final for w in windows])
    status = _status(method, plan, error_estimates)
    return Solution(sample, status, rounds, evaluations, time.perf_counter() - begin, error_estimates, history)


def _prepare(
    table: Table,
    noise: Noise,
    method: Method,
    start: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    members: bool,
    settled: Settled | None,
    resolution: float | None,
) -> tuple[WindowSetup | PararealSetup | CollocationSetup, Sequence[WindowSolver | PararealSolver | CollocationSolver]]:
    """What the samples share, and one window or wavefront for each."""
    starts = [None if start is None else start[k] for k in range(noise.samples)]
    if settled is not None and not isinstance(method, WindowMethod):
        raise ValueError(
            f"{method.name} keeps the states of a few nodes only, and cannot tell those of every node; use parasolver"
        )
    if isinstance(method, CollocationMethod):
        ground = CollocationSetup(table, method, device, dtype, members, resolution)
        return ground, [CollocationSolver(ground, noise, k, x) for k, x in enumerate(starts)]
    if isinstance(method, PararealMethod):
        method.check_shape(noise.shape)
        course = PararealSetup(table, method, device, dtype, members)
        return course, [PararealSolver(course, noise, k, x) for k, x in enumerate(starts)]
    plan = WindowSetup(table, method, device, dtype, members, resolution)
    return plan, [WindowSolver(plan, noise, k, x, settled) for k, x in enumerate(starts)]


def _status(method: Method, plan: WindowSetup | PararealSetup | CollocationSetup, error_estimates: list[ErrorEstimate]) -> str:
    if isinstance(method, CollocationMethod):
        worst = max(c.estimated_error for c in error_estimates)
        if worst > method.tolerance:
            return (
                f"stopped: an estimated error of {worst:.2g} was reached, where {method.tolerance:g} was asked for; give more "
                "nodes (max_nodes), or let the window loop go on (exact=True)"
            )
        return f"converged: {RULES['error'].format(method.tolerance)}"
    if isinstance(method, WindowMethod):
        assert isinstance(plan, WindowSetup)
        corrected = method.corrector is None or method.corrector.sweeps >= method.corrector.steps
        if method.sweeps is not None and (method.sweeps < min(plan.exact_after, plan.width) or not corrected):
            return f"stopped: every node was swept {method.sweeps} times, as asked"
        exact = (method.tolerance == 0 or plan.width == 1) and corrected
    else:
        exact = all(c.estimated_error == 0 for c in error_estimates)
    if exact:
        return EXACT
    if isinstance(method, PararealMethod) and method.iterations is not None:
        return f"stopped: {method.iterations} iterations were made, as asked"
    beside = ""
    if isinstance(method, WindowMethod) and method.corrector is not None and method.corrector.sweeps < method.corrector.steps:
        beside = (
            f"; not in it: the corrector's {method.corrector.steps} steps were swept {method.corrector.sweeps} times, as asked"
        )
    return f"converged: {RULES[method.rule].format(method.tolerance)}{beside}"


def sample(
    denoiser: Denoiser | Evaluator,
    table: Table,
    noise: Noise,
    method: Method,
    *,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Solution:
    """Samples with one model on one device: drives `solve` with an evaluator.

    Args:
        denoiser: The model as a function `(x, t) -> m` of rows (evaluator.py), or an `Evaluator` that holds one.
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (methods/presets.py).
        start: `[B, ...]` states at node 0 to use instead of the noise's.
        dtype: Dtype of states, float32 or float64.
        progress: Called after each round with the sweeps that ended in it.

    Raises:
        ValueError: As `solve` and `Evaluator` do.
    """
    evaluator = denoiser if isinstance(denoiser, Evaluator) else Evaluator(denoiser)
    resolution = None if evaluator.dtype is None else torch.finfo(evaluator.dtype).eps
    solver = solve(
        table, noise, method, start=start, device=evaluator.device, dtype=dtype, progress=progress, resolution=resolution
    )
    batch = next(solver)
    while True:
        try:
            batch = solver.send(evaluator(batch))
        except StopIteration as end:
            return end.value
