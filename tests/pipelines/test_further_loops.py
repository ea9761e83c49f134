# SPDX-License-Identifier: Apache-2.0
"""Loops of further kinds: each gives the plain call's sample in parallel, or is refused for its own reason."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary, Net

from paradiff import parallelize, parasolver
from paradiff.pipelines.loop.source import obstacles

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy

ON_12 = "\n        if i == 12: self.scheduler."
PLAIN = """
def loop(self, x, generator):
    SETUP
    for i, t in enumerate(self.scheduler.timesteps):
        BEFORE
        v = self.net(x, t)
        WITHIN
        x = self.scheduler.step(v, t, x)[0]
        AFTER
    return x RESULT
"""


def written(**parts: str) -> str:
    """PLAIN with these parts."""
    text = PLAIN
    for name in ("setup", "before", "within", "after"):
        text = text.replace(name.upper(), parts.get(name, "pass"))
    return text.replace(" RESULT", parts.get("result", ""))


HELPERS = {
    "helper": "def advance(self, v, t, x):\n    return self.scheduler.step(v, t, x)[0]\n"
    "def loop(self, x, generator):\n    for t in self.scheduler.timesteps:\n"
    "        x = self.advance(self.net(x, t), t, x)\n    return x\n",
    "step by another name": "def loop(self, x, generator):\n    step = self.scheduler.step\n"
    "    for t in self.scheduler.timesteps:\n        v = self.net(x, t); x = step(v, t, x)[0]\n    return x\n",
}
FOLLOWED = {
    "last output": written(result="- 0.1 * v"),
    "last output in an object": written(setup="box = SimpleNamespace(v=None)", within="box.v = v", result="- 0.1 * box.v"),
    "last state": written(before="old = x", result="+ 0.3 * (x - old)"),
    "last state of a loop that edits": written(before="old = x", after="x = x + 0.05 * (i % 5)", result="+ 0.3 * (x - old)"),
    "state before the step by the network": written(before="x = x + 0.1 * self.net(x, t)", within="v = v * (1 - 0.01 * i)"),
}
REFUSED = {
    "number": (written(setup="box = SimpleNamespace(k=0.0)", within="box.k += 0.5; v = v if box.k < 6 else 0.8 * v"), "box.k"),
    "text": (
        written(setup="box = SimpleNamespace(s='')", within="box.s += 'a'; v = v if len(box.s) < 12 else 0.8 * v"),
        "box.s",
    ),
    "tensor": (written(setup="n = torch.zeros(())", within="n.add_(1); v = torch.where(n > 12, 0.8, 1.0) * v"), "n (grows|is)"),
    "sum of states": (
        written(setup="box = SimpleNamespace(s=0 * x)", after="box.s = box.s + x", result="+ 0.02 * box.s"),
        "the norm of box.s",
    ),
    "one state": (written(after="\n        if i == 12:\n            mid = x", result="+ mid"), "leaves mid to what follows"),
    "comprehension": (
        "def loop(self, x, generator):\n"
        "    out = [x := self.scheduler.step(self.net(x, t), t, x)[0] for t in self.scheduler.timesteps]\n"
        "    return out[-1] + 0.1 * torch.stack(out).mean(0)\n",
        "keeps the states of all passes",
    ),
    "generator function": (
        "def states(self, x):\n    for t in self.scheduler.timesteps:\n"
        "        x = self.scheduler.step(self.net(x, t), t, x)[0]\n        yield x\n"
        "def loop(self, x, generator):\n    total = 0\n    for x in self.states(x):\n        total = total + x\n"
        "    return x + 0.02 * total\n",
        "yields the states of its passes",
    ),
    "network's setting": (
        written(before="self.net.gain = 0.6 if 5 <= i < 9 else 1.0"),
        "the loop changes Gained.gain, which a network reads",
    ),
    "shared setting": (
        written(before="STORE['w'] = 0.7 if 5 <= i < 9 else 1.0", within="v = v * STORE['w']"),
        "STORE.'w'. is set",
    ),
    "levels": (
        written(before=ON_12 + "alphas_cumprod = self.scheduler.alphas_cumprod ** 1.1"),
        "alphas_cum",
    ),
    "levels in place": (
        written(before=ON_12 + "alphas_cumprod.pow_(1.1)"),
        "alphas_cumprod of its",
    ),
    "configuration": (
        written(before=ON_12 + "register_to_config(clip_sample=True)"),
        "the configuration of its scheduler",
    ),
    "clean data": (
        written().replace("x = self.scheduler.step(v, t, x)[0]", "o = self.scheduler.step(v, t, x); x = o[0] + 0.02 * o[1]"),
        "reads more of a step's result",
    ),
    "fresh generators": (
        written().replace("step(v, t, x)", "step(v, t, x, generator=torch.Generator().manual_seed(i))"),
        "another generator from pass to pass",
    ),
    "scheduler replaced": (
        written(before="\n        if i == 15: self.scheduler = type('Other', (), {})()\n        time = t").replace(
            "self.scheduler.step", "getattr(self.scheduler, 'step', lambda v, t, x: (x,))"
        ),
        "replaces its pipeline's scheduler, by a Other",
    ),
    "scheduler copied": (
        written(setup="import copy; other = copy.deepcopy(self.scheduler)").replace("x = self.scheduler", "x = other"),
        "copies its scheduler within its call",
    ),
    "arguments used up": (
        written(setup="more = [{'scale': 1.0}] * 30", before="one = more.pop()").replace("x, t)\n", "x, t, **one)\n", 1),
        r"IndexError \(pop from empty list\) where step .* is passed again; len\(more\) shrinks",
    ),
    "early end": (written(after="\n        if x.norm() < 4: break"), "ends before its last time, by a break"),
    "early end by count": (written(after="\n        if i == 20: break"), "ends before its last time, by a break"),
    "time left out": (written(before="\n        if i % 3 == 2: continue"), "passes over a time without a step"),
    "step in a pool": (
        written(setup="from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(1)").replace(
            "self.scheduler.step(v, t, x)", "pool.submit(self.scheduler.step, v, t, x).result()"
        ),
        "takes its scheduler's step in another thread",
    ),
    "states in one tensor": (
        written(setup="xs = x.new_zeros(len(self.scheduler.timesteps) + 1, 2, 8)").replace(
            "x = self.scheduler.step(v, t, x)[0]", "xs[i + 1] = self.scheduler.step(v, t, x)[0]; x = xs[i + 1]"
        ),
        "write their states into xs, one by one",
    ),
    "states in a list": (
        "def loop(self, x, generator):\n    xs = [x]\n    for t in self.scheduler.timesteps:\n"
        "        xs.append(self.scheduler.step(self.net(xs[-1], t), t, xs[-1])[0])\n    return xs[-1]\n",
        "write their states into xs, one by one",
    ),
    "network's dtype": (
        written(before="\n        if i == 15: self.net.double()").replace(
            "self.net(x, t)", "self.net(x.to(next(self.net.parameters()).dtype), t).float()"
        ),
        "depends on the passes before",
    ),
    "times as numbers": (
        written().replace("timesteps)", "timesteps.tolist())"),
        "walks over something else than scheduler.timesteps",
    ),
}


class Gained(Net):
    """A network with a setting and optional arguments."""

    gain: float
    seen: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.seen = 1.0, []

    def forward(self, x: torch.Tensor, t: Any, scale: float = 1.0, shift: Any = None) -> torch.Tensor:
        v = scale * self.gain * super().forward(x, torch.as_tensor(t))
        return v if shift is None else v + shift


class NearOne(Gained):
    """A network whose outputs are near 1."""

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1 + 0.1 * super().forward(x, t)


class Listing(Gained):
    """A network that lists what it gave, and reads none of it."""

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        v = super().forward(x, t)
        self.seen.append(float(v.mean()))
        return v


def both(text: str, executor: Any, scheduler: Any, network: Any = Gained, window: int | None = None) -> tuple[Any, Any, Any]:
    """The plain sample, the parallel one, and the report."""
    method = parasolver(tolerance=1e-4) if window is None else parasolver(window=window, tolerance=1e-4)
    kind = Adversary.of(text)
    calls: list[Any] = []
    call: Any = None
    for parallel in (False, True):
        pipe = kind(network(), scheduler())
        call = parallelize(pipe, method, executor=executor) if parallel else pipe
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls.append(call(generator=torch.Generator().manual_seed(3)))
    return calls[0], calls[1], call.report


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("name", HELPERS)
def test_a_step_in_a_helper_is_followed(name: str, executor: Any) -> None:
    plain, found, report = both(HELPERS[name], executor, lambda: diffusers.DDIMScheduler(clip_sample=False))
    assert report.executor == executor, report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


@pytest.mark.parametrize("window", [None, 2, 3, 6, 8, 12])
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_the_last_pass_leaves_is_that_of_the_plain_call(name: str, window: int | None) -> None:
    scheduler = lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # noqa: E731
    plain, found, report = both(FOLLOWED[name], "lanes", scheduler, window=window)
    assert report.executor == "lanes", report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


LEAVES = {
    "pipeline": (written(within="self.last = v"), lambda pipe: pipe.last),
    "network": (written(within="self.net.last = v"), lambda pipe: pipe.net.last),
    "list in the pipeline": (written(setup="self.last = [0, 0]", within="self.last[1] = v"), lambda pipe: pipe.last[1]),
}


@pytest.mark.parametrize("where", LEAVES)
def test_what_a_pass_leaves_in_an_object_is_one_states(where: str) -> None:
    text, left = LEAVES[where]
    found = []
    for parallel in (False, True):
        pipe = Adversary.of(text)(Gained(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        call = parallelize(pipe, parasolver(tolerance=1e-4)) if parallel else pipe
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(generator=torch.Generator().manual_seed(3))
        found.append(left(pipe))
    assert type(found[1]) is torch.Tensor
    assert float((found[1] - found[0]).square().mean().sqrt()) <= 1e-3  # Ten times the tolerance.


def test_the_last_time_is_left_in_the_pipeline() -> None:
    pipe = Adversary.of(written(within="self.now = t"))(Gained(), FLOW())
    pipe(generator=torch.Generator().manual_seed(3))
    last = pipe.now
    call = parallelize(pipe, parasolver(tolerance=1e-4), executor="vector")
    call(generator=torch.Generator().manual_seed(3))
    assert call.report.executor == "vector"
    assert type(pipe.now) is torch.Tensor
    assert torch.equal(pipe.now, last)


PROMOTED = """
def loop(self, x, generator):
    x = x.half()
    for t in self.scheduler.timesteps:
        scaled = self.scheduler.scale_model_input(x, t)
        x = self.scheduler.step(self.net(scaled.float(), t), t, x, generator=generator)[0]
    return x
"""
FLOW = lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # noqa: E731


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("kind", ["FlowMatchEuler", "EulerAncestral", "LCM"])
def test_states_have_the_dtype_that_the_step_gives_them(kind: str, executor: Any) -> None:
    text = PROMOTED if kind != "FlowMatchEuler" else PROMOTED.replace("self.scheduler.scale_model_input(x, t)", "x")
    kinds = {"EulerAncestral": diffusers.EulerAncestralDiscreteScheduler, "LCM": diffusers.LCMScheduler}
    plain, found, report = both(text, executor, kinds.get(kind, FLOW))
    assert report.executor == executor, report.warnings
    assert plain.dtype == found.dtype == torch.float32
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error
    assert report.error_estimate.estimated_error <= 1e-4  # The tolerance, below what a state of 16 bits resolves.


def test_the_tolerance_is_one_that_states_of_16_bits_resolve() -> None:
    *_, report = both(
        PROMOTED.replace(", generator=generator", ""), "vector", diffusers.UniPCMultistepScheduler
    )  # Its step gives the state the dtype it had.
    assert "the tolerance was raised to 0.00976562" in report.warnings[0]


AWAY = "greenlet.getcurrent().parent and greenlet.getcurrent().parent.switch()"
SWITCHES = {
    "in a pass": written(setup="import greenlet", within=AWAY),
    "in its last pass": written(setup="import greenlet", after=f"\n        if i == 29: {AWAY}"),
    "after the loop": written(setup="import greenlet", result=f"+ 0 * int(bool({AWAY}))"),
}


@pytest.mark.parametrize("where", SWITCHES)
def test_a_call_that_leaves_its_greenlet_is_refused(where: str) -> None:
    plain, found, report = both(SWITCHES[where], "lanes", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(found, plain)
    assert "switches to another greenlet" in report.warnings[0]


AGAIN = """
def loop(self, x, generator):
    for _ in AROUND:
        for t in self.scheduler.timesteps:
            v = self.net(x, t)
            x = self.scheduler.step(v, t, x)[0]
        x = 0.5 * x
    return x
"""


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("around", ["range(2)", "self.scheduler.timesteps[:2]", "enumerate(self.scheduler.timesteps[:2])"])
def test_a_loop_that_is_run_again_by_one_around_it_is_refused(around: str, executor: Any) -> None:
    plain, found, report = both(AGAIN.replace("AROUND", around), executor, lambda: diffusers.DDIMScheduler(clip_sample=False))
    assert torch.equal(plain, found)
    assert "runs its loop a second time" in report.warnings[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_is_refused_for_what_it_does(name: str) -> None:
    text, reason = REFUSED[name]
    ddpm = name == "fresh generators"
    plain, found, report = both(
        text, "lanes", lambda: (diffusers.DDPMScheduler if ddpm else diffusers.DDIMScheduler)(clip_sample=False)
    )
    assert report.executor == "sequential"
    assert torch.equal(plain, found)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.warnings[0])


def test_two_values_that_a_helper_hands_on_are_named() -> None:
    text = HELPERS["helper"].replace("        x = self.advance(self.net(x, t), t, x)", "        x, m = self.advance(m, t, x)")
    assert obstacles(Adversary.of(text)) == ["its passes leave x, m to the next one"]


def test_a_callback_that_changes_a_networks_setting_is_refused() -> None:
    kind = Adversary.of(written())

    class Called(kind):
        def __call__(self, generator: Any = None, callback_on_step_end: Any = None) -> Any:
            return kind.__call__(self, generator)

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        pipe.net.gain = 0.5
        return tensors

    pipe = Called(Gained(), diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match=r"callback_on_step_end changed Gained\.gain after step 0"):
        parallelize(pipe, parasolver(), executor="lanes")(callback_on_step_end=callback)


@pytest.mark.parametrize("read", [False, True])
def test_a_list_in_a_network_is_memory_where_the_pipeline_reads_it(read: bool) -> None:
    text = written(result="+ sum(self.net.seen) / 30" if read else "")
    plain, found, report = both(text, "vector", diffusers.FlowMatchEulerDiscreteScheduler, Listing)
    assert report.executor == ("sequential" if read else "vector")
    if read:
        assert "a call of Listing changes Listing.seen" in report.warnings[0]
    assert float((found - plain).abs().max()) < (1e-6 if read else 0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        "x, t, 1 - 0.02 * i",
        "x, t, **({'shift': 0.1 * x} if i % 3 else {})",
        "x, t, **({'scale': 0.9} if i % 3 else {'shift': x})",
    ],
)
def test_network_calls_with_other_arguments_are_made_apart(arguments: str) -> None:
    text = written().replace("self.net(x, t)", f"self.net({arguments})")
    plain, found, report = both(text, "lanes", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert report.executor == "lanes", report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


NEXT_TIME = """
def loop(self, x, generator):
    times = self.scheduler.timesteps
    for i, t in enumerate(times):
        later = None if i + 1 == len(times) else times[i + 1]
        OTHERWISE
        x = self.scheduler.step(self.net(x, t), t, x, generator=generator, prev_timestep=later)[0]
    return x
"""


@pytest.mark.parametrize(
    ("otherwise", "reason"),
    [
        ("pass", None),
        (
            "later = t - 1 if i == 7 else later",
            "a prev_timestep that is not the time of its next pass",
        ),
        ("later = times[min(i + 2, len(times) - 1)]", "hands 'prev_timestep', a tensor"),
    ],
)
def test_a_step_that_is_given_the_time_of_the_next_pass_is_followed(otherwise: str, reason: str | None) -> None:
    plain, found, report = both(
        NEXT_TIME.replace("OTHERWISE", otherwise),
        "lanes",
        lambda: diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample=False),
    )
    if reason is None:
        assert report.executor == "lanes", report.warnings
        assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error
    else:
        assert torch.equal(plain, found)
        assert reason in report.warnings[0]


class Towards(diffusers.FlowMatchEulerDiscreteScheduler):
    """A scheduler for edits, whose step also takes the source."""

    def step(self, model_output: Any, timestep: Any, sample: Any, source: Any = None, **others: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        advanced = super().step(model_output, timestep, sample, **others)[0]
        return (advanced if source is None else 0.9 * advanced + 0.1 * source,)


SOURCES = {"a name": "source=source", "a place": "source", "of the state": "source=0.5 * x", "none": "source=None"}


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("given", SOURCES)
def test_a_step_that_takes_a_source_as_well_is_refused_by_it(given: str, executor: Any) -> None:
    text = written(setup="source = 0.3 * x").replace("v, t, x)", f"v, t, x, {SOURCES[given]})")
    plain, found, report = both(text, executor, lambda: Towards(shift=3.0))
    if given == "none":
        assert report.executor == executor
        assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error
    else:
        assert torch.equal(found, plain)
        assert "hands 'source', a tensor, to Towards.step: only numbers and switches have a table" in report.warnings[0]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_loop_that_takes_no_step_is_refused(executor: Any) -> None:
    text = written().replace("self.scheduler.timesteps)", "self.scheduler.timesteps[:0])")
    plain, found, report = both(text, executor, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(found, plain)
    assert "took no step" in report.warnings[0]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_what_follows_the_loop_may_call_networks(executor: Any) -> None:
    text = written(result="+ 0.1 * self.net(x, self.scheduler.timesteps[-1])")
    plain, found, report = both(text, executor, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert report.executor == executor
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


@pytest.mark.parametrize(
    "branch",
    [
        "if not v.abs().max() > 0: continue",
        "if not v.any(): break",
        "if v.std() == 0: raise RuntimeError('a constant output')",
        "v = v / v.std() if v.std() > 0 else self.net(-x, t)",
    ],
)
def test_a_branch_that_no_output_of_the_network_takes_leaves_a_loop_parallel(branch: str) -> None:
    text = written(within=branch + "; v = v * (1 + i / 100)")
    plain, found, report = both(text, "lanes", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), window=8)
    assert report.executor == "lanes", report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        ("continue", "passes over a time without a step, where half of the first step's outputs stand in for its networks'"),
        ("break", "by a break or a return, where half of the first step's outputs stand in for its networks'"),
    ],
)
def test_a_branch_that_the_plain_call_does_not_take_is_told_as_such(taken: str, reason: str) -> None:
    text = written(within=f"if v.norm() < 3: {taken}")  # 16 numbers near 1
    plain, found, report = both(text, "lanes", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), NearOne, 8)
    assert torch.equal(found, plain)
    assert reason in report.warnings[0]
