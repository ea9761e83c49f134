# SPDX-License-Identifier: Apache-2.0
"""What networks of a pipeline return: tensors in containers are split into states; those within other objects are refused."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary, Net
from diffusers.utils import BaseOutput
from torch import Tensor

from paradiff import parallelize, parasolver

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy

LOOP = """
def loop(self, x, generator):
    for i, t in enumerate(self.scheduler.timesteps):
        out = self.net(x, t)
        x = self.scheduler.step(VALUE, t, x)[0]
    return x
"""


@dataclasses.dataclass
class Plain:
    sample: Tensor
    level: float


@dataclasses.dataclass
class Diffusers(BaseOutput):
    sample: Tensor
    level: float


class Slots:
    __slots__ = ("level", "sample")

    def __init__(self, sample: Tensor, level: float) -> None:
        self.sample, self.level = sample, level


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "Plain": lambda v: Plain(v, 1.0),
    "SimpleNamespace": lambda v: types.SimpleNamespace(sample=v, level=1.0),
    "Slots": lambda v: Slots(v, 1.0),
    "list": lambda v: [v, types.SimpleNamespace(sample=[{"sample": v}])],
    "function": lambda v: lambda: v,
}
SEEN: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda v: v,
    "a tuple": lambda v: (v, 1.0),
    "an output of diffusers": lambda v: Diffusers(v, 1.0),
    "an object without tensors beside": lambda v: (v, types.SimpleNamespace(level=1.0, scales=[1.0, 2.0])),
}
VALUES = {
    "Plain": "out.sample[:2]",
    "SimpleNamespace": "0.1 * x + out.sample.mean()",
    "Slots": "out.sample",
    "list": "out[0] + 0.01 * out[1].sample[0]['sample'].mean()",
    "function": "out()[:2]",
    "a tensor": "out",
    "a tuple": "out[0]",
    "an output of diffusers": "out.sample",
    "an object without tensors beside": "out[0] * out[1].level",
}
"""What a loop takes of them: rows that it would also find among those of a window."""


class Returning(Net):
    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.made(super().forward(x, t))


def called(name: str, executor: Any) -> tuple[Tensor, Tensor, Any, list[str]]:
    """The plain call, the parallel one, its report and its warnings."""
    kind = Adversary.of(LOOP.replace("VALUE", VALUES[name]))

    def made() -> Any:
        return kind(Returning((OTHERS | SEEN)[name]), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))

    plain = made()(generator=torch.Generator().manual_seed(3))
    run = parallelize(made(), parasolver(tolerance=1e-4), executor=executor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(generator=torch.Generator().manual_seed(3))
    return plain, found, run.report, [str(one.message) for one in caught]


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize("name", OTHERS)
def test_tensors_within_other_objects_are_the_reason_of_the_plain_call(name: str, executor: str) -> None:
    plain, found, report, said = called(name, executor)
    assert report.executor == "sequential"
    assert torch.equal(found, plain)
    kind = "SimpleNamespace" if name == "list" else name
    assert any(f"Returning returns tensors within an object of class {kind}, whose rows are not seen" in text for text in said)


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize("name", SEEN)
def test_tensors_in_containers_are_split_into_states(name: str, executor: str) -> None:
    plain, found, report, _ = called(name, executor)
    assert report.executor != "sequential"
    assert report.rounds < report.steps
    assert float((found - plain).square().mean().sqrt()) <= 2e-4


def test_arguments_without_a_tensor_in_a_container_are_the_reason_of_the_plain_call() -> None:
    kind = Adversary.of(
        LOOP.replace("VALUE", "out").replace("self.net(x, t)", "self.net(SimpleNamespace(x=x, t=t))"),
        SimpleNamespace=types.SimpleNamespace,
    )

    class Taking(Net):
        def forward(self, given: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(given.x, given.t)

    def made() -> Any:
        return kind(Taking(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))

    plain = made()(generator=torch.Generator().manual_seed(3))
    with pytest.warns(RuntimeWarning, match="Taking was called without a tensor, a list, a tuple or a dict of tensors"):
        found = parallelize(made(), parasolver(), executor="lanes")(generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, plain)
