# SPDX-License-Identifier: Apache-2.0
"""Samples of few elements: their errors scatter more, and stochastic chains count them with more caution."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import paradiff
from paradiff.chain.sensitivity import scatter
from paradiff.methods.window.setup import WindowSetup
from paradiff.solver.protocol import Method

SCHEDULE = paradiff.Schedule.linear()
CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [paradiff.samplers.ddpm, paradiff.samplers.ddim])
def test_the_caution_of_few_elements_is_larger_on_stochastic_chains(make: paradiff.Table) -> None:
    table = make(SCHEDULE, 20)
    for window in (None, 16, 15, 4):  # up to 15 nodes, windows are narrow
        method = paradiff.parasolver(window)
        few, usual = (WindowSetup(table, method, CPU, torch.float64, elements=n).scaled(1.0)[0] for n in (2, 64))
        times = scatter(2) if table.stochastic and window in (None, 16) else 1.0
        assert few == pytest.approx([times * factor for factor in usual])
    assert scatter(2) > 1.5


@pytest.mark.parametrize(
    "method",
    [paradiff.parasolver(), paradiff.quasi_newton(), paradiff.srds(), paradiff.collocation(16)],
    ids=lambda method: method.name,
)
def test_every_method_counts_the_elements_of_a_sample(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    table, seen = paradiff.samplers.ddpm(SCHEDULE, 20), list[int]()
    for module in ("window.setup", "parareal.stopping"):
        monkeypatch.setattr(f"paradiff.methods.{module}.scatter", lambda elements: seen.append(elements) or 1.0)
    noise = paradiff.Keyed((3, 2, 2), samples=2)
    paradiff.sample(lambda x, t: 0.1 * x, table, noise, method)
    assert seen
    assert {*seen} == {12}
    problem = paradiff.solver.Problem(table=table, noise=noise)
    assert problem.elements == 12
    assert dataclasses.replace(problem, shared_window=True).elements == 4
