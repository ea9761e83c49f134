# SPDX-License-Identifier: Apache-2.0
"""The networks and schedulers of strangers.py, what is done to its pipelines, and places outside of these."""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from attacks import Conditioned
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GLOBAL: dict[str, Any] = {"w": 1.0}
CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("stranger", default=1.0)
LOCAL = threading.local()

# -- networks ------------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network that holds another one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = net


class Optioned(Conditioned):
    """A network with options."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, options: Any = None) -> Tensor:
        gain = 1.0 if options is None else options["gain"] if isinstance(options, dict) else options.gain
        return super().forward(x, t, c) * gain


class ReadsGlobal(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * GLOBAL["w"]


class ReadsContext(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * CONTEXT.get()


class ReadsLocal(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * getattr(LOCAL, "w", 1.0)


class ReadsClass(Conditioned):
    w = 1.0

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * self.w


class ReadsTime(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, GLOBAL["t"] if isinstance(GLOBAL.get("t"), Tensor) else t, c)


class ReadsPipeline(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * self.__dict__["pipe"][0]._gain


class ReadsEnvironment(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * (1 - 0.01 * int(os.environ.get("STRANGER", "0")))


NUMBER = 1.0


def put(value: float) -> None:
    global NUMBER
    NUMBER = value


def number() -> float:
    return NUMBER * getattr(number, "w", 1.0)


class ReadsNumber(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) * number()


class AsksForAutocast(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        cast = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            return super().forward(x, t, c) * (0.8 if cast else 1.0)


class Tables(Conditioned):
    """A network that keeps a table of its input's shape, as rotary embeddings are kept."""

    table: Any = None

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        if self.table is None or self.table.shape != x.shape[1:]:
            self.table = torch.linspace(0.9, 1.1, x.shape[1])
        return super().forward(x, t, c) * self.table


class Keys(Conditioned):
    """A network that keeps what it made of its first condition."""

    kept: Any = None

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        if self.kept is None or len(self.kept) != len(x):
            self.kept = torch.zeros(len(x), 8) if c is None else 0.2 * c.sum(1, keepdim=True).expand(-1, 8)
        return super().forward(x, t, c) + self.kept


class Stages(Conditioned):
    """A network that answers otherwise at some times."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        v = super().forward(x, t, c)
        return torch.where((t.reshape(-1, 1) > 500), v, 0.8 * v)


class Early(Conditioned):
    """A network that decides by its first row's time."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        v = super().forward(x, t, c)
        return v if float(t.reshape(-1)[0]) > 500 else 0.8 * v


class Large(Conditioned):
    """A network that answers otherwise to many rows."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        v = super().forward(x, t, c)
        return v if len(x) <= 4 else 0.95 * v


class OwnDraws(Conditioned):
    """A network with a generator of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.__dict__["draws"] = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x, t, c) + 0.02 * torch.randn(8, generator=self.__dict__["draws"])


class Checkpointed(Conditioned):
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:

        return checkpoint(super().forward, x, t, c, use_reentrant=False)  # pyright: ignore[reportReturnType]


class Spread(Conditioned):
    """A network whose rows are those of several states, normalised over the state."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        v = super().forward(x, t, c)
        return v / v.std()


class Guider:
    """A guider with momentum."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.at: dict[float, Any] = {}

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.m = (a - b) + 0.5 * self.m
        return a + 0.5 * self.m

    def by_time(self, a: Tensor, b: Tensor, t: Any) -> Tensor:
        self.at[float(t)] = float((a - b).norm())
        before = [value for time, value in self.at.items() if time > float(t)]
        return a + 0.01 * sum(before) * (a - b)


def hooked(register: str, hook: Callable[[], Any], **options: Any) -> Callable[[Any], None]:
    def add(pipe: Any) -> None:
        getattr(pipe.net, register)(hook(), **options)

    return add


class Once:
    """A hook that acts once."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, module: Any, args: Any, output: Tensor) -> Any:
        if not self.done:
            self.done = True
            return output * 0.5
        return None


class Norms:
    """A hook that looks."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, module: Any, args: Any, output: Tensor) -> None:
        self.seen.append(float(output.norm()))


class Wise:
    """A hook that lets an answer follow the last one."""

    last: Any = None

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        found = output if self.last is None or self.last.shape != output.shape else 0.7 * output + 0.3 * self.last
        self.last = output
        return found


def replaced(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def replace(pipe: Any) -> None:
        pipe.net = make(pipe.net)

    return replace


def compiled(net: Any) -> Any:
    return torch.compile(net, backend="eager")


class Stub(Wrapped):
    """What stands for a compiled network: it hands on to it all that it does not have."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Averaged(Wrapped):
    """A network that averages over its calls in a buffer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, *args: Any) -> Any:
        v = self.inner(*args)
        self.mean = 0.5 * self.mean + 0.5 * v.mean(0)  # pyright: ignore[reportAttributeAccessIssue]
        return v + 0.2 * self.mean


class Turns(Wrapped):
    """A network whose calls take turns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))

    def forward(self, *args: Any) -> Any:
        self.turn += 1  # pyright: ignore[reportOperatorIssue]
        return self.inner(*args) * (1.0 if int(self.turn) % 2 else 0.9)


NETWORKS: dict[str, Any] = {
    "reads a global": lambda: ReadsGlobal(),
    "reads a context": lambda: ReadsContext(),
    "reads a thread's own": lambda: ReadsLocal(),
    "reads its class": lambda: ReadsClass(),
    "reads its time elsewhere": lambda: ReadsTime(),
    "reads the pipeline": lambda: ReadsPipeline(),
    "reads the environment": lambda: ReadsEnvironment(),
    "reads a number": lambda: ReadsNumber(),
    "asks for autocast": lambda: AsksForAutocast(),
    "keeps a table of shapes": lambda: Tables(),
    "keeps keys of its condition": lambda: Keys(),
    "answers by time": lambda: Stages(),
    "answers by the first row's time": lambda: Early(),
    "answers otherwise to many": lambda: Large(),
    "has draws of its own": lambda: OwnDraws(),
    "is checkpointed": lambda: Checkpointed(),
    "is normalised over its rows": lambda: Spread(),
    "in double": lambda: Doubled(),
}
"""Networks; those from the first "reads" on are chosen by a loop."""


class Doubled(Conditioned):
    """A network in double precision between two conversions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.double()

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(x.double(), t.double(), None if c is None else c.double()).float()


def holding(change: str) -> Callable[[Any], None]:
    """Lets a network, a hook or a helper hold the pipeline."""

    def hold(pipe: Any) -> None:
        pipe._gain, pipe._gains = 1.0, [1.0]
        if change == "network":
            pipe.net.__dict__["pipe"] = [pipe]
        elif change == "helper":
            pipe.gain, pipe.put = lambda: pipe._gain, lambda value: setattr(pipe, "_gain", value)
        elif change == "queue":
            pipe.next_value = lambda: pipe.q.get(timeout=30)  # a run that is not refused ends, too
        elif "scheduler" in change:
            scheduler = pipe.scheduler
            pipe.gain = lambda: 1 - 0.01 * (scheduler.step_index or 0)
            pipe.go = lambda v, t, x: scheduler.step(v, t, x)[0]
            if change != "scheduler":
                where = pipe.net.a if "within" in change else pipe.net
                where.register_forward_hook(lambda m, a, o: o * (1 - 0.01 * (scheduler.step_index or 0)))
        elif change == "levels":
            scheduler = pipe.scheduler
            pipe.net.register_forward_hook(lambda m, a, o: o * (1 - 0.1 * float(scheduler.sigmas[3])))
        else:
            where = pipe.net.a if change == "within" else pipe.net
            where.register_forward_hook(lambda m, a, o: o * (pipe._gains[0] if change == "list" else pipe._gain))

    return hold


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook that acts once": hooked("register_forward_hook", Once),
    "a hook that looks": hooked("register_forward_hook", Norms),
    "a hook with keywords that follows": hooked("register_forward_hook", Wise, with_kwargs=True),
    "a hook that is always called": hooked("register_forward_hook", Wise, with_kwargs=True, always_call=True),
    "a hook in front with keywords": hooked(
        "register_forward_pre_hook", lambda: lambda m, a, k: ((a[0] * 0.9, *a[1:]), k), with_kwargs=True
    ),
    "data parallel": replaced(nn.DataParallel),
    "compiled": replaced(compiled),
    "a stub": replaced(Stub),
    "traced": replaced(
        lambda net: torch.jit.trace(net, (torch.zeros(2, 8), torch.zeros(2), torch.zeros(2, 3)), check_trace=False)
    ),
    "an average over calls": replaced(Averaged),
    "taking turns": replaced(Turns),
    "swa": replaced(lambda net: torch.optim.swa_utils.AveragedModel(net)),
    "a forward of the object": lambda pipe: setattr(pipe.net, "forward", functools.partial(Conditioned.forward, pipe.net)),
    "a forward with a count": lambda pipe: setattr(pipe.net, "forward", counted(pipe.net.forward)),
    "parametrized": lambda pipe: nn.utils.parametrize.register_parametrization(pipe.net.b, "weight", Halved()),
    "quantized": replaced(lambda net: torch.ao.quantization.quantize_dynamic(net, {nn.Linear})),
    "holds the pipeline": holding("network"),
    "a hook within": holding("within"),
    "a hook on it": holding("hook"),
    "a hook on a list": holding("list"),
    "a helper": holding("helper"),
    "a queue in a helper": holding("queue"),
    "a helper with its scheduler": holding("scheduler"),
    "a hook on its scheduler": holding("scheduler, hook"),
    "a hook on its scheduler within": holding("scheduler, within"),
    "a hook on its levels": holding("levels"),
    "in training mode": lambda pipe: pipe.net.train(),
    "frozen": lambda pipe: pipe.net.requires_grad_(False),
}
"""What is done to the pipeline of a plain loop."""


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 0.9 * w


def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs) * (1 - 0.003 * calls)

    return call


# -- schedulers ----------------------------------------------------------------------------------------------------------

Flow: Any = diffusers.FlowMatchEulerDiscreteScheduler


class Memory(Flow):
    """A scheduler with momentum, which is linear."""

    m: Any = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.m = None

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        self.m = model_output if self.m is None else 0.7 * model_output + 0.3 * self.m
        return super().step(self.m, timestep, sample, **kwargs)


class Counted(Flow):
    """A scheduler that scales by a count of its own."""

    n = 0

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.n = 0

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        self.n += 1
        return super().step(model_output * (1 - 0.01 * self.n), timestep, sample, **kwargs)


class CountedOn(Counted):
    """One that does not begin anew."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        n = self.n
        super().set_timesteps(*args, **kwargs)
        self.n = n


class Logged(Flow):
    """A scheduler that keeps a log."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("log", []).append(float(model_output.norm()))
        return super().step(model_output, timestep, sample, **kwargs)


class Drawn(Flow):
    """A scheduler that draws noise of another kind."""

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, **kwargs: Any) -> Any:
        found = super().step(model_output, timestep, sample, **kwargs)
        return (found[0] + 0.02 * torch.rand(sample.shape, generator=generator),)


class Limited(Flow):
    """A scheduler that limits its states far out."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        found = super().step(model_output, timestep, sample, **kwargs)
        return (found[0].clamp(-1.5, 1.5),)


class Sized(Flow):
    """A scheduler that scales by the size of its output."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output / max(1.0, float(model_output.norm()) / 4), timestep, sample, **kwargs)


class Jittered(Flow):
    """A scheduler with drawn times."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        n = len(self.timesteps)
        self.sigmas[1:n] *= 1 - 0.02 * torch.rand(n - 1)
        self.timesteps = self.sigmas[:-1] * 1000


class Global(Flow):
    """A scheduler that reads a global."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output * GLOBAL["w"], timestep, sample, **kwargs)


class Late(Flow):
    """A scheduler that begins to limit late, by its state."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        found = super().step(model_output, timestep, sample, **kwargs)[0]
        return (found if float(timestep) > 200 else torch.tanh(found),)


class InPlace(Flow):
    """A scheduler that writes into what it is given."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        model_output.mul_(0.9)
        return super().step(model_output, timestep, sample, **kwargs)


class Buffered(Flow):
    """A scheduler that returns a buffer of its own."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        found = super().step(model_output, timestep, sample, **kwargs)[0]
        buffer = self.__dict__.get("buffer")
        if buffer is None or buffer.shape != found.shape or buffer.dtype != found.dtype:
            self.__dict__["buffer"] = buffer = torch.empty_like(found)
        buffer.copy_(found)
        return (buffer,)


class Coupled(Flow):
    """A scheduler whose step mixes the images."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, 0.95 * sample + 0.05 * sample.mean(0, keepdim=True), **kwargs)


class Mirrored(Flow):
    """A scheduler whose step mixes the elements."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, 0.95 * sample + 0.05 * sample.flip(-1), **kwargs)


class Shifted(Flow):
    """A scheduler whose step adds a constant."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        found = super().step(model_output, timestep, sample, **kwargs)[0]
        return (found + 0.01,)


class Held:
    """A scheduler by another one that it holds."""

    def __init__(self) -> None:
        self.inner = Flow(shift=3.0)
        self.n = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return self.inner.step(0.9 * model_output, timestep, sample, **kwargs)


KINDS: dict[str, Callable[[], Any]] = {
    "a scheduler with momentum": lambda: Memory(shift=3.0),
    "a scheduler with a count": lambda: Counted(shift=3.0),
    "a scheduler with a count that goes on": lambda: CountedOn(shift=3.0),
    "a scheduler with a log": lambda: Logged(shift=3.0),
    "a scheduler with other draws": lambda: Drawn(shift=3.0),
    "a scheduler with limits": lambda: Limited(shift=3.0),
    "a scheduler of sizes": lambda: Sized(shift=3.0),
    "a scheduler with drawn times": lambda: Jittered(shift=3.0),
    "a scheduler that reads a global": lambda: Global(shift=3.0),
    "a scheduler that limits late": lambda: Late(shift=3.0),
    "a scheduler that writes": lambda: InPlace(shift=3.0),
    "a scheduler with a buffer": lambda: Buffered(shift=3.0),
    "a scheduler that mixes images": lambda: Coupled(shift=3.0),
    "a scheduler that mixes elements": lambda: Mirrored(shift=3.0),
    "a scheduler with a constant": lambda: Shifted(shift=3.0),
    "a scheduler that holds another": Held,
}
"""Schedulers of a plain loop."""
