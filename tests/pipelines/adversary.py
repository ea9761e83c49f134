# SPDX-License-Identifier: Apache-2.0
"""Loops that hold more than a scheduler's chain, made by combining what may go wrong, and a judge of their parallel calls.

A loop is written as source text from one ingredient of each kind: what it keeps from pass to pass and where, from which step
on, how it edits its state, what it draws, which time it gives to its scheduler, which hooks its network has. A call of it is
right if it gives the plain call's result, up to the estimate, or is refused for the reason of one of its ingredients.

    python tests/pipelines/adversary.py [combinations [seed]]

runs a sample of the full product and prints a line for each call that is not right, and a summary.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import itertools
import linecache
import os
import random
import re
import sys
import tempfile
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from torch import Tensor, nn

import paradiff

STEPS = 30

HISTORY = (
    "keeps something from one pass to the next|which the states of a window share|leave .* to the next one|counts its passes"
    "|collects|which outlives the call"
)
UNBOUND = "|UnboundLocalError|NameError|AttributeError|KeyError|IndexError|TypeError|ValueError|StopIteration"

IN_WINDOWS = (
    "mixes the states of two windows|reads the value of a tensor|writes the states|states of a window|reads its step number"
)
"""Reasons of the vector executor alone."""

PLACES: dict[str, tuple[str, str, str]] = {
    # name: (setup, expression that reads it, statement that writes {value})
    "local": ("c = START", "c", "c = {value}"),
    "self": ("self.c = START", "self.c", "self.c = {value}"),
    "dict": ("box = {'c': START}", "box['c']", "box['c'] = {value}"),
    "list": ("box = [START]", "box[0]", "box[0] = {value}"),
    "growing list": ("box = [START]", "box[-1]", "box.append({value})"),
    "deque": ("box = deque([START], maxlen=2)", "box[-1]", "box.append({value})"),
    "object": ("box = SimpleNamespace(c=START)", "box.c", "box.c = {value}"),
    "nested": ("box = SimpleNamespace(inner={'c': [START]})", "box.inner['c'][0]", "box.inner['c'][0] = {value}"),
    "closure": ("get, put = cell(START)", "get()", "put({value})"),
    "guider": ("self.guider = Guider(START)", "self.guider.c", "self.guider.c = {value}"),
    "network": ("self.net.c = START", "self.net.c", "self.net.c = {value}"),
    "module global": ("STORE['c'] = START", "STORE['c']", "STORE['c'] = {value}"),
    "processor": ("self.net.processor.c = START", "self.net.processor.c", "self.net.processor.c = {value}"),
    "function": ("drawn.c = START", "drawn.c", "drawn.c = {value}"),
    "class": ("type(self).c = START", "type(self).c", "type(self).c = {value}"),
    "context variable": ("CONTEXT.set(START)", "CONTEXT.get()", "CONTEXT.set({value})"),
    "default argument": ("kept.__defaults__[0][0] = START", "kept()", "kept.__defaults__[0][0] = {value}"),
    "another module": ("torch._adversary = START", "torch._adversary", "torch._adversary = {value}"),
    "thread's own": ("LOCAL.c = START", "LOCAL.c", "LOCAL.c = {value}"),
    "queue": ("box = Queue(); box.put(START)", "box.queue[-1]", "box.put({value})"),
}
"""Where a loop keeps something."""

KINDS: dict[str, tuple[str, list[str]]] = {
    # name: (initial value, statements that read with GET and write with PUT(...); FROM is the step from which on)
    "momentum": ("0.0", ["PUT(v + 0.75 * GET)", "v = GET"]),
    "momentum from": ("0.0", ["if i >= FROM:", "    PUT(v + 0.75 * GET)", "    v = GET"]),
    "made once": ("None", ["if GET is None:", "    PUT(0.5 * v)", "v = v + GET"]),
    "made at": ("None", ["if i == FROM:", "    PUT(0.5 * v)", "if GET is not None:", "    v = v + GET"]),
    "made of the state at": ("None", ["if i == FROM:", "    PUT(0.3 * x)", "if GET is not None:", "    v = v + GET"]),
    "renewed": ("None", ["if i % 5 == 0:", "    PUT(0.5 * v)", "if GET is not None:", "    v = v + GET"]),
    "previous output": ("0.0", ["w = v", "v = v + 0.5 * GET", "PUT(w)"]),
    "previous state": ("0.0", ["v = v + 0.2 * GET", "PUT(x)"]),
    "count": ("0", ["PUT(GET + 1)", "v = v * (1 + 0.02 * GET)"]),
    "count from": ("0", ["PUT(GET + 1)", "v = v if GET < FROM else 0.9 * v"]),
    "mean": ("0.0", ["PUT(0.5 * GET + float(v.mean()))", "v = v + GET"]),
    "switch": ("False", ["if i == FROM:", "    PUT(True)", "if GET:", "    v = 0.8 * v"]),
}
"""What is kept, and what it does to the network's output."""

SOURCES = {  # values that are used up, one a pass
    "iterator": ("it = iter([1 + 0.02 * k for k in range(40)])", "next(it)"),
    "generator": ("it = (1 + 0.02 * k for k in range(40))", "next(it)"),
    "late iterator": ("it = iter([1.0] * FROM + [0.8] * 40)", "next(it)"),
    "count": ("it = count()", "(1 + 0.02 * next(it))"),
    "popped list": ("it = [1 + 0.02 * k for k in range(40)]", "it.pop(0)"),
}

ELSEWHERE = {
    # name: (setup, expression that counts the passes)
    "environment": ("os.environ['ADVERSARY'] = ''", "grown_environment()"),
    "file": ("FILE.write_text('')", "grown_file()"),
    "thread": ("thread = Counting()", "in_another_thread(thread)"),
    "cached function": ("cached.cache_clear()", "cached(cached.cache_info().currsize)"),
    "recursion limit": ("sys.setrecursionlimit(5000)", "grown_limit()"),
    "bytes": ("count = bytearray(1)", "grown_bytes(count)"),
    "helper's variable": ("STORE['n'] = 0", "counted()"),
}
"""Counts of passes in places that no variable of the loop leads to."""

AFTER = {
    # name: (setup, statement after the step, what is returned, reason)
    "count": ("n = 0", "n += 1", "x * n", "which is read after the loop|reads its step number"),
    "sum": ("n = 0.0", "n += float(t)", "x + 1e-4 * n", "which is read after the loop"),
    "mean": ("m = torch.zeros_like(x)", "m += x", "x + m / 30", "which is read after the loop"),
    "states": (
        "m = torch.zeros(40, 2, 8)",
        "m[i] = x",
        "x + m.sum(0) / 30",
        "which is read after the loop|reads its step number",
    ),
    "text": ("s = ''", "s += 'x' if float(v.mean()) > 0 else 'y'", "x * (1 + s.count('x'))", "which is read after the loop"),
    "list": ("m = []", "m.append(x)", "x + sum(m) / 30", HISTORY),
    "object": ("self.m = []", "self.m.append(float(v.norm()))", "x * sum(self.m) / 30", HISTORY),
}
"""What passes gather and the code after the loop reads."""

FORMS = {
    # name: head of the loop, and statements at the beginning of its body
    "list": ("for i, t in enumerate(list(self.scheduler.timesteps)):", []),
    "tuple": ("for i, t in enumerate(tuple(self.scheduler.timesteps)):", []),
    "indices": ("for i in range(len(self.scheduler.timesteps)):", ["t = self.scheduler.timesteps[i]"]),
    "some indices": ("for i in range(3, STEPS):", ["t = self.scheduler.timesteps[i]"]),
    "pairs": ("for t, i in zip(self.scheduler.timesteps, range(STEPS)):", []),
    "fewer pairs": ("for i, t in zip(range(STEPS - 4), self.scheduler.timesteps):", []),
}
"""Heads of loops that walk over the times in order."""

EDITS: dict[str, tuple[list[str], list[str]]] = {
    # name: (before the network, after the step)
    "none": ([], []),
    "before": (["x = 0.97 * x"], []),
    "before, in place": (["x.mul_(0.97)"], []),
    "before, behind the version": (["x.data.mul_(0.97)"], []),
    "after": ([], ["x = 0.99 * x"]),
    "after, in place": ([], ["x.mul_(0.99)"]),
    "after, by the step's number": ([], ["x = x * (1 - 0.001 * i)"]),
    "after, by the time": ([], ["x = x * (1 - 1e-5 * t)"]),
    "overwrites": ([], ["x = torch.cat([x[:, :6], torch.ones_like(x[:, 6:])], 1)"]),
}
"""What a loop may do to its state. All of these can be followed."""

BROKEN_EDITS: dict[str, tuple[list[str], list[str], list[str], str]] = {
    # name: (before the loop, before the network, after the step, reason)
    "old state after the step": ([], ["old = x"], ["x = x + 0.1 * (x - old)"], HISTORY),
    "old output after the step": ([], [], ["x = x + 0.02 * v"], HISTORY),
    "network after the step": ([], [], ["x = x + 0.01 * self.net(x, t)"], "calls a network after its scheduler's step"),
    "second state": (["y = 0.5 * x"], ["y = 0.9 * y", "x = x + 0.1 * y"], [], HISTORY),
    "second state of outputs": (["y = 0 * x"], [], ["y = y + 0.1 * v", "x = x + 0.05 * y"], HISTORY),
    "second state in a dict": (["y = {'y': 0.5 * x}"], ["y['y'] = 0.9 * y['y']", "x = x + 0.1 * y['y']"], [], HISTORY),
}

DRAWS: dict[str, tuple[str, str]] = {
    "dropout": ("v = nn.functional.dropout(v, 0.1)", ""),
    "bernoulli": ("v = v * (1 + 0.05 * torch.bernoulli(torch.full((8,), 0.5)))", ""),
    "helper": ("v = shaken(v)", ""),
    "numpy": ("v = v * from_numpy()", ""),
    "python": ("v = v * (1 + 0.05 * from_python())", ""),
    "argument": ("v = v + 0.05 * drawn(generator)", ""),
    "own generator": ("v = v + 0.05 * drawn(own)", "own = torch.Generator().manual_seed(5)"),
    "seeded": ("torch.manual_seed(i); v = v + 0.05 * drawn(None)", ""),
    "hook": ("", ""),
}

SIDE_EXITS = {
    "mean of a map": "v = v + 0.3 * self.net.processor.map.mean()",
    "map": "v = v + 0.3 * self.net.processor.map[:2, :8]",
    "number": "v = v * (1 + 0.1 * self.net.processor.level)",
}
"""What a loop reads from a place where its network left it."""

TIMES = {"earlier": "t - 1", "first": "self.scheduler.timesteps[0]"}

HOOKS: dict[str, tuple[tuple[str, Any] | None, bool]] = {
    # name: (how it is registered, and what makes it; whether it is harmless)
    "none": (None, True),
    "scaling": (("register_forward_hook", lambda: lambda module, args, output: 0.9 * output), True),
    "momentum hook": (("register_forward_hook", lambda: Momentum()), False),
    "counting hook": (("register_forward_hook", lambda: Counting()), False),
    "remembering hook": (("register_forward_pre_hook", lambda: Remembering()), False),
}

METHODS: dict[str, Any] = {
    "parasolver": lambda: paradiff.parasolver(),
    "parasolver, window 8": lambda: paradiff.parasolver(window=8, tolerance=1e-3),
    "parasolver, tight": lambda: paradiff.parasolver(tolerance=1e-5),
    "quasi_newton, loose": lambda: paradiff.quasi_newton(tolerance=0.05),
    "quasi_newton": lambda: paradiff.quasi_newton(tolerance=1e-4),
    "paradigms": lambda: paradiff.paradigms(tolerance=1e-2),
}

SCHEDULERS: dict[str, Any] = {
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A combination. `fault` is its kind: a plain loop, or what it keeps, edits, draws, gives to its step or hooks."""

    fault: str
    detail: tuple[str, ...]
    begin: int
    edit: str
    indexed: bool
    scheduler: str
    method: str
    executor: str

    def __str__(self) -> str:
        where = f"{self.fault} {'/'.join(self.detail)} from {self.begin}, edit {self.edit}"
        kind = "lanes" if self.indexed else "any"
        return f"{where}, {self.scheduler}, {self.method}, {self.executor}, {kind}"

    @property
    def plain(self) -> bool:
        """Whether the loop is a chain, which must run in parallel."""
        return self.fault in ("plain", "form")

    @property
    def in_order(self) -> bool:
        """Whether a state's place in the chain decides on what the loop does, which the vector executor cannot follow."""
        return self.fault == "form" or self.indexed or self.edit in ("after, by the step's number", "after, by the time")

    @property
    def reasons(self) -> str:
        """A pattern of the true reasons."""
        found = {
            "keep": HISTORY + UNBOUND,
            "use up": HISTORY + UNBOUND,
            "elsewhere": HISTORY,
            "draw": "draws random numbers|" + HISTORY,
            "time": "another time",
            "side exit": HISTORY + "|on which later calls may depend",
            "hook": HISTORY + "|on which later calls may depend|is a Python generator",
        }
        if self.fault == "edit":
            return BROKEN_EDITS[self.detail[0]][3]
        if self.fault == "after":
            return AFTER[self.detail[0]][3]
        if self.fault == "draw" and self.detail[0] != "own generator":
            return "draws random numbers|leaves torch for numpy"
        return found[self.fault]

    def source(self) -> str:
        """The text of the loop."""
        setup: list[str] = []
        before, after = (list(part) for part in EDITS[self.edit])
        body: list[str] = []
        time, returned, head = "t", "x", "for i, t in enumerate(self.scheduler.timesteps):"
        if self.fault == "keep":
            kind, place = self.detail
            start, statements = KINDS[kind]
            made, get, put = PLACES[place]
            setup.append(made.replace("START", start))
            for line in statements:
                line = re.sub(r"PUT\((.*)\)$", lambda found: put.replace("{value}", found[1]), line)
                body.append(line.replace("GET", get))
        elif self.fault == "use up":
            made, get = SOURCES[self.detail[0]]
            setup.append(made)
            body.append(f"v = v * {get}")
        elif self.fault == "edit":
            first, early, late, _ = BROKEN_EDITS[self.detail[0]]
            setup += first
            before += early
            after += late
        elif self.fault == "draw":
            line, made = DRAWS[self.detail[0]]
            setup += [made] if made else []
            body += [line] if line else []
        elif self.fault == "side exit":
            body.append(SIDE_EXITS[self.detail[0]])
        elif self.fault == "time":
            time = TIMES[self.detail[0]]
        elif self.fault == "hook":
            pass  # `make` registers it
        elif self.fault == "elsewhere":
            made, get = ELSEWHERE[self.detail[0]]
            setup.append(made)
            body.append(f"v = v if {get} < FROM else 0.8 * v")
        elif self.fault == "after":
            made, line, returned, _ = AFTER[self.detail[0]]
            setup.append(made)
            after.append(line)
        elif self.fault == "form":
            head, first = FORMS[self.detail[0]]
            before = [*first, *before]
        if self.indexed:
            body.append("v = v * (1 - 0.002 * i)")
        generator = ", generator=generator" if self.scheduler == "ancestral" else ""
        lines = [
            "def loop(self, x, generator):",
            *[f"    {line}" for line in setup],
            f"    {head}",
            *[f"        {line}" for line in before],
            "        v = self.net(self.scheduler.scale_model_input(x, t) if scaled(self) else x, t)",
            *[f"        {line}" for line in body],
            f"        x = self.scheduler.step(v, {time}, x{generator})[0]",
            *[f"        {line}" for line in after],
            f"    return {returned}",
        ]
        return "\n".join(lines).replace("FROM", str(self.begin)) + "\n"

    def make(self) -> Any:
        """A fresh pipeline with this loop."""
        pipe = Adversary.of(self.source())(Net(), SCHEDULERS[self.scheduler]())
        pipe.net.leaves = self.fault == "side exit"
        if self.fault in ("hook", "plain") and HOOKS[self.detail[0]][0] is not None:
            register, hook = HOOKS[self.detail[0]][0]
            getattr(pipe.net, register)(hook())
        if self.detail[0] == "hook":
            pipe.net.register_forward_hook(noisy)
        return pipe


class Net(nn.Module):
    """A small network with a place for what is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.processor = Cell()
        self.leaves = False  # whether it leaves something in its processor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x) + t.reshape(-1, 1) / 300)
        if self.leaves:
            self.processor.map, self.processor.level = hidden, float(hidden.mean())
        return self.b(hidden)


class Cell:
    """An object without a word of what it is for."""


class Guider:
    """An object with the face of diffusers' guiders."""

    def __init__(self, c: Any) -> None:
        self.c = c

    def set_state(self) -> None: ...

    def prepare_inputs(self) -> None: ...


def cell(value: Any) -> Any:
    def get() -> Any:
        return value

    def put(new: Any) -> None:
        nonlocal value
        value = new

    return get, put


class Momentum:
    def __init__(self) -> None:
        self.m: Any = 0.0

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        self.m = output + 0.5 * (self.m if not isinstance(self.m, Tensor) or self.m.shape == output.shape else 0.0)
        return self.m


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * (1 + 0.02 * self.calls)


class Remembering:
    def __init__(self) -> None:
        self.first: Any = None

    def __call__(self, module: Any, args: Any) -> Any:
        self.first = args[0].detach().clone() if self.first is None else self.first
        return args[0] + 0.1 * self.first[: len(args[0])].mean(), *args[1:]


def shaken(v: Tensor) -> Tensor:
    return v + 0.02 * torch.rand(8)


def drawn(generator: torch.Generator | None) -> Tensor:
    return torch.empty(8).uniform_(generator=generator)


def noisy(module: Any, args: Any, output: Tensor) -> Tensor:
    return output + 0.02 * torch.empty(8).exponential_()


def from_numpy() -> float:
    return float(1 + 0.05 * numpy.random.rand())


def from_python() -> float:
    return random.random()


def scaled(pipeline: Any) -> bool:
    return hasattr(pipeline.scheduler, "scale_model_input")


def kept(box: list[Any] = [None]) -> Any:  # noqa: B006  (the default argument is what is kept)
    return box[0]


def grown_environment() -> int:
    os.environ["ADVERSARY"] += "x"
    return len(os.environ["ADVERSARY"])


def grown_file() -> int:
    FILE.write_text(FILE.read_text() + "x")
    return len(FILE.read_text())


def grown_limit() -> int:
    sys.setrecursionlimit(sys.getrecursionlimit() + 1)
    return sys.getrecursionlimit() - 5000


def grown_bytes(count: bytearray) -> int:
    count[0] += 1
    return count[0]


def counted() -> int:
    STORE["n"] += 1
    return STORE["n"]


def in_another_thread(counting: Any) -> int:
    thread = threading.Thread(target=lambda: counting(None, None, torch.zeros(())))
    thread.start()
    thread.join()
    return counting.calls


@functools.cache
def cached(number: int) -> int:
    return number + 1


STORE: dict[str, Any] = {}
LOCAL = threading.local()
CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("CONTEXT", default=None)
FILE = Path(tempfile.gettempdir()) / f"adversary-{os.getpid()}"
GLOBALS = {"HISTORY", "UNBOUND"}
HEAD = """
    def __init__(self, net, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator=None):
        self.scheduler.set_timesteps(STEPS)
        x = torch.randn(2, 8, generator=generator) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        return self.loop(x, generator)

"""
_numbers = itertools.count()


def _class(loop: str, given: Mapping[str, Any]) -> Any:
    """The class of `Adversary.of`."""
    text = (
        "import os\nimport sys\nfrom collections import deque\nfrom itertools import count\nfrom queue import Queue\n"
        "from types import SimpleNamespace\nimport torch\n"
        "from torch import nn\nfrom diffusers import DiffusionPipeline\n\nclass Adversary(DiffusionPipeline):"
        + HEAD
        + textwrap.indent(loop, "    ")
    )
    name = f"<adversary {next(_numbers)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {name: value for name, value in globals().items() if not name.startswith("_")}
    scope.update(given, __name__=__name__)
    exec(compile(text, name, "exec"), scope)
    return scope["Adversary"]


def product() -> list[tuple[str, tuple[str, ...]]]:
    """Every fault with its detail."""
    return [
        *[("keep", pair) for pair in itertools.product(KINDS, PLACES)],
        *[("use up", (source,)) for source in SOURCES],
        *[("elsewhere", (place,)) for place in ELSEWHERE],
        *[("after", (what,)) for what in AFTER],
        *[("form", (form,)) for form in FORMS],
        *[("edit", (edit,)) for edit in BROKEN_EDITS],
        *[("draw", (draw,)) for draw in DRAWS],
        *[("side exit", (exit,)) for exit in SIDE_EXITS],
        *[("time", (time,)) for time in TIMES],
        *[("hook", (hook,)) for hook, (_, harmless) in HOOKS.items() if not harmless],
        *[("plain", (hook,)) for hook, (_, harmless) in HOOKS.items() if harmless],
    ]


def sampled(count: int, seed: int) -> list[Loop]:
    """Combinations drawn from the full product, each fault about as often, and every fourth one plain."""
    rng = random.Random(seed)
    every = product()
    by_fault = {fault: [detail for name, detail in every if name == fault] for fault in dict.fromkeys(f for f, _ in every)}
    faults = [
        "keep",
        "plain",
        "keep",
        "use up",
        "edit",
        "plain",
        "draw",
        "keep",
        "hook",
        "keep",
        "plain",
        "time",
        "draw",
        "keep",
        "elsewhere",
        "form",
        "after",
    ]
    loops = []
    for number in range(count):
        fault = faults[number % len(faults)]
        detail = rng.choice(by_fault[fault])
        scheduler = "ddim" if fault == "time" else rng.choice(list(SCHEDULERS))
        loops.append(
            Loop(
                fault=fault,
                detail=detail,
                begin=rng.choice([0, 1, 2, 5, 10, 17]),
                edit=rng.choice(list(EDITS)) if fault in ("plain", "form") or rng.random() < 0.3 else "none",
                indexed=rng.random() < 0.4,
                scheduler=scheduler,
                method=rng.choice(list(METHODS)),
                executor=rng.choice(["auto", "auto", "vector", "lanes"]),
            )
        )
    return loops


class Adversary:
    """Makes pipeline classes."""

    @staticmethod
    def of(loop: str, **scope: Any) -> Any:
        """A pipeline class with a method `loop` of this text, whose source can be read and which knows further names."""
        return _class(loop, scope)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a call: `parallel`, `refused`, or what was wrong."""

    kind: str
    text: str


def judged(loop: Loop, check: Any = "first") -> Verdict:
    """The plain call and the parallel one, compared."""

    def generator() -> torch.Generator:
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        return torch.Generator().manual_seed(3)

    plain = loop.make()(generator=generator())
    if not bool(plain.isfinite().all()):
        return Verdict("skipped", "the plain call is not finite")
    pipe = loop.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with paradiff.parallelize(pipe, METHODS[loop.method](), executor=loop.executor, check=check) as run:
                found = pipe(generator=generator())
        except ValueError as error:
            return Verdict("refused", str(error)) if "changes its latents" in str(error) else Verdict("crashed", repr(error))
        except Exception as error:
            return Verdict("crashed", f"{type(error).__name__}: {error}")
    report = run.report
    if type(found) is not Tensor:
        return Verdict("crashed", f"a {type(found).__name__} was returned: {report.warnings}")
    rms = float((found - plain).square().mean().sqrt())
    size = max(1.0, float(plain.square().mean().sqrt()))
    if report.executor == "sequential":
        reason = "; ".join(report.warnings)
        if rms > 0 and loop.fault != "hook":
            return Verdict("WRONG", f"the plain call after the refusal differs by {rms:.1e}: {reason}")
        if loop.plain:
            return Verdict("refused" if loop.executor == "vector" and loop.in_order else "needless", reason)
        if loop.executor == "vector" and re.search(IN_WINDOWS, reason):
            return Verdict("refused", reason)
        return Verdict("refused" if re.search(loop.reasons, reason) else "other reason", reason)
    assert report.error_estimate is not None
    told = report.error_estimate.estimated_error
    text = f"{report.executor}, {report.rounds} rounds, RMS error {rms:.1e}, estimate {told:.1e}"
    return Verdict("parallel" if rms <= max(2 * told, 1e-5 * size) else "WRONG", text)


def main() -> None:
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    count, seed = (int(value) for value in (*sys.argv[1:], *("330", "0")[len(sys.argv) - 1 :]))
    verdicts: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    for loop in sampled(count, seed):
        verdict = judged(loop)
        verdicts[verdict.kind] += 1
        plain[verdict.kind] += loop.plain
        if verdict.kind not in ("parallel", "refused", "skipped"):
            print(f"{verdict.kind}: {loop}\n    {verdict.text[:300]}", flush=True)
    print(f"{count} loops, seed {seed}: {dict(verdicts)}; of them without a fault: {dict(+plain)}")


if __name__ == "__main__":
    main()
