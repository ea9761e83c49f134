"""The estimate of one sample's interpolation error: what the intervals of its collocation system leave out, carried to the
sample.

Defects (defect.py) come from intervals of twice the length, which the network is asked for as nodes settle (order 0), or from
the forcings themselves (orders from 1). Carried to the sample by the linearized system (linearization.py) they are its shares,
and the sum of their squares is that of the error. What was seen of a sample's growth, how much more it answers than the chain's
linear part does, is kept, and so is the response of the first time it was judged: later rounds move the states little, and show
less of it.

A cut is a test: the sample moves by about what the intervals were estimated to leave out. Where it moved more, growth seen
since considered, the next estimate is as much larger, and the one after that by the root of it. Where it moved less, on a
deterministic chain whose early errors do not grow, the next is eased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.defect import DoubledIntervals, convergence_ratio, directions, interpolation_defects
from paradiff.methods.collocation.linearization import Linearization
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.system import CollocationSystem, noise_states

Shares = tuple[list[float], list[tuple[int, ...]]]
"""What each group of intervals leaves out of the sample, root mean square, and the numbers of its intervals."""


class Estimate:
    """Of one sample; b members, d numbers each.

    Args:
        setup: What all samples share.
        noise: x[0] and the noises of every sample.
        sample: The sample.
        x0: `[b, d]` its state at node 0.
        shape: Of a state.

    Attributes:
        interpolation_error: As last judged; infinite before.
        growth: How many times as much as by the chain's linear part defects were seen to reach the sample; at least 1.
        amplified: By how much the last cut moved the sample more than was estimated; at least 1.
    """

    def __init__(self, setup: CollocationSetup, noise: Noise, sample: int, x0: Tensor, shape: tuple[int, ...]) -> None:
        self._control = setup.control
        self._setup, self._noise, self._sample, self._x0, self._shape = setup, noise, sample, x0, shape
        self.interpolation_error = math.inf
        self.growth = self.amplified = 1.0
        self._first: Linearization | None = None  # when first judged
        self._judged: Tensor | None = None  # the sample as it was when last judged
        self._judged_error, self._judged_growth = 0.0, 1.0
        self._foretold = math.inf  # what the last cut was to leave out
        self._doubled: DoubledIntervals | None = None
        self._defects: dict[int, Tensor] = {}  # of the intervals of twice the length
        self._earlier: dict[tuple[int, int, int], Tensor] = {}  # those of intervals that a cut left alone, by their points

    def begin(self, system: CollocationSystem) -> None:
        """Takes over a collocation system; what is known of intervals that it shares with the one before is kept."""
        if self._doubled is not None:
            spans = self._doubled.spans
            self._earlier = {spans[j]: defect for j, defect in self._defects.items()}
        self._system, self._doubled, self._defects = system, None, {}

    def forget(self) -> None:
        """Forcings have another unit now."""
        self._doubled, self._defects, self._earlier = None, {}, {}

    # -- what is asked ------------------------------------------------------------------------------------------------

    def wanted(self, settled: int, drawn: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
        """Numbers of the intervals of twice the length that are to be asked still.

        Args:
            settled: How many nodes from the first on are settled.
            drawn: The noises of all intervals (`system.draw`).
        """
        if not self._system.averaged:
            return []
        if self._doubled is None:
            self._doubled = self._setup.doubled(self._system)
            spans = self._doubled.spans
            self._defects = {j: self._earlier[place] for j, place in enumerate(spans) if place in self._earlier}
            if self._setup.table.stochastic and self._doubled.first:
                own = self._doubled.own(self._noise, self._sample) + noise_states(self._doubled.noise_weights, drawn)
                self._own = self._setup.move(own).view(-1, *self._x0.shape)
        return [j for j, n in enumerate(self._doubled.first) if j not in self._defects and n + 1 < settled]

    def asked(self, pairs: list[int], forcings: Tensor) -> tuple[Tensor, Tensor]:
        """Fine nodes `[R]` and averaged states `[R, b, d]` of intervals of twice the length, by the forcings `[M, b, d]`."""
        assert self._doubled is not None
        start, influence = (self._setup.move(v[pairs]) for v in (self._doubled.initial, self._doubled.influence))
        found = start[:, None, None] * self._x0 + weighted(influence, forcings)
        return self._doubled.nodes[pairs], found + self._own[pairs] if self._setup.table.stochastic else found

    def take(self, pairs: list[int], found: Tensor, forcings: Tensor) -> None:
        """Takes the forcings `[R, b, d]` of intervals of twice the length, beside those of all intervals."""
        assert self._doubled is not None
        weight, weights = (self._setup.move(v[pairs]) for v in (self._doubled.weight, self._doubled.weights))
        defects = weight[:, None, None] * found - weighted(weights, forcings)
        self._defects.update(zip(pairs, defects, strict=True))

    @property
    def ready(self) -> bool:
        """Whether all defects are known."""
        return not self._system.averaged or (self._doubled is not None and len(self._defects) == len(self._doubled.first))

    # -- what is made of it -------------------------------------------------------------------------------------------

    def shares(self, response: Linearization, influence: Tensor, forcings: Tensor, sample: Tensor) -> tuple[Shares, float]:
        """What each group of intervals leaves out, with what the last cut taught of such estimates; and `amplified`, now.

        Args:
            response: The linearized system.
            influence: `[M+1, M]` weights of the forcings in the states and, last, in the sample.
            forcings: `[M, b, d]`.
            sample: As it is now.
        """
        shares, groups = self._left_out(response, influence, forcings)
        amplified = self.amplified
        if self._judged is not None and math.isfinite(self.interpolation_error):
            moved = math.sqrt(float(self._mean_squares((sample - self._judged).view(1, *self._x0.shape))))
            foreseen = self.interpolation_error * self.growth / self._judged_growth  # had that much growth been seen then
            amplified = max(math.sqrt(amplified), moved / math.hypot(foreseen, self._judged_error))
            foretold = self._control.error.safety * self._foretold * moved / self.interpolation_error
            calm = not self._system.averaged and self.growth < self._control.error.benign_amplification and amplified == 1
            if calm:  # the move is no single number then, and small by no chance
                eased = math.sqrt(foretold / max(math.sqrt(sum(e * e for e in shares)), 1e-300))
                shares = [min(max(eased, self._control.error.least_relaxation), 1.0) * e for e in shares]
        return ([amplified * e for e in shares], groups), amplified

    def judge(
        self, interpolation_error: float, amplified: float, response: Linearization, sample: Tensor, iteration_error: float
    ) -> None:
        """The sample is judged: its estimate counts, and the next cut is measured by it."""
        self.interpolation_error, self.amplified, self._first = interpolation_error, amplified, self._first or response
        self._judged, self._judged_error, self._judged_growth = sample, iteration_error, self.growth

    def cut(self, shares: Shares, parts: Sequence[int]) -> None:
        """Intervals are cut into so many parts each."""
        exponent = self._control.mesh.subdivision_exponent
        fewer = (e / min(parts[n] for n in group) ** exponent for e, group in zip(*shares, strict=True))
        self._foretold = math.sqrt(sum(e * e for e in fewer))

    def _left_out(self, response: Linearization, influence: Tensor, forcings: Tensor) -> Shares:
        """By the defects alone."""
        system, move, control = self._system, self._setup.move, self._control
        if all(interval.right - interval.left == 1 for interval in system.intervals):
            return [0.0], [(0,)]
        if system.averaged:
            assert self._doubled is not None
            groups: list[tuple[int, ...]] = [(n, n + 1) for n in self._doubled.first]
            if not groups:
                return [0.0], [(0,)]
            defects = torch.stack([self._defects[j] for j in range(len(groups))])
            found = self._reaching(response, directions(defects, control.defect.neighbours), move(self._doubled.effect))
            tail = 1 + control.error.tail_safety * (
                1 - self.growth**-control.error.tail_exponent
            )  # what grows is a single number, and chance has more of a hand in it
            caution = control.error.safety * tail / control.defect.halving_ratio * self._doubled.sensitivity
            return (caution * found.sqrt().cpu()).tolist(), groups
        omitted, weights = interpolation_defects(system)
        if not omitted:
            return [math.inf], [tuple(range(len(system.intervals)))]
        found = self._reaching(
            response, directions(weighted(move(weights), forcings), control.defect.neighbours), influence[:, omitted]
        )
        more, weights = interpolation_defects(system, 4)
        fourth = self._reaching(response, [weighted(move(weights), forcings)], influence[:, more]) if more else None
        last = None if fourth is None else float(fourth.sum().sqrt())
        rate = convergence_ratio(float(found.sum().sqrt()), last, control.defect)
        return [control.error.safety / rate * math.sqrt(e) for e in found.tolist()], [(n - 1, n) for n in omitted]

    def _reaching(self, response: Linearization, several: list[Tensor], influence: Tensor) -> Tensor:
        """`[J]` mean square effects on the sample of J defects, the mean over several sets of them."""
        found = self._mean_over(response, several, influence)
        if self._first is not None:
            nodes = self._system.nodes
            near = torch.searchsorted(nodes, self._first.nodes).clamp(max=len(nodes) - 1)
            found = torch.maximum(found, self._mean_over(self._first, several, influence[[*near.tolist(), -1]]))
        alone = float(self._mean_squares(influence[-1][:, None, None] * several[len(several) // 2]).sum())
        self.growth = max(self.growth, math.sqrt(float(found.sum()) / max(alone, 1e-300)))
        return found

    def _mean_over(self, response: Linearization, several: list[Tensor], influence: Tensor) -> Tensor:
        """`[J]` mean square effects on the sample, the mean over several sets of J changes."""
        return torch.stack([self._mean_squares(response.on_sample(d, influence)) for d in several]).mean(0)

    def _mean_squares(self, changes: Tensor) -> Tensor:
        """`[J]` of changes `[J, b, d]` of the sample."""
        return self._setup.step.mean_square(changes.view(-1, *self._shape))


def weighted(matrix: Tensor, values: Tensor) -> Tensor:
    """`[K, b, d]` by weights `[K, M]` of values `[M, b, d]`."""
    return (matrix @ values.flatten(1)).view(-1, *values.shape[1:])
