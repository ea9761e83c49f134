# SPDX-License-Identifier: Apache-2.0
"""`Recorded` noise beside a table that was read off a scheduler: the draws are those of the scheduler's own loop."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import diffusers
import pytest
import torch
from scheduler_loops import network
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paradiff import Keyed, Recorded, Table, from_scheduler, parasolver, sample, sequential, srds
from paradiff.chain.draws import Draws
from paradiff.chain.noise import RecordedAlong

pytestmark = [  # what diffusers 0.42 and torchsde say of themselves
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn.t accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]

SHAPE = (2, 3)
SDE = {"algorithm_type": "sde-dpmsolver++"}

# name: class, steps, options of step, options of the class, whether draws are one a step
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], bool]] = {
    "ddim": ("DDIM", 12, {"eta": 0.7}, {"clip_sample": False}, True),
    "ddim, parallel": ("DDIMParallel", 12, {"eta": 1.0}, {"clip_sample": False}, True),
    "ddpm": ("DDPM", 12, {}, {"clip_sample": False}, True),
    "ddpm, large variance, clipped": ("DDPM", 12, {}, {"variance_type": "fixed_large"}, True),
    "ddpm, parallel": ("DDPMParallel", 12, {}, {"clip_sample": False}, True),
    "euler, churn": ("EulerDiscrete", 12, {"s_churn": 3.0}, {}, True),
    "euler, churn within limits": ("EulerDiscrete", 12, {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 5.0}, {}, False),
    "euler, churn with less noise": ("EulerDiscrete", 12, {"s_churn": 2.0, "s_noise": 0.9, "s_tmax": 8.0}, {}, False),
    "euler, churn, karras": ("EulerDiscrete", 12, {"s_churn": 1.0, "s_tmin": 0.1}, {"use_karras_sigmas": True}, True),
    "euler ancestral": ("EulerAncestralDiscrete", 12, {}, {}, True),
    "kdpm2 ancestral": ("KDPM2AncestralDiscrete", 12, {}, {}, False),
    "kdpm2 ancestral, karras": ("KDPM2AncestralDiscrete", 7, {}, {"use_karras_sigmas": True}, False),
    "sde-dpm++ 1": ("DPMSolverMultistep", 12, {}, {"solver_order": 1, **SDE}, True),
    "sde-dpm++ 2": ("DPMSolverMultistep", 12, {}, SDE, True),
    "sde-dpm++ 2, single step": ("DPMSolverSinglestep", 12, {}, SDE, True),
    "edm euler": ("EDMEuler", 12, {"s_churn": 4.0}, {}, True),
    "edm euler, within limits": ("EDMEuler", 12, {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 20.0}, {}, False),
    "edm sde-dpm++": ("EDMDPMSolverMultistep", 12, {}, SDE, True),
    "sa-solver": ("SASolver", 12, {}, {}, True),
    "sa-solver, orders 3 and 2": ("SASolver", 12, {}, {"predictor_order": 3, "corrector_order": 2}, True),
    "lcm": ("LCM", 6, {}, {"clip_sample": False}, True),
    "tcd": ("TCD", 6, {"eta": 0.6}, {}, True),
    "consistency model": ("CMStochasticIterative", 6, {}, {}, True),
    "flow lcm": ("FlowMatchLCM", 6, {}, {}, True),
    "flow euler, stochastic": ("FlowMatchEulerDiscrete", 12, {}, {"stochastic_sampling": True}, True),
    "flow heun, churn": ("FlowMatchHeunDiscrete", 8, {"s_churn": 2.0}, {}, True),
    "unclip": ("UnCLIP", 12, {}, {}, True),
    "ltx ancestral": ("LTXEulerAncestralRF", 12, {}, {}, True),
}


def ready(case: str) -> tuple[Any, dict[str, Any]]:
    kind, steps, options, config, _ = CASES[case]
    if not hasattr(diffusers, kind + "Scheduler"):
        pytest.skip(f"this diffusers has no {kind}Scheduler")
    scheduler = getattr(diffusers, kind + "Scheduler")(**config)
    scheduler.set_timesteps(steps)
    return scheduler, options


def loop(scheduler: Any, generator: Any, samples: int, **options: Any) -> Tensor:
    """diffusers' own loop, on a copy; its generator ends where the loop leaves it."""
    own = copy.deepcopy(scheduler)
    several = isinstance(generator, list)
    draws = [torch.randn((1 if several else samples, *SHAPE, 1), generator=g) for g in (generator if several else [generator])]
    x = torch.cat(draws) * float(getattr(own, "init_noise_sigma", 1.0))
    if "generator" in inspect.signature(own.step).parameters:
        options["generator"] = generator
    for t in own.timesteps:
        seen = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        x = own.step(network(seen, t), t, x, return_dict=False, **options)[0]
    return x


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# Float32 on both sides; unCLIP divides by small levels.
SAME = 2e-5


@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("case", CASES)
def test_the_draws_are_those_of_the_schedulers_own_loop(case: str, kind: str) -> None:
    scheduler, options = ready(case)
    table = from_scheduler(scheduler, **options)

    def source() -> Any:
        each = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
        return each if kind == "each" else each[0]

    theirs = source()
    wanted = loop(scheduler, theirs, 2, **options)
    noise = Recorded((*SHAPE, 1), source(), None if kind == "each" else 2)
    methods = (sequential(), parasolver(3, tolerance=0)) if kind == "one" else (srds(3, iterations=3),)
    for method in methods:
        assert far(sample(network, table, noise, method).sample, wanted) < SAME
    assert (table.draws is None or table.draws.one_a_step) == CASES[case][4]
    if table.draws is not None:
        mine = source()
        for generator in [mine] if kind == "one" else mine:
            for _ in range(1 + sum(table.draws.counts)):
                torch.randn(2 if kind == "one" else 1, *SHAPE, 1, generator=generator)
        for one, other in zip([mine] if kind == "one" else mine, [theirs] if kind == "one" else theirs, strict=True):
            assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_steps_draw_in_the_dtype_of_the_schedulers_own_loop(case: str, dtype: torch.dtype) -> None:
    scheduler, options = ready(case)
    table = from_scheduler(scheduler, **options)
    known = table.draws is None or table.draws.source == "given"
    if not known or "generator" not in inspect.signature(scheduler.step).parameters:
        pytest.skip("its draws are not made with the generator that it is given")
    shape = (4, 6, 1)  # vectors of a processor hold as many numbers of one dtype as they do not of another
    theirs, drawn = torch.Generator().manual_seed(4), list[Tensor]()
    x = torch.randn((1, *shape), generator=theirs, dtype=dtype)

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **kwargs or {})
            if func in (torch.randn, torch.randn_like):
                drawn.append(found)
            return found

    with Watched():
        for t in copy.deepcopy(scheduler.timesteps):
            x = scheduler.step(0 * x, t, x, return_dict=False, generator=theirs, **options)[0].to(dtype)
    plain = Recorded(shape, torch.Generator().manual_seed(4), dtype=dtype)
    noise = plain.along(table.draws)
    mine = noise._recorded if isinstance(noise, RecordedAlong) else plain  # pyright: ignore[reportPrivateUsage]
    for k, wanted in enumerate(drawn):
        own = mine.draw(0, range(k, k + 1))
        assert own.dtype == wanted.dtype
        assert torch.equal(own, wanted)
    assert torch.equal(noise.start(0), plain.start(0))


@pytest.mark.parametrize("fault", ["one a step", "the draw before", "the other sign"])
def test_draws_that_enter_otherwise_are_seen(fault: str) -> None:
    scheduler, options = ready("kdpm2 ancestral")
    table = from_scheduler(scheduler, **options)
    assert table.draws is not None
    terms = {
        "one a step": None,
        "the draw before": tuple(tuple((max(k - 1, 0), w) for k, w in own) for own in table.draws.terms),
        "the other sign": tuple(tuple((k, -w) for k, w in own) for own in table.draws.terms),
    }[fault]
    draws = None if terms is None else dataclasses.replace(table.draws, terms=terms)
    noise = Recorded((*SHAPE, 1), torch.Generator().manual_seed(4))
    wanted = loop(scheduler, torch.Generator().manual_seed(4), 1, **options)
    assert far(sample(network, dataclasses.replace(table, draws=draws), noise, sequential()).sample, wanted) > 1e-2


@pytest.mark.parametrize("kind", ["DPMSolverSDE", "CosineDPMSolverMultistep"])
def test_a_brownian_tree_is_refused_by_name_and_has_noise_by_key(kind: str) -> None:
    pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, kind + "Scheduler")()
    scheduler.set_timesteps(8)
    table = from_scheduler(scheduler)
    with pytest.raises(ValueError, match=f"{kind}Scheduler draws its noise with generators of its own .* give Keyed noise"):
        sample(network, table, Recorded(SHAPE, torch.Generator()), sequential())
    keyed = [sample(network, table, Keyed(SHAPE), m).sample for m in (sequential(), parasolver(tolerance=0))]
    assert far(*keyed) < SAME


@pytest.mark.parametrize(("steps", "options"), [(16, {}), (12, {"use_karras_sigmas": True})])
def test_rounding_does_not_widen_the_band(steps: int, options: dict[str, Any]) -> None:
    pytest.importorskip("torchsde")
    scheduler = diffusers.DPMSolverSDEScheduler(**options)
    scheduler.set_timesteps(steps)
    assert from_scheduler(scheduler).band == 2


def test_torchs_own_generator_is_asked_for_by_name() -> None:
    table = from_scheduler(ready("kdpm2 ancestral")[0])
    assert table.draws is not None
    own = dataclasses.replace(table, draws=dataclasses.replace(table.draws, source="torch"))
    with pytest.raises(ValueError, match=r"draws its noise with torch's own generator, .* Recorded\(shape, torch.default_gen"):
        sample(network, own, Recorded((*SHAPE, 1), torch.Generator().manual_seed(4)), sequential())
    with torch.random.fork_rng():
        torch.manual_seed(4)
        noise = Recorded((*SHAPE, 1), torch.default_generator)
    given = Recorded((*SHAPE, 1), torch.Generator().manual_seed(4))
    found, wanted = (sample(network, *pair, sequential()).sample for pair in ((own, noise), (table, given)))
    assert torch.equal(found, wanted)


def test_draws_are_kept_by_copies_and_pickles_and_told_apart() -> None:
    table: Table = from_scheduler(ready("kdpm2 ancestral")[0])
    again = pickle.loads(pickle.dumps(table))
    assert again == table
    assert again.draws == table.draws
    assert dataclasses.replace(table, draws=None) != table
    with pytest.raises(ValueError, match=r"draws has 2 counts and 2 terms; with 23 steps it must have 23 of each"):
        dataclasses.replace(table, draws=Draws("", (1, 1), ((), ())))


def test_noise_by_key_does_not_depend_on_the_draws() -> None:
    table = from_scheduler(ready("kdpm2 ancestral")[0])
    plain = dataclasses.replace(table, draws=None)
    assert torch.equal(*(sample(network, one, Keyed(SHAPE), sequential()).sample for one in (table, plain)))


def test_a_scheduler_that_mixes_two_draws_in_a_step_keeps_both() -> None:
    root = 0.5**0.5
    draws = Draws("", (2, 0, 1), (((0, root), (1, -root)), (), ((2, 1.0),)))
    recorded = Recorded((4,), torch.Generator().manual_seed(0))
    d = recorded.draw(0, range(5))
    found = recorded.along(draws).draw(0, range(5))
    torch.testing.assert_close(found, torch.stack([root * (d[0] - d[1]), 0 * d[0], d[2], d[3], d[4]]))
