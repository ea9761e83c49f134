# SPDX-License-Identifier: Apache-2.0
"""A pipeline with a small network of its own, and networks that keep something from one call to the next."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

STEPS = 24


class Net(nn.Module):
    """Without memory."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        self.eval()

    def body(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + t.reshape(-1, 1) / 300))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t)


class Pipe(diffusers.DiffusionPipeline):
    """A loop as diffusers writes them: it can be interrupted, and calls back."""

    def __init__(self, net: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @classmethod
    def of(cls, net: nn.Module) -> Any:
        """A pipeline with this network."""
        return cls(net, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Tensor:
        self._interrupt = False
        self.scheduler.set_timesteps(STEPS)
        x = torch.randn(2, 8, generator=generator) if latents is None else latents
        for i, t in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                continue
            x = self.scheduler.step(self.net(x, t), t, x).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": x})
        return x


class Counter(Net):
    """Switches after some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return self.body(x, t) * (1.0 if self.count < 15 else 0.9)


class Buffered(Net):
    """Counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return self.body(x, t) * (1 - self.count / 100)


class Parametric(Net):
    """Counts in a parameter, past torch's version."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count.data += 1
        return self.body(x, t) * (1 - 0.1 * (self.count > 15))


class Momentum(Net):
    """Adds what its calls before gave."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found = self.body(x, t)
        self.mean = found[:2].clone() if self.mean is None else 0.9 * self.mean + 0.1 * found[:2]
        return found + 0.1 * self.mean.repeat(len(found) // 2, 1)


class Late(Net):
    """Stores at early times what it uses at late ones."""

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found = self.body(x, t)
        if float(t.max()) > 300:
            self.store["found"] = found[:2].clone()
            return found
        return found + 0.3 * self.store["found"].repeat(len(found) // 2, 1)


class Normalized(Net):
    """Left in training mode: its running statistics change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16).train()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(x) + t.reshape(-1, 1) / 300)))


class Dropped(Net):
    """Draws torch's random numbers."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return nn.functional.dropout(self.body(x, t), 0.1)


class Chance(Net):
    """Draws Python's random numbers."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t) * (1 + 0.1 * random.random())


class Cycle(Net):
    """Walks an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = itertools.cycle([1.0, 0.9, 0.8])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t) * next(self.gains)


class Count(Net):
    """Numbers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.number = itertools.count()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t) * (1.0 if next(self.number) < 15 else 0.9)


class Generating(Net):
    """Walks a Python generator."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = (1.0 if n < 15 else 0.9 for n in range(10**6))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t) * next(self.gains)


TOTAL = [0]


class Global(Net):
    """Counts in a global variable."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        TOTAL[0] += 1
        return self.body(x, t) * (1.0 if TOTAL[0] < 15 else 0.9)


class OfTheClass(Net):
    """Counts in an attribute of its class."""

    count = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        type(self).count += 1
        return self.body(x, t) * (1.0 if type(self).count < 15 else 0.9)


class Default(Net):
    """Counts in the default of an argument."""

    def forward(self, x: Tensor, t: Tensor, count: list[int] = [0]) -> Tensor:  # noqa: B006
        count[0] += 1
        return self.body(x, t) * (1.0 if count[0] < 15 else 0.9)


class Alternating(Net):
    """Replaces its own forward."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.forward = self.other
        return self.body(x, t)

    def other(self, x: Tensor, t: Tensor) -> Tensor:
        del self.forward
        return 0.9 * self.body(x, t)


class Tally:
    def __init__(self) -> None:
        self.count = 0

    def next(self) -> int:
        self.count += 1
        return self.count


class Holding(Net):
    """Counts in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t) * (1.0 if self.tally.next() < 15 else 0.9)


class Watching(Net):
    """Keeps a record that nobody reads: harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.shapes = 0, list[torch.Size]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        return self.body(x, t)


def wrapped() -> Net:
    """A forward within a function that counts its calls in a list."""
    net, calls = Net(), list[int]()
    forward = net.forward

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return forward(x, t) * (1.0 if len(calls) < 15 else 0.9)

    net.forward = counting
    return net


def watched() -> Net:
    """A forward within a function that keeps a list which nobody reads: harmless."""
    net, sizes = Net(), list[int]()
    forward = net.forward

    def watching(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(x, t)

    net.forward = watching
    return net


def hooked(*, inside: bool = False, before: bool = False) -> Net:
    """A torch hook on the network, or on a layer within, that changes its mind."""
    net, state = Net(), {"calls": 0}
    owner = net.second if inside else net

    def after_call(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        state["calls"] += 1
        return output * 0.9 if state["calls"] > 15 else None

    def before_call(module: nn.Module, args: Any) -> Any:
        state["calls"] += 1
        return (args[0] * (0.9 if state["calls"] > 15 else 1.0), *args[1:])

    owner.register_forward_pre_hook(before_call) if before else owner.register_forward_hook(after_call)
    return net


def looked_at() -> Net:
    """A torch hook that keeps a list which nobody reads: harmless."""
    net, shapes = Net(), list[torch.Size]()
    net.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    return net


def logged() -> Net:
    """A torch hook that keeps named numbers, a class and a list that holds itself, which nobody reads: harmless."""
    net, told = Net(), list[Any]()
    own = told[:]
    own.append(own)

    def log(module: nn.Module, args: Any, output: Tensor) -> None:
        told.extend([{"rows": float(len(output)), "shape": output.shape}, type(output)])

    net.register_forward_hook(log)
    net.told = own  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return net


HARMLESS: dict[str, Callable[[], Net]] = {
    **{"plain": Net, "record": Watching, "list": watched, "hook": looked_at, "log": logged}
}

WITH_MEMORY: dict[str, Callable[[], Net]] = {
    **{
        kind.__name__: kind
        for kind in (
            *(Counter, Buffered, Parametric, Momentum, Late, Normalized, Dropped, Chance, Cycle, Count, Generating, Global),
            *(OfTheClass, Default, Alternating, Holding),
        )
    },
    "closure": wrapped,
    "hook": hooked,
    "hook inside": lambda: hooked(inside=True),
    "pre-hook": lambda: hooked(before=True),
}


def begin_anew() -> None:
    """Sets what the networks share outside of their objects to its beginning."""
    TOTAL[0] = OfTheClass.count = 0
    defaults = Default.forward.__defaults__
    assert defaults is not None
    defaults[0][0] = 0
    random.seed(0)
    torch.manual_seed(0)
