# SPDX-License-Identifier: Apache-2.0
"""The tiny pipelines are fit to test with: reproducible, finite, and moved by all that a sampler's network is moved by."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import pytest
import torch
from tiny import CASES
from torch import Tensor

CONDITIONED = [name for name, case in CASES.items() if case.other]
CLOCKS = ("timestep", "timesteps", "t")


@dataclasses.dataclass(frozen=True)
class Runs:
    """What a pipeline gave: with one seed, the same built anew and after another call, with another seed and condition."""

    first: Tensor
    again: Tensor
    reseeded: Tensor
    reconditioned: Tensor | None
    steps: int
    responses: dict[str, float]


@functools.cache
def runs(name: str) -> Runs:
    case = CASES[name]
    pipe = case.make()
    steps = 0
    step = pipe.scheduler.step

    # Pipelines read the signature of `step` to learn what to pass to it.
    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    calls: list[tuple[tuple, dict[str, Any]]] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    first = case.run(pipe)
    hook.remove()
    counted_steps = steps
    other = case.make()
    reseeded = case.run(other, seed=1)
    return Runs(
        first,
        case.run(other),
        reseeded,
        case.run(pipe, **case.other) if case.other else None,
        counted_steps,
        responses(network, *calls[len(calls) // 2]),
    )


def responses(network: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, float]:
    """How much the network's output changes, relative to its size, when its state or its time is halved."""
    named = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    named |= named.pop("kwargs", {})
    state = next(iter(named))
    clock = next(name for name in CLOCKS if name in named)

    def output(**changed: Any) -> Tensor:
        with torch.no_grad():
            result = network(**named | changed)[0]
        return torch.stack(result) if isinstance(result, list) else result

    def halved(name: str) -> Any:
        value = named[name]
        return [item / 2 for item in value] if isinstance(value, list) else value / 2

    plain = output()
    return {
        part: float((output(**{name: halved(name)}) - plain).norm() / plain.norm())
        for part, name in (("state", state), ("time", clock))
    }


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_built_anew_is_the_same_also_after_another_call(name: str) -> None:
    assert torch.equal(runs(name).first, runs(name).again)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_finite_and_not_constant(name: str) -> None:
    first = runs(name).first
    assert first.isfinite().all()
    assert first.std() > 0.05


# Each change is far above rounding, 1e-7, so that a method that confuses seeds, prompts, states or times is seen.


@pytest.mark.parametrize("name", CASES)
def test_another_seed_gives_another_output(name: str) -> None:
    assert distance(runs(name).first, runs(name).reseeded) > 0.1


@pytest.mark.parametrize("name", CONDITIONED)
def test_another_condition_gives_another_output(name: str) -> None:
    reconditioned = runs(name).reconditioned
    assert reconditioned is not None
    assert distance(runs(name).first, reconditioned) > 0.01


@pytest.mark.parametrize("part", ["state", "time"])
@pytest.mark.parametrize("name", CASES)
def test_the_network_follows(name: str, part: str) -> None:
    assert runs(name).responses[part] > 0.01


@pytest.mark.parametrize("name", CASES)
def test_the_loop_makes_the_stated_number_of_steps(name: str) -> None:
    assert runs(name).steps == CASES[name].steps


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Relative to the size of the first."""
    return (a - b).norm() / a.norm()
