# SPDX-License-Identifier: Apache-2.0
"""`explain`: what it says is what a parallel call then does, and saying it leaves the pipeline untouched."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tiny import CASES
from tiny.case import deprecations
from tiny.stable import stable
from torch import Tensor, nn

from paradiff import explain, parallelize, parasolver, piadm_sde, quasi_newton, sequential, srds
from paradiff.samplers.scheduler.probe import probe

EXECUTORS = {"sd": "vector", "sd_controlnet": "lanes"}


@pytest.mark.parametrize(("name", "executor"), [("sd", "vector"), ("sd_ddpm", "vector"), ("ddim_clip", "vector")])
@pytest.mark.parametrize("steps", [1, 10, 25])
def test_the_table_is_that_of_the_schedulers_own_chain(name: str, executor: str, steps: int) -> None:
    pipe = CASES[name].make()
    found = explain(pipe, num_inference_steps=steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    assert found.table is probe(scheduler, scheduler.timesteps)
    assert found.table is not None
    assert (found.table.steps, found.table.band, found.table.stochastic) == (steps, 1, name == "sd_ddpm")
    assert torch.equal(found.table.t[:-1].long(), scheduler.timesteps)
    assert (found.executor, found.refused) == (executor, [])
    assert (found.pipeline, found.scheduler) == (type(pipe).__name__, type(scheduler).__name__)


def test_the_coefficients_are_those_of_the_formula() -> None:
    table = explain(CASES["ddim"].make(), num_inference_steps=20).table
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=2e-3)
    alphas = scheduler.alphas_cumprod.double()
    assert table is not None
    now = table.t[:-1].long()
    then = torch.cat([alphas[now[1:]], scheduler.final_alpha_cumprod.double()[None]])
    expected = (then / alphas[now]).sqrt()
    # Probing meets the scheduler's float32 schedule, whose roundings are 1e-7.
    assert (table.a[:, 0] - expected).abs().max() < 1e-6
    noise = (1 - then).sqrt() - expected * (1 - alphas[now]).sqrt()
    assert (table.b[:, 0] - noise).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["sd", "sd_dpmpp_2m", "flux", "ddim_clip", "sd_controlnet", "z_image", "lcm"])
def test_the_executor_and_the_chain_are_those_of_a_parallel_call(name: str) -> None:
    case = CASES[name]
    pipe, method = case.make(), parasolver(tolerance=1e-3)
    with deprecations():
        found = explain(pipe, method, num_inference_steps=10)
    with parallelize(pipe, method) as run:
        case.run(pipe)
    assert found.executor == run.report.executor
    assert name not in EXECUTORS or found.executor == EXECUTORS[name]
    assert found.table is not None
    assert found.table.steps == run.report.steps
    reads = [n for n in found.notes if n.startswith("the loop reads its step number, so each state gets a lane of its own: ")]
    assert len(reads) == (found.executor == "lanes")


@pytest.mark.parametrize(("name", "steps"), [("sd", 50), ("flux", 28), ("lcm", 4), ("ddim", 50)])
def test_steps_are_the_pipelines_own_default(name: str, steps: int) -> None:
    pipe = CASES[name].make()
    assert inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default == steps
    table = explain(pipe).table
    assert table is not None
    assert table.steps == steps


def test_a_pipeline_without_steps_of_its_own_needs_them() -> None:
    class Bare(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt: str, num_inference_steps: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise AssertionError

    pipe = CASES["sd"].make()
    pipe.__class__ = Bare
    with pytest.raises(ValueError, match="Bare has no number of steps of its own; give num_inference_steps"):
        explain(pipe)
    assert explain(pipe, num_inference_steps=5).table is not None


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (2000, "num_inference_steps is 2000, which the DDIMScheduler cannot make: .*cannot be larger"),
        (0, "num_inference_steps is 0; it must be a whole number of at least 1 step"),
        (-3, "num_inference_steps is -3; it must be"),
        (2.5, "num_inference_steps is 2.5; it must be"),
        ("10", "num_inference_steps is '10'; it must be"),
    ],
)
def test_steps_that_the_scheduler_cannot_make_are_named(steps: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        explain(CASES["sd"].make(), num_inference_steps=steps)


def test_options_of_the_step_are_honoured() -> None:
    pipe = CASES["sd"].make()
    plain, noisy = (explain(pipe, num_inference_steps=10, eta=eta).table for eta in (0.0, 1.0))
    assert plain is not None
    assert noisy is not None
    assert (plain.stochastic, noisy.stochastic) == (False, True)
    assert "stochastic" in str(explain(pipe, num_inference_steps=10, eta=1.0))
    unknown = explain(pipe, num_inference_steps=10, etta=1.0)
    assert unknown.table is None
    assert "unexpected keyword argument 'etta'" in unknown.refused[0]


def test_a_step_that_is_not_linear_is_refused() -> None:
    class Bent(diffusers.DDIMScheduler):
        """A step that bends the output."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:  # pyright: ignore
            return super().step(torch.sin(model_output), timestep, sample, **kwargs)

    pipe = CASES["sd"].make()
    pipe.scheduler = Bent.from_config(pipe.scheduler.config)
    found = explain(pipe)
    assert found.table is None
    assert found.expected is None
    assert found.executor == "sequential"
    assert len(found.refused) == 1
    assert "Bent" in found.refused[0]
    assert "not linear" in found.refused[0]
    text = str(found)
    assert text.startswith("StableDiffusionPipeline with Bent\nexecutor: sequential\nrefused: ")
    assert "chain:" not in text
    assert "pays" not in text


def test_a_network_that_keeps_a_cache_is_refused() -> None:
    pipe = CASES["flux"].make()
    assert explain(pipe).refused == []
    type(pipe.transformer).is_cache_enabled = property(lambda self: True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        found = explain(pipe)
    finally:
        del type(pipe.transformer).is_cache_enabled
    assert found.refused == ["transformer keeps a cache across steps, which needs them in order; disable it"]
    assert found.executor == "sequential"
    assert found.table is not None  # the chain itself is fine
    assert not any("pays" in note for note in found.notes)


def test_what_the_loops_source_forbids_is_refused() -> None:
    found = explain(stable(diffusers.StableDiffusionPanoramaPipeline))
    assert found.refused == ["its scheduler steps several times in a pass"]
    assert found.executor == "sequential"
    assert not any("pays" in note for note in found.notes)

    class Guided(diffusers.StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps: int = 7, latents: Any = None) -> Any:  # pyright: ignore
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                with torch.enable_grad():
                    output = self.unet(latents, t)[0]
                latents = self.scheduler.step(output, t, latents)[0]
            return latents

    pipe = CASES["sd"].make()
    pipe.__class__ = Guided
    found = explain(pipe)
    assert found.refused == ["its loop computes gradients: with torch.enable_grad():"]
    assert found.table is not None
    assert found.table.steps == 7


def test_a_loop_within_another_one_is_noted() -> None:
    found = explain(CASES["animatediff"].make())
    (note,) = [n for n in found.notes if n.startswith("the loop is within another one")]
    assert note.endswith("for free_init_iter in range(num_free_init_iters):")
    assert found.refused == []


def test_what_is_no_pipeline_is_named() -> None:
    pipe = CASES["sd"].make()
    pipe.scheduler = None
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline has no scheduler.*give it one"):
        explain(pipe)
    for other in ("a/model", torch.nn.Linear(2, 2), None):
        with pytest.raises(ValueError, match=f"was given a {type(other).__name__}; it takes a diffusers pipeline object"):
            explain(other)
    with pytest.raises(ValueError, match="method is a str; give one of paradiff's"):
        explain(CASES["sd"].make(), "parasolver")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (parasolver(11), "the window is 11; the chain has 10 sub-intervals: give at most that, or None for all"),
        (parasolver(stride=11), "the stride is 11 steps; the chain has 10"),
        (piadm_sde(2), "piadm_sde is for stochastic chains; table 'DDIMScheduler' is deterministic"),
        (srds(12), "12"),
    ],
)
def test_methods_that_do_not_fit_the_chain_are_named(method: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        explain(CASES["sd"].make(), method, num_inference_steps=10)


@pytest.mark.parametrize("method", [srds(), quasi_newton(), parasolver(8)], ids=["srds", "quasi_newton", "window"])
def test_any_method_is_tried_on_the_closed_form_problem(method: Any) -> None:
    found = explain(CASES["sd"].make(), method)
    assert found.expected is not None
    assert found.expected.rounds < 50
    assert f"{found.expected.rounds} rounds and {found.expected.evaluations} rows instead of 50 steps" in str(found)


def test_times_shifted_by_the_pictures_size_are_noted() -> None:
    found, plain = explain(CASES["flux"].make()), explain(CASES["sd3"].make())
    note = "the pipeline shifts its times by the picture's size; they were taken for a shift of mu = 1"
    assert note in found.notes
    assert note not in plain.notes
    assert found.table is not None
    # sigma = e / (e + 1/s - 1) for s in equal steps; undone, the steps differ by float32's roundings, which 1/s enlarges.
    sigma = found.table.sigma[:-1]
    unshifted = 1 / (1 + torch.e * (1 / sigma - 1))
    assert unshifted.diff().std() < 1e-5
    assert sigma.diff().std() > 1e-3


def test_a_window_of_one_will_not_pay_and_a_wide_one_may() -> None:
    pipe = CASES["sd"].make()
    for method in (sequential(), parasolver(1)):
        found = explain(pipe, method, num_inference_steps=20)
        assert "it will not pay: 20 rounds for 20 steps; the plain call is as fast" in found.notes
    found = explain(pipe, num_inference_steps=20)
    assert found.expected is not None
    (note,) = [n for n in found.notes if n.startswith("it pays where a network call on ")]
    assert f"costs less than {20 / found.expected.rounds:.1f} calls on one" in note
    assert "on a CPU it seldom does" in note


def test_a_limit_on_the_clean_data_is_part_of_the_chain() -> None:
    limited, plain = (explain(CASES[name].make(), num_inference_steps=20) for name in ("ddim_clip", "ddim"))
    assert limited.table is not None
    assert plain.table is not None
    assert limited.table.clip is not None
    assert plain.table.clip is None
    assert "linear in state and output but for a limit on the clean data, reads" in str(limited)
    assert "linear in state and output, reads one step back" in str(plain)
    assert limited.refused == []
    assert limited.expected is not None


def test_the_text_is_the_findings_line_by_line() -> None:
    found = explain(CASES["sd_controlnet"].make(), parasolver(8), num_inference_steps=20)
    assert found.expected is not None
    assert str(found).splitlines() == [
        "StableDiffusionControlNetPipeline with DDIMScheduler",
        "chain: 20 network calls, deterministic, linear in state and output, reads one step back",
        "executor: lanes",
        f"on a closed-form problem: {found.expected.rounds} rounds and {found.expected.evaluations} rows instead of 20 steps",
        *(f"note: {note}" for note in found.notes),
    ]
    assert len(found.notes) == 2
    assert "reads up to 5 steps back" in str(explain(CASES["sd_pndm"].make()))


def test_levels_that_do_not_agree_with_the_coefficients_are_noted() -> None:
    found = explain(CASES["lcm"].make())
    assert found.table is not None
    assert not found.table.exact_levels
    assert found.table.about_levels in found.notes


@pytest.mark.parametrize("name", ["sd", "sd_euler_ancestral", "sd_controlnet", "flux"])
def test_the_pipeline_is_left_untouched_and_no_network_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = CASES[name].make()
    kind, scheduler = type(pipe), pipe.scheduler
    with deprecations():
        if not scheduler.config.get("use_dynamic_shifting", False):
            scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    attributes = [set(vars(part)) for part in parts]
    drawn = torch.get_rng_state()

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} was called")

    monkeypatch.setattr(torch.nn.Module, "__call__", called)
    with deprecations():
        found = explain(pipe, num_inference_steps=10)
    assert found.table is not None
    assert (type(pipe), pipe.scheduler) == (kind, scheduler)
    assert vars(scheduler).keys() == before.keys()
    for key, value in vars(scheduler).items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else str(value) == str(before[key]), key
    assert [set(vars(part)) for part in parts] == attributes
    assert torch.equal(torch.get_rng_state(), drawn)


# -- networks that are timed -------------------------------------------------------------------------------------------------


class Slow(nn.Module):
    """A network whose call takes so many seconds, and so many more for each state beyond the first, by a clock of its own."""

    def __init__(self, clock: list[float], once: float, row: float) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.clock, self.once, self.row = clock, once, row

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.clock[0] += self.once + self.row * (len(x) - 1)
        return torch.tanh(self.layer(x) + t.reshape(-1, 1) / 1000 + text.mean((1, 2))[:, None])


class Timed(diffusers.DiffusionPipeline):
    """A pipeline with a text of its own length; with guidance a state has two rows."""

    def __init__(self, net: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)
        self.decoded = 0

    @torch.no_grad()
    def __call__(self, length: int, num_inference_steps: int = 20, guided: bool = False, generator: Any = None) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        rows = 2 if guided else 1
        x, text = torch.randn(1, 8, generator=generator), torch.ones(rows, length, 4)
        for t in self.scheduler.timesteps:
            m = self.net(torch.cat([x] * rows), t, text)
            x = self.scheduler.step(m[:1], t, x).prev_sample
        self.decoded += 1
        return x


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Any]:
    """A pipeline whose network takes so many seconds, and so many more for each row beyond the first."""
    clock = [0.0]
    monkeypatch.setattr("paradiff.pipelines.timing.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return lambda once, row: Timed(Slow(clock, once, row), diffusers.DDIMScheduler())


def test_networks_are_timed_with_the_conditioning_in_place(timed: Callable[[float, float], Any]) -> None:
    pipe, generator = timed(1.0, 0.1), torch.Generator().manual_seed(5)
    before = generator.get_state()
    found = explain(pipe, quasi_newton(window=8), call={"length": 1000, "guided": True, "generator": generator})
    (timing,) = found.timings
    assert (timing.network, timing.repeated) == ("Slow", 2 * 1000 * 4 * 4)
    assert {1, 2, 4, 8} <= set(timing.seconds)
    assert timing.seconds[4] == pytest.approx(1.7)  # eight rows
    assert "Slow: a call on one state takes 1.1e+03 ms, and 1.2 on 2, 1.5 on 4, " in str(found)
    assert "each further state repeats 0.0305 MiB of its inputs" in str(found)
    assert found.expected is not None
    (note,) = [note for note in found.notes if note.startswith("in the networks")]
    assert f"20 steps would take 22 s here, and {found.expected.rounds} rounds " in note
    assert pipe.decoded == 0  # the call was given up
    assert torch.equal(generator.get_state(), before)
    assert type(pipe) is Timed
    assert "forward" not in vars(pipe.net)


def test_a_text_that_is_one_row_in_memory_is_repeated_for_no_state(timed: Callable[[float, float], Any]) -> None:
    found = explain(timed(1.0, 0.1), call={"length": 1000}, num_inference_steps=12)
    assert [timing.repeated for timing in found.timings] == [0]
    assert "repeats" not in str(found)


def test_the_forecast_is_the_sum_over_the_rounds(timed: Callable[[float, float], Any]) -> None:
    """At a flat cost rounds count; at one in proportion to the rows a row as dear as a call pays nowhere."""
    flat = explain(timed(1.0, 0.0), quasi_newton(window=8), call={"length": 4})
    assert flat.expected is not None
    assert f"{len(flat.expected.history)} rounds {flat.expected.rounds:.3g} s" in " ".join(flat.notes)
    assert not any(note.startswith("it will not pay") for note in flat.notes)
    dear = explain(timed(1.0, 1.0), quasi_newton(window=8), call={"length": 4})
    assert dear.expected is not None
    assert f"{dear.expected.rounds} rounds {dear.expected.evaluations:.3g} s" in " ".join(dear.notes)
    assert dear.notes[-1].startswith("it will not pay on this device: no window makes the rounds cheaper than the steps")


def test_a_better_window_is_named(timed: Callable[[float, float], Any]) -> None:
    found = explain(timed(1.0, 0.3), quasi_newton(), num_inference_steps=50, call={"length": 4})
    (note,) = [note for note in found.notes if note.startswith("with a window of ")]
    best = int(note.split()[4])
    assert best in (2, 3, 4, 8, 16, 32)
    again = explain(timed(1.0, 0.3), quasi_newton(window=best), num_inference_steps=50, call={"length": 4})
    assert not any(note.startswith("with a window of ") for note in again.notes)


def test_a_call_without_a_parallel_form_is_not_timed(timed: Callable[[float, float], Any]) -> None:
    class Random(Slow):
        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return super().forward(x, t, text) + torch.randn(())

    pipe = Timed(Random([0.0], 1.0, 0.1), diffusers.DDIMScheduler())
    found = explain(pipe, call={"length": 4})
    assert found.timings == []
    assert any(note.startswith("the networks could not be timed with vector: ") for note in found.notes)
    assert any(note.startswith("it pays where") for note in found.notes)


def test_a_call_that_does_not_fit_raises_as_the_pipeline_does(timed: Callable[[float, float], Any]) -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'length'"):
        explain(timed(1.0, 0.1), call={"prompt": "a lighthouse"})
