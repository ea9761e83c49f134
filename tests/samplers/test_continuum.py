# SPDX-License-Identifier: Apache-2.0
"""The chain of many steps is the equation of its levels: against its formula, step by step."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from paradiff import Keyed, Schedule, Table, collocation, sample
from paradiff.samplers import ddim, ddpm, euler, flow_euler
from paradiff.samplers.continuum import STEPS, continuum

TABLES = {
    "preserving": ddim(Schedule.linear(), 100),
    "preserving, stochastic": ddpm(Schedule.linear(), 100, prediction="v"),
    "exploding": euler(Schedule.scaled_linear(), 100),
    "flow": flow_euler(100, shift=3.0),
}
each_table = pytest.mark.parametrize("name", TABLES)
each_target = pytest.mark.parametrize("target", ["ode", "sde"])
Target = Literal["ode", "sde"]


@each_table
@each_target
def test_every_step_is_the_formulas(name: str, target: Target) -> None:
    """With a clean datum d and a state x: x' = alpha' d + sqrt(sigma'^2 - c^2) (x - alpha d)/sigma + c z."""
    fine = continuum(TABLES[name], target, 300)
    x, d = 0.7, -0.4
    for i in range(fine.steps):
        (a, s), (a1, s1) = ((float(fine.alpha[k]), float(fine.sigma[k])) for k in (i, i + 1))
        c = s1 * math.sqrt(max(1 - (a * s1 / (s * a1)) ** 2, 0)) if target == "sde" else 0.0
        m = (d - float(fine.p[i]) * x) / float(fine.q[i])
        found = float(fine.a[i, 0]) * x + float(fine.b[i, 0]) * m
        assert found == pytest.approx(a1 * d + math.sqrt(max(s1**2 - c**2, 0)) * (x - a * d) / s, rel=1e-9, abs=1e-12)
        assert float(fine.c[i]) == pytest.approx(c, abs=1e-12)
    assert fine.stochastic == (target == "sde")


@each_table
def test_levels_are_even_in_their_ratio_and_of_the_tables_kind(name: str) -> None:
    table = TABLES[name]
    fine = continuum(table, "ode", 500)
    first = 1 if table.alpha[0] == 0 else 0
    assert fine.steps == 500 + first
    alpha, sigma = fine.alpha[first:-1], fine.sigma[first:-1]
    even = (alpha / sigma).log().diff()
    assert float(even.max() - even.min()) < 1e-9
    for found, known in ((fine.alpha, table.alpha), (fine.sigma, table.sigma)):
        assert found[[0, -2]].tolist() == pytest.approx(known[[0, -2]].tolist(), rel=1e-9)
    assert (fine.alpha[-1], fine.sigma[-1], fine.t[-1]) == (table.alpha[-1], table.sigma[-1], table.t[-1])
    assert fine.start_scale == table.start_scale
    kind = {"p": alpha**2 + sigma**2, "e": alpha, "f": alpha + sigma}[name[0]]
    assert torch.allclose(kind, torch.ones_like(kind))
    if name == "exploding":
        assert torch.allclose(fine.scale[:-1], (sigma**2 + 1).rsqrt())


@each_table
def test_times_lie_between_those_of_the_table(name: str) -> None:
    table = TABLES[name]
    fine = continuum(table, "ode", 2000)
    assert (fine.t[:-1].diff() < 1e-9).all()
    ratio, known = (fine.alpha / fine.sigma)[:-1], (table.alpha / table.sigma)[:-1]
    for n in range(1, table.steps - 1):
        k = int((ratio - known[n]).abs().argmin())
        around = float((table.t[n - 1] - table.t[n + 1]).abs())
        assert abs(float(fine.t[k] - table.t[n])) < around / 2
    if name == "flow":
        assert torch.allclose(fine.t[:-1], 1000 * fine.sigma[:-1], atol=1e-6)


@each_target
def test_steps_are_thousands(target: Target) -> None:
    assert continuum(TABLES["preserving"], target).steps == STEPS[target]


def changed(table: Table, **values: Any) -> Table:
    fields = ("name", "prediction", "t", "alpha", "sigma", "a", "b", "c")
    given: dict[str, Any] = {f: getattr(table, f) for f in fields}
    given |= {"exact_levels": False, **values}
    return Table(**given)


def test_levels_of_no_known_kind_are_refused() -> None:
    table = TABLES["preserving"]
    strange = changed(table, alpha=0.8 * table.alpha)
    with pytest.raises(ValueError, match=r"neither variance-preserving nor variance-exploding nor on the line alpha"):
        continuum(strange, "ode")


def test_inputs_scaled_in_a_way_of_their_own_are_refused() -> None:
    table = TABLES["preserving"]
    with pytest.raises(ValueError, match=r"scales its network's inputs or outputs in a way of its own.*use target='chain'"):
        continuum(changed(table, scale=torch.full_like(table.t, 0.5)), "sde")
    clean = torch.stack([table.p, table.q], dim=1)
    with pytest.raises(ValueError, match=r"scales its network's inputs or outputs in a way of its own"):
        continuum(changed(table, clean=clean), "ode")


@each_table
def test_the_sde_of_a_known_datum_ends_there(name: str) -> None:
    """A network that knows the datum: any chain of the levels lands on it, noise and all."""
    table, datum = TABLES[name], 0.3
    fine = continuum(table, "sde")

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        i = (fine.t[None, :-1] - t[:, None]).abs().argmin(1)[:, None]
        return ((datum - fine.p[i] * x / fine.scale[i]) / fine.q[i]).to(x.dtype)

    found = sample(network, table, Keyed((3,), 1), collocation(8, target="sde", max_nodes=64), dtype=torch.float64)
    assert (found.sample - datum).abs().max() < 1e-2
