# SPDX-License-Identifier: Apache-2.0
"""The scheduler a pipeline's loop sees is the user's, but for the iteration, the scaling and the step."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.deprecated import ScoreSdeVpScheduler
from torch import Tensor

from paradiff.errors import NeedsLanes, Unsupported
from paradiff.pipelines.loop.scheduler_proxy import first_index, make_proxy, place, real_scheduler, seal
from paradiff.pipelines.loop.timesteps import Iterations, RoundTimesteps
from paradiff.pipelines.tensor.windowed import Windowed

SCHEDULERS = [
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.PNDMScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.EDMEulerScheduler,
    diffusers.LCMScheduler,
]


every = pytest.mark.parametrize("make", SCHEDULERS, ids=lambda make: make.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers calls numpy


class Spy:
    """A loop that writes down what it is asked."""

    def __init__(self) -> None:
        self.iterations = Iterations()
        self.calls: list[Any] = []

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        assert type(timesteps) is Tensor
        return self.iterations.walk(timesteps, lambda: iter([]))

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        self.calls.append(("scale", sample, timestep))
        return sample

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        if self.iterations.timesteps is not None:
            self.iterations.begin()
        self.calls.append(("step", output, timestep, sample, kwargs))
        return (sample,)


def state(scheduler: Any) -> dict[str, str]:
    return {k: repr(v.tolist() if isinstance(v, Tensor) else v) for k, v in vars(scheduler).items()}


@every
def test_a_proxy_is_the_users_in_every_other_respect(make: Any) -> None:
    scheduler = make()
    before = state(scheduler)
    proxy = make_proxy(scheduler, Spy())
    real = copy.deepcopy(scheduler)
    assert type(proxy) is proxy.__class__ is type(scheduler)  # loops ask for it
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(proxy, method)) == inspect.signature(getattr(scheduler, method))
    for one in (proxy, real):
        one.set_timesteps(10)
    assert proxy.config == real.config
    assert proxy.order == real.order
    assert getattr(proxy, "init_noise_sigma", None) == getattr(real, "init_noise_sigma", None)
    assert torch.equal(proxy.timesteps, real.timesteps)
    assert proxy.timesteps.dtype == real.timesteps.dtype
    if hasattr(real, "sigmas"):
        assert torch.equal(proxy.sigmas, real.sigmas)
    if hasattr(real, "index_for_timestep"):
        for t in real.timesteps:
            assert proxy.index_for_timestep(t) == real.index_for_timestep(t)
    x, noise, times = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), real.timesteps[[3, 5]]
    for method in ("add_noise", "get_velocity", "scale_noise"):
        if hasattr(real, method):
            order = (x, times, noise) if method == "scale_noise" else (x, noise, times)
            assert torch.equal(getattr(proxy, method)(*order), getattr(real, method)(*order))
    assert type(type(proxy).from_config(proxy.config)) is type(scheduler)
    assert [c.__name__ for c in proxy.compatibles] == [c.__name__ for c in scheduler.compatibles]
    assert state(scheduler) == before


@every
def test_the_real_scheduler_is_the_users_class_and_steps_as_it_does(make: Any) -> None:
    scheduler = make()
    loop = Spy()
    proxy = make_proxy(scheduler, loop)
    reference = copy.deepcopy(scheduler)
    for one in (proxy, reference):
        one.set_timesteps(10)
        if hasattr(one, "set_begin_index"):
            one.set_begin_index(2)
    real = real_scheduler(proxy)
    assert type(real) is type(scheduler)
    assert type(real.timesteps) is Tensor
    assert real.config == reference.config
    x, m = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    results = []
    for one in (real, reference):
        if hasattr(one, "scale_model_input"):
            one.scale_model_input(x, one.timesteps[2])
        noise = {"generator": torch.Generator().manual_seed(0)} if takes_noise(one) else {}
        y = one.step(m, one.timesteps[2], x, **noise)
        results.append(y.prev_sample)
    assert torch.equal(*results)
    assert loop.calls == []


def takes_noise(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def test_a_scheduler_that_has_its_timesteps_is_iterated_by_the_loop_at_once() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    proxy = make_proxy(scheduler, Spy())
    assert isinstance(proxy.timesteps, RoundTimesteps)
    assert not isinstance(scheduler.timesteps, RoundTimesteps)


def test_timesteps_hold_their_values_and_give_plain_tensors() -> None:
    loop = Spy()
    values = torch.tensor([900, 600, 300, 0])
    timesteps = RoundTimesteps.wrap(values, loop)
    assert len(timesteps) == 4
    assert timesteps.tolist() == values.tolist()
    assert (timesteps.shape, timesteps.dtype, timesteps.device) == (values.shape, values.dtype, values.device)
    for plain in (
        timesteps[1],
        timesteps[-1:].repeat(2),
        timesteps[[1, 2]],
        timesteps[timesteps > 500],
        timesteps[::2],
        timesteps / 1000,
        1 - timesteps,
        timesteps == 300,
        (timesteps == 300).nonzero(),
        timesteps.max(),
        torch.cat([timesteps, timesteps]),
        torch.where(timesteps > 1, timesteps, 0),
        timesteps[None],
        timesteps.unbind()[0],
    ):
        assert type(plain) is Tensor
    assert timesteps.cpu().numpy().tolist() == values.tolist()


def test_a_run_of_timesteps_stays_with_the_loop() -> None:
    loop = Spy()
    timesteps = RoundTimesteps.wrap(torch.tensor([900, 600, 300, 0]), loop)
    for run in (
        timesteps[1:],
        timesteps[:-1],
        timesteps[1:][:2],
        timesteps.to("cpu"),
        timesteps.to(torch.float64),
        timesteps.float(),
        timesteps.clone(),
        timesteps.flip(0),
        torch.flip(timesteps, (0,)),
        copy.deepcopy(timesteps),
    ):
        assert isinstance(run, RoundTimesteps)
        assert run.handler is loop
    assert [int(t) for t in reversed(timesteps)] == [0, 300, 600, 900]


def test_an_iteration_is_the_loop_once_a_step_comes_between_two_turns() -> None:
    loop = Spy()
    proxy = make_proxy(diffusers.DDIMScheduler(), loop)
    proxy.set_timesteps(5)
    assert [int(t) for t in proxy.timesteps] == [800, 600, 400, 200, 0]
    assert all(type(t) is Tensor and t.ndim == 0 for t in proxy.timesteps)
    next(iter(proxy.timesteps))  # an iteration that is given up
    seen = []
    for t in proxy.timesteps[1:]:
        assert [int(u) for u in proxy.timesteps[:2]] == [800, 600]  # within the loop's body
        assert loop.iterations.begin().tolist() == [600, 400, 200, 0]
        seen.append(int(t))
        proxy.step(torch.zeros(1), t, torch.zeros(1))
    assert seen == [600]  # Spy's rounds are none


def test_a_first_step_late_in_the_loop_is_refused() -> None:
    loop = Spy()
    proxy = make_proxy(diffusers.DDIMScheduler(), loop)
    with pytest.raises(Unsupported, match="does not walk over"):
        loop.iterations.begin()
    times = iter(proxy.timesteps)
    next(times)
    next(times)
    with pytest.raises(Unsupported, match="iteration number 2"):
        loop.iterations.begin()


def test_step_is_taken_by_position_and_by_name() -> None:
    loop = Spy()
    proxy = make_proxy(diffusers.DDIMScheduler(), loop)
    m, x, t = torch.ones(2), torch.zeros(2), torch.tensor(3)
    proxy.step(m, t, x, 0.5, generator=None)
    proxy.step(sample=x, timestep=t, model_output=m, return_dict=False)
    proxy.scale_model_input(x, timestep=t)
    first, second, scaled = loop.calls
    assert first[:4] == second[:4] == ("step", m, t, x)
    assert first[4] == {"eta": 0.5, "generator": None}
    assert second[4] == {"return_dict": False}
    assert scaled == ("scale", x, t)
    with pytest.raises(TypeError, match="unexpected"):
        proxy.step(m, t, x, nonsense=1)


def test_another_kind_of_step_is_refused() -> None:
    with pytest.raises(Unsupported, match="step takes model_output, old_pred_original_sample, timestep first"):
        make_proxy(diffusers.CogVideoXDPMScheduler(), Spy())
    with pytest.raises(Unsupported, match="takes nothing first"):
        make_proxy(ScoreSdeVpScheduler(), Spy())
    proxy = make_proxy(diffusers.RePaintScheduler(), Spy())
    with pytest.raises(Unsupported, match="undo_step"):
        proxy.undo_step(torch.zeros(1), 3)
    with pytest.raises(Unsupported, match="already belongs"):
        make_proxy(proxy, Spy())


def test_a_pipelines_copy_of_its_scheduler_is_refused() -> None:
    with pytest.raises(Unsupported, match="copies its scheduler within its call"):
        copy.deepcopy(make_proxy(diffusers.DDIMScheduler(), Spy()))


def test_the_copys_containers_are_its_own() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    proxy = make_proxy(scheduler, Spy())
    proxy.model_outputs[0] = 1
    proxy.set_timesteps(7)
    assert scheduler.model_outputs == [None, None]
    assert len(scheduler.timesteps) == 4


def test_noise_added_within_the_loop_has_the_level_of_the_step() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    proxy, real = make_proxy(scheduler, Spy()), copy.deepcopy(scheduler)
    x, noise = torch.randn(1, 4), torch.randn(1, 4)
    for one in (proxy, real):
        one.set_timesteps(8)
        one.set_begin_index(2)
    base = first_index(proxy, proxy.timesteps[2])
    assert base == 2
    for i, t in enumerate(real.timesteps[2:-1]):
        real.step(noise, t, x)
        place(proxy, base + i + 1)
        after: Any = real.timesteps[i + 3].reshape(1)
        assert torch.equal(proxy.add_noise(x, noise, after), real.add_noise(x, noise, after))
    place(proxy, base + Windowed.wrap(torch.tensor([1, 4]), object()))
    at = proxy.sigmas[proxy.step_index]  # of all states of a window at once
    assert at.window.tolist() == real.sigmas[[base + 1, base + 4]].tolist()
    last: Any = real.timesteps[-1:]
    try:
        noised = proxy.add_noise(x, noise, last)
    except NeedsLanes:
        pass  # where torch wants numbers in a list of indices
    else:
        for state, step in zip(noised.window, (1, 4), strict=True):
            real._step_index = base + step
            assert torch.equal(state, real.add_noise(x, noise, last))
    assert real_scheduler(proxy).step_index is None


@pytest.mark.parametrize("name", ["step", "scale_model_input", "set_timesteps"])
def test_a_method_that_somebody_has_replaced_is_refused(name: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    setattr(scheduler, name, functools.partial(getattr(scheduler, name)))
    with pytest.raises(Unsupported, match=f"the {name} of this EulerDiscreteScheduler object"):
        make_proxy(scheduler, Spy())


def test_the_first_index_is_looked_up_where_the_pipeline_does_not_set_it() -> None:
    proxy = make_proxy(diffusers.EulerDiscreteScheduler(), Spy())
    proxy.set_timesteps(8)
    assert first_index(proxy, proxy.timesteps[3]) == 3
    assert first_index(make_proxy(diffusers.DDIMScheduler(), Spy()), torch.tensor(0)) is None


USES = {
    "an item": lambda held: held[-1],
    "its truth": lambda held: bool(held),
    "a comparison": lambda held: held < 2,
    "an attribute": lambda held: held.shape,
    "a sum": lambda held: 1 + held,
    "a sum with a tensor": lambda held: torch.ones(2) + held,
    "a torch function": lambda held: torch.add(torch.ones(2), held),
    "its items": lambda held: list(held),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_a_step_changes_is_sealed(use: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    proxy = make_proxy(scheduler, Spy())
    seal(proxy, {"model_outputs", "lower_order_nums", "nothing of the kind"})
    for name in ("model_outputs", "lower_order_nums"):
        with pytest.raises(Unsupported, match=f"the loop reads the scheduler's {name}, which changes from step to step"):
            use(getattr(proxy, name))
    assert "model_outputs" not in vars(real_scheduler(proxy))
    assert scheduler.lower_order_nums == 0
