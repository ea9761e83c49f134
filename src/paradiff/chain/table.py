# SPDX-License-Identifier: Apache-2.0
"""The table of a sampler: every coefficient of the chain, known before the first network call.

A sampler with N steps walks states x[0] (noise) ... x[N] (sample):

    x[i+1] = sum_{j<P} ( a[i,j] x[i-j] + b[i,j] m[i-j] ) + c[i] z[i],      m[i] = M(scale[i] x[i], t[i])        (1)

M is the network, z[i] the step's noise, P the band: 1 for one-step samplers, 2 for two-stage and two-step ones. Node i has
signal level alpha[i] and noise level sigma[i], and the network's clean-data estimate there is D = p[i] x + q[i] m.

Two conditions hold for every consistent table and are checked when one is made. A known clean datum stays on its ray
(x = alpha x0 and the matching m give alpha' x0 at the node reached, alpha'), and variances add up (the deterministic part
maps pure noise of level sigma to level u, and u^2 + c^2 = sigma'^2).

Tables are made by the plain functions of paradiff.samplers, or read off any diffusers scheduler (`samplers.from_scheduler`).
Those read off have exact coefficients a, b, c, while their levels are found separately and may be a guide only: they serve
slopes, fills and error estimates, and no state of a finished chain depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from paradiff.chain.draws import Draws
from paradiff.chain.home import at_home, made_at_home
from paradiff.chain.plain import is_plain, plain
from paradiff.chain.prediction import Prediction, clean_coefficients
from paradiff.errors import is_whole, require_real, require_whole, shown

CONSISTENT = 1e-6  # relative difference of levels that the two conditions allow
LARGEST = 2.0**63  # whole numbers below it are int64's
Cached = TypeVar("Cached")
TENSORS = dict.fromkeys(("t", "alpha", "sigma", "a", "b", "c"), False)
TENSORS |= dict.fromkeys(("scale", "reached", "clip_weight", "clean", "rounding"), True)
"""The fields that are tensors, and whether they may be left out."""
ROUNDING = 1e-4  # what float32 arithmetic in a scheduler can explain


@dataclass(frozen=True)
class Table:
    """One sampler on one schedule at one number of steps: equation (1).

    All tensors are float64 on the CPU. Shapes use N for the number of steps and P for the band.

    Attributes:
        name: The sampler's name, `ddpm` say.
        prediction: What the network predicts.
        t: `[N+1]` times handed to the network; the last belongs to the sample, whose chain never evaluates it (a corrector
            may, where noise is left there).
        alpha: `[N+1]` signal levels.
        sigma: `[N+1]` noise levels.
        a: `[N, P]` coefficients of the states x[i-j].
        b: `[N, P]` coefficients of the outputs m[i-j].
        c: `[N]` coefficients of the noises; all zero for a deterministic sampler.
        scale: `[N+1]` factor on the state before the network sees it; ones by default.
        start_scale: Standard deviation of x[0].
        reached: `[N, 2]` signal and noise level that step i lands on, where these are not those of node i + 1 (diffusers'
            DDIM on unevenly spaced times); by default those of node i + 1.
        clip: Limit on the clean-data estimate (clipping.py), or None.
        clip_weight: `[N]` weights w of the limit; 1/q by default.
        exact_variance: False for samplers that add more noise than the process has (`fixed_large`), which are excused from
            the second condition.
        clean: `[N, 2]` p and q, where they are not those of `prediction` (a network behind EDM's preconditioning).
        exact_levels: False for coefficients that are exact while the levels are a guide: excused from both conditions, by
            `mismatch`.
        draws: The random draws that a sequential run makes the noises of (draws.py), for `Recorded`; None for one a step.
        rounding: `[N]` what rounding leaves of the state that each step returns where a scheduler computes it, root mean
            square, in units of its spacing at 1; None where the table is the step itself (roundoff.py). Not compared.
        first: The node of the whole chain that is this table's node 0: the noises are those of the steps from there on. Above 0
            in a slice, `table[70:]`, whose states at node 0 the caller gives.

    Raises:
        ValueError: If a field is of another kind, shapes disagree, a value is not finite, a level is negative, an output tells
            nothing of the clean data, or a consistency condition fails.
    """

    name: str
    prediction: Prediction
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    scale: Tensor = None  # pyright: ignore[reportAssignmentType]  (filled in below)
    start_scale: float = 1.0
    reached: Tensor = None  # pyright: ignore[reportAssignmentType]  (filled in below)
    clip: Callable[[Tensor], Tensor] | None = None
    clip_weight: Tensor | None = None
    exact_variance: bool = True
    clean: Tensor | None = None
    exact_levels: bool = True
    draws: Draws | None = None
    rounding: Tensor | None = field(default=None, compare=False)
    first: int = 0

    @made_at_home
    def __post_init__(self) -> None:
        self._check_kinds()
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, plain(value).cpu())
        self._check_shapes(self.steps)
        self._check_levels()
        if self.scale is None:
            object.__setattr__(self, "scale", torch.ones(self.steps + 1, dtype=torch.float64))
        if self.reached is None:
            object.__setattr__(self, "reached", torch.stack([self.alpha[1:], self.sigma[1:]], dim=1))
        if self.clip is not None and self.clip_weight is None:
            object.__setattr__(self, "clip_weight", 1 / self.q)
        self._check_consistency()

    def __repr__(self) -> str:
        kind = "stochastic" if self.stochastic else "deterministic"
        limit = "" if self.clip is None else f", clean data limited by {self.clip!r}"
        noise, signal = self.sigma, self.alpha
        part = f" from node {self.first} of its chain on" if self.first else ""
        return (
            f"Table {self.name!r}{part}: {self.steps} steps, band {self.band}, {kind}, {self.prediction} prediction{limit}\n"
            f"  times {self.t[0]:g} to {self.t[-2]:g}, signal {signal[0]:.3g} to {signal[-1]:.3g}, noise {noise[0]:.3g} to "
            f"{noise[-1]:.3g}\n"
            f"  {self.about_levels}"
        )

    def __eq__(self, other: object) -> bool:
        """Whether all fields have equal values but `rounding`, which other machines may see otherwise."""
        if not isinstance(other, Table):
            return NotImplemented
        compared = [f.name for f in fields(self) if f.compare]
        return self is other or all(equal(getattr(self, name), getattr(other, name)) for name in compared)

    def __hash__(self) -> int:
        return hash((self.name, self.prediction, self.steps, self.band, float(self.alpha[0]), float(self.sigma[0])))

    def __len__(self) -> int:
        """N, the number of steps."""
        return self.steps

    def __getitem__(self, steps: slice) -> Table:
        """The table of some consecutive steps: `table[70:]`, the last 30 of 100.

        Its node 0 is node 70 of the chain, where the caller gives the states (`start=`), and its noises are those of the steps
        70 ... 99: the sample is that of the whole chain's loop from these states on.

        Raises:
            ValueError: If `steps` is no slice of consecutive steps, is empty, or begins where a step reads states before it.
        """
        if not isinstance(steps, slice):
            raise ValueError(
                f"a table was asked for {shown(steps)}; give a slice of its {self.steps} steps, such as table[70:] or "
                "table[:30]"
            )
        for name, value in (("begin", steps.start), ("end", steps.stop), ("step", steps.step)):
            if value is not None and not is_whole(value):
                raise ValueError(f"the {name} of a table's slice is {shown(value)}; it must be a whole number, or left out")
        if steps.step not in (None, 1):
            raise ValueError(
                f"a table was sliced with a step of {steps.step}; its steps follow each other: make the table of a shorter "
                "chain instead"
            )
        begin, end, _ = slice(steps.start, steps.stop).indices(self.steps)
        if begin >= end:
            raise ValueError(
                f"the slice {_written(steps)} of table {self.name!r} is empty: the chain has {self.steps} steps; keep one at "
                "least"
            )
        if begin == 0 and end == self.steps:
            return self
        if begin not in self.restarts:
            near = min((n for n in self.restarts[:-1]), key=lambda n: abs(n - begin))
            raise ValueError(
                f"the slice {_written(steps)} of table {self.name!r} begins at node {begin}, where a step reads states before "
                f"it; the nearest node at which the chain starts afresh is {near}"
            )
        return self._part(begin, end)

    def _part(self, begin: int, end: int) -> Table:
        """The steps from a node to another, at the first of which the chain starts afresh."""
        inside, nodes = slice(begin, end), slice(begin, end + 1)
        of_steps = ("a", "b", "c", "reached", "clip_weight", "clean", "rounding")
        found = {name: getattr(self, name)[nodes] for name in ("t", "alpha", "sigma", "scale")}
        found |= {name: None if (v := getattr(self, name)) is None else v[inside] for name in of_steps}
        size = 1.0 if begin else self.start_scale
        draws = None if self.draws is None else self.draws.part(begin, end)
        return replace(self, **found, start_scale=size, draws=draws, first=self.first + begin)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what is derived from them is made again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _check_kinds(self) -> None:
        for name, absent in TENSORS.items():
            value = getattr(self, name)
            if not (value is None and absent) and (not is_plain(value) or value.ndim == 0):
                raise ValueError(
                    f"table {self.name!r}: {name} is {shown(value)}; it must be a dense torch tensor of real numbers, float64, "
                    f"one entry for each node or step{', or None' if absent else ''}"
                )
        if isinstance(self.start_scale, Tensor) and self.start_scale.numel() == 1 and is_plain(self.start_scale):
            object.__setattr__(self, "start_scale", float(self.start_scale))
        require_real(f"table {self.name!r}: start_scale", self.start_scale)
        require_whole(f"table {self.name!r}: first", self.first, 0)

    def _check_levels(self) -> None:
        for name in ("alpha", "sigma"):
            value = getattr(self, name)
            if (value < 0).any():
                node = int((value < 0).nonzero()[0])
                raise ValueError(
                    f"table {self.name!r}: {name} is {value[node]:.3g} at node {node}; levels are standard deviations, 0 or "
                    "more"
                )

    def _check_shapes(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"table {self.name!r} has {len(self.t)} times; it needs at least two, for one step")
        band = max(self.a.shape[1], 1) if self.a.ndim == 2 else 1
        expected = {
            "t": (steps + 1,),
            "alpha": (steps + 1,),
            "sigma": (steps + 1,),
            "a": (steps, band),
            "b": (steps, band),
            "c": (steps,),
            "scale": (steps + 1,),
            "reached": (steps, 2),
            "clip_weight": (steps,),
            "clean": (steps, 2),
            "rounding": (steps,),
        }
        expected = {name: shape for name, shape in expected.items() if getattr(self, name) is not None}
        for name, shape in expected.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape or value.dtype != torch.float64:
                raise ValueError(
                    f"table {self.name!r}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}; with {steps} "
                    f"steps it must be {shape}, float64"
                )
            if not torch.isfinite(value).all():
                node = int((~torch.isfinite(value).reshape(len(value), -1).all(1)).nonzero()[0])
                raise ValueError(
                    f"table {self.name!r}: {name} is not finite at node {node} (alpha = {self.alpha[node]:.3g}, sigma = "
                    f"{self.sigma[node]:.3g}, {self.prediction} prediction); a schedule that starts from pure noise "
                    "needs sample, v or flow prediction"
                )
        if self.draws is not None and not len(self.draws.counts) == len(self.draws.terms) == steps:
            raise ValueError(
                f"table {self.name!r}: draws has {len(self.draws.counts)} counts and {len(self.draws.terms)} terms; with "
                f"{steps} steps it must have {steps} of each"
            )
        for i in range(min(band - 1, steps)):
            if self.a[i, i + 1 :].any() or self.b[i, i + 1 :].any():
                raise ValueError(f"table {self.name!r}: step {i} refers to states before the first one")

    def _check_consistency(self) -> None:
        if not self.exact_levels:
            self._check_clean()
            return
        complaints = ["a known clean datum leaves its ray"]
        if self.exact_variance:
            complaints.append("variances do not add up")
        for complaint, found, off, wanted in zip(complaints, self._landed.T, self.mismatches.T, self.reached.T, strict=False):
            worst = int(off.argmax())
            if not off[worst] <= CONSISTENT:
                raise ValueError(
                    f"table {self.name!r}: {complaint} at step {worst}: level {found[worst]:.6g} where the schedule has "
                    f"{wanted[worst]:.6g}; check the coefficients a, b, c of that step"
                )

    def _check_clean(self) -> None:
        """Refuses levels at which outputs tell nothing of the clean data: no method has a slope, or an estimate, there."""
        known = torch.isfinite(self.p) & torch.isfinite(self.q) & (self.q != 0)
        if not known.all():
            node = int((~known).nonzero()[0])
            raise ValueError(
                f"table {self.name!r}: the clean-data estimate p x + q m has p = {self.p[node]:.3g} and q = {self.q[node]:.3g} "
                f"at node {node} (alpha = {self.alpha[node]:.3g}, sigma = {self.sigma[node]:.3g}, {self.prediction} "
                "prediction); p and q must be finite, and q not 0, at every node but the last: give levels above 0 there, as a "
                "guide if no others are known"
            )

    @cached_property
    def _landed(self) -> Tensor:
        return landed(self.a, self.b, self.c, self.alpha, self.sigma, self.p, self.q)

    @property
    def mismatches(self) -> Tensor:
        """`[N, 2]` how far the signal and the noise level that each step lands on are from `reached`, beside the level."""
        return (self._landed - self.reached).abs() / (self.reached.abs() + 1e-2)

    @property
    def mismatch(self) -> float:
        """The largest of `mismatches`, those of the conditions that this table is not excused from."""
        return float(self.mismatches[:, : 2 if self.exact_variance else 1].amax())

    @property
    def about_levels(self) -> str:
        """A sentence: how far the levels may be trusted."""
        if self.exact_levels:
            return "levels and coefficients agree"
        size = "within rounding" if self.mismatch < ROUNDING else "in part"
        return (
            f"levels and coefficients agree {size} (largest difference {self.mismatch:.1e}): the coefficients are exact, the "
            "levels serve slopes, first guesses and error estimates"
        )

    @property
    def steps(self) -> int:
        """N, the number of steps; nodes are 0 ... N."""
        return self.t.shape[0] - 1  # len() of a tensor takes ten times as long, and this is asked for in every round

    @property
    def times(self) -> Tensor:
        """`[N+1]` times as they are handed to the network: int64 where all are whole numbers that it holds, else float64."""
        whole = bool(((self.t == self.t.round()) & (self.t.abs() < LARGEST)).all())
        return self.t.to(torch.int64) if whole else self.t

    @property
    def band(self) -> int:
        """P, the number of states that one step reads."""
        return self.a.shape[1]

    @cached_property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.c.any())

    @cached_property
    def restarts(self) -> list[int]:
        """The nodes at which the chain starts afresh: all that follows depends on the state there alone. Every node of a
        one-step sampler, every second one of a two-stage sampler; 0 and N always."""
        nodes = list(range(self.steps + 1))
        crossed = torch.zeros(self.steps + 1, dtype=torch.bool, device="cpu")
        for j in range(1, self.band):
            reads = (self.a[:, j] != 0) | (self.b[:, j] != 0)
            for step in reads.nonzero()[:, 0].tolist():
                crossed[step - j + 1 : step + 1] = True  # this step looks past these nodes, at one before them
        return [n for n in nodes if n in (0, self.steps) or not crossed[n]]

    def cached(self, key: tuple[Any, ...], make: Callable[[], Cached]) -> Cached:
        """What `make` returns, made at the first call with a key and kept as long as the table."""
        kept = self.__dict__.setdefault("_derived", {})
        if key not in kept:
            with at_home():  # also where torch's default device is another when it is first asked for
                kept[key] = make()
        return kept[key]

    @cached_property
    def _clean(self) -> tuple[Tensor, Tensor]:
        if self.clean is not None:
            return self.clean[:, 0], self.clean[:, 1]
        return clean_coefficients(self.prediction, self.alpha[:-1], self.sigma[:-1])

    def clean_at(self, nodes: slice | int) -> tuple[Tensor, Tensor]:
        """p and q at nodes, among which the last may be: where there is no step, by what the network predicts.

        Raises:
            ValueError: If they are asked for at the last node of a table that states its own.
        """
        asked = torch.arange(self.steps + 1, device="cpu")[nodes]
        if int(asked.max()) < self.steps:
            return self.p[asked], self.q[asked]
        if self.clean is not None:
            raise ValueError(
                f"table {self.name!r} says nothing of the clean data at its last node, which its chain never evaluates; end "
                "the correction, or the chain, before it"
            )
        return clean_coefficients(self.prediction, self.alpha[nodes], self.sigma[nodes])

    @property
    def p(self) -> Tensor:
        """`[N]` coefficient of the state in the clean-data estimate."""
        return self._clean[0]

    @property
    def q(self) -> Tensor:
        """`[N]` coefficient of the output in the clean-data estimate."""
        return self._clean[1]

    def posterior_variance(self, edges: list[int] | None = None) -> Tensor:
        """`[M]` variance of the state at each of the nodes `edges` `[M+1]` after the first, given the state at the one before
        and the clean datum, sigma'^2 (1 - snr/snr'): a DDPM step's own noise (Ho et al. 2020, eq. 7), defined for
        deterministic samplers too, where it serves as the unit of tolerances. All nodes by default."""
        nodes = slice(None) if edges is None else edges
        alpha, sigma = self.alpha[nodes], self.sigma[nodes]
        ratio = (alpha[:-1] * sigma[1:]) / (alpha[1:] * sigma[:-1])
        return (sigma[1:] ** 2 * (1 - ratio**2)).clamp(min=0)

    def convert(self, nodes: slice | Tensor, x: Tensor, m: Tensor) -> Tensor:
        """The output that the linear step sees: `m` itself, or `m` with the clean-data limit folded in (clipping.py).

        Args:
            nodes: Slice or CPU integer tensor of the R nodes.
            x: `[R, ...]` states there.
            m: `[R, ...]` network outputs there.
        """
        if self.clip is None:
            return m
        assert self.clip_weight is not None
        p, q, w = (column(v[nodes], x) for v in (self.p, self.q, self.clip_weight))
        clean = p * x + q * m
        return m + w * (self.clip(clean) - clean)


@made_at_home
def landed(a: Tensor, b: Tensor, c: Tensor, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """`[N, 2]` signal and noise level that each step lands on from nodes at their levels, with the clean datum known.

    Args:
        a: `[N, P]` coefficients of equation (1); `b` and `c` `[N]` likewise.
        b: See `a`.
        c: See `a`.
        alpha: `[N+1]` levels.
        sigma: See `alpha`.
        p: `[N]` coefficients of the clean-data estimate.
        q: See `p`.
    """
    steps, band = a.shape
    source = torch.arange(steps)
    ray_output, noise_output = (1 - p * alpha[:-1]) / q, -p * sigma[:-1] / q
    ray, noise = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    for j in range(band):
        at = (source - j).clamp(min=0)
        ray += a[:, j] * alpha[at] + b[:, j] * ray_output[at]
        noise += a[:, j] * sigma[at] + b[:, j] * noise_output[at]
    return torch.stack([ray, torch.hypot(noise, c)], dim=1)


def _written(steps: slice) -> str:
    """A slice as it is written."""
    return f"[{'' if steps.start is None else steps.start}:{'' if steps.stop is None else steps.stop}]"


def equal(one: Any, other: Any) -> bool:
    """Whether two values are equal; tensors if their dtypes, shapes and all numbers are."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def column(values: Tensor, like: Tensor) -> Tensor:
    """`values` `[R]` on the device and in the dtype of `like` `[R, ...]`, shaped to multiply it; the host does not wait."""
    moved = values.to(device=like.device, dtype=like.dtype, non_blocking=values.device.type == "cpu")
    return moved.view(-1, *[1] * (like.ndim - 1))
