# SPDX-License-Identifier: Apache-2.0
"""Noise with a covariance: the loop that maps its draws, the covariance that they have, and estimates that hold."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Method,
    Recorded,
    Schedule,
    Table,
    by_row,
    collocation,
    parasolver,
    quasi_newton,
    sample,
    sequential,
    srds,
)
from paradiff.chain import Correlated, Noise
from paradiff.models import Frames, Masked
from paradiff.planning.pilots import pilot_noise
from paradiff.samplers import alphafold3, ddim, ddpm, edm

SHAPE = (5, 3)
RHO = 0.8
LINEAR = Schedule.linear()


def matrix() -> Tensor:
    """A covariance of the fifteen elements of a sample."""
    root = torch.randn(15, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T / 15 + 0.1 * torch.eye(15, dtype=torch.float64)


def singular() -> Tensor:
    """A covariance along the first axis, of rank 4: the noise of the five places adds up to 0."""
    return torch.eye(5, dtype=torch.float64) - 0.2


def smoothed(z: Tensor) -> Tensor:
    """A user's own map: neighbours along the first axis are averaged."""
    return (z + z.roll(1, 1)) / math.sqrt(2)


MAPS: dict[str, tuple[Callable[[Noise], Correlated], Callable[[Tensor], Tensor]]] = {
    "matrix": (
        lambda noise: Correlated(noise, matrix()),
        lambda z: (torch.linalg.cholesky(matrix()) @ z.flatten()).view(SHAPE),
    ),
    "matrix along the second axis": (
        lambda noise: Correlated(noise, matrix()[:3, :3], axes=[1]),
        lambda z: torch.stack([torch.linalg.cholesky(matrix()[:3, :3]) @ row for row in z]),
    ),
    "matrix along both axes, the second first": (
        lambda noise: Correlated(noise, matrix(), axes=(1, 0)),
        lambda z: (torch.linalg.cholesky(matrix()) @ z.T.flatten()).view(3, 5).T,
    ),
    "deviations": (
        lambda noise: Correlated.scaled(noise, torch.tensor([1.0, 0.5, 0.0])),
        lambda z: torch.stack([z[:, 0], z[:, 1] / 2, 0 * z[:, 2]], 1),
    ),
    "autoregressive": (lambda noise: Correlated.autoregressive(noise, RHO), lambda z: recursion(z)),
    "pink": (lambda noise: Correlated.power_law(noise, 1.0), lambda z: filtered(z)),
    "a function": (lambda noise: Correlated(noise, smoothed), lambda z: smoothed(z[None])[0]),
}
SOURCES: dict[str, Callable[[], Noise]] = {
    "keyed": lambda: Keyed(SHAPE, 3, samples=2),
    "recorded": lambda: Recorded(SHAPE, torch.Generator().manual_seed(5), samples=2),
}
METHODS: dict[str, Method] = {
    "sequential": sequential(),
    "parasolver": parasolver(tolerance=0.0),
    "quasi_newton": quasi_newton(window=7, tolerance=0.0),
    "collocation": collocation(tolerance=1e-9),
}


def recursion(z: Tensor) -> Tensor:
    """AR(1) as it is written."""
    rows = [z[0]]
    for k in range(1, len(z)):
        rows.append(RHO * rows[-1] + math.sqrt(1 - RHO**2) * z[k])
    return torch.stack(rows)


def filtered(z: Tensor) -> Tensor:
    """Pink noise by a circulant matrix, of cosines."""
    count = len(z)
    gains = [1 / math.sqrt(min(k, count - k) or 1) for k in range(count)]
    norm = math.sqrt(sum(g**2 for g in gains) / count)
    kernel = [sum(g * math.cos(2 * math.pi * k * j / count) for k, g in enumerate(gains)) / count / norm for j in range(count)]
    circulant = torch.tensor([[kernel[(i - j) % count] for j in range(count)] for i in range(count)], dtype=torch.float64)
    return circulant @ z


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + 0.3 * x.roll(1, 1)) + 0.1 * (t.to(x)[:, None, None] / 1000)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", MAPS)
def test_a_chain_is_that_of_the_loop_which_maps_its_draws(name: str, source: str, method: str) -> None:
    make, textbook = MAPS[name]
    table, noise = ddpm(LINEAR, 20), SOURCES[source]()
    found = sample(net, table, make(noise), METHODS[method], dtype=torch.float64).sample
    for k in range(2):
        x = textbook(noise.start(k).double())
        for i in range(table.steps):
            z = textbook(noise.draw(k, range(i, i + 1))[0].double())
            x = table.a[i, 0] * x + table.b[i, 0] * net(x[None], table.t[i : i + 1])[0] + table.c[i] * z
        torch.testing.assert_close(found[k], x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("table", [edm(8, solver="euler", s_churn=4.0), edm(5, s_churn=3.0)], ids=["euler", "heun"])
def test_recorded_draws_are_mapped_where_the_published_loop_makes_them(table: Table) -> None:
    """EDM's algorithm 2, whose every noise is L z, from the same generator."""
    noise = Correlated.autoregressive(Recorded(SHAPE, torch.Generator().manual_seed(2)), RHO)
    found = sample(net, table, noise, quasi_newton(tolerance=0.0), dtype=torch.float64).sample[0]
    generator, steps = torch.Generator().manual_seed(2), 8 if "euler" in table.name else 5
    draw = lambda: recursion(randn_tensor((1, *SHAPE), generator=generator)[0].double())  # noqa: E731
    k = torch.arange(steps, dtype=torch.float64)
    ratios = (80 ** (1 / 7) + k / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels, gamma = [*ratios.tolist(), 0.0], min((4.0 if steps == 8 else 3.0) / steps, math.sqrt(2) - 1)
    x = levels[0] * draw()
    clean = lambda x, level: net(x[None], torch.tensor([level], dtype=torch.float64))[0]  # noqa: E731
    for one, other in itertools.pairwise(levels):
        high = one * (1 + gamma)
        x = x + math.sqrt(high**2 - one**2) * draw()
        slope = (x - clean(x, high)) / high
        after = x + (other - high) * slope
        if steps == 5 and other:
            after = x + (other - high) * (slope + (after - clean(after, other)) / other) / 2
        x = after
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_draws_have_the_covariance(name: str) -> None:
    make, textbook = MAPS[name]
    noise = make(Keyed(SHAPE, 1))
    drawn = noise.draw(0, range(20000)).flatten(1)
    basis = torch.stack([textbook(e.view(SHAPE)).flatten() for e in torch.eye(15, dtype=torch.float64)], 1)
    wanted = basis @ basis.T
    torch.testing.assert_close(torch.cov(drawn.T), wanted, rtol=0, atol=0.08)
    if name in ("autoregressive", "pink", "a function"):
        torch.testing.assert_close(wanted.diagonal(), torch.ones(15, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_a_power_law_has_its_spectrum(exponent: float) -> None:
    noise = Correlated.power_law(Keyed((64,), 0), exponent)
    power = np.abs(np.fft.rfft(noise.draw(0, range(4000)).numpy(), axis=1))[:, 1:] ** 2
    slope = np.polyfit(np.log(np.arange(1, 33)), np.log(power.mean(0)), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)
    if exponent == 0:
        torch.testing.assert_close(noise.start(0), Keyed((64,), 0).start(0).double())


def test_a_singular_covariance_leaves_a_direction_without_noise() -> None:
    noise = Correlated(Keyed(SHAPE, samples=2), singular(), axes=[0])
    assert noise.start(0).sum(0).abs().max() < 1e-6
    basis = Correlated(Keyed((5,)), singular())._map(torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(basis.T @ basis, singular(), rtol=0, atol=1e-7)
    assert float(basis.T.triu(1).abs().max()) < 1e-7
    assert float(basis.diagonal().min()) > -1e-7

    def centred(x: Tensor, t: Tensor) -> Tensor:
        found = net(x, t)
        return found - found.mean(1, keepdim=True)

    table = ddpm(LINEAR, 50, prediction="sample")
    plain = sample(centred, table, noise, sequential()).sample
    assert float(plain.sum(1).abs().max()) < 1e-5
    for method in (quasi_newton(window=16), srds(), collocation()):
        found = sample(centred, table, noise, method)
        errors = (found.sample - plain).square().mean((1, 2)).sqrt().tolist()
        assert all(e <= told.estimated_error for e, told in zip(errors, found.error_estimates, strict=True))


@pytest.mark.parametrize("name", ["autoregressive", "pink", "matrix"])
@pytest.mark.parametrize(
    "table", [ddpm(LINEAR, 200, prediction="sample"), ddim(LINEAR, 100, prediction="sample")], ids=["ddpm", "ddim"]
)
def test_estimates_hold_where_the_network_knows_the_noise(name: str, table: Table) -> None:
    """Data at four points, and noise with a covariance: the posterior mean by the covariance's own distance."""
    make, textbook = MAPS[name]
    basis = torch.stack([textbook(e.view(SHAPE)).flatten() for e in torch.eye(15, dtype=torch.float64)], 1)
    inverse = torch.linalg.inv(basis @ basis.T)
    points = torch.randn(4, 15, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / 2
    level = {float(t): (float(a), float(s)) for t, a, s in zip(table.t[:-1], table.alpha, table.sigma, strict=False)}

    def mean(x: Tensor, t: Tensor) -> Tensor:
        a, s = torch.tensor([level[float(v)] for v in t], dtype=torch.float64).T
        off = x.double().flatten(1)[:, None] - a[:, None, None] * points
        weights = torch.softmax(-0.5 * ((off @ inverse) * off).sum(2) / s[:, None] ** 2, 1)
        return (weights @ points).view_as(x).to(x)

    noise = make(Keyed(SHAPE, seed=list(range(40, 46))))
    plain = sample(mean, table, noise, sequential(), check="off").sample
    for method in (quasi_newton(window=16), parasolver(window=32), srds(), collocation(window=16)):
        found = sample(mean, table, noise, method, check="off")
        errors = (found.sample - plain).square().mean((1, 2)).sqrt().tolist()
        late = [k for k, (e, told) in enumerate(zip(errors, found.error_estimates, strict=True)) if e > told.estimated_error]
        assert not late, (method.name, [(errors[k], found.error_estimates[k].estimated_error) for k in late])


def test_what_is_made_of_noise_sees_through_the_covariance() -> None:
    """Random numbers of rows, masks, frames and pilots are those of the source."""
    table, keyed = ddpm(LINEAR, 10), Keyed(SHAPE, [3, 8])
    noise = Correlated.autoregressive(keyed, RHO)
    assert by_row(lambda x, t, rows: x, table, noise).keys("numbers") == keyed.keys
    masked = Masked(table, noise, torch.ones(SHAPE).bool())
    assert torch.equal(masked.kept().draw(0, range(3)), noise.draw(0, range(3)))
    assert by_row(lambda x, t, rows: x, table, masked.kept()).keys("numbers") == keyed.keys
    pilot = pilot_noise(Evaluator(net), noise, 0)
    assert isinstance(pilot, Correlated)
    assert pilot.source != keyed
    assert (pilot.samples, pilot.shape) == (2, SHAPE)
    recorded = Correlated.scaled(Recorded(SHAPE, torch.Generator().manual_seed(0)), torch.full(SHAPE, 0.5))
    folding = alphafold3(6)
    half, whole = (Frames.drawn(folding, n, seed=1).moving() for n in (recorded, recorded.source))
    torch.testing.assert_close(2 * half.start(0), whole.start(0))
    torch.testing.assert_close(2 * half.draw(0, range(5)), whole.draw(0, range(5)))


def test_a_slice_has_the_noises_of_its_steps() -> None:
    table, noise = ddpm(LINEAR, 20), Correlated.autoregressive(Keyed(SHAPE, 3), RHO)
    whole = sample(net, table, noise, sequential(), dtype=torch.float64)
    x = noise.start(0)[None]
    for i in range(8):
        x = table.a[i, 0] * x + table.b[i, 0] * net(x, table.t[i : i + 1]) + table.c[i] * noise.draw(0, range(i, i + 1))
    rest = sample(net, table[8:], noise, quasi_newton(tolerance=0.0), start=x, dtype=torch.float64)
    torch.testing.assert_close(rest.sample, whole.sample, rtol=0, atol=1e-9)


def test_values_compare_and_pickle() -> None:
    made = [make(source()) for make, _ in MAPS.values() for source in SOURCES.values()]
    again = [make(source()) for make, _ in MAPS.values() for source in SOURCES.values()]
    for i, one in enumerate(made):
        assert [one == other for other in again] == [i == j for j in range(len(made))]
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert (other, hash(other)) == (one, hash(one))
            assert torch.equal(other.start(1), one.start(1))
        assert len(repr(one).splitlines()) == 1
    assert (
        repr(made[0]) == "Keyed noise: 2 of shape (5, 3), seed 3, correlated by a covariance of 15 elements along axes (0, 1)"
    )


def test_covariances_that_are_none_are_refused() -> None:
    noise, eye = Keyed(SHAPE), torch.eye(5)
    for call, what in (
        (lambda: Correlated(None, eye), "the noise is None; give a Noise"),  # type: ignore[arg-type]
        (lambda: Correlated(noise, 0.5), "the covariance is 0.5; give a tensor"),  # type: ignore[arg-type]
        (lambda: Correlated(noise, eye), r"give a square matrix of real numbers \[15, 15\], for axes of sizes \(5, 3\)"),
        (lambda: Correlated(noise, torch.ones(5, 4), axes=[0]), r"shape \(5, 4\).*give a square matrix"),
        (lambda: Correlated(noise, eye.bool(), axes=[0]), "give a square matrix of real numbers"),
        (lambda: Correlated(noise, eye * math.nan, axes=[0]), "the covariance is not finite"),
        (lambda: Correlated(noise, eye * 0, axes=[0]), "the covariance is 0; give one that leaves some noise"),
        (lambda: Correlated(noise, eye.cumsum(1), axes=[0]), "is not equal to its transpose"),
        (lambda: Correlated(noise, eye - 0.5, axes=[0]), "has the eigenvalue -1.5, which would be a variance"),
        (lambda: Correlated(noise, eye, axes=[2]), r"the axes are \[2\]; give some of the 2 axes"),
        (lambda: Correlated(noise, eye, axes=[0, 0]), "each once"),
        (lambda: Correlated(noise, eye, axes=[]), "give some of the 2 axes"),
        (lambda: Correlated(noise, smoothed, axes=[0]), "beside a function"),
        (lambda: Correlated(noise, lambda z: z[:, 0]), "must return a tensor of real numbers of the same shape"),
        (lambda: Correlated(noise, lambda z: z + 1), "is not linear"),
        (lambda: Correlated(noise, torch.tanh), "is not linear"),
        (lambda: Correlated(noise, lambda z: z - z.mean(0)), "maps a draw to something else by itself"),
        (lambda: Correlated(noise, lambda z: z * math.inf), "not finite, or all 0"),
        (lambda: Correlated.scaled(noise, torch.ones(4)), r"can be expanded to \(5, 3\)"),
        (lambda: Correlated.scaled(noise, -torch.ones(3)), "are negative, not finite, or all 0"),
        (lambda: Correlated.scaled(noise, torch.zeros(3)), "are negative, not finite, or all 0"),
        (lambda: Correlated.scaled(noise, 0.5), "the deviations are 0.5; give a tensor"),  # type: ignore[arg-type]
        (lambda: Correlated.autoregressive(noise, 1.0), "the correlation is 1.0; it must be a number between"),
        (lambda: Correlated.autoregressive(noise, "a"), "the correlation is 'a'"),  # type: ignore[arg-type]
        (lambda: Correlated.autoregressive(noise, 0.5, axis=-1), r"the axes are \[-1\]"),
        (lambda: Correlated.power_law(noise, math.nan), "the exponent is nan"),
        (lambda: Correlated.power_law(Keyed((1, 3)), 1.0), "colour needs several"),
    ):
        with pytest.raises(ValueError, match=what) as refusal:
            call()
        assert "\n" not in str(refusal.value)
