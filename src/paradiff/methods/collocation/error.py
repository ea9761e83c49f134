"""The estimate of one sample's interpolation error: what the gaps of its sparse system leave out, carried to the sample.

Defects (defect.py) come from gaps of twice the length, which the network is asked for as nodes settle (order 0), or from the
drives themselves (orders from 1). Carried to the sample by the linearized system (linearization.py) they are its shares, and
the sum of their squares is that of the error. What was seen of a sample's growth, how much more it answers than the chain's
linear part does, is kept, and so is the response of the first time it was judged: later rounds move the states little, and show
less of it.

A cut is a test: the sample moves by about what the gaps were estimated to leave out. Where it moved more, growth seen since
considered, the next estimate is as much larger, and the one after that by the root of it. Where it moved less, on a
deterministic chain whose early errors do not grow, the next is eased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.defect import DoubledIntervals, directions, left_out, reduction
from paradiff.methods.collocation.linearization import Linearization
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.system import CollocationSystem, spread

Shares = tuple[list[float], list[tuple[int, ...]]]
"""What each group of gaps leaves out of the sample, root mean square, and the numbers of its gaps."""


class Estimate:
    """Of one sample; b members, d numbers each.

    Args:
        ground: What all samples share.
        noise: x[0] and the noises of every sample.
        sample: The sample.
        x0: `[b, d]` its state at node 0.
        shape: Of a state.

    Attributes:
        interpolation_error: As last judged; infinite before.
        growth: How many times as much as by the chain's linear part defects were seen to reach the sample; at least 1.
        amplified: By how much the last cut moved the sample more than was estimated; at least 1.
    """

    def __init__(self, ground: CollocationSetup, noise: Noise, sample: int, x0: Tensor, shape: tuple[int, ...]) -> None:
        self._control = ground.control
        self._ground, self._noise, self._sample, self._x0, self._shape = ground, noise, sample, x0, shape
        self.interpolation_error = math.inf
        self.growth = self.amplified = 1.0
        self._first: Linearization | None = None  # when first judged
        self._judged: Tensor | None = None  # the sample as it was when last judged
        self._judged_error, self._judged_growth = 0.0, 1.0
        self._foretold = math.inf  # what the last cut was to leave out
        self._doubled: DoubledIntervals | None = None
        self._defects: dict[int, Tensor] = {}  # of the gaps of twice the length
        self._earlier: dict[tuple[int, int, int], Tensor] = {}  # those of gaps that a cut left alone, by their edges

    def begin(self, sparse: CollocationSystem) -> None:
        """Takes over a sparse table; what is known of gaps that it shares with the one before is kept."""
        if self._doubled is not None:
            places = self._doubled.places
            self._earlier = {places[j]: defect for j, defect in self._defects.items()}
        self._sparse, self._doubled, self._defects = sparse, None, {}

    def forget(self) -> None:
        """Drives have another unit now."""
        self._doubled, self._defects, self._earlier = None, {}, {}

    # -- what is asked ------------------------------------------------------------------------------------------------

    def wanted(self, settled: int, drawn: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
        """Numbers of the gaps of twice the length that are to be asked still.

        Args:
            settled: How many nodes from the first on are settled.
            drawn: The noises of all gaps (`sparse.draw`).
        """
        if not self._sparse.averaged:
            return []
        if self._doubled is None:
            self._doubled = self._ground.doubled(self._sparse)
            places = self._doubled.places
            self._defects = {j: self._earlier[place] for j, place in enumerate(places) if place in self._earlier}
            if self._ground.table.stochastic and self._doubled.first:
                own = self._doubled.own(self._noise, self._sample) + spread(self._doubled.spread, drawn)
                self._own = self._ground.move(own).view(-1, *self._x0.shape)
        return [j for j, n in enumerate(self._doubled.first) if j not in self._defects and n + 1 < settled]

    def asked(self, pairs: list[int], drives: Tensor) -> tuple[Tensor, Tensor]:
        """Fine nodes `[R]` and averaged states `[R, b, d]` of gaps of twice the length, by the drives `[M, b, d]`."""
        assert self._doubled is not None
        start, reach = (self._ground.move(v[pairs]) for v in (self._doubled.start, self._doubled.reach))
        found = start[:, None, None] * self._x0 + times(reach, drives)
        return self._doubled.nodes[pairs], found + self._own[pairs] if self._ground.table.stochastic else found

    def take(self, pairs: list[int], found: Tensor, drives: Tensor) -> None:
        """Takes the drives `[R, b, d]` of gaps of twice the length, beside those of all gaps."""
        assert self._doubled is not None
        weight, weights = (self._ground.move(v[pairs]) for v in (self._doubled.weight, self._doubled.weights))
        defects = weight[:, None, None] * found - times(weights, drives)
        self._defects.update(zip(pairs, defects, strict=True))

    @property
    def ready(self) -> bool:
        """Whether all defects are known."""
        return not self._sparse.averaged or (self._doubled is not None and len(self._defects) == len(self._doubled.first))

    # -- what is made of it -------------------------------------------------------------------------------------------

    def shares(self, response: Linearization, reach: Tensor, drives: Tensor, sample: Tensor) -> tuple[Shares, float]:
        """What each group of gaps leaves out, with what the last cut taught of such estimates; and `amplified`, now.

        Args:
            response: The linearized system.
            reach: `[M+1, M]` weights of the drives in the states and, last, in the sample.
            drives: `[M, b, d]`.
            sample: As it is now.
        """
        shares, groups = self._left_out(response, reach, drives)
        amplified = self.amplified
        if self._judged is not None and math.isfinite(self.interpolation_error):
            moved = math.sqrt(float(self._mean_squares((sample - self._judged).view(1, *self._x0.shape))))
            foreseen = self.interpolation_error * self.growth / self._judged_growth  # had that much growth been seen then
            amplified = max(math.sqrt(amplified), moved / math.hypot(foreseen, self._judged_error))
            foretold = self._control.error.safety * self._foretold * moved / self.interpolation_error
            calm = not self._sparse.averaged and self.growth < self._control.error.benign_amplification and amplified == 1
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
        """Gaps are cut into so many parts each."""
        exponent = self._control.mesh.subdivision_exponent
        fewer = (e / min(parts[n] for n in group) ** exponent for e, group in zip(*shares, strict=True))
        self._foretold = math.sqrt(sum(e * e for e in fewer))

    def _left_out(self, response: Linearization, reach: Tensor, drives: Tensor) -> Shares:
        """By the defects alone."""
        sparse, move, control = self._sparse, self._ground.move, self._control
        if all(gap.right - gap.left == 1 for gap in sparse.gaps):
            return [0.0], [(0,)]
        if sparse.averaged:
            assert self._doubled is not None
            groups: list[tuple[int, ...]] = [(n, n + 1) for n in self._doubled.first]
            if not groups:
                return [0.0], [(0,)]
            defects = torch.stack([self._defects[j] for j in range(len(groups))])
            found = self._reaching(response, directions(defects, control.defect.neighbours), move(self._doubled.effect))
            tail = 1 + control.error.tail_safety * (
                1 - self.growth**-control.error.tail_exponent
            )  # what grows is a single number, and chance has more of a hand in it
            caution = control.error.safety * tail / control.defect.halving_ratio * self._doubled.answer
            return (caution * found.sqrt().cpu()).tolist(), groups
        gone, weights = left_out(sparse)
        if not gone:
            return [math.inf], [tuple(range(len(sparse.gaps)))]
        found = self._reaching(response, directions(times(move(weights), drives), control.defect.neighbours), reach[:, gone])
        more, weights = left_out(sparse, 4)
        fourth = self._reaching(response, [times(move(weights), drives)], reach[:, more]) if more else None
        last = None if fourth is None else float(fourth.sum().sqrt())
        rate = reduction(float(found.sum().sqrt()), last, control.defect)
        return [control.error.safety / rate * math.sqrt(e) for e in found.tolist()], [(n - 1, n) for n in gone]

    def _reaching(self, response: Linearization, several: list[Tensor], reach: Tensor) -> Tensor:
        """`[J]` mean square effects on the sample of J defects, the mean over several sets of them."""
        found = self._mean_over(response, several, reach)
        if self._first is not None:
            nodes = self._sparse.nodes
            near = torch.searchsorted(nodes, self._first.nodes).clamp(max=len(nodes) - 1)
            found = torch.maximum(found, self._mean_over(self._first, several, reach[[*near.tolist(), -1]]))
        alone = float(self._mean_squares(reach[-1][:, None, None] * several[len(several) // 2]).sum())
        self.growth = max(self.growth, math.sqrt(float(found.sum()) / max(alone, 1e-300)))
        return found

    def _mean_over(self, response: Linearization, several: list[Tensor], reach: Tensor) -> Tensor:
        """`[J]` mean square effects on the sample, the mean over several sets of J changes."""
        return torch.stack([self._mean_squares(response.on_sample(d, reach)) for d in several]).mean(0)

    def _mean_squares(self, changes: Tensor) -> Tensor:
        """`[J]` of changes `[J, b, d]` of the sample."""
        return self._ground.step.mean_square(changes.view(-1, *self._shape))


def times(matrix: Tensor, values: Tensor) -> Tensor:
    """`[K, b, d]` by weights `[K, M]` of values `[M, b, d]`."""
    return (matrix @ values.flatten(1)).view(-1, *values.shape[1:])
