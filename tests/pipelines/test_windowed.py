# SPDX-License-Identifier: Apache-2.0
"""What a loop's body does to a window, it does to each state; what it reads in Python all states agree in, or it is refused."""

from __future__ import annotations

import copy
import math
import operator
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paradiff.errors import NeedsLanes
from paradiff.pipelines.tensor.windowed import RULES, UNSUITABLE, Windowed, mapped, mapped_over_states

W = 3
RUN = object()


def window(*shape: int, seed: int = 0, width: int = W, dtype: torch.dtype = torch.float64) -> Windowed:
    values = torch.randn(width, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Windowed.wrap(values.to(dtype), RUN)


def plain(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(value: Any, w: int) -> Any:
    return mapped(lambda leaf: leaf.window[w].clone() if isinstance(leaf, Windowed) else leaf, value)


def tensors(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, value)
    return found


def check(body: Callable[..., Any], *inputs: Any) -> Any:
    """The body's results for a window are those for each state alone: values, shapes and dtypes."""
    results = body(*mapped(lambda leaf: copy.copy(leaf) if isinstance(leaf, Windowed) else leaf, inputs))
    for w in range(W):
        wanted = tensors(body(*at(inputs, w)))
        found = tensors(results)
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            if not isinstance(b, Tensor):
                assert a == b
                continue
            values = a.window[w] if isinstance(a, Windowed) else a
            assert (values.shape, values.dtype, a.shape, a.dtype) == (b.shape, b.dtype, b.shape, b.dtype)
            # Float64; kernels for other shapes may add in another order.
            torch.testing.assert_close(values, b, rtol=1e-12, atol=1e-12, equal_nan=True)
            assert not isinstance(a, Windowed) or a.run is RUN
    return results


T = Windowed.wrap(torch.tensor([900, 500, 20]), RUN)
X, Y = window(2, 4, 3, 5), window(2, 4, 3, 5, seed=1)


def guidance(x: Tensor, t: Tensor) -> Any:
    doubled = torch.cat([x] * 2)
    times = t.expand(doubled.shape[0])
    noise = doubled * times[:, None, None, None] / 1000
    uncond, text = noise.chunk(2)
    guided = uncond + 7.5 * (text - uncond * 0.3)
    std_text = text.std(dim=list(range(1, text.ndim)), keepdim=True)
    std = guided.std(dim=list(range(1, guided.ndim)), keepdim=True)
    rescaled = guided * (std_text / std)
    return 0.7 * rescaled + (1 - 0.7) * guided


def packed(x: Tensor) -> Any:
    b, c, h, w = x.shape[0], x.shape[1], 2, 2
    x = x[:, :, :2, :4].reshape(b, c, h // 2, 2, 4 // w, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4).unflatten(2, (c, 4)).flatten(1, 2)


BODIES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "guidance": (guidance, (X, T)),
    "packed": (packed, (X,)),
    "times": (
        lambda t: [
            t / 1000,
            1 - t,
            t * 2.5,
            t[None],
            t.repeat(4),
            t.to(torch.float32),
            t.unsqueeze(0),
            t.reshape(1),
            2 ** t.double(),
            t // 3,
            -t,
            t % 7,
            t.view(-1),
        ],
        (T,),
    ),
    "time and plain of other dtypes": (
        lambda t, p: [t * p, p - t, t / p.float(), t.float() * p[0, 0], t + torch.tensor(1.5)],
        (T, plain(2, 4)),
    ),
    "ranks": (
        lambda x, t, p: [x * t, t - x, x + p, p * x[0, 0, 0], x[0, 0] * p, t.double() * p, p / t.double()],
        (X, window(), plain(4, 2, 4, 3, 5)),
    ),
    "channels": (lambda x, p: torch.cat([x, p[:, :1], p], dim=1), (X, plain(2, 4, 3, 5))),
    "last axis": (lambda x, p: torch.cat([x, p], dim=-1), (X, plain(2, 4, 3, 5))),
    "other dtypes": (lambda x, p: torch.cat([x.float(), p]), (X, plain(2, 4, 3, 5))),
    "stack": (
        lambda x, y, p: [torch.stack([x, y], d) for d in (0, 1, -1, -5)] + [torch.stack((p, x))],
        (X, Y, plain(2, 4, 3, 5)),
    ),
    "parts": (
        lambda x: [
            x.chunk(2),
            x.split(1),
            x.split([1, 3], dim=1),
            x.chunk(2, dim=-1),
            x.unbind(1),
            torch.unbind(x),
            list(x),
            x.tensor_split(2),
        ],
        (X,),
    ),
    "items": (
        lambda x: [
            x[0],
            x[:, 1:],
            x[..., None],
            x[None],
            x[-1, :, 0],
            x[:, ::2],
            x[[1, 0]],
            x[:, torch.tensor([2, 0])],
            x[True],
        ],
        (X,),
    ),
    "lookup": (lambda t, p: [p[t], p[t[None]], p[t - 1] * 2], (T, torch.linspace(0, 1, 1000))),
    "gather": (lambda t, p: p.gather(0, t[None]), (T, torch.linspace(0, 1, 1000))),
    "where": (
        lambda x, y, p: [
            torch.where(x > 0, x, y),
            torch.where(p > 0, x, p),
            torch.where(x > 0, 0.0, y),
            x.where(y > 0, p),
            torch.where(x[0, 0, 0] > 0, x, p),
        ],
        (X, Y, plain(2, 4, 3, 5)),
    ),
    "reductions": (
        lambda x: [
            x.mean(),
            x.sum((1, 2)),
            x.std([1, 2, 3], keepdim=True),
            x.var(-1),
            x.std(1, False),
            x.norm(dim=-1),
            x.amax(dim=(-1, 0)),
            torch.mean(x, 1, keepdim=True),
            x.max(1),
            x.flatten().max(),
            x.mean(dim=1, dtype=torch.float32),
        ],
        (X,),
    ),
    "axes": (
        lambda x: [
            x.transpose(1, -1),
            x.flatten(1),
            x.flatten(),
            x.flatten(start_dim=-2),
            x.squeeze(0),
            x[:, :1].squeeze(1),
            x.squeeze(),
            x.movedim(1, -1),
            x.permute(0, 3, 1, 2),
            x.permute(-1, 0, 1, 2),
            x.swapaxes(0, 1),
            x.mT,
            x.unsqueeze(-1),
            x.unsqueeze(0),
            x.unsqueeze(-5),
        ],
        (X,),
    ),
    "sizes": (
        lambda x: [
            x.view(2, -1),
            x.reshape(-1),
            x.reshape((4, 2, -1)),
            x[:1].expand(3, -1, 3, 5),
            x.expand(2, 2, 4, 3, 5),
            x.repeat(2, 1, 1, 1),
            x.repeat(2, 1, 1, 1, 1),
            x.view(x.shape),
            x.repeat_interleave(2, 0),
            x.view(torch.int64),
        ],
        (X,),
    ),
    "video": (
        lambda x, t: [
            (x[:, :, None].repeat(1, 1, 3, 1, 1) * t).permute(0, 2, 1, 3, 4).flatten(0, 1),
            F.interpolate(x[:, :, None], scale_factor=2.0),
        ],
        (X, T),
    ),
    "functions": (
        lambda x: [
            F.interpolate(x, scale_factor=2),
            F.linear(x, plain(6, 5)),
            F.linear(x[0, 0, 0], plain(6, 5), plain(6)),
            F.conv2d(x, plain(2, 4, 1, 1)),
            F.pad(x, (1, 1)),
            F.softmax(x, -1),
            F.group_norm(x, 2),
            F.silu(x),
            x.exp().clamp(0, 1),
            F.layer_norm(x, (5,)),
        ],
        (X,),
    ),
    "module": (
        lambda x: (
            torch.nn.Linear(5, 2, dtype=torch.float64)
            .requires_grad_(False)
            .apply(lambda m: [p.fill_(0.5) for p in m.parameters()])(x)
        ),
        (X,),
    ),
    "windows of weights": (
        lambda x, y: [F.linear(x[0, 0], y[0, 1]), torch.einsum("bchw,bdhw->bcd", x, y), x[0] @ y[0].transpose(1, 2)],
        (X, Y),
    ),
    "comparisons": (
        lambda x, t: [x > 0, x == x, t >= 500, (t > 30) & (t < 800), x != 1, ~(x > 0), operator.eq(x, None)],
        (X, T),
    ),
    "dtypes": (
        lambda x: [
            x.float(),
            x.half().double(),
            x.to(torch.bfloat16),
            x.type_as(torch.ones(1)),
            x.long(),
            x.to(torch.ones(1)),
            x.bool(),
            plain(2).to(x),
        ],
        (X,),
    ),
    "factories": (
        lambda x: [torch.zeros_like(x), x.new_zeros(3), torch.ones_like(x, dtype=torch.int64), torch.full_like(x, 2.0)],
        (X,),
    ),
    "metadata": (
        lambda x, t: [
            x.shape[1],
            x.dim(),
            x.ndim,
            x.numel(),
            len(x),
            x.size(0),
            x.dtype,
            str(x.device),
            t.ndim,
            t.shape == (),
            x.is_floating_point(),
            torch.is_tensor(t),
            torch.is_floating_point(t),
            x.requires_grad,
            x.is_contiguous(),
            isinstance(t, Tensor),
            x.stride(),
            x.nelement(),
        ],
        (X, T),
    ),
    "promotion": (
        lambda t: [
            t + 1.5,
            t * True,
            t.half() * 2.5,
            t.float() / 3,
            t.float() * torch.tensor(2.0, dtype=torch.float64),
            t.half() + torch.ones(3),
        ],
        (T,),
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_act_on_each_state(name: str) -> None:
    body, inputs = BODIES[name]
    check(body, *inputs)


def test_writing_in_place_reaches_the_window() -> None:
    def body(x: Tensor, y: Tensor, p: Tensor) -> Any:
        x, view = x.clone(), y.clone()
        x[:, 1:] = y[:, 1:]
        x[0] = p[0]
        x[:, 0, 0] = 4.0
        x[:, :, 1, 1] = y[:, :, 0, 0].float()
        x[:, [0, 2]] = 5.0
        x += y
        x *= 2
        x -= p
        x[:, 1].mul_(3)
        x.add_(p, alpha=2).clamp_(-9, 9)
        part = view[:, :2]
        part /= 3
        x.copy_(x.flip(0))
        return x, view

    check(body, X, Y, plain(2, 4, 3, 5))
    x = copy.deepcopy(X)
    same = x
    version = x._version
    x += 1
    assert x is same
    assert x._version > version
    assert x.mul_(2) is same


@pytest.mark.parametrize(
    "unchanged",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.to(device=x.device, dtype=x.dtype),
        lambda x: x.to(x),
        lambda x: x.double(),
        lambda x: x.type(torch.float64),
        lambda x: x.type_as(x),
        lambda x: x.cpu(),
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.detach(),
        lambda x: x.data,
    ],
)
def test_what_changes_nothing_returns_the_very_object(unchanged: Callable[[Tensor], Tensor]) -> None:
    assert unchanged(X) is X


def test_a_copy_is_another_object() -> None:
    x = copy.deepcopy(X)
    for other in (x.clone(), copy.deepcopy(x), x.to(torch.float64, copy=True)):
        assert other is not x
        assert other.run is RUN
        assert torch.equal(other.window, x.window)
        other.mul_(0)
    assert x.window.any()
    assert x.permute(0, 2, 1, 3).contiguous().window[0].is_contiguous()


SAME = Windowed.wrap(torch.full((W,), 7), RUN)


@pytest.mark.parametrize(
    "reading",
    [
        bool,
        int,
        float,
        math.cos,
        range,
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: int(t.numpy()),
        lambda t: float(np.asarray(t)),
        lambda t: [5] * t,
        lambda t: list(range(20))[t],
        lambda t: bool(t > 7),
        lambda t: 1 if t >= 7 else 2,
        lambda t: torch.equal(t, torch.tensor(7)),
        lambda t: torch.allclose(t, torch.tensor(7)),
        lambda t: 7 in t[None],
        lambda t: torch.is_nonzero(t),
        lambda t: torch.arange(9)[: int(t)].tolist(),
        lambda t: torch.arange(9)[:t].tolist(),
        lambda t: torch.arange(9)[None].expand(t, 9).tolist(),
        lambda t: torch.full((2,), t).tolist(),
        lambda t: f"{t}",
        lambda t: torch.tensor([t] * 2).tolist(),
        lambda t: torch.tensor([t.float()] * 2).tolist(),
        lambda t: torch.arange(12).view(1, -1)[:, :t].tolist(),
        lambda t: torch.linspace(0, t, 3).tolist(),
    ],
)
def test_a_value_that_all_states_share_is_read(reading: Callable[[Any], Any]) -> None:
    assert reading(SAME) == reading(torch.tensor(7))
    assert reading(Windowed.wrap(torch.tensor([7]), RUN)) == reading(torch.tensor(7))


def test_truth_is_shared_by_values_that_differ() -> None:
    assert bool(T) is True
    with pytest.raises(NeedsLanes, match="__bool__"):
        bool(T - 500)


@pytest.mark.parametrize(
    ("reading", "name"),
    [
        (lambda t: bool(t > 500), "__bool__"),
        (float, "__float__"),
        (int, "__int__"),
        (range, "__index__"),
        (lambda t: t.item(), "item"),
        (lambda t: t.tolist(), "tolist"),
        (lambda t: t.numpy(), "numpy"),
        (lambda t: torch.equal(t, torch.tensor(500)), "equal"),
        (lambda t: torch.allclose(t, torch.tensor(500)), "allclose"),
        (lambda t: 500 in t[None], "__contains__"),
        (lambda t: math.cos(t), "__float__"),
        (lambda t: torch.tensor([t] * 2), "__index__"),
        (lambda t: torch.tensor([t.float()] * 2), "__float__"),
        (lambda t: torch.arange(9)[:t], "__index__"),
        (lambda t: X[:, :t], "__index__"),
        (lambda t: 1 if t > 30 and t < 800 else 2, "__bool__"),
    ],
)
def test_a_value_that_differs_is_refused_by_name(reading: Callable[[Any], Any], name: str) -> None:
    text = rf"the loop reads the value of a tensor in Python \(`{name}`\), and it differs between the states of a window"
    with pytest.raises(NeedsLanes, match=text):
        reading(T)


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (lambda x: x.nonzero(), "`nonzero` cannot act on all states"),
        (lambda x: x[x > 0], "`__getitem__` cannot act on all states"),
        (lambda x: torch.unique(x), "unique"),
        (lambda x: x.view(7, -1), "`view` cannot act on all states .*RuntimeError"),
        (lambda x: x + plain(3), r"`add` cannot act on all states"),
        (lambda x: plain(2, 4, 3, 5).add_(x), "`add_` writes the states of a window into a tensor of one state"),
        (lambda x: plain(2, 4, 3, 5).__setitem__(0, x[0]), "`__setitem__` writes the states"),
        (lambda x: plain(2, 4, 3, 5).copy_(x), "`copy_` writes the states"),
        (lambda x: torch.add(x, x, out=plain(2, 4, 3, 5)), "`add` writes the states of a window into a tensor given as `out`"),
        (lambda x: x.clone().unsqueeze_(0), "`unsqueeze_` changes the shape"),
        (lambda x: x + window(2, 4, 3, 5, width=2), "mixes the states of two windows, of 3 and 2 states"),
        (lambda x: torch.cat([x, window(2, 4, 3, 5, width=2)]), "mixes the states of two windows, of 3 and 2 states"),
        (lambda x: torch.lerp(x, window(2, 4, 3, 5, width=2), 0.5), "mixes the states of two windows, of 3 and 2 states"),
        (lambda x: x * Windowed.wrap(X.window, object()), "mixes the states of two windows"),
        (lambda x: x.data_ptr(), "asks for the memory of a tensor"),
        (lambda x: x.untyped_storage(), "asks for the memory of a tensor"),
        (lambda x: x.__reduce_ex__(4), "pickles"),
    ],
)
def test_what_has_no_meaning_for_each_state_is_refused(operation: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(NeedsLanes, match=text):
        operation(X)


def test_code_beneath_the_rules_sees_no_values() -> None:
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NeedsLanes, match=r"aten.add.* as if they were one"):
        _ = X + 1


def test_states_are_told_in_text() -> None:
    assert repr(X) == "Windowed(width=3, shape=(2, 4, 3, 5), dtype=torch.float64)"
    assert f"{T}" == "900 500 20"
    assert f"{T / 7:.1f}" == "128.6 71.4 2.9"
    assert f"{X}" == str(X) == repr(X)


def test_draws_differ_between_the_states() -> None:
    drawn = torch.randn_like(X)
    assert drawn.shape == X.shape
    assert not torch.equal(drawn.window[0], drawn.window[1])


RULED = [
    (torch.add, (X, Y), {}),
    (torch.sub, (X, plain(3, 5)), {}),
    (torch.mul, (plain(2, 4, 3, 5), X), {}),
    (Tensor.__rsub__, (X, 1.5), {}),
    (torch.pow, (X.abs(), 2), {}),
    (torch.mul, (X, window(5, seed=3)), {}),
    (torch.mul, (window(), plain(2, 3)), {}),
    (torch.gt, (X, 0), {}),
    (torch.cat, ([X, Y, plain(2, 4, 3, 5)],), {"dim": 1}),
    (torch.cat, ([X, Y], -2), {}),
    (torch.stack, ([X, Y], -1), {}),
    (torch.chunk, (X, 2), {}),
    (torch.chunk, (X, 2, -1), {}),
    (Tensor.split, (X, [1, 3]), {"dim": 1}),
    (torch.unbind, (X, 2), {}),
    (Tensor.__getitem__, (X, (Ellipsis, 1, slice(None, None, 2), None)), {}),
    (Tensor.__getitem__, (plain(1000), T[None]), {}),
    (Tensor.view, (X, 2, -1), {}),
    (Tensor.expand, (X, 3, 2, -1, 3, 5), {}),
    (Tensor.repeat, (X, (2, 1, 1, 3, 1)), {}),
    (Tensor.permute, (X, 0, -1, 1, 2), {}),
    (torch.unsqueeze, (X, -1), {}),
    (torch.std, (X,), {"dim": [1, -1], "keepdim": True}),
    (torch.mean, (X, 0), {}),
    (torch.where, (X > 0, X, plain(5)), {}),
    (torch.flatten, (X, 1), {}),
    (torch.transpose, (X, 0, -1), {}),
    (F.linear, (X, plain(2, 5), plain(2)), {}),
    (torch.clamp, (X, -1.0, 1.0), {}),
    (torch.exp, (X,), {}),
    (torch.zeros_like, (X,), {"dtype": torch.float32}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), RULED, ids=lambda value: getattr(value, "__name__", ""))
def test_rules_give_what_mapping_over_the_states_gives(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ruled = RULES[func](func, args, kwargs)
    assert ruled is not UNSUITABLE
    for a, b in zip(tensors(ruled), tensors(mapped_over_states(func, args, kwargs)), strict=True):
        assert (a.shape, a.dtype, a.window.shape) == (b.shape, b.dtype, b.window.shape)
        # Float64; kernels for other shapes may add in another order.
        torch.testing.assert_close(a.window, b.window, rtol=1e-12, atol=1e-12)


def test_threads_do_not_disturb_each_other() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                check(guidance, X, T)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_default_device_holds_after_a_run_in_which_torch_first_met_one() -> None:
    program = """
import torch
from paradiff.pipelines.tensor.makers import making
with making(), torch.device("cpu"):
    torch.ones(1)
torch.set_default_device("meta")
print(torch.tensor([]).device, torch.full((2,), 1.0).device)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["meta", "meta"]
