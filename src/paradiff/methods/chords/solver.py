# SPDX-License-Identifier: Apache-2.0
"""One sample's cores: the rows that they ask for, their corrections, and their answers.

Core c starts at node s[c], 0 = s[0] < s[1] < ..., in round c + 1, from the long step that the core behind it makes from its own
start. All cores take one step of the chain a round. Write F for that step and G(l, r, x) for the long step from node l to r
with the clean-data estimate at (l, x) frozen; its network output is known wherever a core has been. Once the core behind
arrives, with the state y, at the node l from which a core has come with the state x and now steps from r - 1 to r, the core
takes

    F(r-1) - G(l, r, x) + G(l, r, y)                                                                              (1)

in place of F(r-1), and the state at r is what the next correction starts from. Corrections cost no network call.

Core c reaches the chain's end in round c + N - s[c]. The answers are, in this order, the long step from the last core's start
to the end (answer 0, in round C for C cores), and the ends of core C - 1, C - 2, ..., 0. Core 0 is the sequential sampler: its
answer, answer C, is exact. The change from the answer before, times a caution (control.py), is the estimate of an answer's
error; it is no smaller than a share of the change before that, as two answers may agree by chance.

Two answers also agree where both come from one wrong state: those that the last core makes, from its start and at its end, and
those of cores that were corrected from one core before that was corrected itself. So each core lacks what the cores behind it
learned since: a correction of core b by d, relative to its state, reaches core c > b when the core behind c, which no longer
lacks it, corrects c. An estimate is no smaller than the caution times what the answer's core lacks times the answer's root mean
square: relative errors are carried to the end as they are, as those of Gaussian data (chain/sensitivity.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.data_scale import held_to, unusual
from paradiff.chain.noise import Noise
from paradiff.errors import NotFinite
from paradiff.methods.chords.setup import ChordsSetup
from paradiff.solver.protocol import Query
from paradiff.solver.records import ChordsRecord
from paradiff.solver.solution import ErrorEstimate


@dataclass(eq=False)
class Core:
    """One solver.

    Attributes:
        number: Its place among the cores.
        node: Where it is.
        x: Its state there.
        left: The node that its next correction starts from.
        left_x: Its state there; `left_clean` the clean-data estimate, once it was evaluated.
        lack: The largest relative correction of a core behind it that its state does not follow from.
    """

    number: int
    node: int
    x: Tensor
    left: int
    left_x: Tensor
    left_clean: Tensor | None = None
    lack: float = 0.0


@dataclass(frozen=True, eq=False)
class ChordsQuery(Query):
    """The rows of one round, one a core.

    Attributes:
        at: The nodes, as an index on the device.
        states: `[R, ...]` the states, not scaled.
    """

    at: Tensor
    states: Tensor


class ChordsSolver:
    """The cores of one sample.

    Args:
        setup: What all samples share.
        noise: The noises.
        sample: The sample.
        start: `[...]` the state at node 0; None for the noise's.

    Attributes:
        sample: The sample.
        done: Whether the sample is found.
        answers: How many answers there are.
        exact: Whether the newest is core 0's, the sequential sample.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
    """

    def __init__(self, setup: ChordsSetup, noise: Noise, sample: int, start: Tensor | None) -> None:
        self.setup, self.sample = setup, sample
        x0 = setup.move(noise.start(sample)) * setup.table.start_scale if start is None else setup.move(start)
        self._cores = [Core(0, 0, x0, 0, x0)]
        self._answer: Tensor | None = None
        self._asked: list[int] = []
        self._made: list[tuple[Core, bool]] = []  # the cores of the round's answers, and whether that is core 0's end
        self._corrected: list[Core] = []  # the cores that were corrected in the round
        self.answers = 0
        self.done = self.exact = False
        self.rounds = self.evaluations = 0
        self.residual = self.estimate = math.inf

    @property
    def final(self) -> Tensor:
        """The newest answer, the sample once the run is done."""
        assert self._answer is not None
        return self._answer

    @property
    def newest(self) -> Tensor:
        """The newest answer; before the first, the state furthest along the chain."""
        return self._cores[-1].x if self._answer is None else self._answer

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        return ErrorEstimate(self.residual, self.estimate, self.rounds, self.evaluations)

    def ask(self) -> ChordsQuery:
        """A row for each core."""
        setup = self.setup
        self._asked = [core.node for core in self._cores]
        nodes = torch.tensor(self._asked)
        at = nodes.to(setup.device, non_blocking=True)
        states = torch.stack([core.x for core in self._cores])
        return ChordsQuery(nodes, setup.step.seen(at, states), at, states)

    def tell(self, query: ChordsQuery, outputs: Tensor, states: Tensor | None = None) -> Tensor:
        """Takes the outputs of a query.

        Returns:
            Mean square of the state that core 0 stepped to, for each answer of the round its mean square change from the
            answer before and its own mean square, and for each correction its mean square over that of the state; on the
            device.
        """
        assert states is None, "the loop refuses changed states, since follows_edits is False"
        setup, x, end = self.setup, query.states, self.setup.table.steps
        self.rounds += 1
        self.evaluations += len(outputs)
        m = setup.table.convert(query.nodes, x, outputs)
        stepped = setup.step(query.at, [x], [m], None)
        clean = [setup.clean(node, x[k], m[k]) for k, node in enumerate(self._asked)]
        found: list[tuple[Core, Tensor]] = []
        corrections: list[Tensor] = []
        self._corrected = []
        for k, core in enumerate(self._cores):
            if core.left == core.node:
                core.left_clean = clean[k]
        if len(self._cores) == self.rounds and len(self._cores) <= len(setup.starts):  # the last core stands at its start
            last, more = self._cores[-1], len(self._cores) < len(setup.starts)
            to = setup.starts[len(self._cores)] if more else end
            ahead = setup.long_step(last.node, to, last.x, clean[-1])
            if more:
                self._cores.append(Core(len(self._cores), to, ahead, to, ahead, lack=last.lack))
            else:
                found.append((last, ahead))
        for k, core in enumerate(self._cores[: len(stepped)]):
            core.node, core.x, behind = core.node + 1, stepped[k], k - 1
            if k and self._asked[behind] == core.left:
                assert core.left_clean is not None
                before = setup.long_step(core.left, core.node, core.left_x, core.left_clean)
                after = setup.long_step(core.left, core.node, x[behind], clean[behind])
                core.x = core.x - before + after
                corrections.append(after - before)
                self._corrected.append(core)
                core.left, core.left_x, core.left_clean = core.node, core.x, None
        numbers = [stepped[0]]
        self._made = []
        arrived = [core for core in self._cores if core.node == end]
        self._cores = [core for core in self._cores if core.node < end]
        for core, answer in [*found, *((core, core.x) for core in reversed(arrived))]:
            numbers += [answer if self._answer is None else answer - self._answer, answer]
            self._answer = answer
            self._made.append((core, core.number == 0 and answer is core.x))
        squares = setup.step.mean_square(torch.stack(numbers))
        if not corrections:
            return squares
        changes, sizes = (
            setup.step.mean_squares(torch.stack(states)) for states in (corrections, [core.x for core in self._corrected])
        )
        return torch.cat([squares, (changes / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).amax(1)])

    def advance(self, norms: list[float], round: int) -> ChordsRecord:
        """Judges the answers of the round.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If a state of the sequential chain is not finite.
        """
        setup, method = self.setup, self.setup.method
        if not math.isfinite(norms[0]):
            node = self._asked[0]
            raise NotFinite(
                f"sample {self.sample} is not finite after node {node} (time {float(setup.table.t[node]):g}), whose own state "
                "is that of the sequential chain: the model returned NaN or infinity, or overflowed its dtype; check its "
                "weights, its dtype and the times it was trained on"
            )
        self._learn(norms[1 + 2 * len(self._made) :])
        for k, (core, exact) in enumerate(self._made):
            change, size = norms[1 + 2 * k : 3 + 2 * k]
            change = math.inf if self.answers == 0 or not math.isfinite(change) else math.sqrt(change)
            least = 0.0 if self.answers < 2 else method.control.least_contraction * self.residual
            estimate = method.control.caution * max(change, least, max(core.lack, setup.rounding) * math.sqrt(size))
            self.exact = exact
            self.residual, self.estimate = (0.0, 0.0) if exact else (change, estimate)
            self.answers += 1
            allowed = held_to(method.tolerance, unusual(size)) if method.rule == "error" else method.tolerance
            judged = self.estimate if method.rule == "error" else self.residual
            asked = self.answers > method.answers if method.answers is not None else judged <= allowed
            self.done = self.done or exact or asked
        answer = self.answers - 1 if self._made else None
        return ChordsRecord(round, self.sample, self._asked, answer, self.residual, int(self.done))

    def _learn(self, corrections: list[float]) -> None:
        """Keeps what each core lacks.

        Args:
            corrections: The relative mean square correction of each core that was corrected in the round.
        """
        cores = {core.number: core for core in [*self._cores, *(core for core, _ in self._made)]}
        before = {number: core.lack for number, core in cores.items()}
        for core in self._corrected:
            core.lack = before[core.number - 1]
        for corrected, square in zip(self._corrected, corrections, strict=True):
            size = math.sqrt(square) if math.isfinite(square) else math.inf
            for core in cores.values():
                if core.number > corrected.number:
                    core.lack = max(core.lack, size)
