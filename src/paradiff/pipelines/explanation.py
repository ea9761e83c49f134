# SPDX-License-Identifier: Apache-2.0
"""`explain`: a forecast of a parallel run of a pipeline, without a call of its networks unless they are to be timed.

The scheduler is probed at the given number of steps, the loop's source is read, and the method is run on a closed-form
problem, a mixture of Gaussians, with the same chain; its number of rounds is of the order of a trained network's. Whether fewer
rounds save time depends on the device: a round costs about one network call while the device has room for the window's rows.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from paradiff.chain.noise import Keyed
from paradiff.chain.table import Table
from paradiff.errors import Unsupported
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.methods.presets import parasolver
from paradiff.models.exact import Mixture
from paradiff.pipelines.host.find import host_of
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.source import handed_on, outer_loops
from paradiff.pipelines.run import Run
from paradiff.pipelines.settings import Settings
from paradiff.pipelines.timing import Timing, forecast, timings
from paradiff.planning.auto import auto
from paradiff.samplers.scheduler.probe import probe
from paradiff.solver.loop import drive, solve
from paradiff.solver.protocol import Batch, Chooses, Method
from paradiff.solver.solution import Solution

CLUSTERS, DIMENSION, SPREAD = 10, 64, 0.05
"""The number of Gaussians in the closed-form problem, their dimension and their standard deviation."""
WINDOWS = (2, 3, 4, 8, 16, 32)
"""Windows that a timed forecast tries beside that of the method."""
UNIT_MU = 1.0
"""The shift mu of a flow schedule, in place of the one that the pipeline computes from the picture's size."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `explain` found.

    Attributes:
        pipeline: The name of the pipeline's class.
        scheduler: The name of the scheduler's class.
        table: The chain; None if the scheduler's step is not linear.
        executor: The executor that would be tried first: `vector`, `lanes` or `sequential`.
        expected: A run of the method on a closed-form problem with this chain; None without a chain.
        timings: What the calls of the loop's networks cost on several states; empty if they were not timed.
        refused: Sentences: the reasons why there is no parallel run; empty if there is one.
        notes: Sentences: what else the run depends on.
    """

    pipeline: str
    scheduler: str
    table: Table | None
    executor: str
    expected: Solution | None
    timings: list[Timing]
    refused: list[str]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.pipeline} with {self.scheduler}"]
        if self.table is not None:
            reads = "one step" if self.table.band == 1 else f"up to {self.table.band} steps"
            kind = "stochastic" if self.table.stochastic else "deterministic"
            linear = "linear in state and output" + ("" if self.table.clip is None else " but for a limit on the clean data")
            lines.append(f"chain: {self.table.steps} network calls, {kind}, {linear}, reads {reads} back")
        lines.append(f"executor: {self.executor}")
        if self.expected is not None and self.table is not None:
            lines.append(
                f"on a closed-form problem: {self.expected.rounds} rounds and {self.expected.evaluations} rows instead of "
                f"{self.table.steps} steps"
            )
        lines += map(str, self.timings)
        return "\n".join([*lines, *(f"refused: {r}" for r in self.refused), *(f"note: {n}" for n in self.notes)])


def explain(
    pipeline: Any,
    method: Method | None = None,
    *,
    num_inference_steps: int | None = None,
    call: Mapping[str, Any] | None = None,
    **step_options: Any,
) -> Explanation:
    """Forecasts a parallel run of a pipeline: its chain, its executor, its rounds, and the reasons against it.

    Args:
        pipeline: A diffusers pipeline.
        method: The method; `auto()` by default.
        num_inference_steps: Number of steps, at least 1; the default of the pipeline's call if left out.
        call: Further arguments of the pipeline's call, such as `{"prompt": "a lighthouse"}`. With them the call is made up to
            its second pass, and the networks of its loop are timed on one state and on several, the conditioning in place.
        step_options: Further arguments of the scheduler's `step` that the pipeline would pass, such as `eta`.

    Raises:
        ValueError: If the argument is no pipeline or has no scheduler, the scheduler cannot make this number of steps, or the
            method does not fit its chain.
    """
    method = auto() if method is None else method
    host = host_of(pipeline)
    run = Run(host, Settings(method=method))
    scheduler = copy.deepcopy(host.scheduler)
    refused, notes = [], []
    steps = default_steps(host) if num_inference_steps is None else num_inference_steps
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps is {steps!r}; it must be a whole number of at least 1 step")
    set_timesteps(scheduler, steps, notes)
    table = None
    try:
        table = probe(scheduler, scheduler.timesteps, step_options)
    except Unsupported as unsupported:
        refused.append(str(unsupported))
    if table is not None and not table.exact_levels:
        notes.append(table.about_levels)
    executor = executor_of(run, refused, notes)
    if table is not None:
        method = _by_name(method, table, [] if refused else notes)
    expected, rows = (None, []) if table is None else _tried(table, method)
    found: list[Timing] = []
    if expected is not None and table is not None and not refused:
        if call is not None:
            found = timed(host, steps, call, executor, max(rows), notes)
        if found:
            _does_it_pay(found, table, method, rows, notes)
        else:
            _will_it_pay(host, table, expected, notes)
    elif call is not None:
        notes.append("the networks were not timed, since there is no parallel run")
    return Explanation(
        pipeline=host.name,
        scheduler=type(scheduler).__name__,
        table=table,
        executor=executor if not refused else "sequential",
        expected=expected,
        timings=found,
        refused=refused,
        notes=notes,
    )


def _by_name(method: Method, table: Table, notes: list[str]) -> Method:
    """A method whose rounds do not depend on the clock, in place of one that chooses."""
    if not isinstance(method, Chooses):
        return method
    chosen = method.chosen(table)
    notes.append(f"without measurements the choice is {method.reason(table)}; `paradiff plan` makes them")
    if not isinstance(chosen, AdaptiveMethod):
        return chosen
    window = getattr(method, "window", None)
    found = parasolver(None if window is None else min(window, table.steps), method.tolerance)
    notes.append(f"the rounds are those of {found!r}")
    return found


def default_steps(host: Host) -> int:
    """The number of steps that a host's call takes by itself.

    Raises:
        ValueError: If it has none.
    """
    parameter = inspect.signature(host.call).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise ValueError(f"{host.name} has no number of steps of its own; give num_inference_steps")
    return parameter.default


def set_timesteps(scheduler: Any, steps: int, notes: list[str]) -> None:
    """Gives a scheduler its times, as a pipeline's call does.

    Raises:
        ValueError: If it cannot make so many steps.
    """
    options: dict[str, Any] = {}
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        options["mu"] = UNIT_MU
        notes.append(f"the pipeline shifts its times by the picture's size; they were taken for a shift of mu = {UNIT_MU:g}")
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"num_inference_steps is {steps}, which the {type(scheduler).__name__} cannot make: {first}"
        ) from error


def executor_of(run: Run, refused: list[str], notes: list[str]) -> str:
    """The executor that a host's loop allows; why there is none is added to `refused`, what else is found to `notes`."""
    kind, cached = run.host.kind, run.cached()
    if cached:
        refused.append(f"{'; '.join(cached)}, which needs them in order; disable it")
        return "sequential"
    found = run.host.obstacles()
    if found:
        refused += found
        return "sequential"
    if (clause := handed_on(run.host.kept(), run.settings.method)) is not None:
        refused.append(clause)
        return "sequential"
    if outer := outer_loops(kind):
        notes.append(f"the loop is within another one; a call that runs it more than once is sequential: {outer[0]}")
    read = run.host.index_reads()
    if read:
        notes.append(f"the loop reads its step number, so each state gets a lane of its own: {read[0].strip()}")
    elif read is None:
        notes.append("the loop's source could not be read, so each state gets a lane of its own")
    return "vector" if read == [] else "lanes"


def _tried(table: Table, method: Method) -> tuple[Solution, list[int]]:
    """A run of the method on a mixture of Gaussians with this chain, and the rows of its rounds."""
    rows: list[int] = []
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLUSTERS, DIMENSION, generator=generator, dtype=torch.float64).clamp(-1, 1)
    target = Mixture(torch.full((CLUSTERS,), 1 / CLUSTERS), means, torch.full((CLUSTERS,), SPREAD))

    def outputs(batch: Batch) -> Tensor:
        nodes = batch.nodes
        rows.append(len(nodes))
        x = batch.x.double() / table.scale[nodes, None]
        clean = target.clean(x, table.alpha[nodes], table.sigma[nodes])
        return ((clean - table.p[nodes, None] * x) / table.q[nodes, None]).float()

    return drive(solve(table, Keyed((DIMENSION,), 0), method), outputs, check="off"), rows


def timed(host: Host, steps: int, call: Mapping[str, Any], executor: str, widest: int, notes: list[str]) -> list[Timing]:
    """What the networks cost; nothing where the call cannot be run by the executor."""
    takes = "num_inference_steps" in inspect.signature(host.call).parameters
    arguments = {**call, **({"num_inference_steps": steps} if takes else {})}
    for one in dict.fromkeys((executor, "lanes")):
        try:
            return timings(host, arguments, one, min(widest + 1, steps))
        except Unsupported as unsupported:
            notes.append(f"the networks could not be timed with {one}: {unsupported}")
    return []


def _does_it_pay(found: list[Timing], table: Table, method: Method, rows: list[int], notes: list[str]) -> None:
    """Notes the seconds of the networks' calls, with this window and with the best of some others."""
    plain, parallel = forecast(found, [1] * table.steps), forecast(found, rows)
    notes.append(
        f"in the networks {table.steps} steps would take {plain:.3g} s here, and {len(rows)} rounds {parallel:.3g} s, the "
        f"audit left out: {plain / parallel:.2g} times as fast"
    )
    best, window = parallel, None
    for other in WINDOWS if hasattr(method, "window") else ():
        if other < table.steps and other != getattr(method, "window", None):
            seconds = forecast(found, _tried(table, dataclasses.replace(cast(Any, method), window=other))[1])
            best, window = min((best, window), (seconds, other), key=lambda one: one[0])
    if window is not None and best < 0.95 * parallel:
        notes.append(f"with a window of {window} it would be {plain / best:.2g} times as fast")
    if best > 0.95 * plain:
        notes.append(
            "it will not pay on this device: no window makes the rounds cheaper than the steps; the plain call is as fast"
        )


def _will_it_pay(host: Host, table: Table, expected: Solution, notes: list[str]) -> None:
    gain = table.steps / expected.rounds
    width = -(-expected.evaluations // expected.rounds)
    network = next(iter(host.networks.values()), None)
    device = next(iter(network.parameters())).device.type if network is not None else "cpu"
    if gain < 1.2:
        notes.append(f"it will not pay: {expected.rounds} rounds for {table.steps} steps; the plain call is as fast")
        return
    notes.append(
        f"it pays where a network call on {width} states at once costs less than {gain:.1f} calls on one"
        + ("; on a CPU it seldom does, as a call costs in proportion to its rows" if device == "cpu" else "")
    )
