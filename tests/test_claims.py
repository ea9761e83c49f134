# SPDX-License-Identifier: Apache-2.0
"""What the pages say of rounds and of exact samples, and the new names that the changelog gives for old ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import paradiff
from paradiff import Keyed, Solution
from paradiff.methods.presets import collocation, jacobi, paradigms, parasolver, quasi_newton, sequential, srds
from paradiff.models import Mixture
from paradiff.planning import Calibration
from paradiff.samplers import ddim, ddpm
from paradiff.samplers.schedule import Schedule
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Method

STEPS = 24
SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
WINDOWS: dict[str, Method] = {
    "jacobi": jacobi(tolerance=0.0),
    "paradigms": paradigms(tolerance=0.0),
    "parasolver": parasolver(tolerance=0.0),
    "sub-intervals": parasolver(tolerance=0.0, stride=5),
    "quasi_newton": quasi_newton(tolerance=0.0),
    "quasi_deer": paradiff.quasi_deer(tolerance=0.0),
    "parataa": paradiff.parataa(tolerance=0.0),
}
PIADM = {"ddpm": paradiff.piadm_sde, "ddim": paradiff.piadm_ode}


def solved(sampler: str, method: Method) -> tuple[Solution, float]:
    """A method's solution on a mixture, and its largest difference to the sequential one."""
    draw = torch.Generator().manual_seed(0)
    mixture = Mixture(torch.full((5,), 0.2), torch.randn(5, 6, generator=draw), torch.full((5,), 0.05))
    table = SAMPLERS[sampler](Schedule.linear(), STEPS)
    model, noise = mixture.denoiser(table), Keyed((6,), [1, 2])
    found, plain = (sample(model, table, noise, one) for one in (method, sequential()))
    return found, float((found.sample - plain.sample).abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_at_tolerance_zero_are_exact_within_the_chains_rounds(name: str, sampler: str) -> None:
    found, error = solved(sampler, WINDOWS[name])
    assert error == pytest.approx(0, abs=1e-6)
    assert found.rounds <= STEPS


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stagger", [None, 1])
def test_piadm_at_tolerance_zero_is_exact_within_the_chains_rounds(stagger: int | None, sampler: str) -> None:
    found, error = solved(sampler, PIADM[sampler](4, tolerance=0.0, stagger=stagger))
    assert error == pytest.approx(0, abs=1e-6)
    assert found.rounds <= STEPS


def test_unequal_sub_intervals_can_need_more_rounds() -> None:
    assert solved("ddpm", parasolver(tolerance=0.0, stride=[1, 1, 1, 21]))[0].rounds > STEPS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_srds_is_exact_after_as_many_iterations_as_blocks(sampler: str) -> None:
    pipelined, error = solved(sampler, srds(4, iterations=4))
    batched, other = solved(sampler, srds(4, iterations=4, ordering="batched"))
    assert max(error, other) == pytest.approx(0, abs=1e-6)
    assert pipelined.rounds <= STEPS < batched.rounds
    assert solved(sampler, srds(8, iterations=8, rows=1))[0].rounds > STEPS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_collocation_is_the_sequential_sample_within_its_tolerance(sampler: str) -> None:
    assert solved(sampler, collocation(exact=True, tolerance=1e-3))[1] < 1e-2


def test_collocation_with_a_small_window_can_need_more_rounds() -> None:
    assert solved("ddpm", collocation(8, window=1, exact=True))[0].rounds > STEPS


@pytest.mark.parametrize("build", [srds, collocation])
def test_srds_and_collocation_refuse_tolerance_zero(build: Callable[..., Method]) -> None:
    with pytest.raises(ValueError, match="the tolerance is 0"):
        build(tolerance=0.0)


def test_the_page_of_policies_has_the_figures_of_its_file() -> None:
    root = Path(__file__).parents[1]
    found = json.loads((root / "benchmarks/results/policy.json").read_text())
    lines = (root / "docs/policies.md").read_text().splitlines()
    cells = {row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line)}
    for row in found["summary"]:
        wanted = [str(row["executed"]), f"{row['succeeded']} of {row['episodes']}"]
        wanted += [f"{row['rounds_mean']:.1f}"] if "rounds_mean" in row else ["-"]
        wanted += [f"{100 * row[name]:.0f} %" if name in row else "-" for name in ("within_4", "within_8")]
        named = ("error_rms_median", "error_rms_max")
        wanted += [", ".join(f"{row[name]:.1e}".replace("e-0", "e-") for name in named) if named[0] in row else "-"]
        assert cells[row["way"]] == wanted
    for row in found["tried"]:
        wanted = [row["begins_from"], f"{row['rounds_mean']:.1f}", str(row["rounds_max"])]
        assert cells[row["method"]] == wanted
    for row in found["clock"]:
        curves = [name for name in row if name not in ("way", "seconds", "beside", "calls")]
        wanted = [f"{1e3 * row[name]:.0f}" for name in ("seconds", *curves)]
        assert cells[f"{row['way']}, ms"] == wanted


def test_the_page_of_estimates_has_the_figures_of_its_calibrations() -> None:
    root = Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks/results/calibration.json").read_text())["rows"]
    page = (root / "docs/error_estimate.md").read_text()
    for row in rows:
        pairs = [(e, s) for e, s in zip(*(row["samples"][name] for name in ("errors", "estimates")), strict=True)]
        bound = Calibration("", "", row["calibration"]["errors"], row["calibration"]["estimates"]).bound
        assert bound.factor == pytest.approx(row["factor"])
        assert sum(error <= bound.of(estimate) for error, estimate in pairs) == row["covered"]
        name, windows = row["method"].partition("(")[0], re.findall(r"window=(\d+)", row["method"])
        cells = [f"{row['problem']}, {row['chain'].upper()} {row['steps']}", f"`{name}`", windows[0] if windows else "-"]
        cells += [f"{row['factor']:.2g}", f"{row['covered']} of {row['fresh']}", f"{row['held']} of {row['fresh']}"]
        cells += [f"{row[way]['median']:.1f} ({row[way]['within']:.0%})" for way in ("raw", "calibrated")]
        assert f"| {' | '.join(cells)} |" in page
    covered, fresh = (sum(row[name] for row in rows) for name in ("covered", "fresh"))
    assert f"{covered} of {fresh} samples" in page


def test_the_page_of_estimates_has_the_powers_of_its_file() -> None:
    root = Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks/results/tolerance.json").read_text())["rows"]
    rows = [row for row in rows if row["part"].startswith("proportion")]
    page = (root / "docs/error_estimate.md").read_text()
    for title in {row["title"] for row in rows}:
        cells = [title]
        for name in ("parasolver", "quasi_newton", "srds", "collocation"):
            own = [row for row in rows if (row["title"], row["method"]) == (title, name)]
            tolerances, errors = (np.log([row[key] for row in own]) for key in ("tolerance", "error_median"))
            power = np.polyfit(tolerances, errors, 1)[0]
            cells.append(f"{power:.1f}")
        assert f"| {' | '.join(cells)} |" in page
    seeds = sum(row["seeds"] for row in rows)
    within = sum(round(row["within"] * row["seeds"]) for row in rows)
    assert f"{within} of {seeds} samples" in page


def test_the_changelogs_new_names_are_there() -> None:
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    rows = [line.split("|")[2] for line in text.partition("| old | new |")[2].splitlines() if line.count("|") == 3]
    names = [name for row in rows for name in re.findall(r"`(paradiff\.[\w.]+)`", row)]
    assert len(names) > 10
    for name in names:
        found: object = paradiff
        for part in name.split(".")[1:]:
            found = getattr(found, part)


def test_the_page_of_molecules_has_the_figures_of_its_file() -> None:
    root = Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks/results/molecules.json").read_text())["rows"]
    page = (root / "docs/molecules.md").read_text()
    tables = {line for line in page.splitlines() if line.startswith("|") and re.search(r" of \d", line)}
    for row in rows:
        chain, _, calls = row["table"].rpartition(" ")
        method, _, more = row["method"].partition(", ")
        rounds = f"{row['rounds']:.1f} ({row['rounds_max']})"
        held = f"{row['held']} of {row['seeds']}"
        named = f"`{method}`{', ' + more if more else ''}"
        if row["part"] == "cold":
            error = f"{row['error_max']:.1e}".replace("e-0", "e-")
            ends = [f"`{method}`", rounds, f"{row['evaluations']:.0f}", error, held]
            found = [line for line in tables if line.endswith(f"| {' | '.join(ends)} |")]
        else:
            atom = f"{100 * row['per_atom']:.2f} %"
            found = [f"| {' | '.join([chain, named, calls, rounds, atom, held])} |"]
        assert [line for line in found if line in tables] == found[:1] == found, row
        tables.remove(found[0])
    assert not tables
