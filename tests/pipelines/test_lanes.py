# SPDX-License-Identifier: Apache-2.0
"""Calls of the pipeline, one for every state, give the plain call's sample, see their own step numbers, and leave no trace."""

from __future__ import annotations

import contextvars
import gc
import itertools
import math
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import diffusers
import greenlet
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
from diffusers.utils.torch_utils import randn_tensor
from tiny import CASES
from torch import Tensor, nn
from torch.utils import _pytree
from tqdm import tqdm

import paradiff
from paradiff.errors import Unsupported
from paradiff.methods.window.method import WindowMethod
from paradiff.pipelines.executors import coalesce
from paradiff.pipelines.executors.bars import one_bar
from paradiff.pipelines.executors.coalesce import Coalescer, NetworkCall
from paradiff.pipelines.executors.lane import Lane
from paradiff.pipelines.executors.lanes import run_lanes
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.driver import LoopSolver
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network import boundary
from paradiff.pipelines.network.batching import Batching, Check

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy

TIGHT = paradiff.parasolver(tolerance=1e-5)
"""Sweeps the whole chain at once, until the estimated error is 1e-5 of a state's scale."""


class Run:
    """A pipeline that is called with lanes, as `parallelize` does it.

    Tests whose loops note what they see are run without the audit, which refuses a loop that collects.
    """

    def __init__(self, pipeline: Any, method: WindowMethod = TIGHT, check: Check = "first") -> None:
        self.pipeline = pipeline
        self.solver = LoopSolver(method)
        self.batching = Batching(check=check)

    def __call__(self, **arguments: Any) -> Any:
        networks = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        with boundary.install(networks):
            return run_lanes(Host(self.pipeline, type(self.pipeline)), arguments, self.solver, self.batching)


class Encoder(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, prompt: Tensor) -> Tensor:
        self.calls += 1
        return prompt.sin()


class Network(nn.Module):
    """Acts on every row by itself, at its own time."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.weight = nn.Parameter(torch.tensor([0.7]))

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
        self.rows.append(len(hidden_states))
        time = timestep.expand(len(hidden_states)).reshape(-1, 1) / 1000
        return torch.sin(hidden_states * self.weight + condition) * (0.3 + 0.5 * time * strength)


class Bare(diffusers.DiffusionPipeline):
    """Components without a call."""

    network: Network
    scheduler: Any

    def __init__(self, network: Any, encoder: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, encoder=encoder, scheduler=scheduler)


class Loop(Bare):
    """The plainest pipeline. It calls `before`; `body` in each iteration before the step, `edit` after it; and `after`."""

    @torch.no_grad()
    def __call__(
        self,
        steps: int = 12,
        generator: Any = None,
        body: Callable[..., Any] | None = None,
        edit: Callable[..., Any] | None = None,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        strength: Callable[[int], float] = lambda i: 1.0,
    ) -> Tensor:
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        self._steps = len(timesteps)
        condition = self.encoder(torch.arange(10.0).reshape(2, 5))
        condition *= 0.5  # in place
        x = randn_tensor((2, 5), generator=generator)
        if before is not None:
            x = before(self, x)
        progress: Any = self.progress_bar
        with progress(total=steps) as bar:
            for i, t in enumerate(timesteps):
                self._step = i
                m = self.network(self.scheduler.scale_model_input(x, t), t, condition, strength=strength(i))
                if body is not None:
                    m = body(self, i, t, x, m)
                x = self.scheduler.step(m, t, x, return_dict=False)[0]
                if edit is not None:
                    x = edit(self, i, t, x)
                bar.update()
        return x if after is None else after(self, x)


@pytest.fixture
def loop() -> Any:
    pipe = Loop(Network(), Encoder(), diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


FAMILIES = [
    "sd_euler_ancestral",
    "sd_inpaint4",
    "sd_controlnet_half",
    "sd3_skip_layers",
    "wan22",
    "cogvideox_dynamic_cfg",
    "ltx_image_to_video",
    "z_image_truncated",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_pipelines_give_their_own_sample(name: str) -> None:
    case = CASES[name]
    pipe = case.make()
    expected_generator, generator = seeded(3), seeded(3)
    expected = case.run(pipe, generator=expected_generator)
    run = Run(pipe)
    got = case.call(run, generator=generator)
    # The tolerance is 1e-5 of a state's scale, and samples are decoded, which adds rounding.
    assert relative(got, expected) < 5e-5
    assert run.solver.passes <= run.solver.table.steps
    assert torch.equal(generator.get_state(), expected_generator.get_state())
    assert relative(case.run(pipe, generator=seeded(3)), expected) == 0  # the pipeline is as it was


@pytest.mark.parametrize("edited", [False, True])
def test_rounds_are_fewer_than_steps_and_the_sample_is_the_same(loop: Any, edited: bool) -> None:
    noise, origin = torch.randn(2, 5, generator=seeded(1)), torch.randn(2, 5, generator=seeded(2))
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])

    def edit(pipe: Any, i: int, t: Tensor, x: Tensor) -> Tensor:
        known = origin
        if i < pipe._steps - 1:  # as inpainting pipelines do it
            known = pipe.scheduler.add_noise(origin, noise, pipe.scheduler.timesteps[i + 1].reshape(1))
        return (1 - mask) * known + mask * x

    arguments = {"steps": 40, "edit": edit if edited else None}
    expected = loop(generator=seeded(), **arguments)
    run = Run(loop)
    got = run(generator=seeded(), **arguments)
    assert relative(got, expected) < 1e-5
    assert run.solver.passes < 30
    if edited:
        assert torch.equal(got[:, [1, 4]], origin[:, [1, 4]])


def test_noise_added_by_a_scheduler_that_counts_has_the_level_of_the_lanes_node(loop: Any) -> None:
    loop.scheduler = diffusers.DPMSolverMultistepScheduler()
    origin, mask = torch.randn(2, 5, generator=seeded(2)), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])

    def before(pipe: Any, x: Tensor) -> Tensor:
        pipe.scheduler.set_begin_index(0)
        return x

    def edit(pipe: Any, i: int, t: Tensor, x: Tensor) -> Tensor:
        if i == pipe._steps - 1:
            return x
        known = pipe.scheduler.add_noise(origin, x.new_ones(2, 5), pipe.scheduler.timesteps[i + 1].reshape(1))
        return (1 - mask) * known + mask * x

    arguments = {"steps": 20, "edit": edit, "before": before}
    expected = loop(generator=seeded(), **arguments)
    assert relative(Run(loop)(generator=seeded(), **arguments), expected) < 1e-5


@pytest.mark.parametrize("window", [3, 12])
def test_each_lane_sees_the_step_number_and_the_time_of_its_node(loop: Any, window: int) -> None:
    passes: list[tuple[int, int, int, bool]] = []
    edits: dict[int, int] = {}

    def body(pipe: Any, i: int, t: Tensor, x: Tensor, m: Tensor) -> Tensor:
        lane = greenlet.getcurrent()
        assert isinstance(lane, Lane)
        assert (type(i), type(t), t.shape, x.shape, m.shape) == (int, Tensor, (), (2, 5), (2, 5))
        assert lane.node == i
        assert int(t) == int(pipe.scheduler.timesteps[i])
        if i > 0 and not lane.dry:
            assert edits[lane.number] == i - 1  # the state of this node was edited as in the plain call
        passes.append((i, lane.number, id(pipe), lane.dry))
        return m

    def edit(pipe: Any, i: int, t: Tensor, x: Tensor) -> Tensor:
        lane = greenlet.getcurrent()
        assert isinstance(lane, Lane)
        edits[lane.number] = i
        return x

    run = Run(loop, paradiff.parasolver(window=window, tolerance=1e-5, warmup=1), "off")
    run(generator=seeded(), body=body, edit=edit)
    assert {i for i, *_ in passes} == set(range(12))
    lanes = {number for _, number, _, _ in passes}
    assert len(lanes) == min(window, 11)
    assert len({pipe for _, _, pipe, _ in passes}) == len(lanes)
    assert len([0 for *_, dry in passes if not dry]) == run.solver.rows
    assert edits[0] == 11  # the user's call ends at the last step


def test_calls_of_all_lanes_are_one_call_of_the_network(loop: Any) -> None:
    run = Run(loop, paradiff.parasolver(tolerance=1e-5))
    run.batching = Batching(check="off")
    run(generator=seeded(), steps=12)
    rows = loop.network.rows
    assert len(rows) == run.solver.passes
    assert sum(rows) == 2 * run.solver.rows
    assert max(rows) == 2 * 11


def test_calls_that_differ_are_as_many_calls_as_there_are_kinds(loop: Any) -> None:
    run = Run(loop, paradiff.parasolver(tolerance=1e-5))
    run.batching = Batching(check="off")
    arguments = {"steps": 12, "strength": lambda i: 1.0 if i < 6 else 0.5}
    expected = loop(generator=seeded(), **arguments)
    loop.network.rows.clear()
    got = run(generator=seeded(), **arguments)
    assert relative(got, expected) < 1e-5
    assert len(loop.network.rows) <= 2 * run.solver.passes


def test_a_network_that_some_lanes_call_first_does_not_split_the_next_ones_calls() -> None:
    class Guided(Bare):
        @torch.no_grad()
        def __call__(self, generator: Any) -> Tensor:
            self.scheduler.set_timesteps(12)
            x = randn_tensor((2, 5), generator=generator)
            for i, t in enumerate(self.scheduler.timesteps):
                hint = self.encoder(x) if i < 6 else torch.zeros(2, 5)
                x = self.scheduler.step(self.network(x, t, hint), t, x).prev_sample
            return x

    pipe: Any = Guided(Network(), Encoder(), diffusers.DDIMScheduler(clip_sample=False))
    expected = pipe(generator=seeded())
    pipe.network.rows.clear()
    run = Run(pipe)
    run.batching = Batching(check="off")
    assert relative(run(generator=seeded()), expected) < 1e-5
    assert len(pipe.network.rows) == run.solver.passes


def test_what_comes_before_the_loop_is_computed_once(loop: Any) -> None:
    run = Run(loop)
    run(generator=seeded())
    assert loop.encoder.calls == 1


@pytest.mark.parametrize("given", ["one", "list", "none"])
def test_generators_are_left_where_the_plain_call_leaves_them(loop: Any, given: str) -> None:
    def generators(seed: int) -> Any:
        return {"one": seeded(seed), "list": [seeded(seed), seeded(seed + 1)], "none": None}[given]

    def before(pipe: Any, x: Tensor) -> Tensor:
        return x + torch.rand(2, 5)  # from the global generator

    first, second = generators(5), generators(5)
    torch.manual_seed(7)
    expected = loop(generator=first, before=before)
    after = torch.rand(3)
    torch.manual_seed(7)
    got = Run(loop)(generator=second, before=before)
    assert relative(got, expected) < 1e-5
    assert torch.equal(torch.rand(3), after)
    if given == "one":
        assert torch.equal(first.get_state(), second.get_state())
    if given == "list":
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(first, second, strict=True))


def test_the_users_pipeline_has_what_its_call_wrote_and_its_own_scheduler(loop: Any) -> None:
    scheduler, config = loop.scheduler, dict(loop.config)
    settings = dict(vars(scheduler))
    Run(loop)(generator=seeded(), steps=9)
    assert (loop._steps, loop._step) == (9, 8)
    assert loop.scheduler is scheduler
    assert vars(scheduler) == settings
    assert dict(loop.config) == config
    assert loop._progress_bar_config == {"disable": True}
    assert "forward" not in vars(loop.network)


def test_the_number_of_steps_is_counted_by_the_built_in_function_again() -> None:
    case = CASES["sd"]
    case.call(Run(case.make()), generator=seeded())
    assert "enumerate" not in vars(pipeline_stable_diffusion)
    assert "zip" not in vars(pipeline_stable_diffusion)


def test_two_runs_of_one_module_may_overlap(loop: Any) -> None:
    """The second one starts and ends within the first one's epilogue."""
    other = Loop(Network(), Encoder(), diffusers.DDIMScheduler(clip_sample=False))
    other.set_progress_bar_config(disable=True)
    expected = loop(generator=seeded())
    inner = Run(other)
    counts: list[int] = []

    def after(pipe: Any, x: Tensor) -> Tensor:
        counts.extend(i for i, _ in enumerate([x, x]))
        return x + inner(generator=seeded())

    assert relative(Run(loop)(generator=seeded(), after=after), 2 * expected) < 1e-5
    assert counts == [0, 1]
    assert "enumerate" not in globals()


def test_a_loop_in_another_module_is_counted_too() -> None:
    module = types.ModuleType("elsewhere")
    source = """
def walk(pipe, x, weights):
    for i, t in enumerate(pipe.scheduler.timesteps, 1):
        m = pipe.network(x, t, x * 0)
        x = pipe.scheduler.step(weights[i - 1] * m, t, x).prev_sample
    return x
"""
    exec(source, vars(module))
    weights = [1 + 0.1 * math.cos(i) for i in range(12)]

    class Elsewhere(Bare):
        @torch.no_grad()
        def __call__(self, generator: Any) -> Tensor:
            self.scheduler.set_timesteps(12)
            return vars(module)["walk"](self, randn_tensor((2, 5), generator=generator), weights)

    pipe: Any = Elsewhere(Network(), Encoder(), diffusers.DDIMScheduler(clip_sample=False))
    expected_generator, generator = seeded(), seeded()
    expected = pipe(generator=expected_generator)
    assert relative(Run(pipe)(generator=generator), expected) < 1e-5
    assert torch.equal(generator.get_state(), expected_generator.get_state())
    assert "enumerate" not in vars(module)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_modes_are_each_lanes_own_and_afterwards_as_before(mode: str) -> None:
    decorate = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    modes: list[Modes] = []

    class Cast(Bare):
        @decorate()
        def __call__(self, generator: Any) -> Tensor:
            self.scheduler.set_timesteps(12)
            x = randn_tensor((2, 5), generator=generator)
            for i, t in enumerate(self.scheduler.timesteps):
                assert not torch.is_autocast_enabled("cpu")
                with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
                    m = self.network(x, t, x * 0)
                    assert torch.is_autocast_enabled("cpu") == (i % 2 == 0)
                modes.append(Modes.now())
                x = self.scheduler.step(m, t, x).prev_sample
                x[:, 0] = i  # in place
            return x

    pipe: Any = Cast(Network(), Encoder(), diffusers.DDIMScheduler(clip_sample=False))
    expected = pipe(generator=seeded())
    before = Modes.now()
    modes.clear()
    got = Run(pipe, check="off")(generator=seeded())
    assert relative(got, expected) < 1e-5
    assert len(set(modes)) == 1
    assert not modes[0].grad
    assert modes[0].inference == (mode == "inference_mode")
    assert Modes.now() == before
    assert before.grad
    assert not before.inference
    torch.ones(1, requires_grad=True).exp().backward()  # gradients work as before


def test_the_network_runs_under_autocast_of_the_loops_body() -> None:
    class Seen(Network):
        def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            return super().forward(hidden_states, timestep, condition, strength)

    pipe: Any = Loop(Seen(), Encoder(), diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = pipe(generator=seeded())
        assert relative(Run(pipe)(generator=seeded()), expected) < 1e-5
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_context_variables_are_those_of_the_caller(loop: Any) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    token = variable.set("caller")
    seen: set[str] = set()

    def body(pipe: Any, i: int, t: Tensor, x: Tensor, m: Tensor) -> Tensor:
        seen.add(variable.get())
        return m

    Run(loop)(generator=seeded(), body=body)
    variable.reset(token)
    assert seen == {"caller"}


class Ended(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Ended])
@pytest.mark.parametrize("place", ["body", "network", "prelude", "end"])
def test_an_error_ends_all_lanes_and_restores_everything(loop: Any, error: type[BaseException], place: str) -> None:
    lanes: list[weakref.ref[Any]] = []
    ended: list[int] = []

    def fail(*_: Any) -> Any:
        raise error("planted")

    def body(pipe: Any, i: int, t: Tensor, x: Tensor, m: Tensor) -> Tensor:
        lane: Any = greenlet.getcurrent()
        lanes.append(weakref.ref(lane))
        return fail() if i == 7 and place == "body" else m

    def before(pipe: Any, x: Tensor) -> Tensor:
        lane: Any = greenlet.getcurrent()
        return fail() if lane.number == 3 and place == "prelude" else x

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            ended.append(1)

        def update(self) -> None:
            pass

    loop.progress_bar = lambda total: Bar()
    if place == "network":
        forward = loop.network.forward
        loop.network.forward = lambda *args, **kwargs: fail() if len(args[0]) > 4 else forward(*args, **kwargs)
    attributes, before_modes = set(vars(loop)), Modes.now()
    expected: Any = Unsupported if place == "network" and error is RuntimeError else error
    with pytest.raises(expected, match="planted") as caught:
        Run(loop, check="off")(generator=seeded(), body=body, before=before, after=fail if place == "end" else None)
    assert any(entry.name == "fail" for entry in caught.traceback) or place == "network"
    assert Modes.now() == before_modes
    assert set(vars(loop)) == attributes
    assert "enumerate" not in globals()
    assert len(ended) >= 1
    del caught
    gc.collect()
    assert all(ref() is None for ref in lanes)


def test_lanes_are_freed_with_their_tensors_at_the_end(loop: Any) -> None:
    tensors: list[weakref.ref[Tensor]] = []

    def body(pipe: Any, i: int, t: Tensor, x: Tensor, m: Tensor) -> Tensor:
        tensors.append(weakref.ref(x))
        return m

    gc.collect()
    gc.disable()  # reference counts alone have to do
    try:
        Run(loop, check="off")(generator=seeded(), body=body)
        assert sum(ref() is not None for ref in tensors) == 0
    finally:
        gc.enable()


def test_random_numbers_of_the_loops_own_are_refused(loop: Any) -> None:
    for draw in (lambda g: torch.rand(()), lambda g: torch.rand((), generator=g)):
        generator = seeded()
        with pytest.raises(Unsupported, match="draws random numbers"):
            Run(loop)(generator=generator, body=lambda pipe, i, t, x, m, d=draw, g=generator: m + d(g))


def test_loops_of_another_kind_are_refused(loop: Any) -> None:
    def twice(pipe: Any, i: int, t: Tensor, x: Tensor) -> Tensor:
        return pipe.scheduler.step(x, t, x).prev_sample

    def again(pipe: Any, x: Tensor) -> Tensor:
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(x, t, x).prev_sample
        return x

    def differs(pipe: Any, x: Tensor) -> Tensor:
        pipe.encoder(x) if getattr(greenlet.getcurrent(), "number", 0) else None
        return x

    def another(pipe: Any, x: Tensor) -> Tensor:
        return x + getattr(greenlet.getcurrent(), "number", 0)

    def pairs(pipe: Any, x: Tensor) -> Tensor:
        for t, _ in zip(pipe.scheduler.timesteps, itertools.count(), strict=False):
            x = pipe.scheduler.step(x, t, x).prev_sample
        return x

    for hooks, message in (
        ({"edit": twice}, "several steps"),
        ({"after": again}, "second loop"),
        ({"before": differs}, "another way"),
        ({"before": another}, "another state"),
        ({"before": pairs}, "beside a count"),
        ({"steps": 4, "body": lambda pipe, i, t, x, m: m[:, :3]}, "output has shape"),
    ):
        with pytest.raises(Unsupported, match=message):
            Run(loop)(generator=seeded(), **hooks)


def test_a_loop_of_one_step_is_one_pass(loop: Any) -> None:
    expected = loop(generator=seeded(), steps=1)
    run = Run(loop)
    assert relative(run(generator=seeded(), steps=1), expected) < 1e-6  # rounding of one step
    assert run.solver.passes == 1


def test_an_iteration_before_the_loop_is_walked_in_order(loop: Any) -> None:
    def before(pipe: Any, x: Tensor) -> Tensor:
        index = {int(t): i for i, t in enumerate(pipe.scheduler.timesteps)}
        assert list(index.values()) == list(range(12))
        return x

    def body(pipe: Any, i: int, t: Tensor, x: Tensor, m: Tensor) -> Tensor:
        times = [int(u) for u in pipe.scheduler.timesteps]  # and within its body
        assert times[i] == int(t)
        assert [k for k, _ in enumerate(pipe.scheduler.timesteps)] == list(range(12))
        return m

    def edit(pipe: Any, i: int, t: Tensor, x: Tensor) -> Tensor:
        assert len(list(pipe.scheduler.timesteps[i : i + 2])) == min(2, 12 - i)  # and after its step
        return x

    expected = loop(generator=seeded())
    assert relative(Run(loop)(generator=seeded(), before=before, body=body, edit=edit), expected) < 1e-5


def test_a_condition_that_the_loop_changes_in_place_reaches_each_row_with_its_own_value() -> None:
    """Every lane hands over the same object in each pass. A wrong value would show in the number of rounds alone."""

    class Watched(Network):
        def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
            node = 11 - (timestep.expand(len(hidden_states)) - 1) // 83
            expected = torch.where(node < 9, 0.0, node / 12)[:, None]
            assert torch.equal(condition.expand(len(hidden_states), 5), expected.expand(-1, 5))
            return super().forward(hidden_states, timestep, condition, strength)

    class Marked(Bare):
        @torch.no_grad()
        def __call__(self, generator: Any) -> Tensor:
            self.scheduler.set_timesteps(12)
            x = randn_tensor((2, 5), generator=generator)
            condition = torch.zeros(2, 5)
            for i, t in enumerate(self.scheduler.timesteps):
                condition.fill_(0.0 if i < 9 else i / 12)
                x = self.scheduler.step(self.network(x, t, condition), t, x).prev_sample
            return x

    pipe: Any = Marked(Watched(), Encoder(), diffusers.DDIMScheduler(clip_sample=False, steps_offset=1))
    expected = pipe(generator=seeded())
    run = Run(pipe, paradiff.parasolver(window=4, tolerance=1e-5, warmup=1))
    assert relative(run(generator=seeded()), expected) < 1e-5


def test_random_numbers_are_drawn_between_the_starts_of_lanes_as_in_the_plain_call(loop: Any) -> None:
    """The scheduler draws from the global generator, after the loop's start."""
    loop.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    torch.manual_seed(3)
    expected, after = loop(), torch.rand(3)
    torch.manual_seed(3)
    assert relative(Run(loop, paradiff.parasolver(window=3, tolerance=1e-5))(), expected) < 1e-5
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("kind", ["none", "new", "in place"])
def test_the_solver_is_shown_what_the_loop_makes_of_its_states(loop: Any, kind: str) -> None:
    def edit(pipe: Any, i: int, t: Tensor, x: Tensor) -> Tensor:
        if kind == "none":
            return x
        x = x.clone() if kind == "new" else x
        x[:, 0] = i
        return x

    run = Run(loop)
    tell = run.solver.tell

    def spy(outputs: Tensor, states: Tensor, *others: Any) -> None:
        assert torch.equal(states, run.solver.states) == (kind == "none")
        if kind != "none":
            assert torch.equal(states[:, 0, 0], (run.solver.nodes - 1).to(states.dtype))
            assert torch.equal(states[..., 1:], run.solver.states[..., 1:])
        tell(outputs, states, *others)

    run.solver.tell = spy
    run(generator=seeded(), edit=edit)


def test_one_progress_bar_is_shown(loop: Any) -> None:
    shown: list[bool] = []
    made = vars(tqdm)["__init__"]

    def before(pipe: Any, x: Tensor) -> Tensor:
        shown.append(not tqdm(total=1, leave=False).disable)
        return x

    with one_bar(), one_bar():
        Run(loop, check="off")(generator=seeded(), before=before)
    assert shown == [True] + [False] * 10
    assert vars(tqdm)["__init__"] is made


def test_values_are_compared_when_lanes_start_and_not_again(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison waits for the device."""
    compared: list[int] = []
    equal = coalesce._equal
    monkeypatch.setattr(coalesce, "_equal", lambda columns: (compared.append(len(columns)), equal(columns))[1])
    Run(loop, check="off")(generator=seeded())
    assert compared[0] == 3  # state, time, condition
    assert set(compared[1:]) == {0}


def test_equal_tensors_in_arguments_of_another_structure_do_not_join() -> None:
    """As `text` and `image` beside each other, or one of them twice: what is given by another name is another argument."""
    network, x, text = torch.nn.Identity(), torch.ones(2, 3), torch.zeros(2, 3)

    def call(*args: Any, **kwargs: Any) -> coalesce.NetworkCall:
        return coalesce.NetworkCall.of(network, network.forward, args, kwargs, 0, {})

    first = call(x, text=text)
    assert first.joins(call(x.clone(), text=text.clone()))
    others = [call(x, image=text), call(x, text=[text]), call(x, text), call(x, text=(text,)), call([x], text=text)]
    for other in others:
        assert not first.joins(other)
        assert not other.joins(first)
        other.spec = first.spec  # Planted: a structure that is taken for equal.
        assert first.joins(other)


def test_a_lane_that_starts_late_is_taken_to_pass_what_all_others_do() -> None:
    """Whether it does is told beside, without a wait; what others do not have in common is compared as ever."""
    network, flags = Network(), []
    coalescer = coalesce.Coalescer(Batching(check="off"), flags)
    known: list[dict[Any, Any]] = [{}, {}, {}, {}]
    conditions = [torch.ones(2, 5) for _ in range(4)]

    def together(lanes: list[int]) -> list[Any]:
        calls = [
            coalesce.NetworkCall.of(
                network, network.forward, (torch.full((2, 5), k), torch.tensor(k), conditions[k]), {}, 0, known[k]
            )
            for k in lanes
        ]
        return coalescer(calls)

    together([0, 1])
    assert flags == []
    for lane, same in ((2, True), (3, False)):
        conditions[lane] = torch.full((2, 5), 1.0 if same else 2.0)
        found = together([0, 1, lane])
        assert [(bool(flag), reason) for flag, reason in flags] == [(same, coalesce.OTHER_INPUT)]
        assert torch.allclose(found[2], network(torch.full((2, 5), lane), torch.tensor(lane), conditions[0]))
        flags.clear()
    together([0, 1, 2])
    assert flags == []  # by identity from then on


def test_a_lane_that_starts_late_with_another_input_is_refused(loop: Any) -> None:
    started = torch.zeros(1, dtype=torch.int64)  # which the ledger of what a loop counts does not look into

    def before(pipe: Any, x: Tensor) -> Tensor:
        started.add_(1)
        if started == 8:  # planted: after the window has opened
            sys._getframe(1).f_locals["condition"].add_(1.0)
        return x

    with pytest.raises(Unsupported, match="a network is given another input"):
        Run(loop, paradiff.quasi_newton(window=3))(generator=seeded(), before=before)


def test_times_are_made_once_for_all_lanes(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    own = diffusers.DDIMScheduler.set_timesteps
    monkeypatch.setattr(
        diffusers.DDIMScheduler,
        "set_timesteps",
        lambda self, *args, **kwargs: (made.append(args), own(self, *args, **kwargs))[1],
    )
    plain = loop(generator=seeded())
    made.clear()
    assert relative(Run(loop, check="off")(generator=seeded()), plain) < 1e-5
    assert made == [(12,)]


class Conditioned(torch.nn.Module):
    """A network with a long conditioning."""

    def forward(self, x: Tensor, t: Any, cond: Tensor) -> Tensor:
        level = torch.as_tensor(t).expand(len(x)).to(x.dtype)[:, None] / 1000
        return 0.5 * torch.tanh(x) * level + 0.1 * cond.mean(1, keepdim=True)


def conditioned(writes: bool) -> Callable[[Tensor], Tensor]:
    """A loop with the number of its step, of guidance by doubled rows, which may write into its conditioning."""
    network, scheduler = Conditioned(), cast(Any, diffusers.DDIMScheduler(1000))

    def loop(x: Tensor) -> Tensor:
        cond = torch.cat([torch.zeros(1, 512), torch.ones(1, 512)])
        scheduler.set_timesteps(20)
        for i, t in enumerate(scheduler.timesteps):
            if writes:
                cond.mul_(1 + 0.01 * i)
            low, high = network(torch.cat([x, x]), t, cond).chunk(2)
            x = scheduler.step(low + (1 + 0.01 * i) * (high - low), t, x).prev_sample
        return x

    return loop


def test_lanes_hold_what_is_equal_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside that of the user's own call."""
    places: list[list[int]] = []
    own = Coalescer.__call__

    def noted(self: Coalescer, calls: list[NetworkCall]) -> list[Any]:
        found = own(self, calls)
        places.append([leaf.data_ptr() for call in calls for leaf in call.leaves if leaf is not None and leaf.numel() == 1024])
        return found

    monkeypatch.setattr(Coalescer, "__call__", noted)
    loop, x = conditioned(False), torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = loop(x)
        run = paradiff.parallelize(loop, paradiff.quasi_newton(window=8, tolerance=1e-5))
        found = run(x)
    assert run.report.executor == "lanes"
    assert float((found - wanted).abs().max()) < 1e-4
    assert max(map(len, places)) >= 8
    assert len({place for of_a_call in places for place in of_a_call}) == 2


def test_a_loop_that_writes_into_its_conditioning_is_the_plain_one() -> None:
    loop, x = conditioned(True), torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = loop(x)
        with pytest.warns(RuntimeWarning, match="was called sequentially"):
            found = paradiff.parallelize(loop, paradiff.quasi_newton(window=8, tolerance=1e-5))(x)
    assert torch.equal(found, wanted)


def test_a_lane_that_writes_into_what_others_hold_is_seen() -> None:
    def call(cond: Tensor, *, users: bool) -> NetworkCall:
        return NetworkCall(network, network.forward, [torch.randn(1, 4), 5, cond], spec, 0, {}, users)

    network = Conditioned()
    spec = _pytree.tree_flatten(((torch.zeros(1, 4), 5, torch.zeros(1, 512)), {}))[1]
    conds = [torch.ones(1, 512) for _ in range(4)]
    coalescer = Coalescer(Batching(check="off"))
    calls = [call(cond, users=not k) for k, cond in enumerate(conds)]
    coalescer(calls)
    assert [cond.data_ptr() == conds[1].data_ptr() for cond in conds] == [False, True, True, True]
    coalescer(calls)
    conds[3].mul_(2)
    with pytest.raises(Unsupported, match="writes into an input of a network"):
        coalescer(calls)
