# SPDX-License-Identifier: Apache-2.0
"""Probing: what a table read off a scheduler is, keeps and refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import deprecated
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from problems import chain
from scheduler_loops import SHAPE, gap, start_of, walk_scheduler, walk_table
from torch import Tensor

from paradiff import Keyed, parasolver, sample
from paradiff.chain import Clip
from paradiff.chain.slope import freeze_clean_data
from paradiff.errors import Unsupported
from paradiff.models.exact import Empirical, Mixture, digits
from paradiff.models.pixel import SCHEDULERS, table_of
from paradiff.samplers import ddim, flow_euler
from paradiff.samplers.schedule import Schedule
from paradiff.samplers.scheduler.probe import Increments, from_scheduler, probe

# diffusers 0.42 hands tensors to numpy 2, which complains.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn.t accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def ready(kind: str, steps: int = 10, **config: Any) -> Any:
    scheduler = getattr(diffusers, kind + "Scheduler")(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def ddim_of(steps: int = 10, **config: Any) -> Any:
    return ready("DDIM", steps, **{"clip_sample": False, **config})


class OneMemory(diffusers.DDIMScheduler):
    """Returns the same memory at every step, of the dtype of the states."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        state = super().step(model_output, timestep, sample).prev_sample
        self._memory = getattr(self, "_memory", {})
        kept = self._memory.setdefault((state.shape, state.dtype), torch.empty_like(state)).copy_(state)
        return DDIMSchedulerOutput(prev_sample=kept) if return_dict else (kept,)


def test_a_scheduler_that_returns_one_memory_has_its_own_table() -> None:
    scheduler = OneMemory(clip_sample=False)
    scheduler.set_timesteps(10)
    found, plain = from_scheduler(scheduler), from_scheduler(ddim_of())
    for name in ("a", "b", "c", "t"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name


# -- closed forms ------------------------------------------------------------------------------------------------------

FORMS = [
    ("ddim", 50, {"clip_sample": False}),
    ("ddim", 50, {"clip_sample": True}),
    ("ddpm", 1000, {"clip_sample": False}),
    ("ddpm", 50, {"thresholding": True, "sample_max_value": 1.5}),
    ("ddpm", 50, {"clip_sample": False, "variance_type": "fixed_large"}),
    ("euler", 50, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("euler_ancestral", 50, {}),
    ("heun", 20, {"clip_sample": True}),
    ("dpmpp_2m", 50, {}),
]


@pytest.mark.parametrize(("sampler", "steps", "config"), FORMS)
def test_probed_tables_are_the_formulas(sampler: str, steps: int, config: dict[str, Any]) -> None:
    scheduler = SCHEDULERS[sampler](**config)
    scheduler.set_timesteps(steps)
    found, wanted = from_scheduler(scheduler), table_of(scheduler.config, sampler, steps)
    # The scheduler's own rounding. Its squared levels s are float32 numbers just below 1, which round by 3e-8. At t = 1 of 1000
    # steps, which leads from s to s', the variance 1 - s / s' is 1.2e-4: the roundings of s, s' and the quotient are 7.5e-4 of
    # it, and that of 1 - s = 2.2e-4, whose root divides it, is 7e-5. Of 50 steps the least such variance is fifty times that.
    rounding = 8.2e-4 if steps == 1000 else 2e-5
    assert (found.prediction, found.steps, found.band) == (wanted.prediction, wanted.steps, wanted.band)
    for name in ("t", "alpha", "sigma", "a", "b", "c", "scale", "p", "q"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(mine, theirs, rtol=2e-4 if name == "t" else rounding, atol=3e-6 * float(theirs.abs().max()))
    assert found.start_scale == pytest.approx(wanted.start_scale, rel=1e-6)
    assert found.clip == wanted.clip
    if wanted.clip_weight is not None:
        assert found.clip_weight is not None
        torch.testing.assert_close(found.clip_weight, wanted.clip_weight, rtol=rounding, atol=0)
    assert found.exact_variance == wanted.exact_variance


def test_flow_matching_is_the_formula() -> None:
    found, wanted = from_scheduler(ready("FlowMatchEulerDiscrete", 20, shift=3.0)), flow_euler(20, shift=3.0)
    for name in ("t", "alpha", "sigma", "a", "b", "c", "scale", "p", "q"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_clipped_chain_is_solved_in_a_fraction_of_its_steps() -> None:
    # DDIM as pixel pipelines run it, and a network trained on data that leave the range.
    scheduler = ready("DDIM", 50)
    denoiser = Empirical(1.3 * digits().data).denoiser(ddim(Schedule.linear(), 50))
    table = from_scheduler(scheduler)
    assert table.clip == Clip(1.0)
    noise = Keyed((1, 8, 8), 3)
    x = noise.start(0)[None].double()
    reached = 0.0
    for t in scheduler.timesteps:
        m = denoiser(x, t[None])
        stepped = scheduler.step(m, t, x)
        reached = max(reached, float(stepped.pred_original_sample.abs().max()))
        x = stepped.prev_sample
    assert reached == 1  # the limit was met
    found = sample(denoiser, table, noise, parasolver(slope=freeze_clean_data, tolerance=1e-4), dtype=torch.float64)
    assert found.rounds < 20
    # The tolerance is a root mean square, by estimate.
    assert float((found.sample - x).square().mean().sqrt()) < 1e-4


@pytest.mark.parametrize("kind", ["DDPM", "DPMSolverMultistep"])
def test_each_sample_of_a_loop_state_is_limited_by_itself(kind: str) -> None:
    scheduler = ready(kind, 10, thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=5.0)
    table, x = probe(scheduler), start_of(scheduler)
    x[1] *= 4  # another quantile
    generator = torch.Generator().manual_seed(2)
    wanted = walk_scheduler(scheduler, x, torch.Generator().manual_seed(2))
    assert gap(walk_table(table, x, Increments(scheduler, table, None, x, generator)), wanted) < 1e-6
    alone = from_scheduler(scheduler)  # one sample a row
    nodes, states = slice(0, 2), torch.stack([x, -x])
    merged = table.convert(nodes, states, states)
    for k in range(len(x)):
        torch.testing.assert_close(merged[:, k], alone.convert(nodes, states[:, k], states[:, k]), rtol=1e-12, atol=0)


def test_a_limit_that_leaves_the_last_step_no_room_is_refused() -> None:
    # The last step begins and ends at time 0, so that a raw epsilon has no weight there, but the limited estimate has one.
    with pytest.raises(
        Unsupported, match=r"in step 9 \(time 0\), where the network's output has no weight.* clip_sample=False"
    ):
        probe(ready("DDIM", 10, set_alpha_to_one=False))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ScoreSdeVeScheduler", "has no step of .* but step_correct, step_pred"),
        ("ScoreSdeVpScheduler", "has no step of .* but step_pred"),
        ("KarrasVeScheduler", r"takes \(model_output, sigma_hat, sigma_prev, sample_hat\)"),
        ("RePaintScheduler", r"takes \(model_output, timestep, sample, original_image, mask\)"),
        ("CogVideoXDPMScheduler", r"takes \(model_output, old_pred_original_sample, timestep, timestep_back"),
    ],
)
def test_a_scheduler_with_another_step_is_refused_by_what_it_takes(kind: str, reason: str) -> None:
    scheduler = getattr(deprecated, kind, None) or getattr(diffusers, kind)
    scheduler = scheduler()
    scheduler.set_timesteps(6)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(6)
    with pytest.raises(Unsupported, match=f"{kind}.*{reason}"):
        probe(scheduler)


def test_a_limit_of_a_state_that_the_output_does_not_enter_is_refused() -> None:
    with pytest.raises(
        Unsupported, match=r"in step 0 \(time 0\), where the network's output has no weight.* clip_sample=False"
    ):
        probe(ready("DDIMInverse", 10, clip_sample=True))
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[39, 12, 0])
    with pytest.raises(Unsupported, match=r"in step 2 .*, where the network's output has no weight.* clip_denoised=False"):
        probe(scheduler)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["one", "list", "global"])
def test_draws_are_those_of_the_sequential_call_whoever_makes_them(kind: str, dtype: torch.dtype) -> None:
    def generators() -> Any:
        if kind == "global":
            torch.manual_seed(11)
            return None
        if kind == "list":
            return [torch.Generator().manual_seed(s) for s in (4, 9)]
        return torch.Generator().manual_seed(4)

    def state(generator: Any) -> Tensor:
        if generator is None:
            return torch.get_rng_state()
        return torch.cat([g.get_state() for g in (generator if isinstance(generator, list) else [generator])])

    scheduler = ready("EulerAncestralDiscrete", 6)
    table, x, theirs = probe(scheduler), start_of(scheduler, dtype), generators()
    wanted = walk_scheduler(scheduler, x, theirs)
    end, ours = state(theirs), generators()
    noise = Increments(scheduler, table, None, x, ours)
    assert (noise.samples, noise.shape) == (1, SHAPE)
    assert noise.start(0) is x
    later = noise.draw(0, range(2, 5))
    assert later.dtype == torch.float32
    if dtype != torch.bfloat16:  # whose own loop is off by 1e-2
        assert gap(walk_table(table, x, noise), wanted) < 2e-6
    torch.testing.assert_close(noise.draw(0, range(2, 5)), later, rtol=0, atol=0)
    noise.finish()
    assert torch.equal(state(ours), end)


def test_draws_are_lazy_and_end_with_the_chain() -> None:
    scheduler, generator = ready("DDPM", 6, clip_sample=False), torch.Generator().manual_seed(1)
    table = probe(scheduler)
    before = generator.get_state()
    noise = Increments(scheduler, table, None, start_of(scheduler), generator)
    assert torch.equal(generator.get_state(), before)
    noise.draw(0, range(2))
    other = torch.Generator().manual_seed(1)
    for _ in range(2):
        torch.randn(SHAPE, generator=other, dtype=torch.float64)
    assert torch.equal(generator.get_state(), other.get_state())
    with pytest.raises(ValueError, match="draws none after its last one"):
        noise.draw(0, range(5, 7))


def test_a_sampler_that_uses_its_draws_twice_has_independent_noises() -> None:
    # SA-Solver's corrector takes the last step's draw again. With white noise of its own making the table must give the law of
    # the scheduler: for a linear network the final variance is known from many runs of the scheduler.
    scheduler = ready("SASolver", 12)
    table, shape = from_scheduler(scheduler), (64, 4, 16, 16)
    x = torch.zeros(shape, dtype=torch.float64)
    theirs = walk_linear(scheduler, x, torch.Generator().manual_seed(0)).std()
    noise = Keyed(shape, 5)
    ours = chain(lambda y, t: 0.5 * y, table, noise, start=x)[-1].std()
    assert float(ours / theirs) == pytest.approx(1, abs=0.02)  # 65536 values each: 4e-3 a deviation of the ratio


def walk_linear(scheduler: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    own = copy.deepcopy(scheduler)
    for t in own.timesteps:
        x = own.step(0.5 * x, t, x, generator=generator, return_dict=False)[0]
    return x


# -- a smooth dense chain in parallel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["UniPCMultistep", "SASolver"])
def test_a_dense_chain_is_solved_in_fewer_rounds_than_steps(kind: str) -> None:
    scheduler = ready(kind, 30)
    table = from_scheduler(scheduler)
    assert table.band >= (table.steps - 1 if kind == "UniPCMultistep" else 5)
    lumps = Mixture(torch.tensor([0.6, 0.4]), torch.tensor([[0.7, -0.5, 0.2], [-0.3, 0.6, 0.1]]), torch.tensor([0.1, 0.05]))
    denoiser, noise = lumps.denoiser(table), Keyed((3,), 1, 4)
    wanted = torch.stack([chain(denoiser, table, noise, k)[-1] for k in range(4)])
    found = sample(denoiser, table, noise, parasolver(slope=freeze_clean_data, tolerance=1e-3), dtype=torch.float64)
    assert found.rounds < 20
    assert float((found.sample - wanted).abs().max()) < 5e-3


# -- the cache and the scheduler given -----------------------------------------------------------------------------------


def test_the_same_question_has_the_same_answer() -> None:
    first = from_scheduler(ddim_of())
    assert from_scheduler(ddim_of()) is first
    scheduler = ddim_of()
    assert probe(scheduler, scheduler.timesteps, {"generator": torch.Generator()}) is probe(ddim_of())
    changed = ddim_of()
    changed.alphas_cumprod = changed.alphas_cumprod**1.1
    others = [
        from_scheduler(ddim_of(11)),
        from_scheduler(ddim_of(prediction_type="v_prediction")),
        from_scheduler(ddim_of(), eta=0.5),
        from_scheduler(ddim_of(), scheduler.timesteps[2:]),
        from_scheduler(changed),
        from_scheduler(ready("DDPM", clip_sample=False)),
        from_scheduler(ready("DDIM")),
    ]
    every = [first, *others]
    for k, table in enumerate(every):
        for other in every[k + 1 :]:
            assert not (table.b.equal(other.b) and table.c.equal(other.c) and table.clip == other.clip)


def test_where_a_loop_begins_is_part_of_the_question() -> None:
    # The times are the same: the scheduler goes by the index that it was told.
    tables = []
    for begin in (0, 2):
        scheduler = ready("DPMSolverMultistep", 10)
        scheduler.set_begin_index(begin)
        tables.append(probe(scheduler, scheduler.timesteps[:8]))
    assert not tables[0].a.equal(tables[1].a)


@pytest.mark.parametrize("kind", ["PNDM", "UniPCMultistep", "EulerDiscrete", "KDPM2Discrete"])
def test_the_scheduler_given_and_the_global_generator_are_left_alone(kind: str) -> None:
    scheduler, state = ready(kind, 7), torch.get_rng_state()
    before = copy.deepcopy(vars(scheduler))
    probe(scheduler)
    for name, value in before.items():
        if isinstance(now := vars(scheduler)[name], Tensor):
            torch.testing.assert_close(now, value, rtol=0, atol=0, equal_nan=True)  # KDPM2 has a NaN among its levels
        else:
            assert str(value) == str(now), name
    assert torch.equal(torch.get_rng_state(), state)


def test_probing_inside_inference_mode_gives_ordinary_tensors() -> None:
    with torch.inference_mode():
        scheduler = ready("DPMSolverMultistep", 9)
        table = probe(scheduler)
        Increments(scheduler, table, None, start_of(scheduler)).draw(0, range(2))
    assert not table.a.is_inference()


# -- refusals ------------------------------------------------------------------------------------------------------------


class Bent(diffusers.DDIMScheduler):
    """A step that is nonlinear by one part in ten thousand."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (found + 1e-4 * torch.tanh(sample),)


class Clamped(diffusers.DDIMScheduler):
    """A step that reads its parent's result by a field."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found: Any = super().step(model_output, timestep, sample, return_dict=return_dict)
        found.prev_sample = found.prev_sample.clamp(-1, 1)
        return found


class Dicing(diffusers.DDIMScheduler):
    """A step whose noise is of another kind."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (super().step(model_output, timestep, sample, return_dict=False)[0] + torch.rand_like(sample) - 0.5,)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("BlockRefinementScheduler", "its states are tokens"),
        ("DiscreteDDIMScheduler", "its states are tokens"),
        ("EntropyBoundScheduler", "its states are tokens"),
        ("HeliosScheduler", "its levels are those of one stage of several"),
        ("PiflowScheduler", "its network predicts n_grid outputs for one state"),
        ("DDPMWuerstchenScheduler", r"no step at the last of these 7 times, 0, which ends its chain: .* timesteps\[:-1\]"),
    ],
)
def test_a_scheduler_without_a_chain_of_its_own_is_refused_by_its_reason(kind: str, reason: str) -> None:
    if not hasattr(diffusers, kind):
        pytest.skip("a scheduler of the newest diffusers")
    scheduler = getattr(diffusers, kind)()
    with contextlib.suppress(KeyError):  # of a stage that is not named
        scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match=reason) as refused:
        from_scheduler(scheduler)
    assert "raised" not in str(refused.value)


def test_a_last_time_without_a_step_is_left_out() -> None:
    scheduler = diffusers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(6)
    assert from_scheduler(scheduler, scheduler.timesteps[:-1]).steps == 6


class Broken(diffusers.DDIMScheduler):
    """A step that fails."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("no such thing")


def set_up(scheduler: Any, steps: int = 5) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


REFUSED: dict[str, tuple[Callable[[], Any], Tensor | None, dict[str, Any], str]] = {
    "nonlinear": (lambda: set_up(Bent(clip_sample=False)), None, {}, "Bent.step is not linear in the state"),
    "by a field": (lambda: set_up(Clamped(clip_sample=False)), None, {}, "Clamped.step is not linear in the state"),
    "other noise": (lambda: set_up(Dicing(clip_sample=False)), None, {}, r"noise that is not drawn with torch\.randn"),
    "failing": (lambda: set_up(Broken()), None, {}, "step 0 raised RuntimeError: no such thing"),
    "not set": (lambda: diffusers.DDIMScheduler(), None, {}, "no timesteps yet: call its set_timesteps"),
    "not set, flow": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), None, {}, "no timesteps yet"),
    "other arguments": (lambda: ready("CogVideoXDPM"), None, {}, "only steps of .model_output, timestep, sample."),
    "SCM": (lambda: ready("SCM", 2), None, {}, "keep the second result of step"),
    "learned variance": (lambda: ready("DDPM", variance_type="learned_range"), None, {}, "variance_type = 'learned_range'"),
    "other times": (ddim_of, torch.tensor([900, 850]), {}, "2 timesteps are no stretch of the 10"),
    "no times": (ddim_of, torch.empty(0, dtype=torch.long), {}, "0 timesteps are no stretch"),
    "given noise": (ddim_of, None, {"variance_noise": torch.zeros(1)}, "hands 'variance_noise', a tensor"),
    "pure noise, epsilon": (
        lambda: ddim_of(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        None,
        {},
        "coefficients that are not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_table_is_refused_in_a_sentence(case: str) -> None:
    make, timesteps, options, sentence = REFUSED[case]
    scheduler = make()
    with pytest.raises(Unsupported, match=sentence):
        probe(scheduler, timesteps, options)
    with pytest.raises(ValueError, match=sentence):
        from_scheduler(scheduler, timesteps, **options)


# -- what a table says of its levels -------------------------------------------------------------------------------------


def test_a_table_says_how_far_its_levels_can_be_trusted() -> None:
    exact = from_scheduler(ddim_of())
    rounded = from_scheduler(ready("LCM", 4))
    guide = from_scheduler(ready("IPNDM"))
    assert exact.exact_levels
    assert exact.about_levels == "levels and coefficients agree"
    assert "within rounding" in rounded.about_levels
    assert "in part" in guide.about_levels
    with pytest.raises(ValueError, match="leaves its ray"):
        dataclasses.replace(guide, exact_levels=True)
    # p and q of their own are used, and must be of the table's size.
    edm = from_scheduler(ready("EDMEuler"))
    assert edm.clean is not None
    torch.testing.assert_close(edm.p, 0.25 / (edm.sigma[:-1] ** 2 + 0.25), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"clean has shape \(3, 2\)"):
        dataclasses.replace(edm, clean=edm.clean[:3])


def test_from_scheduler_begins_where_the_scheduler_does() -> None:
    scheduler = ready("EulerDiscrete")
    assert from_scheduler(scheduler).start_scale == pytest.approx(float(scheduler.init_noise_sigma))
    assert probe(scheduler).start_scale == 1  # a loop brings its own start


@pytest.mark.parametrize("scheduler", ["abc", None, 5, torch.nn.Identity()])
def test_what_is_no_scheduler_is_refused(scheduler: Any) -> None:
    with pytest.raises(
        ValueError, match=r"the scheduler is .*; it must be a diffusers scheduler whose set_timesteps was called$"
    ):
        from_scheduler(scheduler)


def test_a_table_needs_no_scheduler() -> None:
    with pytest.raises(ValueError, match=r"the scheduler is Table 'ddim'.*: use the table as it is$"):
        from_scheduler(ddim(Schedule.linear(), 5))


@pytest.mark.parametrize("timesteps", [5, "all", [999, 0]])
def test_what_are_no_timesteps_is_refused(timesteps: Any) -> None:
    with pytest.raises(
        ValueError, match=r"timesteps is .*; it must be a Tensor, a stretch of the scheduler's own, or None for all"
    ):
        from_scheduler(ready("DDIM"), timesteps)


def test_a_step_that_takes_a_time_for_each_sample_is_probed_with_one() -> None:
    scheduler: Any = diffusers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(8)
    times = scheduler.timesteps[:-1]
    table = probe(scheduler, times)
    assert (table.steps, table.band, table.stochastic) == (8, 1, True)
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = Increments(scheduler, table, times, x, torch.Generator().manual_seed(5)).draw(0, range(8))
    generator, own, ours = torch.Generator().manual_seed(5), x, x
    for i, t in enumerate(times):
        m = torch.sin(own)
        ours = table.a[i, 0] * ours + table.b[i, 0] * torch.sin(ours) + table.c[i] * noise[i]
        own = scheduler.step(m, t.expand(3), own, generator=generator).prev_sample
    # The scheduler's levels are float32, and the increments are drawn in float32.
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
