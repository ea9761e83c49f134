# SPDX-License-Identifier: Apache-2.0
"""What chains with churn forget of early errors is read off the path, and no error counts for less than reaches the sample."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, sample, sequential
from paradiff.chain.slope import freeze_clean_data, resolve
from paradiff.chain.step import Step
from paradiff.methods import WindowMethod
from paradiff.methods.presets import quasi_newton
from paradiff.methods.window.budget import ErrorBudget
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.forgetting import Forgetting, Kept
from paradiff.methods.window.members import Member
from paradiff.methods.window.passing import PassByError
from paradiff.methods.window.setup import WindowSetup
from paradiff.models import Mixture
from paradiff.samplers import alphafold3, ddpm, edm
from paradiff.samplers.schedule import Schedule

TABLE, ELEMENTS, SCALE, WIDTH = alphafold3(200), 16, 16.0, 16
CPU = torch.device("cpu")


def mixture(kind: str) -> Mixture:
    """Data of a mean square of about 256: one place, several, or two that differ in one direction alone."""
    if kind == "several":
        means = SCALE * torch.randn(8, ELEMENTS, generator=torch.Generator().manual_seed(5))
    elif kind == "two":
        means = torch.zeros(2, ELEMENTS)
        means[:, 0] = SCALE * ELEMENTS**0.5 * torch.tensor([1.0, -1.0])
    else:
        means = torch.zeros(1, 4 * ELEMENTS)
    count = len(means)
    variance = SCALE**2 if kind == "one" else (0.2 * SCALE) ** 2
    return Mixture(torch.full((count,), 1 / count), means, torch.full((count,), variance))


class Path:
    """The sequential chain of a mixture.

    Attributes:
        states: `[N+1, d]` in double precision.
        outputs: `[N, d]`.
        derivatives: `[N, d, d]` of the clean-data estimate.
    """

    def __init__(self, kind: str, seed: int) -> None:
        data = mixture(kind)
        denoiser, noise = data.denoiser(TABLE), Keyed((data.means.shape[1],), seed=seed)
        draws, states = noise.draw(0, range(TABLE.steps)).double(), [noise.start(0).double() * TABLE.start_scale]
        outputs, derivatives = list[Tensor](), list[Tensor]()

        def clean(x: Tensor, node: int) -> Tensor:
            return denoiser(x[None], TABLE.t[node : node + 1])[0]

        for n in range(TABLE.steps):
            outputs.append(clean(states[-1], n))
            derivatives.append(torch.func.jacrev(clean)(states[-1], n))
            states.append(TABLE.a[n, 0] * states[-1] + TABLE.b[n, 0] * outputs[-1] + TABLE.c[n] * draws[n])
        self.states, self.outputs, self.derivatives = torch.stack(states), torch.stack(outputs), torch.stack(derivatives)

    def seen(self, forgetting: Forgetting, lo: int) -> list[float]:
        """|C|_F about the nodes of a window."""
        part = slice(lo, lo + WIDTH)
        return forgetting(lo, self.states[part], self.outputs[part])[:, 0].tolist()


def forgetting_of(dtype: torch.dtype = torch.float64) -> Forgetting:
    return Forgetting(Step(TABLE, CPU, dtype), WindowControl(), ELEMENTS)


@pytest.mark.parametrize("lo", [20, 100, 130])
def test_the_path_shows_the_covariance_of_gaussian_data(lo: int) -> None:
    """Of d numbers of variance V the covariance given a state is V sigma^2/(V + sigma^2) in each; the mean of nine nodes, each
    of d squares, scatters by about a tenth."""
    path, d = Path("one", 3), 4 * ELEMENTS
    found = path.seen(forgetting_of(), lo)
    for k in (1, WIDTH // 2, WIDTH - 1):
        noise = float(TABLE.sigma[lo + k]) ** 2
        assert found[k] == pytest.approx(d**0.5 * SCALE**2 * noise / (SCALE**2 + noise), rel=0.4)


def test_an_error_is_kept_by_the_product_of_the_steps() -> None:
    lo, forgetting = 100, forgetting_of()
    frozen = resolve(freeze_clean_data, TABLE)[:, 0].abs()
    calm = forgetting.kept(lo, [0.0] * WIDTH, WIDTH, 0.0)
    assert calm.steps == pytest.approx(frozen[lo + 1 : lo + WIDTH + 1].tolist(), rel=1e-12)
    wanted = [float(frozen[n:].prod()) for n in range(lo + 1, lo + WIDTH + 1)]
    assert calm.share == pytest.approx(wanted, rel=1e-9)
    assert calm.most == pytest.approx((0.05 * TABLE.sigma[lo + 1 : lo + WIDTH + 1]).tolist())
    spreads = [0.0] * 5 + [float(TABLE.sigma[105]) ** 2 / 2] + [0.0] * (WIDTH - 6)  # the data are half decided at node 105
    answered = frozen[105] + 0.5 * (TABLE.b[105, 0] / TABLE.q[105]).abs()
    seen = forgetting.kept(lo, spreads, WIDTH, 0.0)
    assert seen.steps[4] == pytest.approx(float(answered))
    assert seen.share[4] / calm.share[4] == pytest.approx(seen.steps[4] / calm.steps[4])
    assert seen.share[5:] == calm.share[5:]
    assert forgetting.kept(lo, [math.nan] * WIDTH, WIDTH, math.nan).share == [1.0] * WIDTH
    assert forgetting.kept(TABLE.steps - 3, [0.0] * 3, 3, 0.0).share[-1] == 1.0  # the chain's last node is the sample


def test_nodes_that_are_not_known_are_as_undecided_as_any_was() -> None:
    lo, forgetting, decided = 60, forgetting_of(), [0.0] * WIDTH
    early, late = (forgetting.kept(lo, decided, WIDTH, largest) for largest in (1e3, 1e4))
    assert 1.0 > late.share[0] > early.share[0] > 0.0
    assert early.steps[:-1] == late.steps[:-1]
    assert early.steps[-1] < late.steps[-1]  # the last one's step leads beyond the window
    half = forgetting.kept(lo, decided, 8, 1e4)
    assert half.steps[:7] == late.steps[:7]
    assert half.steps[7] > late.steps[7]
    assert half.share[0] > late.share[0]


def test_a_node_is_known_up_to_the_first_that_moved_too_far() -> None:
    lo, forgetting, control = 100, forgetting_of(), WindowControl()
    small = (control.wrong * TABLE.sigma[lo + 1 : lo + WIDTH + 1]).tolist()
    assert forgetting.known(lo, small, [0.0] * WIDTH) == WIDTH
    assert forgetting.known(lo, [*small[:5], 1.01 * small[5], *small[6:]], [0.0] * WIDTH) == 6
    assert forgetting.known(lo, [math.nan, *small[1:]], [0.0] * WIDTH) == 1
    spread = 40 * ELEMENTS * SCALE**2
    deciding = control.deciding * float(TABLE.sigma[lo + 1]) ** 2 / (ELEMENTS * spread) ** 0.5
    assert forgetting.small(lo + 1, spread) == pytest.approx(deciding)
    assert forgetting.known(lo, [1.01 * deciding, *small[1:]], [spread, *[0.0] * (WIDTH - 1)]) == 1
    assert forgetting.known(lo, [0.99 * deciding, *[0.0] * (WIDTH - 1)], [spread, *[0.0] * (WIDTH - 1)]) == WIDTH


def test_data_lie_as_far_apart_where_a_sample_has_nearly_decided() -> None:
    """How far an error may reach is told by the largest spread that was seen, at an earlier node or in an earlier window."""
    lo, forgetting, spread = 100, forgetting_of(), 40 * ELEMENTS * SCALE**2
    small = [forgetting.small(node, spread) for node in range(lo + 1, lo + WIDTH + 1)]
    calm = [0.0] * WIDTH
    for spreads, largest in (([spread, *calm[1:]], 0.0), (calm, spread)):
        assert forgetting.known(lo, [0.99 * v for v in small], spreads, largest) == WIDTH
        assert forgetting.known(lo, [*calm[:5], 1.01 * small[5], *calm[6:]], spreads, largest) == 6
    assert forgetting.known(lo, calm, [math.inf, *calm[1:]]) == WIDTH  # what does not move is near its state
    assert forgetting.known(lo, small, [math.inf, *calm[1:]]) == 1
    assert forgetting.kept(lo, calm, WIDTH, spread).most == pytest.approx(small)


def test_a_member_remembers_how_far_data_lie_apart() -> None:
    lo, forgetting, spread, calm = 100, forgetting_of(), 40 * ELEMENTS * SCALE**2, [0.0] * WIDTH
    member = Member(WindowSetup(TABLE, quasi_newton(window=WIDTH), CPU, torch.float64, elements=ELEMENTS))
    member.kept(forgetting, lo - 1, calm, [spread, *calm[1:]])
    moved = [*calm[:5], 1.01 * forgetting.small(lo + 6, spread), *calm[6:]]
    assert member.kept(forgetting, lo, moved, calm).share == forgetting.kept(lo, calm, 6, spread).share


def test_a_sample_that_decides_against_all_odds_ends_where_the_chain_does() -> None:
    """At a logarithm of the odds of 7 for the one point, two nodes before it crosses to the other for good: seen from there, a
    change that moves it by 2 looks small. Errors that may move it so far counted for nothing, and it ended at the first."""
    size, tolerance = 192, 0.04 * SCALE
    means = torch.zeros(2, size)
    means[:, 0] = SCALE * size**0.5 * torch.tensor([1.0, -1.0])
    data, noise = Mixture(torch.full((2,), 0.5), means, torch.full((2,), (0.2 * SCALE) ** 2)), Keyed((size,), seed=[1736])
    plain = sample(data.denoiser(TABLE), TABLE, noise, sequential(), check="off").sample
    found = sample(data.denoiser(TABLE), TABLE, noise, quasi_newton(window=16, tolerance=tolerance), check="off")
    error = float((found.sample - plain).square().mean().sqrt())
    assert error <= found.error_estimates[0].estimated_error <= tolerance


@pytest.mark.parametrize("kind", ["several", "two"])
@pytest.mark.parametrize("seed", [600, 603])
def test_no_error_reaches_the_sample_by_more_than_is_said(kind: str, seed: int) -> None:
    """Along the chain of data that are undecided, the true derivative of the sample in the direction that is kept best; the
    largest is 1, at the end."""
    path, forgetting, forgot = Path(kind, seed), forgetting_of(), 0
    kept, most = torch.eye(ELEMENTS, dtype=torch.float64), [1.0]
    for n in reversed(range(TABLE.steps)):
        kept = kept @ (TABLE.a[n, 0] * torch.eye(ELEMENTS, dtype=torch.float64) + TABLE.b[n, 0] * path.derivatives[n])
        most.insert(0, float(torch.linalg.matrix_norm(kept, 2)))
    for lo in range(0, TABLE.steps - WIDTH, 4):
        spreads = path.seen(forgetting, lo)
        shares = forgetting.kept(lo, spreads, WIDTH, max(spreads)).share
        for node, share in enumerate(shares, lo + 1):
            assert most[node] <= 1.001 * share, (node, most[node], share)
            forgot += share < 0.1
    assert forgot > 100


def test_it_is_looked_at_where_churn_is_and_windows_are_wide() -> None:
    def forgets(table: object, method: WindowMethod) -> bool:
        return WindowSetup(table, method, CPU, torch.float32).forgetting is not None  # type: ignore[arg-type]

    assert forgets(TABLE, quasi_newton(window=16))
    assert forgets(alphafold3(100), quasi_newton(window=16))
    assert not forgets(alphafold3(60), quasi_newton(window=16))
    assert not forgets(TABLE, quasi_newton(window=8))
    for other in (ddpm(Schedule.linear(), 100), edm(40, solver="heun", s_churn=30.0), edm(40, solver="euler", s_churn=30.0)):
        assert not forgets(other, quasi_newton(window=16))


def test_a_node_costs_what_is_kept_of_its_error() -> None:
    budget = ErrorBudget([1.0] * 5, [1.0] * 6, WindowControl())
    kept = Kept([0.1, 0.2, 0.4, 1.0], [0.3, 0.5, 0.7, 0.9], [1.0, 1.0, 1.2, 9.0])
    budget.observe(0, [1.0, 2.0, 3.0, 4.0], kept=kept)
    one = 1.0
    two = 0.5 * one + 2.0
    three = 0.7 * two + 3.0
    theta = WindowControl().first_theta
    costs = [0.0, 0.2 * theta * one, theta * two, theta * three]  # two is above the error that counts as small there
    assert [budget.cost_of(p) for p in range(1, 5)] == pytest.approx(costs)
    budget.accept(2, allowed=1.0)
    used = 0.2 * theta * one
    assert budget.used == pytest.approx(used)
    assert budget.forgone == pytest.approx(0.8 * (1.0 - used))
    budget.recount([2.0] * 6, 9.0, 1.0)  # what is told counts all
    assert budget.used == pytest.approx(2 * theta * one)
    judged = ErrorBudget([1.0] * 5, [1.0] * 6, WindowControl())
    judged.observe(0, [1.0, 2.0, 3.0, 4.0], kept=kept)
    judged.accept(2, allowed=1.0)
    judged.recount([2.0] * 6, 2 * used, 1.0)  # but no more than a tolerance that what is left keeps to
    assert judged.used == pytest.approx(2 * used)
    # What the first node to come was left with is no error that a sweep finds; it came to the later ones by the steps.
    left = [two - 0.5 * one, three - 0.7 * 0.5 * one]
    budget.observe(2, [1.7 * e for e in left] + [1.0], kept=Kept([1.0] * 3, [1.0] * 3, [math.inf] * 3))
    assert budget.theta == pytest.approx(1.7)


def test_what_is_forgone_is_left_to_no_other_node() -> None:
    rule = PassByError(1.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    passes = []
    for forgone in (0.0, 0.4):
        budget = ErrorBudget([1.0] * 5, [1.0] * 6, WindowControl())
        budget.forgone = forgone
        budget.observe(0, [0.4, 0.4, 0.4, 0.4])
        passes.append(rule(0, [0.4, 0.4, 0.4, 0.4], [1] * 4, budget))
    assert passes == [4, 1]


@pytest.mark.parametrize("kind", ["several", "two"])
def test_fewer_rounds_whose_samples_err_by_less_than_is_told(kind: str) -> None:
    denoiser, noise, tolerance = mixture(kind).denoiser(TABLE), Keyed((ELEMENTS,), seed=list(range(700, 704))), 0.01 * SCALE
    method = quasi_newton(window=16, tolerance=tolerance)
    plain = sample(denoiser, TABLE, noise, sequential()).sample
    rounds = []
    for volatile in (1e9, WindowControl().volatile):
        control = dataclasses.replace(method.control, volatile=volatile)
        found = sample(denoiser, TABLE, noise, dataclasses.replace(method, control=control))
        errors = (found.sample - plain).square().mean(1).sqrt()
        assert all(float(e) <= one.estimated_error <= tolerance for e, one in zip(errors, found.error_estimates, strict=True))
        rounds.append(sum(one.rounds for one in found.error_estimates))
    assert rounds[1] < 0.95 * rounds[0]


def test_before_any_node_is_known_nothing_is_forgotten() -> None:
    forgetting, control = forgetting_of(), WindowControl()
    member = Member(WindowSetup(TABLE, quasi_newton(window=WIDTH), CPU, torch.float64, elements=ELEMENTS))
    assert member.kept(forgetting, 60, [0.0], [math.inf]).share == [1.0]
    assert member.kept(forgetting, 61, [0.0] * 2, [9.0, 9.0]).share[0] < 1e-3  # the strongest answer that was seen is 9
    moved = [0.0, 2 * control.wrong * float(TABLE.sigma[64])]
    seen = member.kept(forgetting, 62, moved, [1.0, 1.0])
    assert seen.share == forgetting.kept(62, [1.0, 1.0], 2, 9.0).share
