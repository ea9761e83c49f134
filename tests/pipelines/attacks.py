# SPDX-License-Identifier: Apache-2.0
"""Loops as people write them: guidance schedules, thresholds, pictures and masks, experts, odd places, threads, odd forms.

Each is a few lines put into one loop, and a scheduler. A call is right if it gives the plain call's sample up to its estimate,
or the plain call itself with a reason; and if it leaves the generator where the plain call leaves it.

    python tests/pipelines/attacks.py [words in names]

runs all of them, or those with such names, in both executors and at a fine and a coarse tolerance, and prints the verdicts.
"""

from __future__ import annotations

import random
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy
import torch
from adversary import Adversary, Verdict
from torch import Tensor, nn

from paradiff import parallelize, parasolver, quasi_newton

PICTURE = """
n = int(steps * 0.6)
ts = s.timesteps[steps - n:]
hasattr(s, "set_begin_index") and s.set_begin_index(steps - n)
img = torch.linspace(-1, 1, 16).reshape(2, 8)
noise = torch.randn(2, 8, generator=generator)
"""
"""The beginning of a loop that starts from a picture."""

NOISED = {"flow": "x = s.scale_noise(img, ts[:1], noise)", "noise": "x = s.add_noise(img, noise, ts[:1])"}

LOOP = """
def loop(self): ...

@torch.no_grad()
def __call__(self, generator=None, steps=24, w=3.0):
    self.scheduler.set_timesteps(steps)
    s, net = self.scheduler, self.net
    x = torch.randn(2, 8, generator=generator) * getattr(s, "init_noise_sigma", 1.0)
    c = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    u = torch.zeros(2, 3)
    SETUP
    HEAD
        BEFORE
        v = net(x, t, c)
        WITHIN
        STEP
        AFTER
    END
    return x
"""

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm_3": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3, lower_order_final=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}

METHODS: dict[str, Callable[[], Any]] = {
    "fine": lambda: parasolver(tolerance=1e-4),
    "coarse": lambda: quasi_newton(tolerance=2e-2),
}

ATTACKS: dict[str, dict[str, str]] = {
    "guidance two calls": {
        "within": "v = v + w * (v - net(x, t, u))",
    },
    "guidance cat": {
        "within": """
a, b = net(torch.cat([x] * 2), t, torch.cat([u, c])).chunk(2)
v = a + w * (b - a)""",
    },
    "guidance interval by i": {
        "within": "v = v + w * (v - net(x, t, u)) if 4 <= i < 16 else v",
    },
    "guidance interval by t": {
        "within": "v = v + w * (v - net(x, t, u)) if t > 400 else v",
    },
    "guidance linear in i": {
        "within": "v = v + w * (1 - i / steps) * (v - net(x, t, u))",
    },
    "guidance cosine in t": {
        "within": """
g = 1 + w * torch.cos(t / 1000 * 1.5)
v = v + g * (v - net(x, t, u))""",
    },
    "cfg rescale": {
        "within": """
p = v + w * (v - net(x, t, u))
r = p * (v.std(1, keepdim=True) / p.std(1, keepdim=True))
v = 0.7 * r + 0.3 * p""",
    },
    "cfg rescale global std": {
        "within": """
p = v + w * (v - net(x, t, u))
r = p * (v.std() / p.std())
v = 0.7 * r + 0.3 * p""",
    },
    "cfg zero star": {
        "within": """
n = net(x, t, u)
st = (v * n).sum() / (n * n).sum()
v = n * st + w * (v - n * st)
if i < 1:
    v = v * 0""",
    },
    "apg projection": {
        "within": """
n = net(x, t, u)
d = v - n
p = (d * v).sum(1, keepdim=True) / (v * v).sum(1, keepdim=True) * v
v = v + (w - 1) * (d - 0.5 * p)""",
    },
    "apg momentum": {
        "setup": """
class M:
    r = 0
m = M()""",
        "within": """
n = net(x, t, u)
m.r = v - n - 0.5 * m.r
v = v + (w - 1) * m.r""",
    },
    "skipped guidance reuse": {
        "setup": "d = None",
        "within": """
if i % 2 == 0:
    d = v - net(x, t, u)
v = v + w * d""",
    },
    "guidance of previous t": {
        "setup": "last = s.timesteps[0]",
        "within": """
v = v + 0.3 * (v - net(x, last, u))
last = t""",
    },
    "next time table": {
        "within": """
nt = s.timesteps[i + 1] if i + 1 < len(s.timesteps) else t
v = v + 0.1 * net(x, nt, u)""",
    },
    "table by time dict": {
        "setup": "tab = {float(t): 0.9 + 0.01 * k for k, t in enumerate(s.timesteps)}",
        "within": "v = v * tab[float(t)]",
    },
    "table index nonzero": {
        "within": """
k = (s.timesteps == t).nonzero().item()
v = v * (1 - 0.005 * k)""",
    },
    "thresholding in loop": {
        "within": """
q = torch.quantile(v.abs(), 0.8, dim=1, keepdim=True)
v = v.clamp(-q, q)""",
    },
    "thresholding over batch": {
        "within": """
q = torch.quantile(v.abs().flatten(), 0.8)
v = v.clamp(-q, q)""",
    },
    "clamp state after": {
        "after": "x = x.clamp(-2, 2)",
    },
    "clamp state before": {
        "before": "x = x.clamp(-2, 2)",
    },
    "img2img": {
        "picture": "flow",
    },
    "img2img ddim no begin": {
        "picture": "noise",
        "scheduler": "ddim",
    },
    "img2img dpm": {
        "picture": "noise",
        "scheduler": "dpm",
    },
    "img2img anc": {
        "picture": "noise",
        "scheduler": "ancestral",
    },
    "inpaint flow": {
        "setup": "m = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(2, 8)",
        "after": """
nt = ts[i + 1] if i + 1 < len(ts) else None
k = s.scale_noise(img, nt[None], noise) if nt is not None else img
x = (1 - m) * k + m * x""",
        "picture": "flow",
    },
    "inpaint ddim": {
        "setup": "m = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(2, 8)",
        "after": """
k = s.add_noise(img, noise, ts[i + 1][None]) if i < len(ts) - 1 else img
x = (1 - m) * k + m * x""",
        "picture": "noise",
        "scheduler": "ddim",
    },
    "inpaint fresh noise": {
        "setup": "m = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(2, 8)",
        "after": """
k = s.add_noise(img, torch.randn(2, 8, generator=generator), ts[i + 1][None]) if i < len(ts) - 1 else img
x = (1 - m) * k + m * x""",
        "picture": "noise",
        "scheduler": "ddim",
    },
    "inpaint blend before": {
        "setup": "m = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(2, 8)",
        "picture": "noise",
        "before": "x = (1 - m) * s.add_noise(img, noise, t[None]) + m * x",
        "scheduler": "ddim",
    },
    "soft mask grows": {
        "setup": "m = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(2, 8)",
        "after": """
mm = (m > i / len(ts)).float()
x = mm * x + (1 - mm) * s.add_noise(img, noise, t[None])""",
        "picture": "noise",
        "scheduler": "ddim",
    },
    "mask made in pass 0": {
        "setup": "mm = None",
        "within": """
mm = (v > 0).float() if mm is None else mm
v = v * (0.8 + 0.2 * mm)""",
        "picture": "flow",
    },
    "repaint jump": {
        "setup": "seen = 0",
        "after": """
if i == 10:
    x = x + 0.1 * torch.ones(2, 8)""",
        "scheduler": "ddim",
    },
    "resample twice": {
        "after": """
if i < 3:
    x = s.step(net(x, t, c), t, x)[0]""",
        "scheduler": "ddim",
    },
    "expert by t": {
        "setup": "nets = [net, self.second]",
        "before": "net = nets[0] if t > 500 else nets[1]",
    },
    "expert by i": {
        "setup": "first = net",
        "before": "net = first if i < 12 else self.second",
    },
    "expert one way": {
        "before": """
if i == 12:
    net = self.second""",
    },
    "expert boundary attr": {
        "before": "self._net = self.net if t >= 0.5 * 1000 else self.second",
        "within": "v = 0.5 * v + 0.5 * self._net(x, t, c)",
    },
    "networks average": {
        "within": "v = 0.5 * (v + self.second(x, t, c))",
    },
    "network of network": {
        "within": "v = v + 0.1 * self.second(v, t, c)",
    },
    "second every 5th kept": {
        "setup": "r = 0",
        "within": """
if i % 5 == 0:
    r = self.second(x, t, c)
v = v + 0.2 * r""",
    },
    "setattr module swap": {
        "before": """
if i == 12:
    self.net = self.second
    net = self.net""",
        "end": "self.net = net",
    },
    "condition switches": {
        "setup": "cs = [c, u, c.flip(0)]",
        "before": "c = cs[i * 3 // steps]",
    },
    "condition drifts": {
        "before": "c = c * 0.97",
    },
    "condition of state": {
        "before": "c = x[:, :3] * 0.1",
    },
    "prompt travel in place": {
        "before": "c[:, 0] = i / steps",
    },
    "prompt travel out": {
        "before": "cc = torch.lerp(c, u, i / steps)",
        "within": "v = 0.5 * v + 0.5 * net(x, t, cc)",
    },
    "exec namespace": {
        "setup": "ns = {'k': 0}",
        "within": """
exec('k = k + 1', ns)
v = v * (1 - 0.004 * ns['k'])""",
    },
    "sys.modules attr": {
        "setup": """
import sys as y
mod = type(y)('odd')
y.modules['odd'] = mod
mod.k = 0""",
        "within": """
import odd
odd.k += 1
v = v * (1 - 0.004 * odd.k)""",
    },
    "weakref attr": {
        "setup": """
import weakref

class Z:
    pass
z = Z()
z.k = 0.0
r = weakref.ref(z)""",
        "within": """
r().k = 0.5 * r().k + 1
v = v * (1 - 0.02 * r().k)""",
    },
    "tensor attribute": {
        "setup": "c.k = 0.0",
        "within": """
c.k = 0.5 * c.k + float(v.mean())
v = v + 0.2 * c.k""",
    },
    "scheduler attribute": {
        "setup": "s.mine = 0",
        "within": """
s.mine = s.mine * 0.5 + 1
v = v * (1 - 0.03 * s.mine)""",
    },
    "scheduler config attr": {
        "setup": "object.__setattr__(s, 'box', [0.0])",
        "within": """
s.box[0] = 0.5 * s.box[0] + float(v.std())
v = v + 0.1 * s.box[0]""",
    },
    "slots object": {
        "setup": """
class S:
    __slots__ = ('k',)
o = S()
o.k = 0.0""",
        "within": """
o.k = 0.6 * o.k + v
v = o.k * 0.4""",
    },
    "dataclass frozen replace": {
        "setup": """
import dataclasses as d

@d.dataclass(frozen=True)
class F:
    k: float = 0.0
h = [F()]""",
        "within": """
h[0] = d.replace(h[0], k=0.7 * h[0].k + float(v.mean()))
v = v + 0.3 * h[0].k""",
    },
    "namedtuple": {
        "setup": """
from collections import namedtuple
N = namedtuple('N', 'k')
n = N(torch.zeros(2, 8))""",
        "within": """
n = n._replace(k=0.5 * n.k + v)
v = 0.5 * n.k""",
    },
    "chainmap": {
        "setup": """
from collections import ChainMap
m = ChainMap({}, {'k': torch.zeros(2, 8)})""",
        "within": """
m['k'] = 0.5 * m['k'] + v
v = 0.5 * m['k']""",
    },
    "numpy array": {
        "setup": """
import numpy as np
a = np.zeros(1)""",
        "within": """
a[0] = 0.5 * a[0] + 1
v = v * (1 - 0.02 * float(a[0]))""",
    },
    "memoryview": {
        "setup": "b = memoryview(bytearray(1))",
        "within": """
b[0] += 1
v = v * (1 - 0.004 * b[0])""",
    },
    "array module": {
        "setup": """
import array
a = array.array('d', [0.0])""",
        "within": """
a[0] = a[0] * 0.5 + 1
v = v * (1 - 0.02 * a[0])""",
    },
    "property setter": {
        "setup": """
class P:

    def __init__(q):
        q._k = 0.0

    @property
    def k(q):
        q._k = 0.5 * q._k + 1
        return q._k
p = P()""",
        "within": "v = v * (1 - 0.02 * p.k)",
    },
    "descriptor getitem": {
        "setup": """
class P:
    n = 0

    def __getitem__(q, j):
        q.n += 1
        return 1 - 0.01 * q.n
p = P()""",
        "within": "v = v * p[0]",
    },
    "generator send": {
        "setup": """
def g():
    m = 0.0
    while True:
        y = (yield m)
        m = 0.5 * m + y
h = g()
next(h)""",
        "within": "v = 0.5 * h.send(v)",
    },
    "lru cache by t": {
        "setup": """
import functools as f

@f.lru_cache
def k(tt):
    return 1 - tt / 4000""",
        "within": "v = v * k(float(t))",
    },
    "lru cache of state": {
        "setup": """
import functools as f

@f.lru_cache(1)
def k():
    return 0.3 * x""",
        "within": "v = v + k()",
    },
    "cached_property on self": {
        "setup": "self.__dict__.pop('first', None)",
        "within": """
self.first = self.__dict__.get('first', v)
v = v + 0.2 * self.first""",
    },
    "sum over passes torch.cat": {
        "setup": "h = x[None] * 0",
        "within": """
h = torch.cat([h, v[None]])
v = v + 0.1 * h[-2:].mean(0)""",
    },
    "running mean buffer": {
        "setup": "self.net.register_buffer('rm', torch.zeros(2, 8))",
        "within": """
self.net.rm.mul_(0.5).add_(v)
v = v + 0.2 * self.net.rm""",
    },
    "deterministic noise of i": {
        "within": "v = v + 0.05 * torch.randn(2, 8, generator=torch.Generator().manual_seed(i))",
    },
    "deterministic noise of t": {
        "within": "v = v + 0.05 * torch.randn(2, 8, generator=torch.Generator().manual_seed(int(t)))",
    },
    "noise list prepared": {
        "setup": "ns = [torch.randn(2, 8, generator=generator) for _ in range(steps)]",
        "within": "v = v + 0.05 * ns[i]",
    },
    "noise list popped": {
        "setup": "ns = [torch.randn(2, 8, generator=generator) for _ in range(steps)]",
        "within": "v = v + 0.05 * ns.pop()",
    },
    "own step noise after": {
        "after": "x = x + 0.02 * torch.randn(2, 8, generator=generator)",
    },
    "own noise last excluded": {
        "after": """
if i < steps - 1:
    x = x + 0.02 * torch.randn(2, 8, generator=generator)""",
        "scheduler": "ddim",
    },
    "randn_like global": {
        "within": "v = v + 0.02 * torch.randn_like(v)",
    },
    "fork rng": {
        "within": """
with torch.random.fork_rng():
    torch.manual_seed(3)
    v = v + 0.05 * torch.randn(2, 8)""",
    },
    "numpy rng by i": {
        "setup": "import numpy as np",
        "within": "v = v + 0.05 * torch.from_numpy(np.random.default_rng(i).standard_normal((2, 8))).float()",
    },
    "permutation draw": {
        "within": "v = v[torch.randperm(2, generator=generator)]",
    },
    "thread pool network": {
        "setup": """
from concurrent.futures import ThreadPoolExecutor as T
p = T(1)""",
        "within": "v = 0.5 * v + 0.5 * p.submit(net, x, t, u).result()",
        "end": "p.shutdown()",
    },
    "asyncio": {
        "setup": """
import asyncio

async def a(x, t):
    return net(x, t, u)""",
        "within": "v = v + 0.2 * asyncio.run(a(x, t))",
    },
    "thread writes box": {
        "setup": """
import threading as th
box = [0.0]

def f(q):
    box[0] = 0.5 * box[0] + float(q.mean())""",
        "within": """
k = th.Thread(target=f, args=(v,))
k.start()
k.join()
v = v + 0.3 * box[0]""",
    },
    "order attr used": {
        "within": "v = v * (1 if s.order == 1 else 0.9)",
        "scheduler": "dpm",
    },
    "dpm lower order": {
        "scheduler": "dpm_3",
    },
    "unipc": {
        "scheduler": "unipc",
    },
    "pndm": {
        "scheduler": "pndm",
    },
    "heun": {
        "scheduler": "heun",
    },
    "ddpm step draws": {
        "step": "x = s.step(v, t, x, generator=generator)[0]",
        "scheduler": "ddpm",
    },
    "anc global": {
        "scheduler": "ancestral",
    },
    "ddim eta list gens": {
        "setup": "gs = [torch.Generator().manual_seed(k) for k in (3, 4)]",
        "step": "x = s.step(v, t, x, eta=1.0, generator=gs)[0]",
        "scheduler": "ddim",
    },
    "ddpm variance noise": {
        "within": "vn = torch.randn(2, 8, generator=generator)",
        "step": "x = s.step(v, t, x, eta=1.0, variance_noise=vn)[0]",
        "scheduler": "ddim",
    },
    "eta by i": {
        "step": "x = s.step(v, t, x, eta=i / steps, generator=generator)[0]",
        "scheduler": "ddim",
    },
    "custom sigmas": {
        "setup": """
import numpy as np
s.set_timesteps(sigmas=np.linspace(1, 0.05, 20) ** 1.5)""",
    },
    "custom timesteps": {
        "setup": "s.set_timesteps(timesteps=[900, 700, 500, 400, 300, 200, 100, 50, 20, 0])",
        "scheduler": "ddpm",
    },
    "reversed list": {
        "head": "for i, t in enumerate(list(reversed(list(reversed(s.timesteps))))):",
    },
    "while loop": {
        "setup": "i = 0",
        "head": """
while i < len(s.timesteps):
    t=s.timesteps[i]; i+=1""",
    },
    "iter next": {
        "setup": "it = iter(s.timesteps)",
        "head": """
for i in range(len(s.timesteps)):
    t=next(it)""",
    },
    "two loops halves": {
        "head": "for i, t in enumerate(s.timesteps[:12]):",
        "end": """
for t in s.timesteps[12:]:
    x = s.step(net(x, t, u), t, x)[0]""",
    },
    "sliced last dropped": {
        "head": "for i, t in enumerate(s.timesteps[:-4]):",
    },
    "stride 2": {
        "head": "for i, t in enumerate(s.timesteps[::2]):",
        "scheduler": "ddim",
    },
    "state half shadow": {
        "setup": "sh = x.clone()",
        "after": "sh = 0.5 * sh + 0.5 * x",
        "end": "x = sh",
    },
    "swap batch": {
        "after": "x = x.flip(0)",
    },
    "roll state": {
        "before": "x = x.roll(1, 1)",
    },
    "roll by i": {
        "before": """
sh = i % 8
x = x.roll(sh, 1)""",
        "after": "x = x.roll(-sh, 1)",
    },
    "view alias": {
        "setup": "y = x[:, :4]",
        "after": "y.copy_(x[:, :4])",
        "end": "x = torch.cat([y, x[:, 4:]], 1)",
    },
    "inplace out": {
        "within": "v.mul_(0.9)",
    },
    "inplace data": {
        "within": "v.data.mul_(0.9)",
    },
    "out kw": {
        "within": "torch.mul(v, 0.9, out=v)",
    },
    "state not replaced": {
        "after": """
y = x
x = y""",
    },
    "states averaged": {
        "setup": "acc = torch.zeros(2, 8)",
        "after": "acc = acc + x / steps",
        "end": "x = x + acc",
    },
    "ema state used": {
        "setup": "e = x",
        "before": """
e = 0.9 * e + 0.1 * x
x = x + 0.05 * (e - x)""",
    },
    "prev sample kept": {
        "setup": "p = None",
        "before": """
q = x
if p is not None:
    x = x + 0.05 * (x - p)
p = q""",
    },
    "grad guidance": {
        "within": """
with torch.enable_grad():
    z = x.detach().requires_grad_()
    l = (net(z, t, c) ** 2).sum()
    g = torch.autograd.grad(l, z)[0]
v = v + 0.01 * g""",
    },
    "grad guidance closed form": {
        "within": """
with torch.enable_grad():
    z = x.detach().requires_grad_()
    l = ((z - 1) ** 2).sum()
    g = torch.autograd.grad(l, z)[0]
v = v + 0.01 * g""",
    },
    "nan guard": {
        "within": """
if torch.isnan(v).any():
    v = torch.zeros_like(v)""",
    },
    "adaptive scale of norm": {
        "within": "v = v * (0.8 if v.norm() > 3 else 1.0)",
    },
    "early exit by norm": {
        "after": """
if (x - v).norm() < 0.01:
    break""",
    },
    "try except": {
        "within": """
try:
    v = v.reshape(99)
except RuntimeError:
    v = v * 0.9""",
    },
    "pred original": {
        "step": """
o = s.step(v, t, x)
x = o.prev_sample
y = o.pred_original_sample""",
        "end": "x = y",
        "scheduler": "ddim",
    },
    "pred original used": {
        "setup": "y = 0",
        "step": """
o = s.step(v + 0.05 * y, t, x)
x = o.prev_sample
y = o.pred_original_sample""",
        "scheduler": "ddim",
    },
    "step return_dict": {
        "step": "x = s.step(v, t, x, return_dict=False)[0]",
    },
    "step positional model": {
        "step": "x = s.step(model_output=v, timestep=t, sample=x)[0]",
    },
    "own euler, no step": {
        "step": "x = x + (s.sigmas[i + 1] - s.sigmas[i]) * v",
    },
    "step of copy": {
        "setup": """
import copy
s2 = copy.deepcopy(s)""",
        "step": "x = s2.step(v, t, x)[0]",
    },
    "step then own noise sigma": {
        "after": "x = x + 0.01 * s.sigmas[i + 1] * torch.ones(2, 8)",
    },
    "scale sigma by step_index": {
        "within": """
k = s.step_index if s.step_index is not None else 0
v = v * (1 - 0.005 * k)""",
    },
    "sigma of step index": {
        "within": "v = v * (1 - 0.05 * float(s.sigmas[i]))",
    },
    "batch grows": {
        "after": """
if i == 11:
    x = x.repeat(2, 1)
    c = c.repeat(2, 1)""",
    },
    "deepcopy net": {
        "setup": """
import copy
net = copy.deepcopy(net)""",
    },
    "net lambda": {
        "setup": """
n0 = net
net = lambda a, b, d: n0(a, b, d) * 0.9""",
    },
    "net bound forward": {
        "setup": "net = self.net.forward",
    },
    "net functional_call": {
        "setup": """
from torch.func import functional_call as F
ps = dict(self.net.named_parameters())
net = lambda a, b, d: F(self.net, ps, (a, b, d))""",
    },
    "net functional drift": {
        "setup": """
from torch.func import functional_call as F
ps = {k: p.detach().clone() for k, p in self.net.named_parameters()}
net = lambda a, b, d: F(self.net, ps, (a, b, d))""",
        "after": """
ps = {k: p * 0.995 for k, p in ps.items()}
net = lambda a, b, d, ps=ps: F(self.net, ps, (a, b, d))""",
    },
    "net vmap": {
        "setup": "net = torch.vmap(lambda a, b, d: self.net(a[None], b, d[None])[0], in_dims=(0, None, 0))",
    },
    "t scaled": {
        "within": "v = 0.5 * v + 0.5 * net(x, t / 2, u)",
    },
    "t expanded": {
        "within": "v = 0.5 * v + 0.5 * net(x, t.expand(2), u)",
    },
    "t as python": {
        "within": "v = 0.5 * v + 0.5 * net(x, torch.tensor(float(t)), u)",
    },
    "t from i": {
        "within": "v = 0.5 * v + 0.5 * net(x, torch.tensor(1000.0 * (1 - i / steps)), u)",
    },
    "progress": {
        "head": "for i, t in enumerate(self.progress_bar(s.timesteps)):",
    },
}
"""Parts of LOOP by their names, and a scheduler; `picture` for one that starts from a picture."""

NETWORKS: dict[str, Callable[[Any], Any]] = {
    "scaled by calls": lambda net: net.register_forward_pre_hook(Counting()),
    "mean of the batch": lambda net: net.register_forward_hook(lambda m, args, out: out - out.mean(0, keepdim=True)),
    "mean of calls": lambda net: net.a.register_forward_hook(Averaging()),
    "batch norm": lambda net: setattr(net, "b", nn.Sequential(net.b, nn.BatchNorm1d(8).train())),
    "batch norm, eval": lambda net: setattr(net, "b", nn.Sequential(net.b, nn.BatchNorm1d(8).eval())),
    "dropout": lambda net: setattr(net, "b", nn.Sequential(net.b, nn.Dropout(0.2).train())),
    "weight norm": lambda net: nn.utils.parametrizations.weight_norm(net.b),
    "spectral norm": lambda net: nn.utils.parametrizations.spectral_norm(net.b).train(),
}
"""What is done to the network of a plain loop."""


class Conditioned(nn.Module):
    """A network with a condition."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.c, self.b = nn.Linear(8, 16), nn.Linear(3, 16), nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        hidden = self.a(x) + t.reshape(-1, 1) / 300
        return self.b(torch.tanh(hidden if c is None else hidden + self.c(c)))


class Counting:
    """A hook that counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any, args: Any) -> Any:
        self.calls += 1
        return args[0] * (1 - 0.002 * self.calls), *args[1:]


class Averaging:
    """A hook that averages over calls."""

    def __init__(self) -> None:
        self.mean: Any = None

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        if self.mean is None or self.mean.shape != output.shape:
            self.mean = output
        self.mean = 0.5 * self.mean + 0.5 * output
        return self.mean


def written(given: Mapping[str, str]) -> str:
    """The text of a loop with these parts."""
    parts = {"head": "for i, t in enumerate(s.timesteps):", "step": "x = s.step(v, t, x)[0]"} | dict(given)
    if "picture" in parts:
        parts["head"] = "for i, t in enumerate(ts):"
        parts["setup"] = PICTURE.strip() + "\n" + NOISED[parts["picture"]] + "\n" + parts.get("setup", "pass")
    lines = []
    for line in LOOP.splitlines():
        part = line.strip()
        text = parts.get(part.lower(), "pass") if part.isupper() else None
        indent = line[: len(line) - len(line.lstrip())]
        lines.append(line if text is None else textwrap.indent(text.strip(), indent))
    return "\n".join(lines) + "\n"


def judged(name: str, method: Any, executor: Any) -> Verdict:
    """The plain call and the parallel one of an attack, or of a plain loop with one of NETWORKS, compared."""
    parts = ATTACKS.get(name, {})
    kind = Adversary.of(written(parts))

    def made() -> Any:
        torch.manual_seed(0)
        pipe = kind(Conditioned(), SCHEDULERS[parts.get("scheduler", "flow")]())
        object.__setattr__(pipe, "second", Conditioned(5))
        if name in NETWORKS:
            NETWORKS[name](pipe.net)
        return pipe

    def called(call: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        generator = torch.Generator().manual_seed(3)
        return call(generator=generator), generator.get_state()

    plain, state = called(made())
    call = parallelize(made(), method, executor=executor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, after = called(call)
    report = call.report
    if found.shape != plain.shape:
        return Verdict("WRONG", f"a sample of shape {tuple(found.shape)}")
    if not torch.equal(state, after):
        return Verdict("WRONG", "the generator is elsewhere than after the plain call")
    rms = float((found.double() - plain.double()).square().mean().sqrt())
    if report.executor == "sequential":
        return Verdict("WRONG" if rms > 0 else "refused", report.warnings[-1])
    assert report.error_estimate is not None
    told, size = report.error_estimate.estimated_error, max(1.0, float(plain.square().mean().sqrt()))
    text = f"{report.executor}, {report.rounds} rounds, RMS error {rms:.1e}, estimate {told:.1e}"
    return Verdict("parallel" if rms <= max(2 * told, 1e-5 * size) else "WRONG", text)


def main() -> None:
    verdicts = Counter[str]()
    for name in [*ATTACKS, *NETWORKS]:
        if any(word in name for word in sys.argv[1:] or [name]):
            for executor in ("auto", "lanes"):
                for tolerance, method in METHODS.items():
                    verdict = judged(name, method(), executor)
                    verdicts[verdict.kind] += 1
                    print(f"{verdict.kind:8} {name}, {executor}, {tolerance}: {verdict.text[:200]}", flush=True)
    print(f"{len(ATTACKS)} loops and {len(NETWORKS)} networks, {dict(verdicts)}")


if __name__ == "__main__":
    main()
