# SPDX-License-Identifier: Apache-2.0
"""The interpolation error of one sample, estimated from defects and calibrated by refinements.

Defects (defect.py) are propagated to the sample by the linearized system (linearization.py). The root mean square that each
group of intervals contributes there is its **share** of the error; shares add up in quadrature. The **amplification** of a
sample is the ratio of this to the effect of the same defects by the chain's linear part alone. Its largest value is kept, and
so is the linearization at which the error was first estimated: later rounds move the states little, and their secant pairs
show less of the amplification.

A sample that ends on another side of a decision than the chain's own hides its error: once it is decided, nothing that happened
before counts, and the linearized sample answers to early defects hardly at all. The states in the midst of the decision do. So
the defects are propagated to some of them too, and where one is off by more than a small part of its noise level by estimate
(`decided_error`), weighted by the decision d (chain/sensitivity.py) and by how much the path lets early errors grow
(growth.py), the estimate of the sample exceeds the tolerance as that state's exceeds this part, and the mesh is refined where
that comes from.

What decides whether a mesh suffices is near the errors' size. What is told of a sample is to be exceeded rarely, so that it is
larger, by a factor (`told`), up to the tolerance that the sample was found to keep to.

A refinement tests the estimate, since it moves the sample by about the estimated error. Where the sample moved more than
predicted, with the amplification observed since taken into account, the next estimate is multiplied by the ratio, and the one
after that by its root. Where it moved less, on a deterministic chain that amplifies early errors little, the next is relaxed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paradiff.chain.data_scale import unusual
from paradiff.chain.sensitivity import decision
from paradiff.chain.step import uploaded
from paradiff.methods.collocation.control import CollocationControl
from paradiff.methods.collocation.defect import DoubledIntervals, convergence_ratio, interpolation_defects
from paradiff.methods.collocation.growth import caution, path_growth
from paradiff.methods.collocation.linearization import Linearization
from paradiff.methods.collocation.system import CollocationSystem, weighted


@dataclass(frozen=True)
class InterpolationError:
    """An estimate of the interpolation error.

    Attributes:
        shares: Error that each group of intervals contributes to the sample, root mean square; infinite where it could not be
            estimated.
        groups: The numbers of the intervals of each group.
        amplification: Largest amplification observed so far, 1 or more.
        deciding: Error that each group contributes to the state that is farthest off in the midst of the decision, as a
            multiple of what that state's may be; empty where it was not estimated.
    """

    shares: list[float]
    groups: list[tuple[int, ...]]
    amplification: float = 1.0
    deciding: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Root of the sum of the shares' squares."""
        return math.sqrt(sum(e * e for e in self.shares))

    @property
    def decided(self) -> bool:
        """Whether the mesh tells which side of a decision the sample is on."""
        return sum(e * e for e in self.deciding) <= 1

    def scaled(self, factor: float) -> InterpolationError:
        """All shares times a factor."""
        return replace(self, shares=[factor * e for e in self.shares])

    def doubted(self, factor: float) -> InterpolationError:
        """All states in the midst of the decision farther off by a factor."""
        return replace(self, deciding=[factor * e for e in self.deciding])

    def cautious(self, tolerance: float) -> InterpolationError:
        """As it is where the sample is decided; otherwise above the tolerance, in proportion to the state that is not."""
        if self.decided:
            return self
        return replace(self, shares=[max(e, tolerance * d) for e, d in zip(self.shares, self.deciding, strict=True)])


def told(total: float, tolerance: float, factor: float) -> float:
    """What is told of an estimate: larger by a factor, but not above the tolerance where the estimate is not."""
    return min(factor * total, max(total, tolerance))


@dataclass(frozen=True, kw_only=True, eq=False)
class Propagation:
    """How defects reach the sample; b members, d numbers each.

    Attributes:
        system: The collocation system.
        influence: `[M+1, M]` its influence matrix on the device.
        now: The system linearized at the current forcings.
        first: The same when the error was first estimated, of another mesh maybe; None before.
    """

    system: CollocationSystem
    influence: Tensor
    now: Linearization
    first: Linearization | None

    def effects(self, defects: Tensor, influence: Tensor, neighbours: int = 0) -> Tensor:
        """`[J + 2]` mean square effects of J defects on the sample, the mean over several directions; their sum; and that by
        the chain's linear part alone.

        Args:
            defects: `[J, b, d]`.
            influence: `[M+1, J]` weights of the defects in the states and, last, in the sample.
            neighbours: In whose directions they are propagated, too (`Linearization.effects`).
        """
        found = self.now.effects(defects, influence, neighbours)
        if self.first is not None:
            nodes = self.system.nodes
            near = torch.searchsorted(nodes, self.first.nodes).clamp(max=len(nodes) - 1)
            rows = uploaded([*near.tolist(), len(influence) - 1], influence.device)
            found = torch.maximum(found, self.first.effects(defects, influence[rows], neighbours))
        squares = torch.linalg.vector_norm(defects, dim=2).square() / defects.shape[2]
        linear = (influence[-1].square() * squares.amax(1)).sum()
        return torch.cat([found, torch.stack([found.sum(), linear])])


def interpolation_error(
    propagation: Propagation,
    states: Tensor,
    forcings: Tensor,
    probed: tuple[DoubledIntervals, Tensor] | None,
    *,
    amplification: float,
    control: CollocationControl,
    move: Callable[[Tensor], Tensor],
) -> InterpolationError:
    """The interpolation error by the defects alone, before calibration.

    Args:
        propagation: How defects reach the sample.
        states: `[M, b, d]` states at which the network was evaluated.
        forcings: `[M, b, d]` the forcings there.
        probed: Order 0: the doubled intervals and their defects `[J, b, d]` (`Probes.defects`).
        amplification: Largest amplification observed before.
        control: The tuned numbers.
        move: Moves values to the states' device and dtype.
    """
    system, neighbours, safety = propagation.system, control.defect.neighbours, control.error.safety
    if all(interval.right - interval.left == 1 for interval in system.intervals) or (system.averaged and probed is None):
        return InterpolationError([0.0], [(0,)], amplification)
    if probed is not None:
        doubled, defects = probed
        influence = move(doubled.effect)
        numbers = [propagation.effects(defects, influence, neighbours), _deciding(propagation, defects, influence, control)]
        numbers.append(path_growth(system, states, forcings, control.error.growth_bound))
        host = torch.cat(numbers).cpu()  # the estimate's one wait for the device
        (found, total, linear), early = _read(host[: len(numbers[0])], host[len(numbers[0]) : -1])
        amplification = max(amplification, _amplification(total, linear))
        # What grows is a single number, and so are all defects of small samples: a small value is chance more often.
        tail = 1 + control.error.tail_safety * (1 - amplification**-control.error.tail_exponent)
        few = max(defects[0].numel() ** -0.5 - control.error.many_numbers**-0.5, 0.0)
        chance = 1 + control.error.chance_safety * few
        cold = 1 + control.error.cold_safety * system.recurrence.coldness
        factors = safety * tail * chance * cold / control.defect.halving_ratio * doubled.sensitivity
        groups: list[tuple[int, ...]] = [(n, n + 1) for n in doubled.first]
        nearer = caution(float(host[-1]), control.error.free_growth) / control.defect.halving_ratio
        early = [nearer * e for e in early]
        return InterpolationError((factors * found.sqrt()).tolist(), groups, amplification, early)
    omitted, weights = interpolation_defects(system)
    if not omitted:
        return InterpolationError([math.inf], [tuple(range(len(system.intervals)))], amplification)
    defects, influence = weighted(move(weights), forcings), propagation.influence[:, uploaded(omitted, forcings.device)]
    numbers = [propagation.effects(defects, influence, neighbours), _deciding(propagation, defects, influence, control)]
    more, weights = interpolation_defects(system, 4)
    if more:
        at = uploaded(more, forcings.device)
        numbers.append(propagation.effects(weighted(move(weights), forcings), propagation.influence[:, at]))
    host = torch.cat(numbers).cpu()  # the estimate's one wait for the device
    count = len(numbers[0])
    (found, total, linear), early = _read(host[:count], host[count : count + len(numbers[1])])
    amplification, fourth = max(amplification, _amplification(total, linear)), None
    if more:
        coarser, linear = host[-2:].tolist()
        amplification, fourth = max(amplification, _amplification(coarser, linear)), math.sqrt(coarser)
    ratio = convergence_ratio(math.sqrt(total), fourth, control.defect)
    shares = [safety / ratio * math.sqrt(e) for e in found.tolist()]
    return InterpolationError(shares, [(n - 1, n) for n in omitted], amplification, [e / ratio for e in early])


def _deciding(propagation: Propagation, defects: Tensor, influence: Tensor, control: CollocationControl) -> Tensor:
    """`[K J]` mean square changes of K states by J defects, in units of what each may be off while the sample decides; empty
    where no state lies in the midst of the decision.

    Args:
        propagation: How defects reach the states.
        defects: `[J, b, d]`.
        influence: `[M+1, J]` their weights in the states.
        control: The tuned numbers.
    """
    system, most = propagation.system, control.error.checkpoints
    size = math.log(unusual(system.recurrence.variance))
    weight = decision(system.recurrence.log_snr[system.nodes] + size)
    amid = (weight >= control.error.least_decision).nonzero()[:, 0]
    if not len(amid):
        return defects.new_zeros(0)
    chosen = amid[torch.linspace(0, len(amid) - 1, min(most, len(amid))).round().long()]
    few = min(1.0, (defects.shape[2] / control.error.many_numbers) ** control.error.few_exponent)
    unit = few * weight[chosen] / (system.recurrence.table.sigma[system.nodes[chosen]] * control.error.decided_error)
    found = propagation.now.state_effects(defects, influence, uploaded(chosen.tolist(), influence.device))
    return (found * unit.square().to(found.dtype).to(found.device, non_blocking=True)[:, None]).flatten()


def _read(numbers: Tensor, deciding: Tensor) -> tuple[tuple[Tensor, float, float], list[float]]:
    """What `Propagation.effects` and `_deciding` returned, on the host: `[J]` effects, their sum, and that of the linear part;
    and `[J]` root mean square changes of the state that is farthest off."""
    states = deciding.view(-1, len(numbers) - 2)
    worst = states[int(states.sum(1).argmax())].sqrt().tolist() if len(states) else []
    return (numbers[:-2], float(numbers[-2]), float(numbers[-1])), worst


def _amplification(total: float, linear: float) -> float:
    return math.sqrt(total / max(linear, 1e-300))


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What refinements taught of one sample's estimates.

    Attributes:
        factor: Factor on the next estimate, 1 or more.
        error: The estimate that was accepted last; None before.
        iteration_error: The iteration error at that time.
        sample: The sample at that time.
        predicted: Interpolation error that the last refinement was predicted to leave.
    """

    factor: float = 1.0
    error: InterpolationError | None = None
    iteration_error: float = 0.0
    sample: Tensor | None = None
    predicted: float = math.inf

    def apply(
        self, error: InterpolationError, moved: float, *, averaged: bool, control: CollocationControl
    ) -> tuple[InterpolationError, float]:
        """An estimate, calibrated; and the factor to keep if it is accepted.

        Args:
            error: The estimate by the defects alone.
            moved: Root mean square distance of the sample from `sample`.
            averaged: Whether the interpolation is of order 0.
            control: The tuned numbers.
        """
        last = self.error
        if last is None or self.sample is None or not math.isfinite(last.total):
            return error.scaled(self.factor), self.factor
        expected = last.total * error.amplification / last.amplification  # with the amplification that is observed now
        factor = max(math.sqrt(self.factor), moved / math.hypot(expected, self.iteration_error))
        benign = not averaged and error.amplification < control.error.benign_amplification and factor == 1
        if benign:  # with several independent defects a small total move is evidence, not luck
            predicted = control.error.safety * self.predicted * moved / last.total
            relaxed = math.sqrt(predicted / max(error.total, 1e-300))
            error = error.scaled(min(max(relaxed, control.error.least_relaxation), 1.0))
        return error.scaled(factor), factor

    def accept(self, error: InterpolationError, factor: float, *, iteration_error: float, sample: Tensor) -> Calibration:
        """After an estimate was accepted, calibrated with a factor: the next refinement is measured by it."""
        return replace(self, factor=factor, error=error, iteration_error=iteration_error, sample=sample)

    def refined(self, parts: Sequence[int], exponent: float) -> Calibration:
        """After the intervals were subdivided into `parts` each; n parts leave n^-`exponent` of an interval's error."""
        assert self.error is not None
        shares = zip(self.error.shares, self.error.groups, strict=True)
        fewer = (e / min(parts[n] for n in group) ** exponent for e, group in shares)
        return replace(self, predicted=math.sqrt(sum(e * e for e in fewer)))
