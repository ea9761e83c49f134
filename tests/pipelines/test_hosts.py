# SPDX-License-Identifier: Apache-2.0
"""Hosts that are no pipelines: policies, objects and functions, run in parallel, equal to their plain calls, or refused."""

from __future__ import annotations

import itertools
import pickle
import threading
import warnings
from typing import Any

import diffusers
import pytest
import torch
from tiny import CASES
from tiny.policies import Denoiser, MaskedPolicy, QueuedPolicy
from torch import Tensor, nn
from tqdm import tqdm

import paradiff
from paradiff import parallelize, quasi_newton

METHOD = quasi_newton(window=12, tolerance=1e-4)
CLOSE = 1e-3
"""Ten times the tolerance."""
UNET = Denoiser()
SCHEDULER = diffusers.DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)
START = torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(3))
SEEN = torch.randn(1, 3, generator=torch.Generator().manual_seed(4))

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def plainly(x: Tensor, steps: int = 30) -> Tensor:
    SCHEDULER.set_timesteps(steps)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(UNET(x, t, SEEN), t, x).prev_sample
    return x


def numbered(x: Tensor, steps: int = 30) -> Tensor:
    SCHEDULER.set_timesteps(steps)
    for i, t in enumerate(tqdm(SCHEDULER.timesteps)):
        x = SCHEDULER.step(UNET(x, t, SEEN) * (1 + 0.01 * i), t, x).prev_sample
    return x


def given(unet: nn.Module, sampler: Any, x: Tensor, /, steps: int = 30) -> Tensor:
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        x = sampler.step(unet(x, t, SEEN), t, x).prev_sample
    return x


class Sampler:
    """An object with its networks in a list, and no module itself."""

    def __init__(self) -> None:
        self.nets = [Denoiser(seed=1)]
        self.dpm = diffusers.DPMSolverMultistepScheduler(1000)
        self.last: Tensor | None = None

    def run(self, x: Tensor, steps: int = 20) -> Tensor:
        self.dpm.set_timesteps(steps)
        x = x * self.dpm.init_noise_sigma
        for t in self.dpm.timesteps:
            x = self.dpm.step(self.nets[0](self.dpm.scale_model_input(x, t), t, SEEN), t, x).prev_sample
        self.last = x
        return x


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def test_a_policy_is_parallel_through_the_part_that_has_its_loop() -> None:
    policy = QueuedPolicy()
    plain = [policy.select_action(SEEN, seeded()) for _ in range(8)]
    with parallelize(policy, METHOD) as run:
        found = [policy.select_action(SEEN, seeded()) for _ in range(8)]
    assert run.report.executor == "vector"
    assert len(run.reports) == 1
    assert not run.report.warnings
    assert max(map(difference, plain, found)) < CLOSE
    assert type(policy.diffusion).__name__ == "Diffusion"
    assert "step" not in vars(policy.diffusion.noise_scheduler)


def test_a_policy_that_writes_what_is_known_into_its_state_is_parallel() -> None:
    policy = MaskedPolicy()
    plain = policy.predict_action(SEEN, seeded())["action"]
    with parallelize(policy, METHOD) as run:
        found = policy.predict_action(SEEN, seeded())["action"]
    assert run.report.executor == "vector"
    assert run.report.rounds < run.report.steps
    assert difference(plain, found) < CLOSE
    assert torch.equal(found[:, 0], plain[:, 0])


def test_a_scheduler_that_is_exchanged_is_the_one_that_is_walked() -> None:
    policy = MaskedPolicy()
    run = parallelize(policy, METHOD)
    policy.noise_scheduler = diffusers.DDIMScheduler(100, beta_schedule="squaredcos_cap_v2")
    with run:
        found = policy.predict_action(SEEN, seeded())["action"]
    assert run.report.scheduler == "DDIMScheduler"
    assert difference(policy.predict_action(SEEN, seeded())["action"], found) < CLOSE


@pytest.mark.parametrize("entry", [None, "run"])
def test_an_object_that_is_no_module_is_parallel(entry: str | None) -> None:
    sampler = Sampler()
    plain = sampler.run(START)
    with parallelize(sampler, METHOD, entry=entry) as run:
        found = sampler.run(START)
    assert run.report.executor == "vector"
    assert difference(plain, found) < CLOSE * float(plain.std())
    assert sampler.last is found


def test_a_bound_method_is_taken_with_its_object() -> None:
    sampler = Sampler()
    run = parallelize(sampler.run, METHOD)
    assert difference(run(START), sampler.run(START)) < CLOSE * float(sampler.run(START).std())


@pytest.mark.parametrize(("function", "executor"), [(plainly, "vector"), (numbered, "lanes")])
def test_a_function_with_a_loop_is_parallel(function: Any, executor: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = function(START)
    capsys.readouterr()
    run = parallelize(function, METHOD)
    found = run(START)
    assert run.report.executor == executor
    assert run.report.rounds < run.report.steps
    assert difference(plain, found) < CLOSE
    assert capsys.readouterr().err.count("| 0/30") <= 1  # the bar of the user's own call alone
    assert type(SCHEDULER) is diffusers.DDIMScheduler
    assert torch.equal(SCHEDULER.timesteps, SCHEDULER.timesteps)


def test_a_function_may_be_given_its_scheduler_and_its_network() -> None:
    run = parallelize(given, METHOD)
    assert difference(run(UNET, SCHEDULER, START), given(UNET, SCHEDULER, START)) < CLOSE
    assert run.report.executor == "vector"
    with pytest.raises(ValueError, match="refers to no scheduler; give the one whose times its loop walks over"):
        parallelize(given, METHOD)(UNET, None, START)


def test_the_decorator_makes_a_loop_parallel_in_ten_lines() -> None:
    unet, scheduler = UNET, SCHEDULER

    @paradiff.parallel(METHOD, scheduler=scheduler, networks=[unet])
    def denoise(x: Tensor) -> Tensor:
        """Denoises."""
        scheduler.set_timesteps(30)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, SEEN), t, x).prev_sample
        return x

    assert denoise.__doc__ == "Denoises."
    assert difference(denoise(START), plainly(START)) < CLOSE
    assert denoise.run.report.executor == "vector"  # type: ignore[attr-defined]


def test_hosts_are_switched_as_features_of_diffusers_are() -> None:
    policy = QueuedPolicy()
    run = paradiff.enable_parallel_in_time(policy, paradiff.ParallelInTimeConfig(method=METHOD))
    assert paradiff.is_parallel_in_time_enabled(policy)
    assert paradiff.is_parallel_in_time_enabled(policy.diffusion)
    policy.select_action(SEEN, seeded())
    assert run.report.executor == "vector"
    with pytest.raises(ValueError, match="already run in parallel"):
        paradiff.enable_parallel_in_time(policy)
    paradiff.disable_parallel_in_time(policy)
    assert not paradiff.is_parallel_in_time_enabled(policy)
    paradiff.disable_parallel_in_time(policy)
    with pytest.raises(ValueError, match="config is a dict; give a ParallelInTimeConfig"):
        paradiff.enable_parallel_in_time(policy, {})  # type: ignore[arg-type]


def test_a_function_is_called_through_its_run_and_not_switched() -> None:
    with pytest.raises(ValueError, match=r"cannot be switched.*call what parallelize returns"):
        parallelize(plainly, METHOD).enable()


def test_explain_and_plan_take_a_host() -> None:
    forecast = paradiff.explain(Sampler(), METHOD, num_inference_steps=20)
    assert forecast.executor == "vector"
    assert forecast.table is not None
    assert forecast.table.steps == 20
    with pytest.raises(ValueError, match="has no number of steps of its own"):
        paradiff.explain(Sampler(), METHOD)


# What the loops of functions and objects may keep from one pass to the next: refused, and the plain call's result.

COUNT = 0
KEPT: dict[str, Any] = {}


def in_a_global(x: Tensor) -> Tensor:
    global COUNT
    COUNT = 0
    SCHEDULER.set_timesteps(20)
    for t in SCHEDULER.timesteps:
        COUNT += 1
        x = SCHEDULER.step(UNET(x, t, SEEN) * (1 + 0.02 * COUNT), t, x).prev_sample
    return x


def in_a_dict(x: Tensor) -> Tensor:
    KEPT.clear()
    SCHEDULER.set_timesteps(20)
    for t in SCHEDULER.timesteps:
        out = UNET(x, t, SEEN)
        KEPT["mean"] = 0.9 * KEPT.get("mean", out) + 0.1 * out
        x = SCHEDULER.step(out + 0.1 * KEPT["mean"], t, x).prev_sample
    return x


def in_an_iterator(x: Tensor) -> Tensor:
    weights = itertools.count()
    SCHEDULER.set_timesteps(20)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(UNET(x, t, SEEN) * (1 + 0.02 * next(weights)), t, x).prev_sample
    return x


def with_momentum(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(20)
    last = torch.zeros_like(x)
    for t in SCHEDULER.timesteps:
        out = UNET(x, t, SEEN)
        x, last = SCHEDULER.step(out + 0.2 * last, t, x).prev_sample, out
    return x


def with_drawn_numbers(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    SCHEDULER.set_timesteps(20)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(UNET(x + 0.05 * torch.randn(x.shape, generator=generator), t, SEEN), t, x).prev_sample
    return x


def in_two_loops(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(20)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(UNET(x, t, SEEN), t, x).prev_sample
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(UNET(x, t, -SEEN), t, x).prev_sample
    return x


def in_a_while(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(20)
    k = 0
    while k < 20:
        x = SCHEDULER.step(UNET(x, SCHEDULER.timesteps[k], SEEN), SCHEDULER.timesteps[k], x).prev_sample
        k += 1
    return x


def ended_early(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(20)
    for k, t in enumerate(SCHEDULER.timesteps):
        if k == 15:
            break
        x = SCHEDULER.step(UNET(x, t, SEEN), t, x).prev_sample
    return x


def with_a_list(x: Tensor) -> list[Tensor]:
    SCHEDULER.set_timesteps(20)
    xs = [x]
    for t in SCHEDULER.timesteps:
        xs.append(SCHEDULER.step(UNET(xs[-1], t, SEEN), t, xs[-1]).prev_sample)
    return xs


class Counting(Sampler):
    """Counts its passes in an attribute."""

    passes = 0

    def run(self, x: Tensor, steps: int = 20) -> Tensor:
        self.passes = 0
        self.dpm.set_timesteps(steps)
        x = x * self.dpm.init_noise_sigma
        for t in self.dpm.timesteps:
            self.passes += 1
            out = self.nets[0](self.dpm.scale_model_input(x, t), t, SEEN)
            x = self.dpm.step(out * (1 + 0.02 * self.passes), t, x).prev_sample
        return x


KEEPING = [
    (in_a_global, "keeps|counts|grows|passes"),
    (in_a_dict, "keeps|passes"),
    (in_an_iterator, "keeps|passes"),
    (with_momentum, "keeps"),
    (with_drawn_numbers, "draws random numbers"),
    (in_two_loops, "second loop|a second time"),
    (in_a_while, "the loop is a `while`"),
    (ended_early, "ends before its last time"),
    (with_a_list, "its passes|one by one|added"),
    (Counting, "keeps|passes"),
]


@pytest.mark.parametrize(("kind", "reason"), KEEPING, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_what_a_loop_keeps_is_found_and_the_plain_call_made(kind: Any, reason: str, tolerance: float) -> None:
    call: Any = kind().run if isinstance(kind, type) else kind
    plain = call(START)
    counted = COUNT
    run = parallelize(call, quasi_newton(window=8, tolerance=tolerance))
    with pytest.warns(RuntimeWarning, match=reason):
        found = run(START)
    assert run.report.executor == "sequential"
    assert counted == COUNT
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "value", [None, 3, "denoise", [1], nn.Linear(2, 2), SCHEDULER, object()], ids=lambda v: type(v).__name__
)
def test_what_has_no_chain_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"was given a {type(value).__name__}; it takes a diffusers pipeline object, an object"
    ):
        parallelize(value)


class TwoLoops(Sampler):
    def refine(self, x: Tensor) -> Tensor:
        for t in self.dpm.timesteps:
            x = self.dpm.step(self.nets[0](x, t), t, x).prev_sample
        return x


class TwoSchedulers(Sampler):
    def __init__(self) -> None:
        super().__init__()
        self.ddim = SCHEDULER

    def run(self, x: Tensor, steps: int = 20, fast: bool = True) -> Tensor:
        scheduler: Any = self.ddim if fast else self.dpm
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(self.nets[0](x, t, SEEN), t, x).prev_sample
        return x


def without_a_network(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(4)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(x.sin(), t, x).prev_sample
    return x


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (TwoLoops(), {}, "has 2 methods that step a scheduler, TwoLoops.(run|refine), TwoLoops.(run|refine); give .* as entry="),
    (TwoSchedulers(), {}, "TwoSchedulers.run may step 2 schedulers: dpm, ddim; give the one"),
    (Sampler(), {"entry": "walk"}, "the Sampler has no method 'walk'"),
    (Sampler(), {"scheduler": 3}, "scheduler is a int, which has no set_timesteps and no step"),
    (Sampler(), {"networks": [3]}, "networks has a int; give the torch modules"),
    (Sampler(), {"networks": []}, "has no network among its attributes"),
    (plainly, {"entry": "x"}, "entry is 'x' beside the function plainly"),
]


@pytest.mark.parametrize(("value", "options", "reason"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_host_that_is_not_clear_is_refused_in_a_sentence(value: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parallelize(value, **options)


def test_a_function_without_a_network_is_refused_when_it_is_called() -> None:
    with pytest.raises(ValueError, match="without_a_network refers to no network"):
        parallelize(without_a_network)(START)


def test_a_named_scheduler_settles_which_of_two_is_walked() -> None:
    sampler = TwoSchedulers()
    run = parallelize(sampler, METHOD, scheduler=sampler.ddim)
    assert difference(run(START), sampler.run(START)) < CLOSE
    assert run.report.executor == "vector"


def test_calls_of_two_threads_take_turns() -> None:
    run, found = parallelize(plainly, METHOD), []
    plain = plainly(START)

    def call() -> None:
        with torch.no_grad():
            found.append(run(START))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert max(difference(plain, one) for one in found) < CLOSE


def test_a_parallel_call_on_a_scheduler_that_another_threads_walks_over_is_the_plain_one() -> None:
    """The second thread's call begins within the first one's loop."""
    inner = parallelize(given, METHOD, networks=[UNET], scheduler=SCHEDULER)
    found: list[Tensor] = []

    def call() -> None:
        with (
            torch.no_grad(),
            pytest.warns(RuntimeWarning, match="another parallel call walks over the same DDIMScheduler"),
        ):
            found.append(inner(UNET, SCHEDULER, START))

    def loop(x: Tensor) -> Tensor:
        SCHEDULER.set_timesteps(30)
        for t in SCHEDULER.timesteps:
            if not found:
                thread = threading.Thread(target=call)
                thread.start()
                thread.join()
            x = SCHEDULER.step(UNET(x, t, SEEN), t, x).prev_sample
        return x

    outer = parallelize(loop, METHOD, networks=[UNET], scheduler=SCHEDULER)
    result, plain = outer(START), plainly(START)
    assert outer.report.executor == "vector"
    assert inner.report.executor == "sequential"
    assert difference(plain, result) < CLOSE
    assert difference(plain, found[0]) < CLOSE
    assert type(SCHEDULER) is diffusers.DDIMScheduler


def test_functions_of_one_scheduler_in_many_threads_leave_it_as_it_was() -> None:
    def loop(x: Tensor) -> Tensor:
        return plainly(x)

    runs = [parallelize(one, METHOD, networks=[UNET], scheduler=SCHEDULER) for one in (plainly, loop, plainly)]
    found: list[Tensor] = []

    def call(run: Any) -> None:
        with torch.no_grad():
            found.append(run(START))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        threads = [threading.Thread(target=call, args=(run,)) for run in runs * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    plain = plainly(START)
    assert len(found) == 9
    assert max(difference(plain, one) for one in found) < CLOSE
    assert type(SCHEDULER) is diffusers.DDIMScheduler


def test_two_runs_of_one_pipeline_take_turns() -> None:
    case = CASES["ddpm"]
    pipe = case.make()
    scheduler, plain, found = pipe.scheduler, case.run(pipe), list[Tensor]()

    def call(run: Any) -> None:
        with torch.no_grad():
            found.append(case.run(run))

    threads = [threading.Thread(target=call, args=(parallelize(pipe, METHOD),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert max(difference(plain, one) for one in found) < CLOSE
    assert pipe.scheduler is scheduler


def test_another_threads_plain_loop_has_the_scheduler_itself() -> None:
    found: list[Any] = []

    def loop(x: Tensor) -> Tensor:
        SCHEDULER.set_timesteps(20)
        for t in SCHEDULER.timesteps:
            if not found:  # in the midst of the parallel run
                thread = threading.Thread(target=lambda: found.append((type(SCHEDULER.timesteps), "step" in vars(SCHEDULER))))
                thread.start()
                thread.join()
            x = SCHEDULER.step(UNET(x, t, SEEN), t, x).prev_sample
        return x

    parallelize(loop, METHOD, scheduler=SCHEDULER)(START)
    assert found == [(Tensor, False)]


def test_an_error_of_the_loop_leaves_the_scheduler_as_it_was() -> None:
    def failing(x: Tensor) -> Tensor:
        SCHEDULER.set_timesteps(20)
        for t in SCHEDULER.timesteps:
            if t < 500:
                raise RuntimeError("no such place")
            x = SCHEDULER.step(UNET(x, t, SEEN), t, x).prev_sample
        return x

    with pytest.raises(RuntimeError, match="no such place"):
        parallelize(failing, METHOD)(START)
    assert type(SCHEDULER) is diffusers.DDIMScheduler
    assert "step" not in vars(SCHEDULER)
    assert pickle.loads(pickle.dumps(SCHEDULER)).config == SCHEDULER.config
