"""The solver's side of one pipeline call: started by the loop's first step, fed by every later pass.

The loop's first pass is an ordinary one, at x[0]. It tells what no argument of the pipeline does: the state's shape and dtype,
the times really walked, the generator and the options of `step`. From it the scheduler is probed (probe.py) and the solver
started; the output it gave at node 0 is kept and answers for that node, whose state never changes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.sensitivity import DETERMINISTIC_CAUTION, STOCHASTIC_CAUTION
from paradiff.errors import Unsupported
from paradiff.pipelines.loop.callback import Callback
from paradiff.samplers.scheduler.probe import Increments, probe
from paradiff.solver.loop import solve
from paradiff.solver.protocol import Batch, EditedOutputs, Method, Observer
from paradiff.solver.solution import Solution

GIVEN_NOISE = "variance_noise"
HALF = (torch.float16, torch.bfloat16)


class LoopSolver:
    """Runs the solver between the passes of one pipeline call.

    Args:
        method: The method.
        dtype: Dtype of the solver's states; float32 or float64.
        callback: The user's callback, which is called with final states.
        observer: Called after each round; it may ask the run to stop.

    Attributes:
        started: Whether the loop's first step has been taken.
        done: Whether the solver has finished; `final` then holds the sample.
        timesteps: `[N]` the loop's own times.
        nodes: `[R]` the nodes wanted in the next pass, on the CPU.
        states: `[R, B, ...]` the states there, not scaled, in the loop's dtype.
        final: `[B, ...]` the sample, in the loop's dtype.
        table: The loop's chain.
        solution: What the solver returned.
        passes: Passes of the loop body so far, the first one included.
        rows: States evaluated so far.
        raised_tolerance: The tolerance used instead of the method's, where the network's dtype does not resolve that one.
    """

    def __init__(
        self,
        method: Method,
        *,
        dtype: torch.dtype = torch.float32,
        callback: Callback | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.method, self._dtype, self._callback, self._observer = method, dtype, callback, observer
        self.started = self.done = False
        self.passes = self.rows = 0
        self.solution: Solution | None = None
        self.raised_tolerance: float | None = None

    def prepare(self, scheduler: Any, timesteps: Tensor) -> None:
        """Takes the scheduler, a plain copy in its state before the first step, and the times `[N]` that the loop walks."""
        self._scheduler, self.timesteps = scheduler, timesteps

    def begin(self, output: Tensor, sample: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Takes the loop's first step: reads off the chain, and starts the solver.

        Args:
            output: `[B, ...]` the network's output at x[0].
            sample: `[B, ...]` x[0].
            kwargs: The step's further arguments.

        Raises:
            Unsupported: If the chain has no table.
            ValueError: If the method does not fit the table.
        """
        self._check(output, sample, kwargs)
        options = {k: v for k, v in kwargs.items() if k not in ("generator", "return_dict", GIVEN_NOISE)}
        self._template = self._real_step(0, output, sample, kwargs)
        self.table = probe(self._scheduler, self.timesteps, options)
        generator = kwargs.get("generator")
        noise = Increments(self._scheduler, self.table, self.timesteps, sample, generator, options)
        self._noise, self._kwargs, self._origin, self._zeroth = noise, dict(kwargs), sample, output.to(self._dtype)
        if self._callback is not None:
            self._callback.timesteps, self._callback.dtype = self.timesteps, sample.dtype
        plain = dataclasses.replace(self.table, scale=torch.ones_like(self.table.scale))
        self._solver = solve(
            plain,
            noise,
            self._fitted(output.dtype),
            start=sample[None].to(self._dtype),
            device=sample.device,
            dtype=self._dtype,
            observer=self._observer,
            shared_window=True,
            resolution=max(torch.finfo(output.dtype).eps, torch.finfo(sample.dtype).eps),
            on_final=None if self._callback is None else self._callback.on_final,
        )
        self.started = True
        self.passes = self.rows = 1
        self._last = torch.zeros(1, dtype=torch.int64), output[None], sample[None]
        self._take(next(self._solver))

    def tell(self, outputs: Tensor, states: Tensor) -> None:
        """Takes what came of a pass.

        Args:
            outputs: `[R, B, ...]` the network's outputs.
            states: `[R, B, ...]` the states as the loop handed them to its step: `self.states` itself, or what it made of them.
        """
        if outputs.shape != self.states.shape:
            raise Unsupported(
                f"the loop's step was given outputs of shape {tuple(outputs.shape[1:])} for states of shape "
                f"{tuple(self._origin.shape)}"
            )
        self.passes += 1
        self.rows += len(outputs)
        self._last = self.nodes, outputs, states
        shown = None
        if states is not self.states:
            if self._callback is not None:
                raise ValueError(
                    "the loop changes its latents after a step, of which a parallel run can tell no callback in time: leave "
                    "out callback_on_step_end"
                )
            shown = torch.where(states == self.states, self._batch.x[self._asked], states.to(self._dtype))
        self._send(outputs.to(self._dtype), shown)

    def check_options(self, kwargs: Mapping[str, Any]) -> None:
        """Takes a later step's arguments: they have to be the first one's, as all steps are taken with those.

        Raises:
            Unsupported: If they differ.
        """
        for name in {*kwargs, *self._kwargs}:
            first, now = self._kwargs.get(name), kwargs.get(name)
            if name != "generator" and now is not first and (isinstance(now, Tensor) or now != first):
                raise Unsupported(f"the loop gives its scheduler's step another {name} as it goes")

    def scale(self, nodes: Tensor) -> Tensor:
        """`[R]` factor on the states at `nodes` before the network sees them."""
        return self.table.scale[nodes]

    def result(self, sample: Tensor) -> Any:
        """What the loop's step returns with `sample` as the new state, in the form in which its scheduler returns it. Its other
        fields (an estimate of the clean data, say) exist at the last step, for schedulers that read no history."""
        template = self._template
        others: Any = None
        if self.done and self.table.band == 1:
            nodes, outputs, states = self._last
            place = int(nodes.argmax())
            if int(nodes[place]) == self.table.steps - 1:
                others = self._real_step(self.table.steps - 1, outputs[place], states[place], self._kwargs)
        if isinstance(template, tuple):
            rest = [_Unread()] * (len(template) - 1) if others is None else list(others[1:])
            return (sample, *rest)
        known = template if others is None else others
        fields = {k: v if others is not None or v is None else _Unread() for k, v in vars(known).items() if k != "prev_sample"}
        return type(template)(prev_sample=sample, **fields)

    def _check(self, output: Any, sample: Any, kwargs: Mapping[str, Any]) -> None:
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise Unsupported(
                f"the loop steps a {type(sample).__name__} with a {type(output).__name__}; both must be tensors of floats"
            )
        if output.shape != sample.shape:
            raise Unsupported(
                f"the network's output of shape {tuple(output.shape)} is not of its state's, {tuple(sample.shape)}: it also "
                "predicts a variance, or the scheduler keeps a state of another kind"
            )
        if kwargs.get(GIVEN_NOISE) is not None:
            raise Unsupported("the loop gives the step's noise itself")
        if not torch.isfinite(output).all():
            raise ValueError("the network's output at the first time is not finite; check its weights, dtype and inputs")

    def _fitted(self, dtype: torch.dtype) -> Method:
        """The method for this call, with a tolerance that a network of that dtype resolves."""
        least = 0.0
        if dtype in HALF:  # rounding moves outputs by eps, and the estimate counts it with the caution of its kind of chain
            caution = STOCHASTIC_CAUTION if self.table.stochastic else DETERMINISTIC_CAUTION
            least = caution * torch.finfo(dtype).eps
        fitted = self.method.in_loop(self.table, least)
        self.raised_tolerance = None if fitted.tolerance == self.method.tolerance else fitted.tolerance
        return fitted

    def _take(self, batch: Batch) -> None:
        """Turns the solver's rows into the next pass, answering those at node 0 from the first one."""
        self._batch = batch
        self._asked = batch.nodes.nonzero()[:, 0]
        if len(self._asked) == 0:
            self._send(self._zeroth[None][:0], None)
            return
        self.nodes = batch.nodes[self._asked]
        self.states = batch.x[self._asked.to(batch.x.device)].to(self._origin.dtype)

    def _send(self, outputs: Tensor, shown: Tensor | None) -> None:
        batch = self._batch
        if len(outputs) < len(batch.nodes):
            whole = self._zeroth.expand_as(batch.x).clone()
            whole[self._asked.to(whole.device)] = outputs
            outputs = whole
            if shown is not None:
                seen = batch.x.clone()
                seen[self._asked.to(seen.device)] = shown
                shown = seen
        try:
            batch = self._solver.send(outputs if shown is None else EditedOutputs(outputs, shown))
        except StopIteration as end:
            self.solution, self.done = end.value, True
            self._noise.finish()
            self.final = end.value.sample[0].to(self._origin.dtype)
            return
        self._take(batch)

    def _real_step(self, index: int, output: Tensor, sample: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """What the scheduler's own step returns, on a copy and with copies of the generators."""
        scheduler = copy.deepcopy(self._scheduler)
        if index:
            scheduler.set_begin_index(_first(scheduler, self.timesteps) + index) if hasattr(
                scheduler, "set_begin_index"
            ) else None
        given = dict(kwargs)
        if given.get("generator") is not None:
            given["generator"] = _clones(given["generator"])
        devices = [sample.device] if sample.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            scheduler_input = getattr(scheduler, "scale_model_input", None)
            if scheduler_input is not None:
                scheduler_input(sample, self.timesteps[index])
            return scheduler.step(output, self.timesteps[index], sample, **given)


class _Unread:
    """A field of a step's result that a parallel run does not have."""

    def __getattr__(self, name: str) -> Any:
        raise Unsupported("the loop reads more of a step's result than the new state")


def _first(scheduler: Any, timesteps: Tensor) -> int:
    """The index of the loop's first time among the scheduler's."""
    begin = getattr(scheduler, "_begin_index", None)
    return len(scheduler.timesteps) - len(timesteps) if begin is None else int(begin)


def _clones(generators: Any) -> Any:
    """Copies of generators, a list of them or one."""
    if isinstance(generators, list | tuple):
        return [_clones(g) for g in generators]
    clone = torch.Generator(device=generators.device)
    clone.set_state(generators.get_state())
    return clone
