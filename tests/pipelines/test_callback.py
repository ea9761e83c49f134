# SPDX-License-Identifier: Apache-2.0
"""`Callback`: told once a step, in order, of copies in the loop's dtype; what would steer the loop is refused by name."""

from __future__ import annotations

import contextlib
import re
import types
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary, Net
from diffusers.callbacks import SDCFGCutoffCallback
from tiny import CASES
from torch import Tensor

from paradiff import parallelize, parasolver
from paradiff.pipelines.loop.callback import Callback

TIMES = torch.tensor([900, 600, 300, 0])


def given(function: Any, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Callback, Any]:
    """The callback of a call with these arguments, ready to be told, and its pipeline."""
    pipeline = SimpleNamespace(_interrupt=False, _guidance_scale=7.5, parts=[])
    callback = Callback.of(pipeline, {"callback_on_step_end": function, "prompt": "a", **arguments})
    assert callback is not None
    callback.timesteps, callback.dtype = TIMES, dtype
    return callback, pipeline


def test_states_are_told_in_order_with_the_step_that_led_to_them() -> None:
    told: list[tuple[Any, int, int, Tensor]] = []
    callback, pipeline = given(lambda pipe, step, time, tensors: told.append((pipe, step, int(time), tensors["latents"])))
    states = torch.arange(8.0).view(4, 2)
    callback.on_final(1, states[:1])
    callback.on_final(2, states[1:])
    assert [(pipe is pipeline, step, time) for pipe, step, time, _ in told] == [
        (True, step, int(TIMES[step])) for step in range(4)
    ]
    assert torch.equal(torch.stack([latents for *_, latents in told]), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_are_told_in_the_loops_dtype_as_copies(dtype: torch.dtype) -> None:
    kept: list[Tensor] = []
    callback, _ = given(lambda pipe, step, time, tensors: kept.append(tensors["latents"]), dtype)
    states = torch.rand(2, 3)
    before = states.clone()
    callback.on_final(1, states)
    assert {latents.dtype for latents in kept} == {dtype}
    for latents in kept:
        latents.zero_()  # what is kept belongs to the callback
    assert torch.equal(states, before)


@pytest.mark.parametrize(
    "answer",
    [
        lambda tensors: None,
        lambda tensors: {},
        lambda tensors: tensors,
        lambda tensors: {"latents": tensors["latents"].clone()},
    ],
    ids=["None", "nothing", "the same", "a copy"],
)
def test_answers_that_change_nothing_are_welcome(answer: Any) -> None:
    def look(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
        pipe.seen = step  # a note of its own, which the loop does not know
        pipe.parts.append(step)
        return answer(tensors)

    callback, pipeline = given(look)
    callback.on_final(1, torch.rand(4, 2))
    assert (pipeline.seen, pipeline.parts) == (3, [0, 1, 2, 3])


class Counted(dict[str, Any]):
    """A dict that is no plain one."""


KEPT: dict[str, Any] = {}


@pytest.mark.parametrize(
    "answer",
    [
        lambda tensors: None,
        lambda tensors: [1],
        lambda tensors: SimpleNamespace(latents=tensors["latents"]),
        lambda tensors: types.MappingProxyType(tensors),
        lambda tensors: Counted(tensors),
        lambda tensors: KEPT,
    ],
    ids=["None", "a list", "an object", "a proxy", "another dict", "the same dict"],
)
def test_what_a_callback_returns_does_what_it_does_in_the_plain_call(answer: Any) -> None:
    """The loop takes its latents from it by `pop`."""

    def outcome(parallel: bool) -> tuple[Any, list[int]]:
        seen: list[int] = []

        def callback(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
            seen.append(step)
            return answer(tensors)

        pipe = CASES["sd"].make()
        with parallelize(pipe, parasolver(window=4)) if parallel else contextlib.nullcontext():
            try:
                found = CASES["sd"].run(pipe, 3, num_inference_steps=6, callback_on_step_end=callback)
            except Exception as error:
                return f"{type(error).__name__}: {error}", seen
        return found, seen

    (plain, once), (found, again) = outcome(False), outcome(True)
    assert again == once
    if isinstance(plain, str):
        assert found == plain
    else:
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-2)


class Own:
    """A loop of the user's own, which takes latents from what a callback returns where there is something."""

    def __init__(self) -> None:
        self.scheduler, self.net = diffusers.DDIMScheduler(clip_sample=False), Net()

    def walk(self, x: Tensor, callback_on_step_end: Any = None) -> Tensor:
        self.scheduler.set_timesteps(12)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(self.net(x, t), t, x)[0]
            if callback_on_step_end is not None:
                outputs = callback_on_step_end(self, i, t, {"latents": x})
                x = x if outputs is None else outputs.pop("latents", x)
        return x


@torch.no_grad()
def test_a_loop_that_may_take_latents_from_what_a_callback_returns_is_walked_plainly() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    plain = Own().walk(x, lambda *_: None)
    run = parallelize(Own(), parasolver(window=4))
    with pytest.warns(RuntimeWarning, match="callback_on_step_end returned None, from which the loop takes its latents"):
        found = run(x, callback_on_step_end=lambda *_: None)
    assert torch.equal(found, plain)


def replaces(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
    return {"latents": tensors["latents"] * (2 if step == 1 else 1)}


def edits(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
    tensors["latents"][0] += step == 1


def hands_back_more(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
    return tensors | ({"prompt_embeds": torch.zeros(1)} if step == 1 else {})


def stops(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
    pipe._interrupt = step == 1


def turns_guidance_off(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> Any:
    pipe._guidance_scale = 0.0 if step == 1 else pipe._guidance_scale
    return tensors


def test_a_callback_may_interrupt() -> None:
    callback, pipeline = given(stops)
    callback.on_final(1, torch.rand(2, 2))
    assert pipeline._interrupt


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (replaces, "the latents"),
        (edits, "the latents"),
        (hands_back_more, "prompt_embeds"),
        (turns_guidance_off, "pipe._guidance_scale"),
    ],
)
def test_callbacks_that_steer_are_refused_at_the_step_that_they_steer(function: Any, what: str) -> None:
    callback, _ = given(function)
    callback.on_final(1, torch.rand(1, 2))
    with pytest.raises(ValueError, match=f"callback_on_step_end changed {what} after step 1; .*leave the change out"):
        callback.on_final(2, torch.rand(3, 2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"callback": print}, "callback= was given, .*use callback_on_step_end=, or leave it out"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "timesteps"]},
            "callback_on_step_end asks for prompt_embeds, timesteps, with which it could change later steps",
        ),
        (
            {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)},
            "callback_on_step_end asks for prompt_embeds",
        ),
        (  # diffusers lets the callback's own inputs count
            {
                "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5),
                "callback_on_step_end_tensor_inputs": ["latents"],
            },
            "callback_on_step_end asks for prompt_embeds",
        ),
    ],
    ids=["old form", "more than latents", "inputs of its own", "inputs of its own beside the call's"],
)
def test_callbacks_that_cannot_be_honoured_are_refused_before_the_loop(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Callback.of(None, {"callback_on_step_end": print} | arguments)


def test_without_a_callback_there_is_none_and_the_loop_is_given_none() -> None:
    assert Callback.of(None, {"prompt": "a", "callback_on_step_end": None, "callback": None}) is None
    arguments = {"prompt": "a", "callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latents"]}
    assert Callback.without(arguments) == {"prompt": "a"}
    assert len(arguments) == 3


SETS = """
def loop(self, x, generator):
    self._scale, self.prompt = 1.0, torch.ones(8)
    for i, t in enumerate(self.scheduler.timesteps):
        if getattr(self, "_interrupt", False):
            continue
        v = self.net(x, t) * (1 - 0.01 * i) * self._scale + 0.01 * self.prompt
        x = self.scheduler.step(v, t, x)[0]
        if self.told is not None:
            x = self.told(self, i, t, {"latents": x}).pop("latents", x)
    return x

@torch.no_grad()
def __call__(self, generator=None, callback_on_step_end=None):
    self.told = callback_on_step_end
    self.scheduler.set_timesteps(STEPS)
    return self.loop(torch.randn(2, 8, generator=generator), generator)
"""


def called(callback: Any, executor: Any) -> tuple[Tensor, Any]:
    """The sample and the report of a call that sets attributes of a pipeline which has none of them before."""
    pipe = Adversary.of(SETS)(Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    call: Any = pipe if executor is None else parallelize(pipe, parasolver(tolerance=1e-5), executor=executor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = call(generator=torch.Generator().manual_seed(3), callback_on_step_end=callback)
    return sample, None if executor is None else call.report


def test_a_callback_reads_what_the_call_has_set() -> None:
    seen: list[Any] = []

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        seen.append((step, pipe._scale, float(pipe.prompt.sum())))
        return tensors

    plain, _ = called(callback, None)
    once = seen.copy()
    seen.clear()
    found, report = called(callback, "lanes")
    assert (seen, report.executor) == (once, "lanes")
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "_scale": lambda pipe: setattr(pipe, "_scale", 0.5),
    "prompt": lambda pipe: setattr(pipe, "prompt", 0.5 * pipe.prompt),
    "prompt, in place": lambda pipe: pipe.prompt.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_callback_that_changes_what_the_call_has_set_is_refused(change: str) -> None:
    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        if step == 8:
            CHANGES[change](pipe)
        return tensors

    name = change.partition(",")[0]
    with pytest.raises(ValueError, match=rf"changed pipe\.{name} after step 8; a parallel run"):
        called(callback, "lanes")


def test_a_callback_that_scales_an_adapter_is_refused_with_the_name_of_the_setting() -> None:
    from peft import LoraConfig

    pipe = CASES["sd"].make()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    name, layer = next((name, part) for name, part in pipe.unet.named_modules() if hasattr(part, "scaling"))
    before = dict(layer.scaling)

    def scale(*_: Any) -> dict[str, Any]:
        layer.scaling["default"] = 0.5
        return {}

    with (
        parallelize(pipe, parasolver(window=4)),
        pytest.raises(ValueError, match=re.escape(f"changed {type(pipe.unet).__name__}.{name}.scaling after step")),
    ):
        CASES["sd"].run(pipe, callback_on_step_end=scale)
    assert layer.scaling == before  # as the sentence asks for a call outside of the block, on the network as it was


def test_an_adapter_that_a_refused_callback_fuses_is_as_it_was() -> None:
    from peft import LoraConfig

    pipe = CASES["sd"].make()
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}

    def fuse(own: Any, *_: Any) -> dict[str, Any]:
        own.fuse_lora()
        return {}

    with parallelize(pipe, parasolver(window=4)), pytest.raises(ValueError, match="callback_on_step_end changed"):
        CASES["sd"].run(pipe, callback_on_step_end=fuse)
    after = pipe.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(getattr(part, "merged", False) for part in pipe.unet.modules())


def test_a_flag_that_is_asked_for_by_its_name_interrupts() -> None:
    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        pipe._interrupt = step == 8
        return tensors

    plain, _ = called(callback, None)
    found, report = called(callback, "lanes")
    assert report.executor == "lanes"
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_callback_is_shown_the_scheduler_of_the_plain_call_at_its_step(scheduler: str, executor: Any) -> None:
    seen: list[Any] = []

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        now = pipe.scheduler
        assert now.timesteps[step] == time
        levels = now.sigmas.tolist() if hasattr(now, "sigmas") else None
        seen.append((now.num_inference_steps, now.timesteps.tolist(), levels, getattr(now, "step_index", None)))
        return tensors

    def made(executor: Any) -> list[Any]:
        pipe = Adversary.of(READS)(Net(), getattr(diffusers, scheduler)())
        own = pipe.scheduler
        call: Any = pipe if executor is None else parallelize(pipe, parasolver(tolerance=1e-5), executor=executor)
        call(generator=torch.Generator().manual_seed(3), callback_on_step_end=callback)
        assert executor is None or call.report.executor == executor
        assert pipe.scheduler is own
        found = seen.copy()
        seen.clear()
        return found

    assert made(executor) == made(None)


DRAWING = """
def __call__(self, generator=None, callback_on_step_end=None):
    self.scheduler.set_timesteps(20)
    x = torch.randn(2, 8, generator=generator)
    for t in self.scheduler.timesteps:
        v = self.net(self.scheduler.scale_model_input(x, t), t)
        x = self.scheduler.step(v, t, x, generator=generator)[0]
        if callback_on_step_end is not None:
            callback_on_step_end(self, 0, t, {"latents": x})
    return x
def loop(self): ...
"""


def drawing(scheduler: Any, first: int, given: bool = True, own: bool = False) -> tuple[Any, Any, Any]:
    """The plain sample and the parallel one of a call whose callback draws from a step on; and what the callback drew."""
    drawn: list[list[Tensor]] = [[], []]
    found: list[Any] = []
    for parallel in (False, True):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(3) if given else None
        from_ = torch.Generator().manual_seed(5) if own else generator

        def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
            if time <= pipe.scheduler.timesteps[first]:
                drawn[parallel].append(torch.randn(3, generator=from_))  # noqa: B023
            return tensors

        pipe = Adversary.of(DRAWING)(Net(), scheduler())
        call = parallelize(pipe, parasolver(tolerance=1e-5), executor="vector") if parallel else pipe
        with torch.no_grad():
            found.append(call(generator=generator, callback_on_step_end=callback))
        found.append(torch.get_rng_state() if generator is None else generator.get_state())
    return found[::2], found[1::2], drawn


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("first", [0, 9, 17])
def test_a_callback_that_draws_what_later_noises_are_made_of_is_refused(first: int, given: bool) -> None:
    with pytest.raises(ValueError, match=f"drew from the call's generator after step {first}, .*a generator of its own"):
        drawing(diffusers.EulerAncestralDiscreteScheduler, first, given)


CASES_OF_DRAWS: dict[str, tuple[Any, int, bool]] = {
    "after the last noise": (diffusers.EulerAncestralDiscreteScheduler, 19, False),
    "on a chain without noise": (lambda: diffusers.DDIMScheduler(clip_sample=False), 0, False),
    "from a generator of its own": (diffusers.EulerAncestralDiscreteScheduler, 0, True),
}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES_OF_DRAWS)
def test_other_draws_of_a_callback_are_those_of_the_plain_call(case: str, given: bool) -> None:
    scheduler, first, own = CASES_OF_DRAWS[case]
    (plain, found), (ended, ends), (before, now) = drawing(scheduler, first, given, own)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)
    assert torch.equal(ends, ended)
    assert before
    assert all(map(torch.equal, before, now))
    assert len(before) == len(now)


READS = SETS.replace(" * (1 - 0.01 * i) * self._scale + 0.01 * self.prompt", "").replace("self.told", "callback_on_step_end")
READS = READS.replace("x, generator):", "x, generator, callback_on_step_end=None):").replace(
    "generator), generator)", "generator), generator, callback_on_step_end)"
)
"""The same without step numbers, for both executors."""

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "sigmas": lambda scheduler: scheduler.sigmas[20].mul_(0.9),
    "timesteps": lambda scheduler: setattr(scheduler, "timesteps", 0.5 * scheduler.timesteps),
    "config": lambda scheduler: scheduler.register_to_config(shift=1.0),
}


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("change", SCHEDULERS)
def test_a_callback_that_changes_the_scheduler_is_refused(change: str, executor: Any) -> None:
    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        if step == 18:
            SCHEDULERS[change](pipe.scheduler)
        return tensors

    pipe = Adversary.of(READS)(Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    call = parallelize(pipe, parasolver(tolerance=1e-5), executor=executor)
    with pytest.raises(ValueError, match=rf"changed pipe\.scheduler\.{change} after step 18; a parallel run"):
        call(generator=torch.Generator().manual_seed(3), callback_on_step_end=callback)


@pytest.mark.parametrize("name", ["sd", "sd_controlnet", "flux"])
def test_it_is_called_in_the_modes_of_the_loop(name: str) -> None:
    """So that it may take gradients, and what it makes is no inference tensor, which could not be trained."""
    case = CASES[name]
    steps = {"num_inference_steps": 6, "output_type": "latent"}

    def called(pipe: Any) -> list[tuple[bool, ...]]:
        seen: list[tuple[bool, ...]] = []

        def callback(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            latents = tensors["latents"]
            with torch.enable_grad():
                known = latents.detach().requires_grad_()
                gradient = torch.autograd.grad(known.square().sum(), known)[0]
            seen.append((*modes, latents.is_inference(), torch.zeros(1).is_inference(), torch.equal(gradient, 2 * latents)))
            return tensors

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "sd"):
            case.run(pipe, 3, callback_on_step_end=callback, **steps)
        return seen

    plain = called(case.make())
    with parallelize(pipe := case.make(), parasolver(window=4)) as run:
        found = called(pipe)
    assert run.report.executor != "sequential"
    assert found == plain
    assert len(found) == 6
