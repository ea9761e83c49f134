# SPDX-License-Identifier: Apache-2.0
"""Networks that are shown their last estimate: the samples of the published loop, whatever the method, in fewer rounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import METHODS, SHAPE, TABLES
from torch import Tensor

from paradiff import (
    Keyed,
    Method,
    Recorded,
    Schedule,
    Table,
    chords,
    collocation,
    parasolver,
    quasi_deer,
    quasi_newton,
    sample,
    sequential,
    srds,
)
from paradiff.chain import Noise
from paradiff.models import SelfConditioned
from paradiff.samplers import alphafold3, ddim, ddpm, edm, heun

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def network(x: Tensor, t: Tensor, estimate: Tensor) -> Tensor:
    """Bounded, entry by entry, and as much of its last estimate as of its state."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.1 * t / 1000) + 0.4 * torch.sin(2 * estimate + 0.3)


def published(net: Network, table: Table, noise: Noise, k: int = 0, hides: bool = False) -> Tensor:
    """Algorithm 2 of Chen et al. with a sampler's own steps, in float64."""
    x = noise.start(k).double() * table.start_scale
    estimate = torch.zeros_like(x)
    for i in range(table.steps):
        m = net((table.scale[i] * x)[None], table.t[i : i + 1], estimate[None])[0]
        if not hides:
            if table.prediction == "epsilon":
                estimate = (x - table.sigma[i] * m) / table.alpha[i]
            elif table.prediction == "v":
                size = (table.alpha[i] ** 2 + table.sigma[i] ** 2).sqrt()
                estimate = (table.alpha[i] * x / size - table.sigma[i] * m) / size
            elif table.prediction == "flow":
                estimate = x - table.sigma[i] * m
            else:
                estimate = m
        x = table.a[i, 0] * x + table.b[i, 0] * m + table.c[i] * noise.draw(k, range(i, i + 1))[0].double()
    return x


OTHERS: dict[str, Callable[[Table], Method]] = {
    "srds": lambda table: srds(iterations=table.steps),
    "chords": lambda table: chords(4, tolerance=1e-12),
    "collocation": lambda table: collocation(tolerance=1e-8),
    "quasi_deer": lambda table: quasi_deer(tolerance=0.0),
    "narrow quasi-Newton": lambda table: quasi_newton(window=3, tolerance=0.0),
}


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_every_method_finds_the_sample_of_the_published_loop(method: str) -> None:
    table, noise = TABLES["ddim" if method == "chords" else "ddpm"], Keyed(SHAPE, seed=3, samples=2)
    pairs = SelfConditioned(table, noise)
    found = sample(pairs.model(network), table, pairs.pairs(), (METHODS | OTHERS)[method](table), dtype=torch.float64)
    expected = torch.stack([published(network, table, noise, k) for k in range(2)])
    assert float((pairs.placed(found.sample) - expected).abs().max()) < 1e-6  # noises are handed over in float32
    assert float((published(network, table, noise, hides=True) - expected[0]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "name", ["ddim", "ddim eta", "ddpm large", "euler", "euler_ancestral", "flow_euler", "alphafold3", "edm"]
)
def test_every_one_step_chain_hands_its_estimate_on(name: str) -> None:
    own = {"alphafold3": alphafold3(12), "edm": edm(12, solver="euler", s_churn=4.0)}
    table, noise = (TABLES | own)[name], Keyed(SHAPE, seed=1)
    pairs = SelfConditioned(table, noise)
    found = sample(pairs.model(network), table, pairs.pairs(), quasi_newton(window=6, tolerance=0.0), dtype=torch.float64)
    expected = published(network, table, noise)
    torch.testing.assert_close(pairs.placed(found.sample)[0], expected, rtol=1e-6, atol=1e-6)


def test_noise_of_a_generator_is_that_of_the_states() -> None:
    table, noise = TABLES["ddpm"], Recorded(SHAPE, torch.Generator().manual_seed(4), samples=2)
    pairs = SelfConditioned(table, noise)
    found = sample(pairs.model(network), table, pairs.pairs(), parasolver(tolerance=0.0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, *SHAPE, generator=generator).double()
    estimate = torch.zeros_like(x)
    for i in range(table.steps):
        estimate = network(x, table.t[i : i + 1].expand(2), estimate)
        x = table.a[i, 0] * x + table.b[i, 0] * estimate + table.c[i] * torch.randn(2, *SHAPE, generator=generator).double()
    torch.testing.assert_close(pairs.placed(found.sample), x, rtol=0, atol=1e-6)


CENTRES = 0.7 * torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def believing(x: Tensor, t: Tensor, estimate: Tensor) -> Tensor:
    """The mean of lumps given the state, and given the last estimate as a second measurement of deviation 2: the clean data."""
    schedule = Schedule.linear()
    alpha, sigma = (v[t.long()][:, None].to(x) for v in (schedule.alpha, schedule.sigma))
    far = (x[:, None] - alpha[..., None] * CENTRES.to(x)).square().sum(2) / (2 * (sigma**2 + 0.1 * alpha**2))
    doubted = (estimate[:, None] - CENTRES.to(x)).square().sum(2) / 8
    told = torch.softmax(-far - doubted * (estimate.square().sum(1, keepdim=True) > 0), 1) @ CENTRES.to(x)
    return told + 0.1 * alpha / (sigma**2 + 0.1 * alpha**2) * (x - alpha * told)


def test_a_hundred_steps_take_few_rounds_and_keep_their_estimates() -> None:
    table, noise = ddpm(Schedule.linear(), 100, prediction="sample"), Keyed((16,), seed=60, samples=16)
    pairs = SelfConditioned(table, noise)
    expected = torch.stack([published(believing, table, noise, k) for k in range(16)])
    for method, most in ((quasi_newton(window=32), 20), (parasolver(window=32), 35), (collocation(), 35)):
        found = sample(pairs.model(believing), table, pairs.pairs(), method)
        errors = (pairs.placed(found.sample) - expected).square().mean(1).sqrt().tolist()
        assert found.rounds <= most
        assert max(errors) < 4e-3
        told = [e.estimated_error for e in found.error_estimates]
        assert sum(error <= own for error, own in zip(errors, told, strict=True)) >= 15
    model = pairs.model(believing)
    model.renewed = None
    assert sample(model, table, pairs.pairs(), quasi_newton(window=32)).rounds > 60  # changes of estimates carried along


def test_an_estimate_that_is_forgotten_is_seen() -> None:
    """The second half is what hands it on: without it samples are others."""
    table, noise = TABLES["ddpm"], Keyed(SHAPE, seed=3)
    pairs = SelfConditioned(table, noise)
    forgets = pairs.model(lambda x, t, estimate: network(x, t, 0 * estimate))
    found = sample(forgets, table, pairs.pairs(), sequential(), dtype=torch.float64)
    torch.testing.assert_close(pairs.placed(found.sample)[0], published(network, table, noise, hides=True), rtol=0, atol=1e-6)


def test_what_hands_no_estimate_on_is_refused() -> None:
    noise, table = Keyed(SHAPE), TABLES["ddpm"]
    for wrong in (heun(Schedule.linear(), 5), TABLES["ddim clipped"], table[4:], "ddpm"):
        with pytest.raises(ValueError, match="along a whole chain that reads one step back and limits nothing"):
            SelfConditioned(wrong, noise)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give those of the run, of shape"):
        SelfConditioned(ddim(Schedule.linear(), 5), noise).placed(torch.zeros(1, *SHAPE))
