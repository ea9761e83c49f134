# SPDX-License-Identifier: Apache-2.0
"""What the tests of the solver share: tables, methods, networks and the plain loop.

A new table joins `TABLES` and a new method `METHODS`, and each gets every test. Tables are short, since every property that is
proved on them holds step by step; the long chains of the literature are run on closed-form data in test_certificate.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paradiff import (
    Keyed,
    Schedule,
    Solution,
    Table,
    jacobi,
    paradigms,
    parasolver,
    parataa,
    piadm_ode,
    piadm_sde,
    quasi_newton,
    sample,
    sequential,
)
from paradiff.chain import Clip, DynamicThreshold, Noise
from paradiff.chain.slope import freeze_clean_data, freeze_epsilon, identity, shifted, zero
from paradiff.methods import WindowMethod
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import WindowSolver
from paradiff.models.exact import Mixture
from paradiff.samplers import (
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    exponential_integrator,
    flow_euler,
    heun,
    log_snr_grid,
    paper_grid,
    rectified_flow,
    variance_preserving,
)
from paradiff.solver import Denoiser

SHAPE = (2, 3)
STEPS = 12

TABLES: dict[str, Table] = {
    "ddim": ddim(Schedule.linear(), STEPS),
    "ddim eta": ddim(Schedule.cosine(), STEPS, eta=1.0, prediction="v"),
    "ddim pure noise": ddim(Schedule.linear(rescale_zero_snr=True), STEPS, spacing="trailing", prediction="v"),
    "ddim clipped": ddim(Schedule.linear(), STEPS, clip=Clip(0.5)),
    "ddpm": ddpm(Schedule.linear(), STEPS, prediction="sample"),
    "ddpm large": ddpm(Schedule.scaled_linear(), STEPS, variance="fixed_large"),
    "ddpm thresholded": ddpm(Schedule.linear(), STEPS, clip=DynamicThreshold(0.7, 1.5)),
    "euler": euler(Schedule.scaled_linear(), STEPS),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), STEPS, prediction="v"),
    "heun": heun(Schedule.scaled_linear(), (STEPS + 1) // 2),
    "dpmpp_2m": dpmpp_2m(Schedule.linear(), STEPS),
    "dpmpp_2m restarted": dpmpp_2m(Schedule.linear(), STEPS, karras=True, restarts=range(3, STEPS, 3), clip=Clip(0.7)),
    "flow_euler": flow_euler(STEPS, shift=3.0),
    "exponential_sde": exponential_integrator(variance_preserving(Schedule.linear()), paper_grid(5, 0.5, 0.2)),
    "exponential_ode": exponential_integrator(
        rectified_flow(), log_snr_grid(6.0, 1e-2, 1, STEPS - 1, clean=True), form="clean", volatility=0.0, prediction="flow"
    ),
}


class Stacked:
    """The noises of some samples as those of one sample with members."""

    samples = 1

    def __init__(self, noise: Keyed) -> None:
        self.noise, self.shape = noise, (noise.samples, *noise.shape)

    def start(self, sample: int) -> Tensor:
        return torch.stack([self.noise.start(k) for k in range(self.noise.samples)])

    def draw(self, sample: int, nodes: range) -> Tensor:
        return torch.stack([self.noise.draw(k, nodes) for k in range(self.noise.samples)], dim=1)


def arbitrary(table: Table) -> Tensor:
    """A slope that knows nothing of the table: numbers in -1 ... 1."""
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.rand(table.steps, table.band, generator=generator, dtype=torch.float64) - 1


SLOPES: dict[str, Callable[[Table], Tensor]] = {
    "zero": zero,
    "identity": identity,
    "freeze_epsilon": freeze_epsilon,
    "freeze_clean_data": freeze_clean_data,
    "shifted": shifted(0.4),
    "arbitrary": arbitrary,
}


def piadm(table: Table) -> Callable[..., WindowMethod]:
    """The one that is for such a chain."""
    return piadm_sde if table.stochastic else piadm_ode


STARTS = ("copy", "linear", "clean")


def uneven(table: Table, warmup: int) -> list[int]:
    """Lengths 1, 4, 2, 3, 1, 4 ... that cover the chain after the warm-up."""
    lengths, left = [], table.steps - warmup
    while left:
        lengths.append(min((1, 4, 2, 3)[len(lengths) % 4], left))
        left -= lengths[-1]
    return lengths


# Every method at tolerance 0 and over the whole chain; `fitted` gives it another window. The strides of a list depend on the
# table, so each is a function of it.
METHODS: dict[str, Callable[[Table], WindowMethod]] = {
    "sequential": lambda table: sequential(),
    "jacobi": lambda table: jacobi(tolerance=0.0),
    "paradigms": lambda table: paradigms(tolerance=0.0),
    "parasolver": lambda table: parasolver(tolerance=0.0),
    "parasolver, published rule": lambda table: parasolver(tolerance=0.0, rule="change"),
    "parasolver, 5 warm-up steps": lambda table: parasolver(tolerance=0.0, warmup=5),
    "parasolver, stride 3": lambda table: parasolver(tolerance=0.0, stride=3, warmup=1),
    "parasolver, stride 3, no warm-up": lambda table: parasolver(tolerance=0.0, stride=3, warmup=0, slope=freeze_clean_data),
    "parasolver, uneven strides": lambda table: parasolver(tolerance=0.0, stride=uneven(table, 1), warmup=1),
    "parasolver, uneven strides, 5 warm-up steps": lambda table: parasolver(
        tolerance=0.0, stride=uneven(table, 5), warmup=5, slope=arbitrary
    ),
    "quasi-Newton": lambda table: quasi_newton(tolerance=0.0),
    "quasi-Newton, 1 pair, a slope that knows nothing": lambda table: quasi_newton(tolerance=0.0, secants=1, slope=arbitrary),
    "parataa at tolerance 0": lambda table: parataa(tolerance=0.0),
    "parataa, order 2, a slope that knows nothing": lambda table: dataclasses.replace(
        parataa(tolerance=0.0, order=2, history=2), slope=arbitrary
    ),
    "piadm, 3 blocks in turn": lambda table: piadm(table)(3, tolerance=0.0),
    "piadm, 3 blocks in flight": lambda table: piadm(table)(3, tolerance=0.0, stagger=1),
    "piadm, 4 blocks, published diagonal": lambda table: piadm(table)(4, tolerance=0.0, stagger=2, carry=False),
    "piadm, 2 blocks, as many sweeps as steps": lambda table: piadm(table)(2, table.steps),
    "arbitrary slope, stride 3, linear": lambda table: WindowMethod("", arbitrary, None, 3, 0, "linear", 0.0),
    "arbitrary slope, stride 4, copy": lambda table: WindowMethod("", arbitrary, None, 4, 1, "copy", 0.0),
} | {
    f"{slope} from {start}": lambda table, slope=slope, start=start: WindowMethod(
        "", SLOPES[slope], predictor=start, tolerance=0.0
    )
    for slope in SLOPES
    for start in STARTS
}
WINDOWS = (1, 2, 5, STEPS, None)


def fitted(method: WindowMethod, table: Table, window: int | None) -> WindowMethod:
    """The method with a window, cut to the number of sub-intervals."""
    most = len(dataclasses.replace(method, window=None).edges(table)) - 1
    if window is None:
        return dataclasses.replace(method, window=None)
    reached = method.anderson and method.anderson.within(min(window, most))
    return dataclasses.replace(method, window=min(window, most), anderson=reached)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear network, bounded, and entry by entry, so that no row can see another."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.1 * t / 1000) + 0.3 * torch.cos(t / 150) * torch.sin(x)


def mixture() -> Mixture:
    """Three lumps in 16 dimensions, of the size of images, -1 ... 1. Unlike the digits it has width, so that errors of states
    reach the sample."""
    means = 0.7 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return Mixture(torch.tensor([0.4, 0.35, 0.25]), means, torch.tensor([0.05, 0.1, 0.02]))


def chain(denoiser: Denoiser, table: Table, noise: Noise, k: int = 0, start: Tensor | None = None, **rows: Tensor) -> Tensor:
    """The plain loop of chain/table.py's equation (1) for sample k, `[N+1, ...]` in float64: what every method must return."""
    x = noise.start(k).double() * table.start_scale if start is None else start.double()
    states, outputs = [x], []
    for i in range(table.steps):
        x = states[-1]
        m = denoiser((table.scale[i] * x)[None], table.t[i : i + 1], **rows)[0]
        if table.clip is not None:
            clean = table.p[i] * x + table.q[i] * m
            m = m + table.clip_weight[i] * (table.clip(clean[None])[0] - clean)
        outputs.append(m)
        new = table.c[i] * noise.draw(k, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        states.append(new)
    return torch.stack(states)


def chains(denoiser: Denoiser, table: Table, noise: Noise) -> Tensor:
    """The last states of the plain loop for all samples, `[B, ...]`."""
    return torch.stack([chain(denoiser, table, noise, k)[-1] for k in range(noise.samples)])


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference beside the largest entry of `wanted`, or beside 1; infinite if anything is not finite."""
    assert found.shape == wanted.shape
    size = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1))
    return size if math.isfinite(size) else math.inf


# The solver takes the same float64 steps as the plain loop, in other orders of summation, at up to 13 nodes whose coefficients
# are up to 1e2; errors of a single rounding, 1e-16, stay below this.
EXACT = 1e-12


def run(
    table: Table, method: WindowMethod, denoiser: Denoiser = network, samples: int = 1, seed: int = 0, **options: object
) -> Solution:
    """A run in float64 on keyed noise."""
    return sample(denoiser, table, Keyed(SHAPE, seed, samples), method, **{"dtype": torch.float64, **options})


def window_of(table: Table, method: WindowMethod, noise: Noise | None = None) -> WindowSolver:
    """The window of sample 0, just opened, to be swept by hand."""
    setup = WindowSetup(table, method, torch.device("cpu"), torch.float64)
    return WindowSolver(setup, noise or Keyed(SHAPE), 0, None)


def sweep(window: WindowSolver, denoiser: Denoiser = network) -> list[float]:
    """One sweep by hand, without the advance, which wants the numbers that are returned."""
    while True:
        query = window.ask()
        norms = window.tell(query, denoiser(query.rows, window.setup.t[query.nodes]))
        if norms is not None:
            return norms.tolist()


def ends(window: WindowSolver) -> Tensor:
    """The states at the ends of the window's sub-intervals, `[W, ...]`."""
    edges = window.setup.edges
    return window.x[[edge - edges[window.lo] + window.setup.history for edge in edges[window.lo + 1 : window.hi + 1]]]


def host_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts from now on, by name, the calls that read a float32 tensor from the host. States are float32 where this is used,
    tables float64 and indices integers, so each is one that would wait for an accelerator."""
    reads: Counter[str] = Counter()

    def counting(read: str) -> None:
        original = getattr(Tensor, read)

        def counted(self: Tensor, *args: object, **options: object) -> object:
            reads[read] += self.dtype == torch.float32
            return original(self, *args, **options)

        monkeypatch.setattr(Tensor, read, counted)

    for read in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero"):
        counting(read)
    return reads
