# SPDX-License-Identifier: Apache-2.0
"""The probed table of every diffusers scheduler against that scheduler's own loop, node by node."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import pytest
import torch
from scheduler_loops import SHAPE, gap, network, start_of, walk_scheduler, walk_table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paradiff import Table, parasolver, sample, sequential
from paradiff.chain.sensitivity import noise_units, sensitivity
from paradiff.chain.slope import freeze_clean_data, freeze_epsilon
from paradiff.chain.table import ROUNDING
from paradiff.samplers.scheduler.probe import Increments, probe

pytestmark = [  # what diffusers 0.42 and torchsde say of themselves
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn.t accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]

DPM, FLOW = "DPMSolverMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
PURE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}

# name: class, steps, options of step, options of the class
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIM", 20, {}, {"clip_sample": False}),
    "ddim, noise": ("DDIM", 20, {"eta": 1.0}, {"clip_sample": False}),
    "ddim, from pure noise": ("DDIM", 20, {}, {"clip_sample": False, **PURE}),
    "ddim, clipped": ("DDIM", 20, {}, {}),
    "ddim, noise, epsilon clipped too": (
        "DDIM",
        20,
        {"eta": 0.5, "use_clipped_model_output": True},
        {"clip_sample_range": 0.7},
    ),
    "ddim, thresholded": ("DDIM", 20, {}, THRESHOLD),
    "ddim, one step": ("DDIM", 1, {}, {"clip_sample": False}),
    "ddim, inverted": ("DDIMInverse", 20, {}, {"clip_sample": False}),
    "ddpm": ("DDPM", 20, {}, {"clip_sample": False}),
    "ddpm, large variance": ("DDPM", 20, {}, {"clip_sample": False, "variance_type": "fixed_large"}),
    "ddpm, clipped": ("DDPM", 20, {}, {}),
    "ddpm, thresholded": ("DDPM", 20, {}, THRESHOLD),
    "euler": ("EulerDiscrete", 20, {}, {}),
    "euler, leading": ("EulerDiscrete", 20, {}, {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler, karras, v": ("EulerDiscrete", 20, {}, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    "euler, exponential": ("EulerDiscrete", 20, {}, {"use_exponential_sigmas": True}),
    "euler, beta": ("EulerDiscrete", 20, {}, {"use_beta_sigmas": True}),
    "euler, churn": ("EulerDiscrete", 20, {"s_churn": 2.0}, {}),
    "euler ancestral": ("EulerAncestralDiscrete", 20, {}, {"timestep_spacing": "trailing"}),
    "flow euler": ("FlowMatchEulerDiscrete", 20, {}, {"shift": 3.0}),
    "flow euler, stochastic": ("FlowMatchEulerDiscrete", 20, {}, {"stochastic_sampling": True}),
    "flow euler, inverted": ("FlowMatchEulerDiscrete", 20, {}, {"invert_sigmas": True}),
    "flow heun": ("FlowMatchHeunDiscrete", 10, {}, {}),
    "flow lcm": ("FlowMatchLCM", 8, {}, {}),
    "heun": ("HeunDiscrete", 10, {}, {"use_karras_sigmas": True}),
    "heun, clipped": ("HeunDiscrete", 10, {}, {"clip_sample": True}),
    "kdpm2": ("KDPM2Discrete", 10, {}, {}),
    "kdpm2 ancestral": ("KDPM2AncestralDiscrete", 10, {}, {}),
    "dpm++ sde": ("DPMSolverSDE", 10, {}, {"noise_sampler_seed": 3}),
    "dpm++ 1": (DPM, 20, {}, {"solver_order": 1}),
    "dpm++ 2": (DPM, 20, {}, {}),
    "dpm++ 2, few steps": (DPM, 8, {}, {"lower_order_final": True}),
    "dpm++ 2, high order to the end": (DPM, 8, {}, {"lower_order_final": False}),
    "dpm++ 2, first order last": (DPM, 20, {}, {"euler_at_final": True, "timestep_spacing": "leading"}),
    "dpm++ 2, heun, karras": (DPM, 20, {}, {"solver_type": "heun", "use_karras_sigmas": True}),
    "dpm++ 2, lu": (DPM, 20, {}, {"use_lu_lambdas": True}),
    "dpm++ 2, thresholded": (DPM, 20, {}, THRESHOLD),
    "dpm++ 3": (DPM, 20, {}, {"solver_order": 3}),
    "dpm++ 3, thresholded": (DPM, 20, {}, {"solver_order": 3, **THRESHOLD}),
    "dpm 2, epsilon": (DPM, 20, {}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpm++ 2, flow": (DPM, 20, {}, FLOW),
    "sde-dpm++ 2": (DPM, 20, {}, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2, inverted": (DPM + "Inverse", 20, {}, {}),
    "dpm++ 2, single step": ("DPMSolverSinglestep", 20, {}, {}),
    "dpm++ 3, single step": ("DPMSolverSinglestep", 20, {}, {"solver_order": 3}),
    "deis": ("DEISMultistep", 20, {}, {"solver_order": 3}),
    "unipc 2": ("UniPCMultistep", 20, {}, {}),
    "unipc 3, flow": ("UniPCMultistep", 20, {}, {"solver_order": 3, **FLOW}),
    "unipc, no corrector": ("UniPCMultistep", 20, {}, {"disable_corrector": list(range(20))}),
    "unipc, thresholded": ("UniPCMultistep", 20, {}, THRESHOLD),
    "sa-solver": ("SASolver", 20, {}, {}),
    "pndm": ("PNDM", 20, {}, {"skip_prk_steps": True}),
    "pndm, runge-kutta start": ("PNDM", 20, {}, {}),
    "lms": ("LMSDiscrete", 10, {}, {}),
    "ipndm": ("IPNDM", 20, {}, {}),
    "edm euler": ("EDMEuler", 20, {}, {}),
    "edm dpm++": ("EDMDPMSolverMultistep", 20, {}, {}),
    "cosine dpm++": ("CosineDPMSolverMultistep", 20, {}, {}),
    "lcm": ("LCM", 8, {}, {}),
    "lcm, clipped": ("LCM", 8, {}, {"clip_sample": True}),
    "tcd": ("TCD", 8, {}, {}),
    "tcd, noise": ("TCD", 8, {"eta": 0.8}, {}),
    "consistency model": ("CMStochasticIterative", 5, {}, {}),
    "cogvideox ddim": ("CogVideoXDDIM", 20, {}, {}),
    "unclip": ("UnCLIP", 20, {}, {}),
}
DENSE = {"unipc 2", "unipc 3, flow", "unipc, thresholded"}
# Steps that no levels can agree with: the first of IPNDM starts from alpha = 0 with a rounded beta; unCLIP lands on a level
# that its rounded variance does not fit.
LEVELS_A_GUIDE = {"ipndm", "unclip"}


def scheduler_of(case: str) -> tuple[Any, dict[str, Any]]:
    kind, steps, options, config = CASES[case]
    if kind in ("CosineDPMSolverMultistep", "DPMSolverSDE"):
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, kind + "Scheduler")(**config)
    scheduler.set_timesteps(steps)
    return scheduler, options


def mutated(table: Table) -> Table:
    """The table with one coefficient of the middle step off by 1e-4: the largest of the states'."""
    a, middle = table.a.clone(), table.steps // 2
    a[middle, a[middle].abs().argmax()] *= 1 + 1e-4
    return dataclasses.replace(table, a=a, exact_levels=False)


# States are float64. Schedulers that round them to float32 in each step (Euler, flow matching, DPM++) leave 1e-7 a step;
# noises are kept in float32; the others agree to 1e-15.
SAME = 1e-6
EPS = torch.finfo(torch.float32).eps


def check_recurrence(case: str, scheduler: Any, options: dict[str, Any]) -> None:
    """The table walks the scheduler's loop and draws its noises, and a coefficient that is off is seen."""
    table = probe(scheduler, None, options)
    x, theirs, ours = start_of(scheduler), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    wanted = walk_scheduler(scheduler, x, theirs, **options)
    noise = Increments(scheduler, table, None, x, ours, options)
    assert gap(walk_table(table, x, noise), wanted) < SAME
    noise.finish()
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert gap(walk_table(mutated(table), x, noise), wanted) > SAME
    assert (table.band > table.steps - 2) == (case in DENSE or table.steps == 1)


def check_levels(case: str, scheduler: Any, options: dict[str, Any], entries: float = 0.0) -> None:
    """The levels agree with the coefficients, fall, and serve slopes and estimates. `entries` is the relative rounding of one
    entry of the scheduler's tables, where equal levels are rounded each by itself."""
    table = probe(scheduler, None, options)
    assert (table.mismatch < ROUNDING) == (case not in LEVELS_A_GUIDE), table.about_levels
    nodes = list(range(table.steps + 1))
    for values in (freeze_clean_data(table), freeze_epsilon(table), noise_units(table, nodes), sensitivity(table)):
        assert torch.isfinite(values).all()
    allowed = 2 * entries * table.sigma[:-1]  # Two equal levels, one rounded down and one up.
    if case == "kdpm2 ancestral":
        allowed += middle_rounding(table.sigma)
    falls = table.sigma.diff() <= allowed
    assert falls.all() or "inverted" in case


def middle_rounding(sigma: Tensor) -> Tensor:
    """`[N]` how far a level may lie above the one before it in KDPM2's ancestral chain, s0, m0, s1, m1, s2 ...

    A middle level m = sqrt(s d), d = s'^2 / s, from s to s' is s' itself in exact arithmetic. diffusers computes
    d = sqrt(s'^2 - u^2), u^2 = s'^2 (s^2 - s'^2) / s^2, in float32: the ten roundings of half an eps in s'^2 and u^2 leave d^2
    with an error of 5 eps s'^2, which is 5 eps (s / s')^2 of its own size. The root of it and the mean of the logarithms keep a
    quarter. Logarithms of up to 6 round by 3 eps, their mean and its exponential by 2 eps more.
    """
    allowed = torch.zeros(len(sigma) - 1, dtype=torch.float64)
    before, after = sigma[:-2:2], sigma[2::2]  # s and s'; the last step, to 0, has no middle
    allowed[1::2] = EPS * (1.25 * (before / after) ** 2 + 5) * after
    return allowed


@pytest.mark.parametrize("case", CASES)
def test_the_recurrence_is_the_schedulers_loop(case: str) -> None:
    check_recurrence(case, *scheduler_of(case))


@pytest.mark.parametrize("case", CASES)
def test_levels_agree_with_the_coefficients_and_serve_slopes_and_estimates(case: str) -> None:
    check_levels(case, *scheduler_of(case))


def rounded_otherwise(scheduler: Any, direction: str) -> int:
    """Moves the float32 entries of the scheduler's tables by one unit in the last place, as another processor's rounding would:
    all towards +inf, all towards -inf, or each either way or not at all. Zeros and ones are exact on every processor. The least
    level of a chain on a Brownian tree stays too: diffusers' own loop does not end where it is above the tree's end. The number
    of entries moved is returned."""
    least = scheduler.config.sigma_min if isinstance(scheduler, diffusers.CosineDPMSolverMultistepScheduler) else torch.nan
    generator, count = torch.Generator().manual_seed(3), 0
    for name, value in sorted(vars(scheduler).items()):
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            continue
        ways = {"up": 1.0, "down": -1.0}
        way = torch.randint(-1, 2, value.shape, generator=generator).float()
        way = torch.full_like(value, ways[direction]) if direction in ways else way
        moved = torch.nextafter(value, way * torch.inf)
        exact = (value == 0) | (value == 1) | value.isclose(torch.tensor(least), rtol=EPS, atol=0) | ~value.isfinite()
        still = exact | (way == 0)
        setattr(scheduler, name, torch.where(still, value, moved))
        count += int((~still).sum())
    return count


@pytest.mark.parametrize("direction", ["up", "down", "mixed"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "cogvideox ddim"])  # whose tables are float64
def test_a_schedulers_rounding_changes_nothing_that_a_table_is_relied_on_for(case: str, direction: str) -> None:
    scheduler, options = scheduler_of(case)
    before = probe(scheduler, None, options)
    assert rounded_otherwise(scheduler, direction) > 0
    after = probe(scheduler, None, options)
    assert (after.band, after.restarts) == (before.band, before.restarts)
    assert (after.prediction, after.clip, after.exact_variance) == (before.prediction, before.clip, before.exact_variance)
    check_recurrence(case, scheduler, options)
    check_levels(case, scheduler, options, entries=EPS)


@pytest.mark.parametrize("case", ["euler ancestral", "flow heun", "dpm++ 2", "unipc 3, flow", "sa-solver", "ddim, thresholded"])
def test_the_solver_returns_the_schedulers_sample_in_float32(case: str) -> None:
    scheduler, options = scheduler_of(case)
    table = probe(scheduler, None, options)
    x = start_of(scheduler, torch.float32)
    wanted = walk_scheduler(scheduler, x, torch.Generator().manual_seed(5), **options)[-1]
    for method in (sequential(), parasolver(tolerance=0.0)):
        noise = Increments(scheduler, table, None, x, torch.Generator().manual_seed(5), options)
        found = sample(network, table, noise, method)
        # Float32 on both sides; a limited estimate is x divided by alpha, which is 0.01 at first.
        assert float((found.sample[0] - wanted).abs().max() / wanted.abs().max()) < 2e-5
        assert found.rounds <= table.steps


SLICED = ["ddim", "ddpm", "euler", "euler ancestral", "flow euler", "dpm++ 2", "sde-dpm++ 2", "heun", "kdpm2", "unipc 2"]


@pytest.mark.parametrize("case", [*SLICED, "sa-solver", "deis", "lms", "edm euler"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_loop_over_a_part_of_the_times_is_that_part_of_the_chain(case: str, ends: bool) -> None:
    scheduler, options = scheduler_of(case)
    begin = 3 * scheduler.order
    timesteps = scheduler.timesteps[begin : -scheduler.order if ends else None]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    table = probe(scheduler, timesteps, options)
    assert table.steps == len(timesteps)
    assert table.start_scale == 1
    x, generator = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).double(), torch.Generator().manual_seed(5)
    wanted = walk_scheduler(scheduler, x, torch.Generator().manual_seed(5), timesteps, **options)
    assert gap(walk_table(table, x, Increments(scheduler, table, timesteps, x, generator, options)), wanted) < SAME
    assert table.mismatch < ROUNDING
    whole = scheduler_of(case)[0]
    every = probe(whole, None, options)
    nodes = slice(begin, begin + table.steps)
    # A multistep sampler starts with a lower order, but at the same levels.
    torch.testing.assert_close(table.sigma[:-1], every.sigma[nodes], rtol=1e-9, atol=0)


class Recorder(TorchFunctionMode):
    """Keeps what torch.randn returns."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.draws.append(found.double().clone())
        return found


STOCHASTIC = ["ddim, noise", "ddpm", "euler ancestral", "flow euler, stochastic", "sde-dpm++ 2", "lcm", "tcd, noise"]


@pytest.mark.parametrize("case", [*STOCHASTIC, "kdpm2 ancestral", "sa-solver", "consistency model"])
def test_noises_are_the_generators_own_standard_draws(case: str) -> None:
    # So c is the exact deviation, and the draws of a sampler that uses one twice (SA-Solver) are kept apart.
    scheduler, options = scheduler_of(case)
    table = probe(scheduler, None, options)
    noise = Increments(scheduler, table, None, start_of(scheduler), torch.Generator().manual_seed(5), options)
    compared = 0
    for i in range(table.steps):
        with Recorder() as recorder:
            z = noise.draw(0, range(i, i + 1))[0]
        if table.c[i] > 0:
            compared += 1
            # Noises are kept in float32; those of flow matching and of a step near the end are rounded beside larger ones.
            torch.testing.assert_close(z.double(), recorder.draws[-1], rtol=0, atol=1e-5)
    assert compared >= table.steps // 3


def test_increments_of_deterministic_chains_draw_nothing() -> None:
    scheduler, _ = scheduler_of("dpm++ 2")
    table, generator = probe(scheduler), torch.Generator().manual_seed(5)
    before = generator.get_state()
    noise = Increments(scheduler, table, None, start_of(scheduler), generator)
    drawn: Tensor = noise.draw(0, range(3, 6))
    noise.finish()
    assert not drawn.any()
    assert drawn.shape == (3, *SHAPE)
    assert torch.equal(generator.get_state(), before)
