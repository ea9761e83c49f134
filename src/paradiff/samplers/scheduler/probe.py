# SPDX-License-Identifier: Apache-2.0
"""A diffusers scheduler as a table: the coefficients of its chain, read off its own `step`.

A scheduler whose step is linear, elementwise, in everything it has been handed so far walks

    x[i+1] = sum_k ( A[i,k] x[k] + B[i,k] m[k] ) + n[i],      k <= i                                            (1)

whatever it keeps between steps. One walk over all steps, with a fresh basis vector as state and another as output at every
step, shows every A[i,k] and B[i,k]: they are the channels of what the step returns. Random draws are set to zero in that walk;
a second one, with inputs zero and basis vectors as draws, shows the standard deviation of the noise n[i]. A third and a fourth,
with random inputs, with none, and with equal real draws, must differ by what (1) says: this superposition test decides
whether the step is linear. A last one in float32 shows what the step's own arithmetic rounds.

A limit on the clean-data estimate (`clip_sample`, `thresholding`) is the one nonlinearity that is known. The scheduler is then
probed with the limit switched off, the weights of the limit are fitted to one walk with it (chain/clipping.py), and the
superposition test is made with it. Everything else is refused.

All others are made in float64, and all on copies on the CPU. Some schedulers round states to float32, and most keep float32
schedules, so that coefficients agree with the formulas of the papers to about 1e-7, and with the scheduler's own chain better
than that.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.draws import Draws, Source
from paradiff.chain.home import at_home
from paradiff.chain.table import CONSISTENT, ROUNDING, Table
from paradiff.errors import Unsupported, require_kind, shown
from paradiff.samplers.scheduler.levels import levels_of
from paradiff.samplers.scheduler.walk import UNUSED, Request, Walk, fingerprint, on_cpu, refuse_unfit, step_of, walk

LINEAR = 1e-6  # superposition error allowed, beside the size of the terms; limits and other nonlinearities miss by 0.01 ... 1
FLOAT32 = 32 * torch.finfo(torch.float32).eps
"""What a scheduler's float32 arithmetic leaves of terms that cancel, beside their size: ten roundings of half an eps in each
coefficient, which differences of neighbouring levels amplify several times. Terms that do not cancel leave 1e-2 and more."""
CHANNELS = 64  # random inputs of the superposition test
LIMITS = ("clip_sample", "clip_denoised", "thresholding")


def probe(scheduler: Any, timesteps: Tensor | None = None, step_kwargs: Mapping[str, Any] | None = None) -> Table:
    """The table of the chain that a denoising loop walks with a scheduler.

    Rows of this table are states of the whole loop, `[R, B, ...]`, and its first state is the loop's own (`start_scale` 1);
    `from_scheduler` gives the form for one sample a row.

    Args:
        scheduler: The scheduler, whose `set_timesteps` was called, and `set_begin_index` where the loop begins inside. It is
            not changed.
        timesteps: `[N]` those that the loop walks, a stretch of the scheduler's own; all of them by default.
        step_kwargs: What the loop hands to `step` by name; generators do not matter here.

    Returns:
        The table, the same object for the same state of the scheduler, times and options.

    Raises:
        Unsupported: If the step has no table.
    """
    return _probed(scheduler, timesteps, step_kwargs).looped


def from_scheduler(scheduler: Any, timesteps: Tensor | None = None, **step_kwargs: Any) -> Table:
    """The table of the chain that a diffusers scheduler walks, for one sample a row.

    Args:
        scheduler: The scheduler, whose `set_timesteps` was called. It is not changed.
        timesteps: `[N]` those that the loop walks, a stretch of the scheduler's own; all of them by default.
        step_kwargs: What the loop hands to `step` beside output, time and state: `eta`, say.

    Returns:
        The table, the same object for the same state of the scheduler, times and options.

    Raises:
        ValueError: If it is no scheduler, or the step has no table: it is not linear, takes other arguments, or its times
            are not known.
    """
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "config"):
        advice = ": use the table as it is" if isinstance(scheduler, Table) else ""
        raise ValueError(
            f"the scheduler is {shown(scheduler)}; it must be a diffusers scheduler whose set_timesteps was called{advice}"
        )
    if timesteps is not None:
        require_kind("timesteps", timesteps, Tensor, ", a stretch of the scheduler's own, or None for all")
    try:
        return _probed(scheduler, timesteps, step_kwargs).table
    except Unsupported as refusal:
        raise ValueError(str(refusal)) from refusal


Dtypes = tuple[tuple[torch.dtype, torch.dtype], ...]


@dataclass(frozen=True)
class Merged:
    """A limit on samples, for rows that are whole batches: each of the R x B samples by itself."""

    limit: Callable[[Tensor], Tensor]

    def __call__(self, clean: Tensor) -> Tensor:
        """C(D) for estimates `[R, B, ...]`."""
        return self.limit(clean.flatten(0, 1)).view_as(clean)


@dataclass(frozen=True)
class Probed:
    """What probing finds.

    Attributes:
        table: The table for one sample a row.
        looped: The table for a whole loop state a row.
        draws: Random draws that each step makes.
        mixing: `[N, N]` by which increments are made independent (see `_independent`), or None where they are.
        error: Superposition error.
    """

    table: Table
    looped: Table
    draws: list[int]
    mixing: Tensor | None
    error: float


def _probed(scheduler: Any, timesteps: Tensor | None, step_kwargs: Mapping[str, Any] | None) -> Probed:
    kwargs = {k: v for k, v in (step_kwargs or {}).items() if k not in UNUSED}
    with torch.inference_mode(False), torch.no_grad(), at_home():
        own = on_cpu(scheduler)
        given = own.timesteps if timesteps is None else timesteps.detach().cpu().clone()
        refuse_unfit(own, given, kwargs)
        try:
            key = (type(own), fingerprint(vars(own)), fingerprint(given), fingerprint(kwargs))
        except TypeError:  # something that has no value of its own, such as a user's function
            return _probe.__wrapped__(Request(None, own, given, kwargs))
        return _probe(Request(key, own, given, kwargs))


@lru_cache(maxsize=32)
def _probe(request: Request) -> Probed:
    steps, scheduler = len(request.timesteps), request.scheduler
    name = type(scheduler).__name__
    off = {option: False for option in LIMITS if scheduler.config.get(option)}
    basis = torch.zeros(2, 2 * steps + 1, dtype=torch.float64)  # one channel more: what the step adds by itself

    def unit(i: int) -> tuple[Tensor, Tensor]:
        found = basis.clone()
        found[0, i] = found[1, steps + i] = 1
        return found[0], found[1]

    main = walk(request, unit, 0, **off)
    own = main.states[:, 2 * steps :]
    factors = _cancelled(main.states[:, : 2 * steps] - own, main.states[:, : 2 * steps].abs() + own.abs())
    if not torch.isfinite(main.states).all():
        i = int((~torch.isfinite(main.states)).any(1).nonzero()[0])
        raise Unsupported(
            f"{name}: step {i} (time {float(request.timesteps[i]):g}) has coefficients that are not finite: either it has "
            "the time of its neighbour (take fewer steps), or it starts from pure noise (which needs another prediction)"
        )
    noise = _responses(request, main.different, off)
    mixing, c = _independent(noise)
    mixed = factors
    if mixing is not None:
        mixed, size = mixing @ factors, mixing.abs() @ factors.abs()
        mixed[1:, 1:steps] -= (mixing.tril(-1))[1:, : steps - 1]
        size[1:, 1:steps] += (mixing.tril(-1)).abs()[1:, : steps - 1]
        mixed = _cancelled(mixed, size)
    a, b = _banded(mixed[:, :steps]), _banded(mixed[:, steps:])
    band = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(v, (0, band - v.shape[1])) for v in (a, b))
    t = request.timesteps.double()
    levels = levels_of(scheduler, t, main.places, main.scale, a, b, c)
    begins = bool((request.timesteps[:1] == scheduler.timesteps[:1]).all())
    table = Table(
        name=name,
        prediction=levels.prediction,
        t=torch.cat([t, torch.zeros(1, dtype=torch.float64)]),
        alpha=levels.alpha,
        sigma=levels.sigma,
        a=a,
        b=b,
        c=c,
        scale=torch.cat([main.scale, torch.ones(1, dtype=torch.float64)]),
        start_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)) if begins else 1.0,
        clean=levels.clean,
        exact_levels=False,
        draws=_draws_of(name, main, noise if mixing is None else mixing @ noise, c, _drawn_in(request, main, off)),
    )
    ray, spread = table.mismatches.amax(0).tolist()
    table = dataclasses.replace(table, exact_variance=ray > ROUNDING or spread <= ROUNDING)
    table = dataclasses.replace(table, exact_levels=table.mismatch <= CONSISTENT)
    limit = _limit_of(scheduler.config)
    if limit is not None:
        table = _limited(request, table, factors, limit)
    error = _superposition_error(request, table, factors, noise)
    if not error <= LINEAR:
        _refuse_idle_limit(request, table, factors, limit)
        raise Unsupported(
            f"{name}.step is not linear in the state and the network's output: superposition fails by {error:.1g} (rounding "
            f"would explain {LINEAR:g}){', its limit ' + repr(limit) + ' included' if limit is not None else ''}"
        )
    _refuse_mixing(request, table, factors, own[:, 0])
    clip = None if table.clip is None else Merged(table.clip)
    rounding = _rounding(request, table, factors, own[:, 0], off)
    looped = dataclasses.replace(table, start_scale=1.0, clip=clip, rounding=rounding)
    return Probed(table, looped, main.draws, mixing, error)


def _cancelled(values: Tensor, size: Tensor) -> Tensor:
    """Sums whose terms are of that size in all; 0 where rounding explains what is left."""
    return torch.where(values.abs() <= FLOAT32 * size, 0.0, values)


def _drawn_in(request: Request, main: Walk, off: Mapping[str, bool]) -> Dtypes:
    """Dtypes of states whose steps draw in another one, each with that: many schedulers step in float32, whatever they are
    given, and some draw there. Seen at the first step that draws."""
    until, found = next((i + 1 for i, count in enumerate(main.draws) if count), 0), list[tuple[torch.dtype, torch.dtype]]()
    if until:
        part = dataclasses.replace(request, timesteps=request.timesteps[:until])
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            nothing = torch.zeros(CHANNELS, dtype=dtype)
            with contextlib.suppress(Unsupported):  # a step that a CPU cannot make in half precision
                drawn = walk(part, lambda i, nothing=nothing: (nothing, nothing), 0, **off).dtypes
                found += [(dtype, own) for own in drawn if len(drawn) == 1 and own != dtype]
    return tuple(found)


def _draws_of(name: str, main: Walk, noise: Tensor, c: Tensor, dtypes: Dtypes) -> Draws | None:
    """How the steps' independent noises are made of draws; None for one a step.

    Args:
        name: The scheduler's.
        main: A walk.
        noise: `[N, K]` coefficients of the K draws in c[i] z[i].
        c: `[N]` deviations.
        dtypes: In which dtypes they are made (`Draws`).
    """
    if not c.any():
        return None
    source: Source = main.sources.pop() if len(main.sources) == 1 and sum(main.draws) == main.different else "own"
    weights = torch.where(c[:, None] > 0, noise / c[:, None], 0.0)
    whole = weights.round()
    weights = torch.where((weights - whole).abs() <= FLOAT32, whole, weights)
    terms = tuple(tuple((k, float(row[k])) for k in row.nonzero()[:, 0].tolist()) for row in weights)
    found = Draws(name, tuple(main.draws), terms if source != "own" else ((),) * len(noise), source, dtypes=dtypes)
    return None if found.one_a_step and not found.dtypes else found


def _banded(factors: Tensor) -> Tensor:
    """`[N, P]` rows of a lower triangle `[N, N]`, the diagonal first; P reaches to the farthest entry that is not 0."""
    steps = len(factors)
    full = torch.zeros(steps, steps, dtype=torch.float64)
    for i in range(steps):
        full[i, : i + 1] = factors[i, : i + 1].flip(0)
    used = full.any(0).nonzero()[:, 0]
    return full[:, : int(used[-1]) + 1] if len(used) else full[:, :1]


def _responses(request: Request, draws: int, off: Mapping[str, bool]) -> Tensor:
    """`[N, K]` coefficients of the K random draws in each step's noise n[i]."""
    nothing = torch.zeros(max(draws, 1), dtype=torch.float64)
    if draws == 0:
        return nothing.expand(len(request.timesteps), 1)
    return walk(request, lambda i: (nothing, nothing), draws, **off).states


def _independent(noise: Tensor) -> tuple[Tensor | None, Tensor]:
    """What makes the steps' noises independent, and their deviations.

    A corrector that uses the last step's draw again (SA-Solver) has noises n with covariance C = L diag(c^2) L^T, L with unit
    diagonal. K = L^-1 applied to (1) leaves noises K n = c z, and replaces old draws by the states they led to.

    Args:
        noise: `[N, K]` coefficients of the draws.

    Returns:
        K, `[N, N]`, or None where it is the identity; c, `[N]`.
    """
    covariance = noise @ noise.T
    c = covariance.diagonal().sqrt()
    if not _cancelled(covariance - covariance.diagonal().diag(), c[:, None] * c).any():
        return None, c
    lower, rest, c = torch.eye(len(noise), dtype=torch.float64), covariance.clone(), c.clone()
    for k in range(len(noise)):
        pivot = rest[k, k]
        if not pivot > 1e-14 * covariance[k, k]:
            c[k] = 0
            continue
        c[k] = pivot.sqrt()
        lower[k + 1 :, k] = rest[k + 1 :, k] / pivot
        rest[k + 1 :, k + 1 :] -= torch.outer(lower[k + 1 :, k], rest[k, k + 1 :])
    unit = torch.eye(len(noise), dtype=torch.float64)
    mixing = torch.linalg.solve_triangular(lower, unit, upper=False, unitriangular=True)
    deviations = covariance.diagonal().sqrt()
    moved = _cancelled(mixing * deviations, deviations[:, None].expand_as(mixing))
    return torch.where(moved == 0, 0.0, mixing) + unit * (moved == 0), c


def _random(steps: int, seed: int) -> Tensor:
    """`[2, N, CHANNELS]` numbers in -1 ... 1."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, steps, CHANNELS, generator=generator, dtype=torch.float64) - 1


def _superposition_error(request: Request, table: Table, factors: Tensor, noise: Tensor) -> float:
    """The largest difference of a step between random inputs and none, beside what equation (1) says of it, with real draws;
    relative to the terms of that step.

    Raises:
        Unsupported: If the real noise is not of the size that was found with basis vectors for draws.
    """
    x, m = _limit_size(request) * _random(table.steps, 1)
    nothing = torch.zeros(CHANNELS, dtype=torch.float64)
    found, idle = (walk(request, f).states for f in (lambda i: (x[i], m[i]), lambda i: (nothing, nothing)))
    expected, real = noise.norm(dim=1), idle.square().mean(1).sqrt()
    if not ((real <= 2 * expected) & (real >= expected / 2)).all():  # 8 deviations of a mean over 64 channels
        raise Unsupported(
            f"{table.name}.step adds noise that is not drawn with torch.randn, so it cannot be repeated in its order"
        )
    inputs = torch.cat([x, table.convert(slice(0, table.steps), x, m)])
    size = (factors.abs() @ inputs.abs() + idle.abs()).amax(1)
    error = ((found - idle - factors @ inputs).abs().amax(1) / size.clamp(min=1e-30)).amax()
    return float(error.nan_to_num(torch.inf))


def _refuse_mixing(request: Request, table: Table, factors: Tensor, own: Tensor) -> None:
    """Refuses a step that gives a sample another state beside another sample, or whose elements know of each other.

    Args:
        request: The question.
        table: The table.
        factors: `[N, 2 N]` those of states and outputs.
        own: `[N]` what each step adds by itself.

    Raises:
        Unsupported: Then.
    """
    x, m = _limit_size(request) * _random(table.steps, 3)

    def beside(i: int) -> tuple[Tensor, Tensor]:
        first, second = (torch.stack([part[i], -0.5 * part[i].flip(0)]).reshape(2, 2, 2, -1) for part in (x, m))
        return first, second

    found = walk(request, beside, 0).states[:, :CHANNELS]
    inputs = torch.cat([x, table.convert(slice(0, table.steps), x, m)])
    size = (factors.abs() @ inputs.abs() + own.abs()[:, None]).amax(1)
    error = ((found - own[:, None] - factors @ inputs).abs().amax(1) / size.clamp(min=1e-30)).amax()
    if not error <= LINEAR:
        raise Unsupported(
            f"{table.name}.step mixes the samples of a batch, or the elements of a sample: beside another one, a state is off "
            f"by {error:.1g} of what the sample alone leads to, and a table has a step for each by itself"
        )


def _rounding(request: Request, table: Table, factors: Tensor, own: Tensor, off: Mapping[str, bool]) -> Tensor:
    """`[N]` the root mean square by which steps in float32, at states and outputs of data of mean square 1, miss what equation
    (1) says of them, in units of float32's spacing.

    Args:
        request: The question.
        table: The table.
        factors: `[N, 2 N]` those of states and outputs.
        own: `[N]` what each step adds by itself.
        off: The options of the limits, switched off.
    """
    clean, noise = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    alpha, sigma, p, q = (v[: table.steps, None] for v in (table.alpha, table.sigma, table.p, table.q))
    exact = alpha * clean + sigma * noise
    x, m = exact.float(), ((clean - p * exact) / q).float()
    found = walk(request, lambda i: (x[i], m[i]), 0, **off).states
    missed = found - own[:, None] - factors @ torch.cat([x, m]).double()
    seen = missed.square().mean(1).sqrt() / torch.finfo(torch.float32).eps
    return seen.nan_to_num(0.0, posinf=0.0)  # of levels that say nothing of its outputs


def _limit_size(request: Request) -> float:
    """The size of inputs that a limit, if there is one, cannot miss."""
    config = request.scheduler.config
    return 10 * max(float(config.get(name) or 1.0) for name in ("clip_sample_range", "sample_max_value"))


def _limit_of(config: Mapping[str, Any]) -> Clip | DynamicThreshold | None:
    if config.get("thresholding"):
        return DynamicThreshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    if config.get("clip_sample") or config.get("clip_denoised"):
        return Clip(float(config.get("clip_sample_range") or 1.0))
    return None


def _refuse_idle_limit(request: Request, table: Table, factors: Tensor, limit: Clip | DynamicThreshold | None) -> None:
    """Refuses a limit in a step in which the network's output has no weight, in the step or in what is limited.

    Raises:
        Unsupported: If there is such a step.
    """
    if limit is None:
        return
    x, m = _limit_size(request) * _random(table.steps, 1)
    both, without = (walk(request, lambda i, k=k: (x[i], k * m[i]), 0).states for k in (1, 0))
    linear = (both - without - factors[:, table.steps :] @ m).abs().amax(1) <= LINEAR * m.abs().max()
    bent = (without - factors[:, : table.steps] @ x).abs().amax(1) > LINEAR * x.abs().max()
    idle = ((table.b[:, 0] == 0) | (linear & bent)).nonzero()[:, 0].tolist()
    if not idle:
        return
    config, i = request.scheduler.config, idle[0]
    option = next(name for name in ("thresholding", "clip_sample", "clip_denoised") if config.get(name))
    raise Unsupported(
        f"{table.name} limits its clean-data estimate in step {i} (time {float(table.t[i]):g}), where the network's output has "
        f"no weight: there the limit acts on the state itself, which is not linear; set {option}=False, or leave out this time"
    )


def _limited(request: Request, table: Table, factors: Tensor, limit: Clip | DynamicThreshold) -> Table:
    """The table with a limit, whose weights are fitted to one walk of the limited scheduler, step after step."""
    x, clean = _random(table.steps, 2)
    clean *= _limit_size(request)
    p, q = table.p[:, None], table.q[:, None]
    m = (clean - p * x) / q
    found = walk(request, lambda i: (x[i], m[i]), 0).states
    change = limit(clean) - clean
    weights = (1 / table.q).clone()
    seen = m.clone()
    for i in range(table.steps):
        rest = found[i] - factors[i] @ torch.cat([x, seen])
        own = factors[i, table.steps + i] * change[i]
        if own.abs().max() > 0:
            weights[i] = (rest @ own) / (own @ own)
        seen[i] += weights[i] * change[i]
    if weights.abs().max() <= LINEAR * (1 / table.q).abs().max():  # an option that the step does not heed
        return table
    return dataclasses.replace(table, clip=limit, clip_weight=weights)


class Increments:
    """The noise that a scheduler adds in a sequential run, drawn by its own step, for a loop state of any shape.

    One sample, whose shape is that of the whole state `[B, ...]`. The increment n[i] of equation (1) is the step's result for
    inputs of zero, with the run's generator: the draws are those of the sequential call, in its order, each made once. They are
    made when a node is first asked for, up to that node, and all are kept: N states in float32 on the state's device.

    Args:
        scheduler: The scheduler as handed to `probe`. It is not changed.
        table: What `probe` returned.
        timesteps: As for `probe`.
        start: The loop's first state `[B, ...]`, in the loop's own dtype and on its device.
        generator: The run's: one, a list of one for each of the B samples, or None for torch's own.
        step_kwargs: As for `probe`.
        output_dtype: Dtype of the network's outputs, in which most steps draw their noise; that of the first state by default.
        state_dtype: Dtype of the states after the first; that of the first by default.

    Raises:
        Unsupported: As `probe` does.
    """

    samples = 1

    def __init__(
        self,
        scheduler: Any,
        table: Table,
        timesteps: Tensor | None,
        start: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        *,
        output_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._output_dtype, self._state_dtype = output_dtype or start.dtype, state_dtype or start.dtype
        self.shape = tuple(start.shape)
        self._start, self._table, self._generator = start, table, generator
        self._kwargs = {k: v for k, v in (step_kwargs or {}).items() if k not in UNUSED}
        found = _probed(scheduler, timesteps, self._kwargs)
        self._mixing = found.mixing
        self._timesteps = scheduler.timesteps if timesteps is None else timesteps
        noisy = (table.c > 0).tolist()  # a step may add noise that was drawn before (a Brownian tree)
        self._last = max((i + 1 for i, count in enumerate(found.draws) if count or noisy[i]), default=0)
        self._host = start.device.type != "cpu" and _of_cpu(generator, self._kwargs)
        if self._host:  # so that neither a draw nor a scheduler's look-up of its time waits for the device
            self._timesteps = self._timesteps.cpu()
        self._scheduler = on_cpu(scheduler) if self._host else copy.deepcopy(scheduler)
        self._drawn: list[Tensor] = []
        self._raw: list[Tensor] = []

    def start(self, sample: int) -> Tensor:
        """The loop's first state, in units of the table's `start_scale` (1 for what `probe` returns)."""
        return self._start if self._table.start_scale == 1 else self._start / self._table.start_scale

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, `[len(nodes), B, ...]` in float32: c[i] z[i] is the increment, and z = 0 where c = 0.

        Raises:
            ValueError: If a node is not one of the chain's steps, whose draws are all that a sequential run makes.
        """
        if len(nodes) and nodes[-1] >= self._table.steps:
            raise ValueError(
                f"noise was asked for at node {nodes[-1]}, but a loop of {self._table.steps} steps draws none after its last "
                "one: use a method without a corrector"
            )
        self._draw_to(nodes.stop)
        nothing = torch.zeros(self.shape, dtype=torch.float32, device=self._start.device)
        return torch.stack([self._drawn[n] if n < len(self._drawn) else nothing for n in nodes])

    def drawn_from(self, step: int) -> list[torch.Generator | None]:
        """The generators that steps of the sequential run after one draw from, None for torch's own; empty where none draws.

        Args:
            step: The number of a step.
        """
        if step + 1 >= self._last:
            return []
        given = list(self._generator) if isinstance(self._generator, list | tuple) else [self._generator]
        shared = self._table.draws is not None and self._table.draws.source == "torch"
        return [*given, *([None] if shared else [])]

    def finish(self) -> None:
        """Makes the draws that nobody asked for, so that the generator ends where the sequential run leaves it."""
        self._draw_to(self._last)

    def _draw_to(self, stop: int) -> None:
        steps = range(len(self._drawn), min(stop, self._last))
        if not steps:
            return
        first = torch.zeros_like(self._start, device="cpu" if self._host else None)
        output, later = first.to(self._output_dtype), first.to(self._state_dtype)
        made: list[Tensor] = []
        for i in steps:
            t, state = self._timesteps[i], later if i else first
            if hasattr(self._scheduler, "scale_model_input"):
                self._scheduler.scale_model_input(state, t)
            found = step_of(self._scheduler, output.clone(), t, state.clone(), self._kwargs, self._generator, None)
            found = found.float().clone()
            if self._mixing is not None:
                self._raw.append(found)
                found = torch.stack([row * float(k) for k, row in zip(self._mixing[i], self._raw, strict=False) if k]).sum(0)
            deviation = float(self._table.c[i])
            made.append(found / deviation if deviation > 0 else torch.zeros_like(found))
        self._drawn += torch.stack(made).to(self._start.device, non_blocking=True).unbind()


def _of_cpu(generator: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a step draws from generators of the CPU alone, and no option of it is a tensor of a device."""
    given = generator if isinstance(generator, list | tuple) else [generator]
    leaves = [v for v in kwargs.values() if isinstance(v, Tensor)]
    return all(isinstance(g, torch.Generator) and g.device.type == "cpu" for g in given) and all(v.is_cpu for v in leaves)
