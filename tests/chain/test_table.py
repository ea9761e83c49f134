# SPDX-License-Identifier: Apache-2.0
"""chain/table.py: what a table refuses, each complaint by its text, and what it tells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from textbook import SHAPE

from paradiff.chain.clipping import Clip
from paradiff.chain.table import Table, column
from paradiff.samplers.exploding import euler, euler_ancestral, heun
from paradiff.samplers.flow import flow_euler
from paradiff.samplers.preserving import ddim, ddpm, dpmpp_2m
from paradiff.samplers.schedule import Schedule

TABLES = {
    "ddim": ddim(Schedule.linear(), 20),
    "ddim eta": ddim(Schedule.cosine(), 20, eta=1.0, prediction="v"),
    "ddpm": ddpm(Schedule.linear(), 20, prediction="sample"),
    "euler": euler(Schedule.scaled_linear(), 20),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), 20, prediction="v"),
    "heun": heun(Schedule.scaled_linear(), 20),
    "dpmpp_2m": dpmpp_2m(Schedule.linear(), 20, karras=True),
    "flow_euler": flow_euler(20, shift=3.0),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("field", ["a", "b"])
@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_a_wrong_coefficient_is_caught_wherever_it_stands(name: str, field: str, factor: float) -> None:
    table = TABLES[name]
    for i in range(table.steps):
        for j in range(table.band):
            wrong = getattr(table, field).clone()
            wrong[i, j] *= factor
            if abs(wrong[i, j] - getattr(table, field)[i, j]) < 1e-4:
                wrong[i, j] += 1e-3 if i >= j else 0
            if torch.equal(wrong, getattr(table, field)):
                continue
            with pytest.raises(ValueError, match=rf"table '{table.name}': .* at step {i}: level .* check the coeff"):
                dataclasses.replace(table, **{field: wrong})


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].stochastic])
def test_variances_that_do_not_add_up_are_caught(name: str) -> None:
    table = TABLES[name]
    wrong = table.c.clone()
    wrong[10] *= 1.01
    with pytest.raises(ValueError, match=r"variances do not add up at step 10: level .* where the schedule has"):
        dataclasses.replace(table, c=wrong)
    assert dataclasses.replace(table, c=wrong, exact_variance=False).c[10] == wrong[10]


def test_a_wrong_coefficient_of_a_clean_datum_is_named() -> None:
    table = TABLES["euler"]
    wrong = table.a.clone()
    wrong[3] *= 1.001
    with pytest.raises(ValueError, match=r"table 'euler': a known clean datum leaves its ray at step 3: level 1.001 where"):
        dataclasses.replace(table, a=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.ones(20, dtype=torch.float64)},
            r"a has shape \(20,\) and dtype torch.float64; with 20 steps it must be",
        ),
        ({"b": torch.ones(20, 3, dtype=torch.float64)}, r"b has shape \(20, 3\) .* it must be \(20, 2\), float64"),
        ({"c": torch.zeros(20)}, r"c has shape \(20,\) and dtype torch.float32; .* it must be \(20,\), float64"),
        ({"alpha": torch.ones(20, dtype=torch.float64)}, r"alpha has shape \(20,\) .* it must be \(21,\), float64"),
        ({"sigma": torch.ones(22, dtype=torch.float64)}, r"sigma has shape \(22,\)"),
        ({"scale": torch.ones(20, dtype=torch.float64)}, r"scale has shape \(20,\) .* it must be \(21,\), float64"),
        (
            {"reached": torch.ones(20, dtype=torch.float64)},
            r"reached has shape \(20,\) .* it must be \(20, 2\), float64",
        ),
        ({"clip_weight": torch.ones(3, dtype=torch.float64)}, r"clip_weight has shape \(3,\) .* it must be \(20,\)"),
        ({"t": torch.ones(1, dtype=torch.float64)}, "has 1 times; it needs at least two, for one step"),
        ({"c": torch.full((20,), math.nan, dtype=torch.float64)}, "c is not finite at node 0"),
    ],
)
def test_wrong_shapes_and_values_are_refused(change: dict, message: str) -> None:
    table = TABLES["dpmpp_2m"]
    if "sigma" in change or "alpha" in change:
        change = {**change, "reached": None}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(table, **change)


def test_a_step_that_reads_states_before_the_first_is_refused() -> None:
    table = TABLES["dpmpp_2m"]
    wrong = table.b.clone()
    wrong[0, 1] = 0.1
    with pytest.raises(ValueError, match="step 0 refers to states before the first one"):
        dataclasses.replace(table, b=wrong)


def test_a_level_at_which_no_clean_estimate_exists_is_refused_though_coefficients_are_finite() -> None:
    table = TABLES["euler"]
    alpha = table.alpha.clone()
    alpha[0] = 0
    with pytest.raises(ValueError, match="a known clean datum leaves its ray at step 0: level nan"):
        dataclasses.replace(table, alpha=alpha)


@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_epsilon_at_pure_noise_is_refused(sampler: Callable[..., Table]) -> None:
    schedule = Schedule.linear(rescale_zero_snr=True)
    message = r"a is not finite at node 0 \(alpha = 0, sigma = 1, epsilon prediction\); a schedule that starts from"
    with pytest.raises(ValueError, match=message):
        sampler(schedule, 10, spacing="trailing")
    assert sampler(schedule, 10, spacing="leading").alpha[0] > 0


# -- what a table tells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_posterior_variance_is_the_noise_of_ddpm(spacing: str) -> None:
    table = ddpm(Schedule.linear(), 50, spacing=spacing)
    # The floor of 1e-20 on the last step aside.
    torch.testing.assert_close(table.posterior_variance(), table.c**2, rtol=1e-9, atol=1e-19)
    # DDIM at eta 0 adds none but has the same unit; at eta 1 it is this noise.
    still = ddim(Schedule.linear(), 50, spacing=spacing)
    assert not still.stochastic
    torch.testing.assert_close(still.posterior_variance(), table.posterior_variance())
    full = ddim(Schedule.linear(), 50, spacing=spacing, eta=1.0)
    torch.testing.assert_close(full.c**2, table.posterior_variance(), rtol=1e-9, atol=1e-19)


def test_posterior_variance_of_euler_ancestral_is_its_noise() -> None:
    table = euler_ancestral(Schedule.linear(), 30)
    torch.testing.assert_close(table.posterior_variance(), table.c**2)
    assert table.posterior_variance()[-1] == 0


def test_posterior_variance_exists_from_pure_noise_to_data() -> None:
    table = ddim(Schedule.linear(rescale_zero_snr=True), 10, spacing="trailing", prediction="v")
    assert table.alpha[0] == 0
    assert table.posterior_variance().isfinite().all()
    torch.testing.assert_close(table.posterior_variance()[0], table.sigma[1] ** 2)


def test_a_level_that_two_nodes_share_has_no_posterior_variance() -> None:
    table = heun(Schedule.linear(), 10)
    assert (table.posterior_variance()[1::2] == 0).all()
    assert (table.posterior_variance()[0:-1:2] > 0).all()


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].band == 1])
def test_a_one_step_sampler_starts_afresh_at_every_node(name: str) -> None:
    assert TABLES[name].restarts == list(range(21))


def test_a_two_stage_sampler_starts_afresh_between_its_steps() -> None:
    table = TABLES["heun"]
    assert table.steps == 39
    assert table.restarts == [*range(0, 39, 2), 39]


def test_a_multistep_sampler_starts_afresh_where_its_order_restarts() -> None:
    # Step 19, the last one, is of order one too.
    assert TABLES["dpmpp_2m"].restarts == [0, 19, 20]
    assert dpmpp_2m(Schedule.linear(), 20, restarts=[4, 5, 11]).restarts == [0, 4, 5, 11, 19, 20]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v", "flow"])
def test_convert_replaces_the_clean_estimate_by_its_limit(prediction: str) -> None:
    table = ddpm(Schedule.linear(), 10, prediction=prediction, clip=Clip(0.5))
    x, m = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for nodes in (slice(2, 6), torch.tensor([9, 0, 3, 3])):
        new = table.convert(nodes, x, m)
        p, q = column(table.p[nodes], x), column(table.q[nodes], x)
        torch.testing.assert_close(p * x + q * new, (p * x + q * m).clamp(-0.5, 0.5), rtol=0, atol=1e-12)
        assert table.convert(nodes, x.float(), m.float()).dtype == torch.float32


def test_convert_is_the_identity_without_a_limit_and_inside_it() -> None:
    x, m = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ddim(Schedule.linear(), 10).convert(slice(0, 4), x, m) is m
    wide = ddim(Schedule.linear(), 10, clip=Clip(1e6))
    assert torch.equal(wide.convert(slice(0, 4), x, m), m)
