# SPDX-License-Identifier: Apache-2.0
"""The loops of strangers.py, by what they do: parts of the loop of attacks.py, a scheduler of it, a network or a change."""

from __future__ import annotations

LOOPS: dict[str, dict[str, str]] = {
    "a deque of outputs": {
        "setup": "from collections import deque; h = deque(maxlen=2)",
        "within": """
h.append(v)
v = 1.5 * h[-1] - 0.5 * h[0]""",
    },
    "a context variable, reset": {
        "within": """
k = CONTEXT.set(0.9)
v = v * CONTEXT.get()
CONTEXT.reset(k)""",
    },
    "a context of its own": {
        "setup": "import contextvars; q = contextvars.copy_context()",
        "within": """
q.run(lambda: CONTEXT.set(CONTEXT.get() * 0.99))
v = v * q[CONTEXT]""",
    },
    "an event": {
        "setup": "import threading; e = threading.Event()",
        "within": """
if i == 9:
    e.set()
v = 0.8 * v if e.is_set() else v""",
    },
    "a semaphore": {
        "setup": "import threading; e = threading.Semaphore(10)",
        "within": "v = v if e.acquire(blocking=False) else 0.8 * v",
    },
    "a heap": {
        "setup": "import heapq; h = []",
        "within": """
heapq.heappush(h, float(v.norm()))
v = v * (1 + 0.01 * h[0])""",
    },
    "keywords of a partial": {
        "setup": "import functools; p = functools.partial(lambda v, k: v * k[0], k=[1.0])",
        "within": """
p.keywords['k'][0] *= 0.99
v = p(v)""",
    },
    "a mapping proxy": {
        "setup": "import types; d = {'k': 0.0}; m = types.MappingProxyType(d)",
        "within": """
d.update(k=0.5 * m['k'] + 1)
v = v * (1 - 0.01 * m['k'])""",
    },
    "an error": {
        "setup": "e = ValueError(0.0)",
        "within": """
e.args = (0.5 * e.args[0] + v,)
v = v + 0.1 * e.args[0]""",
    },
    "an attribute of a builtin module": {
        "setup": "import builtins; builtins._stranger = 0.0",
        "within": """
builtins._stranger = 0.5 * builtins._stranger + 1.0
v = v * (1 - 0.01 * builtins._stranger)""",
        "end": "del builtins._stranger",
    },
    "a bar's count": {
        "head": """
bar = self.progress_bar(total=steps)
for i, t in enumerate(s.timesteps):""",
        "within": "v = v * (1 - 0.01 * bar.n)",
        "after": "bar.update()",
        "end": "bar.close()",
    },
    "a logger's level": {
        "setup": "import logging; g = logging.getLogger('stranger'); g.setLevel(10)",
        "within": """
g.setLevel(g.level + 1)
v = v * (1 - 0.005 * g.level)""",
    },
    "an own random.Random": {
        "setup": "import random; r = random.Random(3)",
        "within": "v = v * (1 + 0.05 * r.random())",
    },
    "an own numpy generator": {
        "setup": "import numpy; r = numpy.random.default_rng(3)",
        "within": "v = v * (1 + 0.05 * float(r.random()))",
    },
    "a numpy generator on the pipeline": {
        "setup": "import numpy; self.r = numpy.random.RandomState(3)",
        "within": "v = v * (1 + 0.05 * float(self.r.rand()))",
    },
    "a generator put back in each pass": {
        "setup": "g = torch.Generator().manual_seed(3); b = g.get_state()",
        "within": """
g.set_state(b)
v = v + 0.05 * torch.randn(2, 8, generator=g)""",
    },
    "the global state put back in each pass": {
        "within": """
b = torch.get_rng_state()
v = v + 0.05 * torch.randn(2, 8)
torch.set_rng_state(b)""",
    },
    "a draw after the loop": {
        "step": "x = s.step(v, t, x, generator=generator)[0]",
        "end": "x = x + 0.1 * torch.randn(2, 8, generator=generator)",
        "scheduler": "ancestral",
    },
    "a draw of all after the loop": {
        "end": "x = x + 0.1 * torch.randn(2, 8)",
        "scheduler": "ancestral",
    },
    "noise of a data loader": {
        "setup": "d = iter(torch.utils.data.DataLoader(list(torch.linspace(0, 1, 48)), batch_size=2))",
        "within": "v = v * (1 - 0.05 * next(d)[:, None])",
    },
    "random bytes": {
        "within": """
import os
v = v * (1 + 1e-3 * os.urandom(1)[0])""",
        "repeats": "no",
    },
    "the clock": {
        "within": """
import time
v = v * (1 + 0.1 * (time.perf_counter() % 1))""",
        "repeats": "no",
    },
    "a buffer for the time, on the pipeline": {
        "setup": "self.tb = torch.zeros(2)",
        "before": "self.tb.copy_(t.expand(2))",
        "within": "v = 0.5 * v + 0.5 * net(x, self.tb, u)",
    },
    "a buffer for the state, on the pipeline": {
        "setup": "self.xb = torch.zeros(4, 8)",
        "within": """
self.xb[:2] = x
self.xb[2:] = x
a, b = net(self.xb, t, torch.cat([u, c])).chunk(2)
v = a + w * (b - a)""",
    },
    "a buffer for the state, in the loop": {
        "setup": "xb = torch.zeros(4, 8)",
        "within": """
xb[:2] = x
xb[2:] = x
a, b = net(xb, t, torch.cat([u, c])).chunk(2)
v = a + w * (b - a)""",
    },
    "a buffer for the state, of the module": {
        "setup": "GLOBAL['xb'] = torch.zeros(2, 8)",
        "within": """
GLOBAL['xb'].copy_(x * (1 - 0.01 * i))
v = 0.5 * v + 0.5 * net(GLOBAL['xb'], t, u)""",
    },
    "a buffer for the output": {
        "setup": "self.vb = torch.zeros(2, 8)",
        "within": """
torch.mul(v, 0.9, out=self.vb)
v = self.vb + 0.1 * net(x, t, u)""",
    },
    "a condition edited in place": {
        "setup": "c0 = c.clone()",
        "before": "c.copy_(c0 * (1 - 0.03 * i))",
    },
    "a condition on the pipeline edited in place": {
        "setup": "self.c = c.clone()",
        "before": "self.c.copy_(c * (1 - 0.03 * i))",
        "within": "v = 0.5 * v + 0.5 * net(x, t, self.c)",
    },
    "options handed to the network": {
        "setup": "o = {}",
        "before": "o['gain'] = 1 - 0.02 * i",
        "within": "v = 0.5 * v + 0.5 * net(x, t, u, options=o)",
    },
    "options on the pipeline": {
        "setup": "self.o = {}",
        "before": "self.o['gain'] = 1 - 0.02 * i",
        "within": "v = 0.5 * v + 0.5 * net(x, t, u, options=self.o)",
    },
    "an object handed to the network": {
        "setup": "import types; o = types.SimpleNamespace(gain=1.0); self.o = o",
        "before": "self.o.gain = 1 - 0.02 * i",
        "within": "v = 0.5 * v + 0.5 * net(x, t, u, options=self.o)",
    },
    "a hook for one pass": {
        "before": "h = net.register_forward_hook(lambda m, a, o, k=1 - 0.02 * i: k * o)",
        "within": "h.remove()",
    },
    "a hook that reads the pipeline": {
        "setup": "h = net.register_forward_hook(lambda m, a, o: o * self.k)",
        "before": "self.k = 1 - 0.02 * i",
        "end": "h.remove()",
    },
    "a hook that reads the loop": {
        "setup": """
k = 1.0
h = net.register_forward_hook(lambda m, a, o: o * k)""",
        "before": "k = 1 - 0.02 * i",
        "end": "h.remove()",
    },
    "a hook that reads the loop's time": {
        "setup": """
t = None
h = net.register_forward_hook(lambda m, a, o: o * (1 - 1e-4 * t))""",
        "end": "h.remove()",
    },
    "a network that is trained now and then": {
        "before": "net.train(i % 2 == 0)",
    },
    "a network that reads a global": {
        "before": "GLOBAL['w'] = 1 - 0.02 * i",
        "network": "reads a global",
    },
    "a network that reads a context": {
        "before": "CONTEXT.set(1 - 0.02 * i)",
        "network": "reads a context",
    },
    "a network that reads a thread's own": {
        "before": "LOCAL.w = 1 - 0.02 * i",
        "network": "reads a thread's own",
    },
    "a network that reads its class": {
        "before": "type(net).w = 1 - 0.02 * i",
        "network": "reads its class",
    },
    "a network that reads its time elsewhere": {
        "before": "GLOBAL['t'] = t",
        "network": "reads its time elsewhere",
    },
    "a network that reads the pipeline": {
        "setup": "net.__dict__['pipe'] = [self]",
        "before": "self._gain = 1 - 0.02 * i",
        "network": "reads the pipeline",
    },
    "a network that holds the pipeline": {
        "before": "self._gain = 1 - 0.02 * i",
        "network": "reads the pipeline",
        "change": "holds the pipeline",
    },
    "a network that holds the pipeline, switched": {
        "before": "self._gain = 1.0 if i < 12 else 0.8",
        "network": "reads the pipeline",
        "change": "holds the pipeline",
    },
    "a part that reads the pipeline": {
        "before": "self._gain = 1 - 0.02 * i",
        "change": "a hook within",
    },
    "a part that reads what is the same": {
        "setup": "self._gain = 0.9",
        "within": "v = v * (1 - 0.01 * i)",
        "change": "a hook within",
    },
    "a hook that holds the pipeline": {
        "before": "self._gain = 1 - 0.02 * i",
        "change": "a hook on it",
    },
    "a hook that holds the pipeline's list": {
        "before": "self._gains[0] = 1 - 0.02 * i",
        "change": "a hook on a list",
    },
    "a hook that holds the pipeline, by time": {
        "before": "self._gain = 1 - 1e-4 * t",
        "change": "a hook on it",
    },
    "a helper of the pipeline itself": {
        "before": "self._gain = 1 - 0.02 * i",
        "within": "v = v * self.gain()",
        "change": "a helper",
    },
    "a helper that sets the pipeline itself": {
        "before": "self.put(1 - 0.02 * i)",
        "within": "v = v * self._gain",
        "change": "a helper",
    },
    "a switched global": {
        "before": "GLOBAL['w'] = 1.0 if i < 12 else 0.8",
        "network": "reads a global",
    },
    "a switched context": {
        "before": "CONTEXT.set(1.0 if i < 12 else 0.8)",
        "network": "reads a context",
    },
    "a switched class": {
        "before": "type(net).w = 1.0 if i < 12 else 0.8",
        "network": "reads its class",
    },
    "a switched environment": {
        "before": "import os; os.environ['STRANGER'] = '0' if i < 12 else '20'",
        "end": "del os.environ['STRANGER']",
        "network": "reads the environment",
    },
    "a hook that holds the scheduler": {
        "change": "a hook on its scheduler",
    },
    "a part that holds the scheduler": {
        "change": "a hook on its scheduler within",
    },
    "a hook that holds the scheduler, in lanes": {
        "within": "v = v * (1 - 0.01 * i)",
        "change": "a hook on its scheduler",
    },
    "a hook that holds the scheduler's levels": {
        "change": "a hook on its levels",
    },
    "a helper that holds the scheduler": {
        "within": "v = v * self.gain()",
        "change": "a helper with its scheduler",
    },
    "a step of the scheduler that a helper holds": {
        "step": "x = self.go(v, t, x)",
        "change": "a helper with its scheduler",
    },
    "a switched number": {
        "before": "put(1.0 if i < 12 else 0.8)",
        "network": "reads a number",
    },
    "a number that declines": {
        "before": "put(1 - 0.02 * i)",
        "network": "reads a number",
    },
    "a switched attribute of a function": {
        "before": "number.w = 1.0 if i < 12 else 0.8",
        "network": "reads a number",
    },
    "a switched autocast": {
        "before": """
a = torch.autocast('cpu', torch.bfloat16, enabled=i < 12)
a.__enter__()""",
        "within": """
a.__exit__(None, None, None)
v = v.float()""",
    },
    "a switched autocast that is seen": {
        "before": """
a = torch.autocast('cpu', torch.bfloat16, enabled=i < 12)
a.__enter__()""",
        "within": "a.__exit__(None, None, None)",
        "network": "asks for autocast",
    },
    "a default dtype": {
        "before": "torch.set_default_dtype(torch.float64 if i % 2 else torch.float32)",
        "within": """
v = v * torch.tensor(0.9).to(torch.float32) * (1 if torch.tensor(1.0).dtype == torch.float32 else 0.9)""",
        "end": "torch.set_default_dtype(torch.float32)",
    },
    "an environment variable": {
        "before": "import os; os.environ['STRANGER'] = str(i)",
        "within": "v = v * (1 - 0.01 * int(os.environ['STRANGER']))",
        "end": "del os.environ['STRANGER']",
    },
    "an environment variable that the network reads": {
        "before": "import os; os.environ['STRANGER'] = str(i)",
        "end": "del os.environ['STRANGER']",
        "network": "reads the environment",
    },
    "halves of the batch": {
        "within": "v = torch.cat([net(x[:1], t, u[:1]), net(x[1:], t, u[1:])])",
    },
    "one image after the other": {
        "within": "v = torch.cat([net(a, t, b) for a, b in zip(x.split(1), c.split(1))])",
    },
    "a fixed point": {
        "within": """
y = x
for _ in range(3):
    y = x + 0.1 * net(y, t, u)
v = net(y, t, c)""",
    },
    "iterations until it rests": {
        "within": """
y = x
for k in range(20):
    z = x + 0.1 * net(y, t, u)
    if (z - y).norm() < 0.02:
        break
    y = z
v = net(y, t, c)""",
    },
    "experts in a list": {
        "setup": "nets = nn.ModuleList([self.net, self.second])",
        "within": "v = nets[i % 2](x, t, c)",
    },
    "experts in a dict of functions": {
        "setup": "nets = {'a': self.net, 'b': lambda x, t, c: self.second(x, t, c) * 0.9}",
        "within": "v = nets['a' if i < 10 else 'b'](x, t, c)",
    },
    "a step in a function within": {
        "setup": """
def advance(v, t):
    nonlocal x
    x = s.step(v, t, x)[0]""",
        "step": "advance(v, t)",
    },
    "a step by name": {
        "step": "x = getattr(s, 'st' + 'ep')(v, t, x)[0]",
    },
    "a step of the class": {
        "step": "x = type(s).step(s, v, t, x)[0]",
    },
    "a step of the base class": {
        "step": "x = diffusers.FlowMatchEulerDiscreteScheduler.step(s, v, t, x)[0]",
    },
    "a partial step": {
        "setup": "import functools; go = functools.partial(s.step, return_dict=False)",
        "step": "(x,) = go(v, t, x)",
    },
    "a step with keywords in a dict": {
        "setup": "extra = {'generator': generator, 'return_dict': False}",
        "step": "x = s.step(v, t, x, **extra)[0]",
        "scheduler": "ddpm",
    },
    "a step's item": {
        "step": "x = s.step(v, t, x)['prev_sample']",
    },
    "a step's tuple": {
        "step": "x = s.step(v, t, x).to_tuple()[0]",
    },
    "a step of halves": {
        "step": "x = torch.cat([s.step(v[:1], t, x[:1])[0], s.step(v[1:], t, x[1:])[0]])",
    },
    "a step at a number": {
        "step": "x = s.step(v, t.item(), x)[0]",
        "scheduler": "ddim",
    },
    "a step at a whole number": {
        "step": "x = s.step(v, int(t), x)[0]",
        "scheduler": "ddim",
    },
    "a step of a double": {
        "step": "x = s.step(v.double(), t, x.double())[0].float()",
    },
    "a step of a flat state": {
        "step": "x = s.step(v.flatten(), t, x.flatten())[0].reshape(2, 8)",
    },
    "a step of a state upside down": {
        "step": "x = s.step(v.T, t, x.T)[0].T",
    },
    "a look ahead": {
        "setup": "import copy",
        "within": """
y = copy.copy(s).step(v, t, x)[0]
v = 0.5 * v + 0.5 * net(y, t, u)""",
        "scheduler": "ddim",
    },
    "an output used after the step": {
        "after": "x = x + 0.01 * v",
    },
    "a state used after the step": {
        "setup": "y = x",
        "before": "y = x",
        "after": "x = 0.9 * x + 0.1 * y",
    },
    "an output edited after the step": {
        "after": "v.zero_()",
    },
    "a reduction": {
        "head": """
import functools
x = functools.reduce(lambda x, t: s.step(net(x, t, c), t, x)[0], s.timesteps, x)
for i in ():
    t = 0""",
    },
    "recursion": {
        "setup": """
def go(x, k):
    return x if k == len(s.timesteps) else go(s.step(net(x, s.timesteps[k], c), s.timesteps[k], x)[0], k + 1)""",
        "head": """
x = go(x, 0)
for i in ():
    t = 0""",
    },
    "a map": {
        "setup": """
def go(t):
    nonlocal x
    x = s.step(net(x, t, c), t, x)[0]
    return x""",
        "head": """
for x in map(go, s.timesteps):
    pass
for i in ():
    t = 0""",
    },
    "an else of the loop": {
        "end": "x = 0.9 * x",
        "head": "for i, t in enumerate(s.timesteps):",
    },
    "chunks of times": {
        "head": "for i, t in ((0, t) for part in s.timesteps.chunk(4) for t in part):",
    },
    "nested chunks of times": {
        "head": """
for part in s.timesteps.chunk(4):
    for t in part:
        x = s.step(net(x, t, c), t, x)[0]
for i in ():
    t = 0""",
    },
    "a loop around": {
        "head": """
for k in range(2):
    s.set_timesteps(steps)
    for t in s.timesteps:
        x = s.step(net(x, t, c), t, x)[0]
for i in ():
    t = 0""",
    },
    "counted from one": {
        "head": "for i, t in enumerate(s.timesteps, start=1):",
        "within": "v = v * (1 - 0.01 * i)",
    },
    "counted pairs": {
        "head": "for i, (t, k) in enumerate(zip(s.timesteps, torch.linspace(1, 0.5, steps))):",
        "within": "v = v * k",
    },
    "pairs backwards": {
        "head": "for t, k in zip(s.timesteps, reversed(list(torch.linspace(1, 0.5, steps)))):",
        "within": "v = v * k",
    },
    "pairs of times": {
        "head": "for t, n in zip(s.timesteps[:-1], s.timesteps[1:]):",
        "within": "v = v * (1 - 1e-4 * n)",
        "scheduler": "ddim",
    },
    "pairs with a generator": {
        "head": "for t, k in zip(s.timesteps, (1 - 0.01 * k for k in range(99))):",
        "within": "v = v * k",
    },
    "pairs with a cycle": {
        "head": """
import itertools
for t, k in zip(s.timesteps, itertools.cycle([1.0, 0.9, 0.8])):""",
        "within": "v = v * k",
    },
    "numbers from behind": {
        "head": """
for i in reversed(range(steps)):
    t = s.timesteps[steps - 1 - i]""",
    },
    "numbers from the end": {
        "head": """
for i in range(steps):
    t = s.timesteps[i - steps]""",
        "within": "v = v * (1 - 0.01 * i)",
    },
    "a slice of an iterator": {
        "head": """
import itertools
for i, t in enumerate(itertools.islice(s.timesteps, steps)):""",
    },
    "a bar of times": {
        "head": """
from tqdm import tqdm
for t in tqdm(s.timesteps, disable=True):""",
    },
    "a bar of numbers": {
        "head": """
from tqdm import tqdm
for i in tqdm(range(steps), disable=True):
    t = s.timesteps[i]""",
        "within": "v = v * (1 - 0.01 * i)",
    },
    "times unbound": {
        "head": "for i, t in enumerate(s.timesteps.unbind()):",
    },
    "times of numpy": {
        "head": """
for i, t in enumerate(s.timesteps.numpy()):
    t = torch.tensor(t)""",
    },
    "times copied": {
        "head": "for i, t in enumerate(s.timesteps.clone()):",
    },
    "times on a device": {
        "head": "for i, t in enumerate(s.timesteps.to('cpu')):",
    },
    "times popped": {
        "setup": "q = list(s.timesteps)",
        "head": """
while q:
    t = q.pop(0)""",
    },
    "a walrus": {
        "setup": "q = list(s.timesteps)",
        "head": "while (t := q.pop(0) if q else None) is not None:",
    },
    "a time edited before": {
        "setup": "s.timesteps[3] -= 5",
        "scheduler": "ddim",
    },
    "times cut before": {
        "setup": "s.timesteps = s.timesteps[:-3]",
        "scheduler": "ddim",
    },
    "a time edited in the loop": {
        "within": """
if i == 5:
    s.timesteps[i + 1] -= 7""",
        "scheduler": "ddim",
    },
    "a time edited in place": {
        "before": "t.sub_(1)",
        "scheduler": "ddim",
    },
    "a level edited in the loop": {
        "before": """
if i == 5:
    s.sigmas[i + 1] *= 0.9""",
    },
    "a step index set": {
        "before": "s._step_index = i",
    },
    "a begin index set in the loop": {
        "before": "s.set_begin_index(0)",
    },
    "times set again in the loop": {
        "before": """
if i == 5:
    s.set_timesteps(steps)""",
    },
    "blended before the step": {
        "setup": """
m = (torch.arange(8) < 3).float(); img = torch.ones(2, 8); n = torch.randn(2, 8, generator=generator)""",
        "before": "x = m * s.scale_noise(img, t[None], n) + (1 - m) * x",
    },
    "blended after the step but the last": {
        "setup": """
m = (torch.arange(8) < 3).float(); img = torch.ones(2, 8); n = torch.randn(2, 8, generator=generator)""",
        "after": """
if i < steps - 1:
    x = m * s.scale_noise(img, s.timesteps[i + 1][None], n) + (1 - m) * x""",
    },
    "blended by a mask of the state": {
        "after": """
m = (x.abs() > 1).float()
x = m * 0.9 * x + (1 - m) * x""",
    },
    "normalised in place": {
        "before": "x.div_(x.std().clamp(min=0.5))",
        "scheduler": "ddpm",
    },
    "an encoder cached for three passes": {
        "setup": "e = {}",
        "within": """
if i // 3 not in e:
    e[i // 3] = self.second(x, t, u)
v = v + 0.2 * e[i // 3]""",
    },
    "an encoder cached by time on the pipeline": {
        "setup": "self.e = {}",
        "within": """
if float(t) not in self.e:
    self.e[float(t)] = self.second(c @ torch.ones(3, 8), t, u)
v = v + 0.2 * self.e[float(t)]""",
    },
    "an encoder cached for good": {
        "setup": "self.e = None",
        "within": """
if self.e is None:
    self.e = self.second(c @ torch.ones(3, 8), s.timesteps[0], u)
v = v + 0.2 * self.e""",
    },
    "a log of numbers": {
        "setup": "log = []",
        "within": "log.append(float(v.mean()))",
    },
    "a log on the pipeline": {
        "setup": "self.log = []",
        "after": "self.log.append(float(x.mean()))",
        "reads": "log",
    },
    "a log of times on the pipeline": {
        "setup": "self.log = []",
        "after": "self.log.append(float(t))",
        "reads": "log",
    },
    "a last value on the pipeline": {
        "after": "self.last = float(x.mean())",
        "reads": "last",
    },
    "a largest value on the pipeline": {
        "setup": "self.most = 0.0",
        "after": "self.most = max(self.most, float(x.abs().max()))",
        "reads": "most",
    },
    "a dict of states by number": {
        "setup": "d = {}",
        "after": "d[i] = x",
        "end": "x = x + 0.1 * d[steps // 2]",
    },
    "a state kept by a condition": {
        "setup": "k = None",
        "after": "k = x if t > 500 else k",
        "end": "x = x + 0.1 * k",
    },
    "states in half precision": {
        "setup": "x = x.to(torch.bfloat16)",
        "step": "x = s.step(v.to(x.dtype), t, x)[0]",
        "before": "x = x.float()",
        "end": "x = x.float()",
    },
    "states in double": {
        "setup": "x = x.double()",
        "before": "y = x; x = x.float()",
        "step": "x = s.step(v.double(), t, y)[0]",
    },
    "autocast": {
        "within": """
with torch.autocast('cpu', torch.bfloat16):
    v = net(x, t, c)
v = v.float()""",
    },
    "inference mode": {
        "within": """
with torch.inference_mode():
    v = net(x, t, c)""",
    },
    "a guider with memory": {
        "setup": "g = Guider()",
        "within": "v = g(v, net(x, t, u))",
    },
    "a guider with memory on the pipeline": {
        "setup": "self.g = Guider()",
        "within": "v = self.g(v, net(x, t, u))",
    },
    "a guider with a memory of its times": {
        "setup": "self.g = Guider()",
        "within": "v = self.g.by_time(v, net(x, t, u), t)",
    },
    "a generator function": {
        "setup": """
def weights():
    k = 1.0
    while True:
        yield k
        k *= 0.98
g = weights()""",
        "within": "v = v * next(g)",
    },
    "a coroutine": {
        "setup": """
import types
@types.coroutine
def weights():
    k = 1.0
    while True:
        yield k
        k *= 0.98
g = weights()""",
        "within": "v = v * g.send(None)",
    },
    "an inner class's count": {
        "setup": """
class K:
    n = 0
    @classmethod
    def up(cls):
        cls.n += 1
        return cls.n""",
        "within": "v = v * (1 - 0.01 * K.up())",
    },
    "a sum in a closure": {
        "setup": """
def made():
    total = 0.0
    def add(v):
        nonlocal total
        total = 0.5 * total + v
        return total
    return add
add = made()""",
        "within": "v = 0.5 * add(v)",
    },
    "a value set by another thread": {
        "setup": """
import threading
box = [1.0]; go = threading.Event(); done = threading.Event()
def work():
    while box[0] > 0.4:
        go.wait()
        go.clear()
        box[0] -= 0.02
        done.set()
threading.Thread(target=work, daemon=True).start()""",
        "within": """
go.set()
assert done.wait(30)
done.clear()
v = v * box[0]""",
    },
    "a queue that is used up": {
        "setup": """
from queue import Queue; q = Queue()
for k in range(steps):
    q.put(1 - 0.01 * k)""",
        "within": "v = v * q.get()",
    },
    "a queue that a thread fills": {
        "setup": """
import threading
from queue import Queue; self.q = Queue(2)
def fill():
    for k in range(steps):
        self.q.put(1 - 0.01 * k)
threading.Thread(target=fill, daemon=True).start()""",
        "within": "v = v * self.next_value()",
        "change": "a queue in a helper",
    },
    "a barrier": {
        "setup": """
import threading
b = threading.Barrier(2)
def meet():
    for _ in range(steps):
        b.wait()
threading.Thread(target=meet, daemon=True).start()""",
        "within": "b.wait(30)",
    },
    "a torch function mode": {
        "setup": """
from torch.overrides import TorchFunctionMode
class M(TorchFunctionMode):
    n = 0
    def __torch_function__(self, f, types, a=(), k=None):
        self.n += f is torch.tanh
        return f(*a, **(k or {}))
m = M()""",
        "before": "m.__enter__()",
        "within": """
m.__exit__(None, None, None)
v = v * (1 - 0.005 * m.n)""",
    },
    "a sparse condition": {
        "within": "v = v + 0.1 * torch.sparse.mm(torch.eye(2).to_sparse(), x)",
    },
    "an einsum over images": {
        "within": "v = v + 0.1 * torch.einsum('ij,kj->ik', x, x) @ x",
    },
    "a median": {
        "within": "v = v - v.median()",
    },
    "a sort": {
        "within": "v = v + 0.1 * x.flatten().sort().values.reshape(2, 8)",
    },
    "a quantile in numpy": {
        "within": """
import numpy as np
v = v / max(1.0, float(np.quantile(v.numpy(), 0.9)))""",
    },
    "a fourier filter": {
        "within": """
f = torch.fft.rfft(v)
f[..., 3:] = 0.5 * f[..., 3:]
v = torch.fft.irfft(f, n=8)""",
    },
    "a boolean index": {
        "within": "v[v > 1] = 1.0",
    },
    "a scatter": {
        "within": "v = v.scatter(1, torch.zeros(2, 1, dtype=torch.long), 0.5)",
    },
    "a print of the state": {
        "within": "str(x), repr(v), f'{float(v.norm()):.3f}'",
    },
    "a copy of the state": {
        "before": """
import copy
x = copy.deepcopy(x)""",
    },
    "a pickled state": {
        "before": """
import io
b = io.BytesIO(); torch.save(x, b); b.seek(0); x = torch.load(b)""",
    },
    "a state through a list": {
        "before": "x = torch.tensor(x.tolist())",
    },
    "a state through numpy": {
        "before": "x = torch.from_numpy(x.numpy().copy())",
    },
}
