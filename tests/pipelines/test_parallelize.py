# SPDX-License-Identifier: Apache-2.0
"""`parallelize`: arguments keep their meaning, the pipeline is restored, and what has no parallel form is named."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from typing import Any

import pytest
import torch
from tiny import CASES, with_scheduler
from tiny.case import noise
from torch import Tensor

from paradiff import parallelize, parasolver, piadm_ode, sequential, srds
from paradiff.chain.slope import freeze_epsilon
from paradiff.methods import WindowMethod, underdamped_langevin
from paradiff.pipelines import Report

BOUND = 1e-5  # of the largest value: float32, whose rounding differs with the rows of a network call
METHOD = parasolver(tolerance=1e-4, slope=freeze_epsilon)  # latents of size 40


def difference(found: Tensor, plain: Tensor) -> float:
    return float((found.double() - plain.double()).abs().max() / plain.double().abs().max())


@functools.cache
def kept(name: str, seed: int) -> Tensor:
    return CASES[name].run(CASES[name].make(), seed)


def plain_of(name: str, seed: int = 3) -> Tensor:
    """What the plain call of a fresh pipeline gives, which is called once for all tests."""
    return kept(name, seed).clone()


def both(
    name: str,
    method: WindowMethod = METHOD,
    *,
    seed: int = 3,
    bound: float = BOUND,
    options: dict[str, Any] | None = None,
    **call: Any,
) -> Report:
    """The report of a parallel call, which is compared with the plain one."""
    case = CASES[name]
    plain = case.run(case.make(), seed, **copy.deepcopy(call)) if call else plain_of(name, seed)
    pipe = case.make()
    with parallelize(pipe, method, check="every", **(options or {})) as run:
        found = case.run(pipe, seed, **copy.deepcopy(call))
    assert found.shape == plain.shape
    assert difference(found, plain) < bound
    return run.report


@functools.cache
def ordinary(name: str) -> Report:
    """The report of a call with nothing further asked for, which is made once for all tests."""
    return both(name)


@pytest.mark.parametrize(
    "call",
    [
        {"num_images_per_prompt": 2},
        {"latents": noise(2, 4, 8, 8, seed=5)},
        {"output_type": "np"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.5},
        {"num_inference_steps": 15},
        {"eta": 0.7},
        {"return_dict": False},
    ],
    ids=lambda call: next(iter(call)),
)
def test_arguments_keep_their_meaning(call: dict[str, Any]) -> None:
    report = both("sd", **call)
    assert report.passes < report.steps == call.get("num_inference_steps", 10)
    assert report.executor == "vector"


@pytest.mark.parametrize("name", ["sd", "sd_inpaint4"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_list_of_generators_draws_as_in_the_plain_call(name: str, eta: float) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in (11, 12)]

    case = CASES[name]
    plain_generators, found_generators = generators(), generators()
    plain = case.run(case.make(), generator=plain_generators, eta=eta)
    with parallelize(pipe := case.make(), METHOD) as run:
        found = case.run(pipe, generator=found_generators, eta=eta)
    assert difference(found, plain) < BOUND
    assert run.report.passes < 10
    for a, b in zip(plain_generators, found_generators, strict=True):
        assert torch.equal(a.get_state(), b.get_state())  # as many draws as the plain call makes


@pytest.mark.parametrize("name", ["sd_euler_ancestral", "sd_ddpm", "lcm", "sd_controlnet", "ddpm"])
def test_generators_end_where_the_plain_call_leaves_them(name: str) -> None:
    case, states = CASES[name], []
    for method in (None, METHOD):
        pipe, generator = case.make(), torch.Generator().manual_seed(4)
        if method is None:
            case.run(pipe, generator=generator)
        else:
            with parallelize(pipe, method):
                case.run(pipe, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["sd_euler_ancestral", "sd_controlnet"])
def test_without_a_generator_torchs_own_is_drawn_from(name: str) -> None:
    case = CASES[name]
    pipe = case.make()
    torch.manual_seed(8)
    plain, after = case.run(pipe, generator=None), torch.rand(1)
    with parallelize(pipe, METHOD):
        torch.manual_seed(8)
        found = case.run(pipe, generator=None)
    assert difference(found, plain) < BOUND
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_image_to_image_starts_where_the_strength_says(strength: float) -> None:
    report = both("sd_img2img", bound=3e-5, strength=strength, num_inference_steps=20)  # latents of size 3
    assert report.steps == int(20 * strength)
    assert report.passes < report.steps


@pytest.mark.parametrize(
    ("method", "sentences"),
    [
        (parasolver(16), ["the window was shortened from 16 to 3, for the loop's chain of 3 steps"]),
        (
            parasolver(8, warmup=2, stride=4),
            [
                "the window was shortened from 8 to 3, for the loop's chain of 3 steps",
                "the stride was shortened from 4 to 1, for the loop's chain of 3 steps",
            ],
        ),
        (srds(5), ["the blocks were shortened from 5 to 3, for the loop's chain of 3 steps"]),
        (srds(5, window=4), ["the window was shortened from 4 to 3", "the blocks were shortened from 5 to 3"]),
        (parasolver(3), []),
        (parasolver(), []),
        (piadm_ode(4), ["the blocks were shortened from 4 to 3, for the loop's chain of 3 steps"]),
    ],
    ids=str,
)
def test_a_method_longer_than_the_chain_is_shortened_to_it(method: Any, sentences: list[str]) -> None:
    report = both("sd_img2img", method, strength=0.3)
    assert report.steps == 3
    warnings = [warning for warning in report.warnings if not warning.startswith("it took as many rounds as steps")]
    assert len(warnings) == len(sentences)
    assert all(found.startswith(told) for found, told in zip(warnings, sentences, strict=True))
    assert both("sd_img2img", method, strength=0.1).steps == 1


@pytest.mark.parametrize("method", [sequential(), parasolver(1), parasolver(3, tolerance=1e-4, slope=freeze_epsilon)])
def test_windows_of_any_width(method: WindowMethod) -> None:
    report = both("sd", method)
    assert report.passes == 10 if method.window == 1 else report.passes <= 10


@pytest.mark.parametrize("name", ["sd", "sd_euler_ancestral", "flux"])
@pytest.mark.parametrize("method", [srds(tolerance=1e-5), piadm_ode(2, tolerance=1e-4)], ids=["srds", "piadm"])
def test_other_methods_run_in_pipelines(name: str, method: Any) -> None:
    if name == "sd_euler_ancestral" and method.name != "srds":
        pytest.skip("piadm_ode is for deterministic chains")
    both(name, method)


def count_rows(network: Any) -> list[int]:
    """The rows of every call of a network, as they will be made; `del network.forward` ends it."""
    sizes: list[int] = []
    counted = network.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(sample))
        return counted(sample, *args, **kwargs)

    network.forward = forward
    return sizes


@pytest.mark.parametrize("name", ["sd", "sd_controlnet"])
def test_row_bounds_and_padding_change_no_result(name: str) -> None:
    free = ordinary(name)
    bound = both(name, options={"max_rows": 8, "pad": True})
    assert bound.passes == free.passes
    pipe = CASES[name].make()
    for max_rows, pad, expected in ((8, False, {4, 8}), (None, False, None), (8, True, {4, 8})):
        sizes = count_rows(pipe.unet)
        with parallelize(pipe, METHOD, max_rows=max_rows, pad=pad, check="off") as run:
            CASES[name].run(pipe)
        del pipe.unet.forward
        assert expected is None or set(sizes) <= expected  # a state is four rows: two images with guidance
        assert len(sizes) > run.report.passes if max_rows else len(sizes) == run.report.passes
        assert 4 * run.report.rows == sum(sizes) or pad


def test_lanes_can_be_asked_for() -> None:
    vector, lanes = ordinary("sd"), both("sd", options={"executor": "lanes"})
    assert (vector.executor, lanes.executor) == ("vector", "lanes")
    assert 0 <= lanes.passes - vector.passes <= 1  # lane 0 makes its second pass before the others start
    plain = both("sd", options={"executor": "sequential"})
    assert plain.executor == "sequential"
    assert plain.warnings == []


def test_callback_sees_final_states_in_order() -> None:
    case = CASES["sd"]
    told: dict[str, list[tuple[int, int, Tensor]]] = {"plain": [], "parallel": []}

    def watch(key: str) -> Any:
        def callback(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            told[key].append((step, int(time), tensors["latents"].clone()))
            return tensors

        return callback

    case.run(case.make(), callback_on_step_end=watch("plain"))
    for executor in ("vector", "lanes"):
        told["parallel"].clear()
        with parallelize(pipe := case.make(), METHOD, executor=executor):  # pyright: ignore[reportArgumentType]
            case.run(pipe, callback_on_step_end=watch("parallel"))
        assert [t[:2] for t in told["parallel"]] == [t[:2] for t in told["plain"]]
        for (_, _, a), (_, _, b) in zip(told["parallel"], told["plain"], strict=True):
            assert difference(a, b) < BOUND


def test_callbacks_that_steer_are_refused_by_name() -> None:
    case = CASES["sd"]

    def shift(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] + 1}

    def unguide(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 1.0
        return tensors

    for callback, complaint in ((shift, "changed the latents after step 0"), (unguide, r"changed pipe\._guidance_scale after")):
        with parallelize(pipe := case.make(), METHOD), pytest.raises(ValueError, match=complaint):
            case.run(pipe, callback_on_step_end=callback)
    with parallelize(pipe := case.make(), METHOD), pytest.raises(ValueError, match="asks for prompt_embeds"):
        case.run(pipe, callback_on_step_end=shift, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    with (
        parallelize(pipe := CASES["sd_inpaint4"].make(), METHOD),
        pytest.raises(ValueError, match="leave out callback_on_step"),
    ):
        CASES["sd_inpaint4"].run(pipe, callback_on_step_end=lambda pipe, step, time, tensors: tensors)
    with parallelize(pipe := case.make(), METHOD), pytest.raises(ValueError, match="callback= was given"):
        pipe("a", num_inference_steps=4, callback=print)


@pytest.mark.parametrize("name", ["sd", "sd_controlnet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_is_restored_after_an_exception(name: str, error: type[BaseException]) -> None:
    case = CASES[name]
    pipe = case.make()
    before = type(pipe), pipe.scheduler
    calls: list[int] = []

    def fail(module: Any, args: Any) -> None:
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise error

    hook = pipe.unet.register_forward_pre_hook(fail)
    grad = torch.is_grad_enabled()
    # The check would refuse the hook, which reads its list.
    with pytest.raises(error), parallelize(pipe, METHOD, check="off"):
        case.run(pipe)
    hook.remove()
    assert (type(pipe), pipe.scheduler) == before
    assert torch.is_grad_enabled() == grad
    assert all("forward" not in vars(m) for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    assert difference(case.run(pipe), plain_of(name, 0)) < BOUND


def test_two_pipelines_nested_and_in_threads() -> None:
    names = ("sd", "sd_dpmpp_2m", "sd_controlnet", "sdxl")
    plain = {name: plain_of(name) for name in names}
    pipes = {name: CASES[name].make() for name in names}
    with parallelize(pipes["sd"], METHOD) as outer, parallelize(pipes["sdxl"], METHOD) as inner:
        for name in ("sd", "sdxl", "sd"):
            assert difference(CASES[name].run(pipes[name], 3), plain[name]) < BOUND
    assert (len(outer.reports), len(inner.reports)) == (2, 1)

    found: dict[str, Tensor] = {}
    rounds: dict[str, int] = {}

    def work(name: str) -> None:
        with parallelize(pipes[name], METHOD) as run:
            found[name] = CASES[name].run(pipes[name], 3)
            rounds[name] = run.report.passes

    with warnings.catch_warnings():  # filters belong to the process: those set in a thread would be lost
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in names:
        assert difference(found[name], plain[name]) < BOUND
        assert rounds[name] < 10


def test_two_pipelines_may_share_their_networks() -> None:
    case = CASES["sd"]
    plain = plain_of("sd")
    pipe = case.make()
    other = with_scheduler(type(pipe)(**pipe.components, requires_safety_checker=False), "euler")
    other.set_progress_bar_config(disable=True)
    with parallelize(pipe, METHOD), parallelize(other, METHOD):
        case.run(other, 3)
        assert difference(case.run(pipe, 3), plain) < BOUND
    assert "forward" not in vars(pipe.unet)


def test_adapters_are_honoured() -> None:
    from peft import LoraConfig

    case = CASES["sd"]

    def adapted() -> Any:
        pipe = case.make()
        torch.manual_seed(1)
        pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        return pipe

    plain, bare = case.run(adapted(), 3), plain_of("sd")
    assert difference(bare, plain) > 1e-3  # the adapter does something
    with parallelize(pipe := adapted(), METHOD, check="every") as run:
        assert difference(case.run(pipe, 3), plain) < BOUND
    assert run.report.passes < 10


def test_accelerates_hooks_are_honoured_and_left_in_place() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Spy(ModelHook):
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    case = CASES["sd"]
    plain = plain_of("sd")
    pipe, spy = case.make(), Spy()
    add_hook_to_module(pipe.unet, spy)
    forward = pipe.unet.forward
    with parallelize(pipe, METHOD, check="off") as run:
        assert difference(case.run(pipe, 3), plain) < BOUND
    assert spy.calls == run.report.passes
    assert pipe.unet.forward is forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_keep_their_dtype_and_states_theirs(dtype: torch.dtype) -> None:
    case = CASES["sd"]

    def run(method: WindowMethod) -> tuple[Tensor, Report]:
        pipe = case.make().to(dtype)
        seen: set[torch.dtype] = set()
        pipe.unet.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
        with parallelize(pipe, method) as run:
            found = case.run(pipe, 3)
        assert seen == {dtype}
        assert found.dtype == dtype
        return found.double(), run.report

    exact, _ = run(sequential())
    found, report = run(parasolver(tolerance=1e-6, slope=freeze_epsilon))
    assert report.passes < 10
    assert any("tolerance was raised" in w for w in report.warnings)
    resolution = torch.finfo(dtype).eps
    assert (found - exact).square().mean().sqrt() < 4 * resolution * exact.square().mean().sqrt()


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_autocast_is_for_the_networks_alone(executor: Any) -> None:
    case = CASES["sd"]

    def run(method: WindowMethod) -> Tensor:
        with parallelize(pipe := case.make(), method, executor=executor), torch.autocast("cpu", torch.bfloat16):
            return case.run(pipe, 3)

    scale = float(run(sequential()).abs().max())
    found = [run(method) for method in (sequential(), parasolver(1), parasolver(5, tolerance=1e-3 * scale))]
    assert torch.equal(found[0], found[1])
    assert found[0].dtype == torch.float32
    assert difference(found[2], found[0]) < 0.1  # networks in half precision


def test_the_sequential_call_is_the_last_resort_and_says_why() -> None:
    case = CASES["sd"]
    plain = plain_of("sd")
    pipe = case.make()
    pipe.unet.train()
    torch.nn.Module.train(pipe.unet)
    pipe.unet.eval()

    class Bent(type(pipe.scheduler)):
        """A step that is not linear."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            return super().step(torch.sin(model_output), timestep, sample, **kwargs)

    bent = case.make()
    bent.scheduler = Bent.from_config(bent.scheduler.config)
    expected = case.run(bent, 3)
    generator = torch.Generator().manual_seed(3)
    with parallelize(bent, METHOD) as run, pytest.warns(RuntimeWarning, match="called sequentially.*not linear") as caught:
        found = case.run(bent, generator=generator)
    assert torch.equal(found, expected)
    assert run.report.executor == "sequential"
    assert run.report.warnings == [str(caught[0].message)]
    assert not torch.equal(found, plain)


def test_a_network_with_a_cache_across_steps_is_called_sequentially() -> None:
    case = CASES["flux"]
    plain = plain_of("flux")
    pipe = case.make()
    type(pipe.transformer).is_cache_enabled = property(lambda self: True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with parallelize(pipe, METHOD), pytest.warns(RuntimeWarning, match="transformer keeps a cache across steps"):
            assert torch.equal(case.run(pipe, 3), plain)
    finally:
        del type(pipe.transformer).is_cache_enabled


def test_rows_that_influence_each_other_are_noticed() -> None:
    case = CASES["sd"]
    plain = plain_of("sd")
    pipe = case.make()
    forward = pipe.unet.forward

    def mixing(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        (found,) = forward(sample, *args, **kwargs)
        return (found + (0.05 * found.mean() if len(sample) > 4 else 0),)  # four rows: one state

    pipe.unet.forward = mixing
    with parallelize(pipe, METHOD), pytest.warns(RuntimeWarning, match="called sequentially"):
        found = case.run(pipe, 3)
    assert difference(found, plain) < BOUND
    assert pipe.unet.forward is mixing


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: parallelize("a/model"), "was given a str; it takes a diffusers pipeline object"),  # pyright: ignore
        (lambda: parallelize(torch.nn.Linear(2, 2)), "was given a Linear.*use paradiff.sample"),  # pyright: ignore
        (lambda: parallelize(CASES["sd"].make(), executor="fast"), "executor is 'fast'; it must be one of auto"),  # pyright: ignore
        (lambda: parallelize(CASES["sd"].make(), check="never"), "check is 'never'; it must be one of first"),  # pyright: ignore
        (lambda: parallelize(CASES["sd"].make(), "parasolver"), "method is a str; give one of paradiff's"),  # pyright: ignore
        (lambda: parallelize(CASES["sd"].make(), max_rows=0), "max_rows is 0; a network call needs at least 1 row"),
        (lambda: parallelize(CASES["sd"].make(), dtype=torch.float16), "states were asked for in torch.float16"),
        (lambda: parasolver(0), "the window is 0; it must be a whole number, at least 1"),
    ],
)
def test_bad_options_are_named(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_a_pipeline_without_a_scheduler_is_named() -> None:
    pipe = CASES["sd"].make()
    pipe.scheduler = None
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline has no scheduler.*give it one"):
        parallelize(pipe)


def test_a_second_parallelize_on_the_same_pipeline_is_named() -> None:
    pipe = CASES["sd"].make()
    with parallelize(pipe, METHOD):
        with pytest.raises(ValueError, match="already run in parallel; leave the other `with` block first"):
            parallelize(pipe)
        CASES["sd"].run(pipe)


@pytest.mark.parametrize(
    ("method", "call", "complaint"),
    [
        (METHOD, {"num_inference_steps": 2000}, "num_inference_steps|2000"),
        (piadm_ode(2, corrector=underdamped_langevin(2, 2)), {}, "given a corrector, which changes the sample"),
        (srds([0, 2, 10]), {"name": "sd_unipc"}, "reads 9 states and needs blocks of at least 8 steps"),
    ],
)
def test_impossible_calls_are_named(method: Any, call: dict[str, Any], complaint: str) -> None:
    call = dict(call)
    name = call.pop("name", "sd")
    case = CASES[name]
    with parallelize(pipe := case.make(), method), pytest.raises(ValueError, match=complaint):
        case.run(pipe, **call)
    assert difference(case.run(pipe), plain_of(name, 0)) < BOUND


def test_report_reads_as_sentences() -> None:
    report = both("sd")
    text = str(report)
    assert text.startswith("StableDiffusionPipeline with DDIMScheduler, parasolver, vector: converged")
    assert f"{report.rounds} rounds and {report.rows} rows instead of 10 steps" in text
    with parallelize(CASES["sd"].make()) as run, pytest.raises(ValueError, match="has not been called yet"):
        _ = run.report
