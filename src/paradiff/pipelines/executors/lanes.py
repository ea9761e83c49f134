# SPDX-License-Identifier: Apache-2.0
"""The lane executor: as many ordinary calls of the pipeline as there are states, advanced together.

A lane is a call of the pipeline's own `__call__` on a shallow copy of the pipeline with a scheduler proxy of its own
(scheduler_proxy.py). Its step numbers are ordinary integers, and its times and states belong to one node. Lanes are greenlets
of one thread: a lane runs until it calls a network or takes a step. When all lanes wait, network calls that fit together
become one call (coalesce.py). When all lanes have stepped, their outputs go to the solver, which names the next nodes.

Lane 0 is the user's call. Its first pass is an ordinary one; its `step` starts the solver. Another lane starts when the solver
wants more states than there are lanes. What precedes its loop is replayed: outputs of the networks that lane 0 called there
come from a log, and random numbers come from copies of the generators.

A pipeline may edit its latents after a step, and the edit depends on the step's number. So a lane must be at node j - 1 when
it receives the state of node j. A lane that has just finished node j - 1 is there. Any other lane makes a dry pass first: it
runs its loop's body as node j - 1 with half of the first pass's outputs for those of the networks, and its step returns the
state of node j.

So lanes have different pasts, and a loop that keeps something from one pass to the next gives different outputs in them. For
the audit (audit.py), a row of each pass is evaluated again in the next one, by a lane that did not make the passes before it.
Rows are chosen such that in the course of a run as many passes as possible have been left out by such a lane. Lane 0 makes its
second pass before any other lane has started: it is the pipeline's own, whatever lanes may have in common. When the solver has
ended, passes that no lane has left out are left out in a last pass, which is for the audit alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Carried, Unsupported
from paradiff.pipelines.executors.builtins import counting
from paradiff.pipelines.executors.coalesce import Coalescer
from paradiff.pipelines.executors.lane import SWITCHES, Elsewhere, Ending, Lane
from paradiff.pipelines.executors.owner import Reads, answering
from paradiff.pipelines.executors.shared_call import Result, SharedCall
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.audit import KEEPS, granted, judge, relative_difference
from paradiff.pipelines.loop.driver import ENDED_EARLY, NO_STEP, Beside, LoopSolver
from paradiff.pipelines.loop.ledger import Ledger, differing, unread
from paradiff.pipelines.loop.random_state import Snapshot, clone
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.network.call_log import CallLog

SECOND = 2
"""The pass in which lane 0 has one between its first and the present; two of its rows are audited."""

SHARE = 8
"""Rows of a pass for each that is evaluated again, at most."""


def run_lanes(host: Host, arguments: Mapping[str, Any], solver: LoopSolver, batching: Batching) -> Any:
    """Runs a pipeline call with a lane for every state.

    Networks reach their lane as `greenlet.getcurrent().route(module, forward, args, kwargs)`, which the wrapped `forward` of
    a network (boundary.py) calls where the running greenlet has it.

    Args:
        host: What owns the chain. Copies of it are called; it gets the attributes that the call sets.
        arguments: The call's arguments by name.
        solver: The call's solver (loop/driver.py).
        batching: The run's batching (network/batching.py).

    Returns:
        What the pipeline's `__call__` returns.

    Raises:
        Unsupported: If lanes cannot run the loop.
    """
    snapshot, reads = Snapshot(arguments), Reads()
    scopes = host.scopes()
    if host.switch is not None:
        host.switch.noted = reads.note_of_scheduler
    while True:
        try:
            with counting(scopes), answering(host.owner, reads):
                return Lockstep(host, arguments, solver, batching, reads).run()
        except Elsewhere as elsewhere:
            scopes.append(elsewhere.scope)
            snapshot.restore()
            batching.log = CallLog()


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a pass that the next one evaluates again, in a lane with another past.

    Attributes:
        node: Its node.
        before: The nodes of the passes that its lane made before, one after the other.
        handed: `[B, ...]` the state that its lane was handed.
        output: `[B, ...]` the network's output that the step was given.
        sample: `[B, ...]` the state that the step was given.
        ledger: What the loop counted and collected.
    """

    node: int
    before: range
    handed: Tensor
    output: Tensor
    sample: Tensor
    ledger: Ledger


@dataclass(frozen=True, eq=False)
class Pass:
    """What a pass of a node had: it is made once more where it is the chain's last one and lane 0 is elsewhere.

    Attributes:
        handed: `[B, ...]` the state that its lane was handed, or None before it was handed any.
        results: What its network calls returned.
    """

    handed: Tensor | None
    results: list[Result]


class Lockstep:
    """Resumes the lanes of one pipeline call, pass by pass.

    Attributes:
        audited: Nodes of passes that a double left out, one at least before the present, without a difference.
        rows: The rows of the last pass that are evaluated again in the next.
        made: The newest passes of nodes that the solver still moves, by their nodes; those of doubles left out.
        round: The number of the pass, counted without lane 0's first one.
    """

    def __init__(self, host: Host, arguments: Mapping[str, Any], solver: LoopSolver, batching: Batching, reads: Reads) -> None:
        self._reads, batching.noted = reads, reads.noted
        self.shared, self.solver = SharedCall(host, arguments, solver, batching), solver
        self.shared.own = 1 if batching.check == "off" else 2
        self.coalescer = Coalescer(batching, self.shared.flags)
        self.lanes: list[Lane] = []
        self.audited: set[int] = set()
        self.rows: list[Row] = []
        self.made: dict[int, Pass] = {}
        self.round = 0
        self._start = self.shared.generator_states(), Snapshot({})
        self._result: Any = None

    def run(self) -> Any:
        """Runs the call to its end."""
        try:
            first = Lane(self.shared, 0, dict(self.shared.arguments))
            self.lanes.append(first)
            self._resume(first)
            if first.dead:
                raise Unsupported(NO_STEP)
            width, audited = self.solver.width, self.coalescer.batching.check != "off" and self.solver.width > 1
            self.coalescer.batching.widest = width + (max(SECOND, width // SHARE) if audited else 0)
            while not self.solver.done:
                self._round()
            if self.coalescer.batching.check != "off" and self.solver.width > 1 and not self.solver.interrupted:
                self._close()
            self.coalescer.refuse_writes()
            self.coalescer.batching.end_loop()
            self._end(first)
            self._resume(first)
            assert first.dead  # Its turns were dry, and after its loop a lane waits for nothing: a step is refused there.
            self.shared.keep(first.owner)
            return self._result
        finally:
            with contextlib.ExitStack() as ends:  # ends all of them, even if one raises
                for lane in self.lanes:
                    ends.callback(lane.end)
                self.lanes.clear()

    def _end(self, first: Lane) -> None:
        """Sends lane 0 to the end of its loop, by a dry pass that leaves behind what the chain's last pass left."""
        last, final = self.solver.ended - 1, self.solver.final
        made = self.made.get(last)
        first.state = final
        if first.node == last and not first.dry and (made is None or made.results is first.results):
            return
        if last > 0 and first.node != last - 1:
            first.turns.append((last - 1, True))
        first.turns.append((last, True))
        if made is not None:
            first.state, first.ending = made.handed, Ending(final, made.results)

    def _round(self) -> None:
        """One pass of all wanted nodes."""
        self.round += 1
        solver = self.solver
        nodes = solver.nodes.tolist()
        wanted = self._assign(nodes)
        doubles = self._doubles(wanted)
        chosen = self._choose(nodes, wanted)
        for place in chosen:
            wanted[place].audited = True
        lanes = [*wanted, *doubles]
        alone = self.round < self.shared.own and solver.width > 1 and len(wanted) > 1 and wanted[0] is self.lanes[0]
        if alone:
            self._go(lanes[:1])
            solver.passes += 1
        self._go(lanes[alone:])
        shapes = {tuple(lane.sample.shape) for lane in lanes} | {tuple(solver.states.shape[1:])}
        if len(shapes) > 1:
            raise Unsupported("the loop changes the shape of its state")
        with Modes.exact().entered():
            outputs = torch.stack([lane.output for lane in lanes])
            samples = torch.stack([lane.sample for lane in lanes])
            eps = max(self.coalescer.batching.eps, torch.finfo(outputs.dtype).eps)
            beside = self._beside(lanes, doubles, outputs[len(nodes) :], samples[len(nodes) :], eps)
            self.rows = [
                Row(
                    node=nodes[place],
                    before=range(wanted[place].walked.start, nodes[place]),
                    handed=solver.states[place].clone(),
                    output=outputs[place],
                    sample=samples[place],
                    ledger=wanted[place].ledger,
                )
                for place in chosen
            ]
            passes = {node: Pass(lane.state, lane.results) for node, lane in zip(nodes, wanted, strict=True)}
            self.made = {node: made for node, made in self.made.items() if node >= min(nodes)} | passes
            for lane in lanes:
                lane.output = lane.sample = None
                lane.audited = False
            solver.tell(outputs[: len(nodes)], samples[: len(nodes)], eps, beside)

    def _go(self, lanes: list[Lane]) -> None:
        """Resumes lanes until each has stepped."""
        for lane in lanes:
            self._resume(lane)
        while waiting := [lane for lane in lanes if lane.call is not None]:
            going = []
            for group in self._due(waiting):
                calls = [lane.call for lane in group if lane.call is not None]
                group[0].task = functools.partial(self.coalescer, calls)
                self._resume(group[0])
                self._reads.refuse_differing(group)
                results = group[0].result
                self.shared.learn(calls[0], results[0])
                self.shared.mark()
                for lane, result in zip(group, results, strict=True):
                    lane.result = result
                going += group
            for lane in going:
                self._resume(lane)

    def _beside(self, lanes: list[Lane], doubles: list[Lane], outputs: Tensor, samples: Tensor, eps: float) -> Beside:
        """What is asked of a pass: that lanes were right in what they took to be so, and that doubles gave the same as the rows
        of the last pass.

        Args:
            lanes: The lanes of the pass.
            doubles: Those among them that evaluated rows of the last pass again.
            outputs: `[R, B, ...]` the outputs that they gave to their steps.
            samples: `[R, B, ...]` the states.
            eps: That of the coarsest dtype in which the pass was computed.
        """
        rows, flags, dtype = self.rows, list(self.shared.flags), torch.promote_types(outputs.dtype, torch.float32)
        self.shared.flags.clear()
        norms = [(lane.ledger, *norm) for lane in lanes for norm in unread(lane.ledger)]
        singles = [*(flag for flag, _ in flags), *(norm for _, _, norm in norms)]
        numbers = [single.view(1).to(outputs.device, dtype, non_blocking=True) for single in singles]
        if doubles:
            numbers.append(relative_difference(outputs, torch.stack([row.output for row in rows])).to(dtype))
            numbers.append(relative_difference(samples, torch.stack([row.sample for row in rows])).to(dtype))

        def judged(told: list[float]) -> None:
            for (_, refusal), so in zip(flags, told, strict=False):
                if not so:
                    raise Unsupported(refusal)
            for (ledger, path, _), norm in zip(norms, told[len(flags) :], strict=False):
                ledger[path] = norm
            told = told[len(singles) :]
            self._compare(rows, doubles, told[: len(doubles)], told[len(doubles) :], eps)

        return Beside(torch.cat([outputs.new_zeros(0, dtype=dtype), *numbers]), judged)

    def _compare(self, rows: list[Row], lanes: list[Lane], outputs: list[float], states: list[float], eps: float) -> None:
        """Judges rows of the last pass by what other lanes gave for them in this one.

        Args:
            rows: The rows.
            lanes: The other lanes.
            outputs: Relative differences of the outputs that the steps were given.
            states: The same of the states.
            eps: That of the coarsest dtype in which the pass was computed.
        """
        self.solver.rows += len(lanes)
        for row, lane, output, state in zip(rows, lanes, outputs, states, strict=True):
            judge(row.node, output, state, eps, "between a call that made the passes before and one that did not")
            path = differing(row.ledger, lane.ledger, granted(eps))
            if path is not None:
                raise Carried(
                    f"{KEEPS}: {path} is {row.ledger[path]} after the passes before, and {lane.ledger[path]} without them"
                )
            self.audited |= set(row.before[:-1])

    def _assign(self, wanted: list[int]) -> list[Lane]:
        """A lane for each wanted node, in order: the lane at the node before, else a free lane, else a new one."""
        after: dict[int, Lane] = {}
        for lane in sorted(self.lanes, key=lambda lane: len(lane.walked)):
            after[lane.node + 1] = lane
        straight = {node: after[node] for node in wanted if node in after}
        free = [lane for lane in self.lanes if straight.get(lane.node + 1) is not lane]
        chosen: list[Lane] = []
        for node, state in zip(wanted, self.solver.states, strict=True):
            lane = straight.pop(node, None)  # one lane only: a method may want several states at a node
            turns = [(node, False)]
            if lane is None:
                lane = free.pop() if free and node else self._new()
                turns = self._entering(node)
            lane.state = state
            lane.turns.extend(turns)
            chosen.append(lane)
        return chosen

    def _entering(self, node: int) -> list[tuple[int, bool]]:
        """The turns of a lane that enters at a node."""
        return [(node - 1, True), (node, False)] if node else [(node, False)]

    def _choose(self, nodes: list[int], lanes: list[Lane]) -> list[int]:
        """The places of the rows in this pass that the next one evaluates again."""
        check = self.coalescer.batching.check
        if check == "off" or self.solver.width == 1:
            return []
        straight = [place for place, lane in enumerate(lanes) if len(lane.walked) > 0 and lane.walked.stop == nodes[place]]
        chosen: list[int] = []
        left_out = set(self.audited)
        for _ in range(max(2 if check == "every" or self.round == SECOND else 1, self.solver.width // SHARE)):
            new = {place: set(lanes[place].walked[:-1]) - left_out for place in straight if place not in chosen}
            if not new:
                break
            place = max(new, key=lambda place: (len(new[place]), place))
            if not new[place] and check == "first" and self.round > SECOND:
                break
            left_out |= new[place]
            chosen.append(place)
        return chosen

    def _doubles(self, lanes: list[Lane]) -> list[Lane]:
        """Lanes that evaluate rows of the last pass again."""
        doubles: list[Lane] = []
        for row in self.rows:
            doubles.append(self._double(row.node, row.before, row.handed, [*lanes, *doubles]))
        return doubles

    def _double(self, node: int, before: range, state: Tensor, busy: list[Lane]) -> Lane:
        """A lane for a row: a free one that made none of the passes before, else a new one."""
        taken, passes = {id(lane) for lane in busy}, {*before, node}
        free = (lane for lane in self.lanes if id(lane) not in taken and not lane.seen & passes)
        lane = next(free, None) or self._new()
        lane.state, lane.audited = state, True
        lane.turns.extend(self._entering(node))
        return lane

    def _close(self) -> None:
        """A last pass for the audit alone, in which passes are left out that no lane has left out so far."""
        solver = self.solver
        missing = set(range(len(solver.first.timesteps) - 2)) - self.audited
        able = [lane for lane in self.lanes if len(lane.walked) > 1 and lane.walked.stop < len(solver.first.timesteps)]
        warm: list[Lane] = []
        while able and (lane := max(able, key=lambda lane: len(missing & {*lane.walked[:-1]}))):
            new = missing & {*lane.walked[:-1]}
            if not new:
                break
            missing -= new
            warm.append(lane)
            able.remove(lane)
        if not warm:
            return
        states = [lane.state for lane in warm]
        before = [lane.walked for lane in warm]
        doubles: list[Lane] = []
        for lane, state in zip(warm, states, strict=True):
            assert state is not None
            doubles.append(self._double(lane.walked.stop, lane.walked, state, [*warm, *doubles]))
            lane.audited = True
            lane.turns.append((lane.walked.stop, False))
        self._go([*warm, *doubles])
        solver.passes += 1
        solver.rows += len(warm)
        with Modes.exact().entered():
            outputs, samples = (
                torch.stack([getattr(lane, name) for lane in [*warm, *doubles]]) for name in ("output", "sample")
            )
            self.rows = [
                Row(lane.node, walked, state, output, sample, lane.ledger)
                for lane, walked, state, output, sample in zip(warm, before, states, outputs, samples, strict=False)
                if state is not None
            ]
            eps = max(self.coalescer.batching.eps, torch.finfo(outputs.dtype).eps)
            beside = self._beside([*warm, *doubles], doubles, outputs[len(warm) :], samples[len(warm) :], eps)
            beside.judge(beside.numbers.tolist())

    def _new(self) -> Lane:
        """A further lane, not started yet."""
        states, _ = self._start
        copies = {id(g): clone(g, state) for g, state in zip(self.shared.generators, states, strict=True)}
        keywords = {
            name: _pytree.tree_map_only(torch.Generator, lambda g: copies[id(g)], value)
            if any(isinstance(leaf, torch.Generator) for leaf in _pytree.tree_leaves(value))
            else value
            for name, value in self.shared.arguments.items()
        }
        lane = Lane(self.shared, len(self.lanes), keywords)
        self.lanes.append(lane)
        return lane

    def _resume(self, lane: Lane) -> None:
        """Runs a lane until it waits or ends."""
        begins = lane.number > 0 and not lane
        now = Snapshot({}) if begins else None
        if begins:
            self._start[1].restore()
        try:
            with lane.modes.entered():
                result = lane.switch()
        finally:
            if now is not None:
                now.restore()
        if lane.dead:
            if not self.solver.done and self.solver.started:
                raise Unsupported(ENDED_EARLY.format(lane.circumstance))
            self._result = result
        elif not lane.waits:
            raise Unsupported(SWITCHES)

    def _due(self, waiting: list[Lane]) -> list[list[Lane]]:
        """Groups of lanes that share one network call each, without those whose network is called later in the loop's body."""
        groups: list[list[Lane]] = []
        for lane in waiting:
            group = next(
                (g for g in groups if g[0].call and lane.call and g[0].call.joins(lane.call) and g[0].surrounded_as(lane)), None
            )
            if group is None:
                groups.append([lane])
            else:
                group.append(lane)
        modules = [id(group[0].call.module) for group in groups if group[0].call is not None]
        due = [g for g, m in zip(groups, modules, strict=True) if not any(self._before(other, m) for other in modules)]
        return due or groups

    def _before(self, a: int, b: int) -> bool:
        """Whether network a is called before network b, and never after it."""
        return (a, b) in self.shared.order and (b, a) not in self.shared.order
