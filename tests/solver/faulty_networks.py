# SPDX-License-Identifier: Apache-2.0
"""Networks whose rows depend on more than themselves: common ones by name, and a product of what may go wrong.

A network of the product remembers (where, what, how long, and what it does with it), or its rows heed each other, their number
or their order. `answer` is the honest network that each of them is without its fault.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Model = Callable[..., Tensor]
SHAPE = (2, 4)


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def answer(x: Tensor, t: Tensor) -> Tensor:
    """An honest network, which heeds state and time."""
    return torch.tanh(0.8 * x) + 0.5 * torch.cos(column(t.double(), x.double()) / 200).to(x.dtype) * torch.sin(x)


# -- memory ------------------------------------------------------------------------------------------------------------

KEYS: dict[str, Callable[[Tensor, Tensor], Hashable]] = {
    "everything": lambda x, t: 0,
    "a number of rows": lambda x, t: len(x),
    "the first time": lambda x, t: float(t[0]),
    "the last time and a number of rows": lambda x, t: (float(t[-1]), len(x)),
    "each row's time": lambda x, t: None,
    "each row's place": lambda x, t: None,
}
"""For what a network keeps one thing each."""

SPANS = ["first", "last", "mean", "from call 5", "from call 12", "every 2", "every 3", "every 5", "every 7"]
"""What is kept: that of the first call, of the last one, of one in so many, a moving mean, or from some call on."""

THINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "output": lambda x, y: y,
    "state": lambda x, y: x,
    "mean": lambda x, y: y.mean().expand_as(y),
}
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "instead": lambda y, kept: kept,
    "mixed": lambda y, kept: 0.7 * y + 0.3 * kept,
    "added": lambda y, kept: y + 0.1 * kept,
    "a factor": lambda y, kept: y * (1 + 0.2 * torch.tanh(kept)),
}


def remembering(key: str, span: str, thing: str, use: str) -> Model:
    """A network with a memory."""
    kept: dict[Hashable, Tensor] = {}
    visits: Counter[Hashable] = Counter()
    calls = itertools.count()

    def one(where: Hashable, x: Tensor, y: Tensor, call: int) -> Tensor:
        value, before = THINGS[thing](x, y), kept.get(where)
        if before is not None and before.shape != value.shape:
            before = None if len(before) < len(value) else before[: len(value)]
        visits[where] += 1
        if span.startswith("from call"):
            if call < int(span.split()[-1]):
                return y
            before = kept.setdefault(where, value)
            return USES[use](y, before) if before.shape == value.shape else y
        if span.startswith("every"):
            if before is None or call % int(span.split()[-1]) == 0:
                kept[where] = value
                return y
            return USES[use](y, before)
        if before is None:
            kept[where] = value
            return y
        if span == "last":
            kept[where] = value
        elif span == "mean":
            kept[where] = 0.5 * before + 0.5 * value
        return USES[use](y, before)

    def model(x: Tensor, t: Tensor) -> Tensor:
        y, call = answer(x, t), next(calls)
        if key not in ("each row's time", "each row's place"):
            return one(KEYS[key](x, t), x, y, call)
        names = [float(value) if "time" in key else k for k, value in enumerate(t)]
        return torch.cat([one(name, x[k : k + 1], y[k : k + 1], call) for k, name in enumerate(names)])

    return model


# -- rows --------------------------------------------------------------------------------------------------------------

ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "each entry": lambda x, t: x,
    "their norm": lambda x, t: x.flatten(1).norm(dim=1),
    "their mean": lambda x, t: x.flatten(1).mean(1),
    "their last entry": lambda x, t: x.flatten(1)[:, -1],
    "their time": lambda x, t: t,
}
SIGNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, t: x.sum(),
    "sum of an entry": lambda x, t: x.flatten(1)[:, 0].sum(),
    "size": lambda x, t: x.abs().mean() - 0.8,
    "spread": lambda x, t: x.std() - 1,
    "largest": lambda x, t: x.max() - 2,
    "mean time": lambda x, t: t.double().mean() - 400,
    "largest time": lambda x, t: t.max() - 500,
    "first time": lambda x, t: t[0] - 300,
    "last row": lambda x, t: x[-1].sum(),
}
MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, t: x.mean(0, keepdim=True).expand_as(x),
    "largest entry": lambda x, t: x.abs().max().expand_as(x),
    "row before": lambda x, t: torch.cat([x[:1], x[:-1]]),
    "row after": lambda x, t: torch.cat([x[1:], x[-1:]]),
    "rows up to it": lambda x, t: x.cumsum(0) / column(torch.arange(1, len(x) + 1), x),
    "median": lambda x, t: x.median(0, keepdim=True).values.expand_as(x),
    "first row": lambda x, t: x[:1].expand_as(x),
    "next row of a pair": lambda x, t: torch.cat(
        [x[: len(x) // 2 * 2].unflatten(0, (-1, 2)).flip(1).flatten(0, 1), x[len(x) // 2 * 2 :]]
    ),
    "attention": lambda x, t: (torch.softmax(x.flatten(1) @ x.flatten(1).T, 1) @ x.flatten(1)).view_as(x),
}
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda t: t[:1].expand_as(t),
    "last": lambda t: t[-1:].expand_as(t),
    "mean": lambda t: t.double().mean().expand(len(t)),
    "row before": lambda t: torch.cat([t[:1], t[:-1]]),
    "largest": lambda t: t.max().expand_as(t),
    "sorted": lambda t: t.sort().values,
    "falling": lambda t: t.sort(descending=True).values,
}
PARTS: dict[str, Callable[[int], list[int]]] = {
    "all": lambda n: [*range(n)],
    "the first two": lambda n: [0, 1][:n],
    "the last two": lambda n: [*range(max(n - 2, 0), n)],
    "inner rows": lambda n: [*range(1, n - 1)],
    "rows 2 and 3": lambda n: [2, 3] if n > 3 else [],
    "rows beyond the eighth": lambda n: [*range(8, n)],
    "every second": lambda n: [*range(0, n, 2)],
    "of large calls": lambda n: [*range(n)] if n > 6 else [],
    "of calls of an odd number": lambda n: [*range(n)] if n % 2 else [],
}
COUNTS: dict[str, Callable[[int], float]] = {
    "their inverse": lambda n: 1 / n,
    "a little": lambda n: 1 + 0.02 / n,
    "odd": lambda n: 1.1 if n % 2 else 1.0,
    "many": lambda n: 0.9 if n > 8 else 1.0,
    "few": lambda n: 0.9 if n < 4 else 1.0,
    "filled to fours": lambda n: n / (-(-n // 4) * 4),
    "a power of two": lambda n: 1.0 if n & (n - 1) == 0 else 1.05,
}


def on(part: str, y: Tensor, other: Tensor) -> Tensor:
    """Outputs of which some rows are the others."""
    at = PARTS[part](len(y))
    y = y.clone()
    y[at] = other[at].to(y.dtype)
    return y


def sorting(key: str, falling: bool, part: str) -> Model:
    def model(x: Tensor, t: Tensor) -> Tensor:
        of = ORDERS[key](x, t)
        if key == "each entry":
            return on(part, answer(x, t), answer(of.sort(0, descending=falling).values, t))
        order = of.sort(stable=True, descending=falling).indices
        return on(part, answer(x, t), answer(x[order], t[order]))

    return model


def branching(sign: str, by: float) -> Model:
    return lambda x, t: answer(x, t) * (by if SIGNS[sign](x, t) > 0 else 1.0)


def mixing(mix: str, weight: float, part: str) -> Model:
    return lambda x, t: on(part, answer(x, t), answer(x + weight * MIXES[mix](x, t), t))


def timing(time: str, part: str) -> Model:
    return lambda x, t: on(part, answer(x, t), answer(x, TIMES[time](t)))


def counting(count: str, part: str) -> Model:
    return lambda x, t: on(part, answer(x, t), answer(x, t) * COUNTS[count](len(x)))


def sharing(last: bool) -> Model:
    """Rows of one time are evaluated once."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        y = answer(x, t)
        rows = {float(value): k for k, value in reversed([*enumerate(t)])}
        if last:
            rows = {float(value): k for k, value in enumerate(t)}
        return y[[rows[float(value)] for value in t]]

    return model


def product() -> dict[str, list[tuple[Any, ...]]]:
    """All networks: what makes one, and its arguments, by kind."""
    return {
        "memory": [*itertools.product(KEYS, SPANS, THINGS, USES)],
        "order": [*itertools.product(ORDERS, (False, True), PARTS)],
        "branch": [*itertools.product(SIGNS, (0.7, 1.1))],
        "mix": [*itertools.product(MIXES, (0.05, 0.3), PARTS)],
        "time": [*itertools.product(TIMES, PARTS)],
        "count": [*itertools.product(COUNTS, PARTS)],
        "share": [(False,), (True,)],
    }


MAKERS: dict[str, Callable[..., Model]] = {
    "memory": remembering,
    "order": sorting,
    "branch": branching,
    "mix": mixing,
    "time": timing,
    "count": counting,
    "share": sharing,
}


def unseen(kind: str, given: tuple[Any, ...]) -> str | None:
    """Why a few rows of the check may not show what is wrong with a network; None where they have to."""
    if kind == "memory" and given[1].split()[0] in ("from", "every"):
        return "a memory that begins after several calls, or acts at some calls only"
    if kind in ("order", "mix", "time", "count") and given[-1] != "all":
        return "a few rows, or calls of some numbers of rows only"
    if kind == "order" and given[1]:
        return "an order in which the rows of the first round and of the check lie already"
    if kind == "branch" and given[0] in ("size", "spread", "largest", "mean time"):
        return "a branch on a size or a mean time of all rows"
    return None


def drawn(count: int, seed: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Networks of all kinds, those of one kind without repetition as far as there are."""
    rng = random.Random(seed)
    pools = {kind: rng.sample(those, len(those)) for kind, those in product().items()}
    kinds = ["memory", "order", "mix", "memory", "time", "branch", "memory", "count", "memory", "share"]
    found = []
    for number in itertools.count():
        if len(found) == count or not any(pools.values()):
            return found
        if pool := pools[kinds[number % len(kinds)]]:
            found.append((kinds[number % len(kinds)], pool.pop()))
    return found


# -- by name -----------------------------------------------------------------------------------------------------------


def dropout(p: float) -> Model:
    drop = nn.Dropout(p)
    return lambda x, t: answer(drop(x), t)


def with_numpy() -> Model:
    draw = np.random.default_rng(0)
    return lambda x, t: answer(x + torch.from_numpy(draw.standard_normal(x.shape)).to(x.dtype), t)


def own_generator() -> Model:
    generator = torch.Generator().manual_seed(0)
    return lambda x, t: answer(x + 0.1 * torch.randn(x.shape, generator=generator).to(x.dtype), t)


def self_conditioning() -> Model:
    last: list[Tensor | None] = [None]

    def model(x: Tensor, t: Tensor) -> Tensor:
        y = answer(x, t)
        if last[0] is not None and last[0].shape == x.shape:
            y = 0.7 * y + 0.3 * last[0]
        last[0] = y
        return y

    return model


def moving_average() -> Model:
    mean = [0.0]

    def model(x: Tensor, t: Tensor) -> Tensor:
        mean[0] = 0.9 * mean[0] + 0.1 * float(x.abs().mean())
        return answer(x, t) + mean[0]

    return model


def momentum() -> Model:
    kept: dict[torch.Size, Tensor] = {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        kept[x.shape] = answer(x, t) - 0.5 * kept.get(x.shape, torch.zeros_like(x))
        return kept[x.shape]

    return model


def first_answer_of_a_shape() -> Model:
    kept: dict[torch.Size, Tensor] = {}
    return lambda x, t: kept.setdefault(x.shape, answer(x, t))


def counts_its_calls() -> Model:
    calls = itertools.count()
    return lambda x, t: answer(x, t) * (1 + 0.1 * next(calls))


def trained_batch_norm() -> Model:
    norm = nn.BatchNorm1d(4)  # in training mode
    return lambda x, t: answer(norm(x.float().reshape(len(x) * 2, 4)).reshape(x.shape).to(x.dtype), t)


MEMORY: dict[str, Callable[[], Model]] = {
    "dropout": lambda: dropout(0.2),
    "a little dropout": lambda: dropout(0.01),
    "numpy's random numbers": with_numpy,
    "a generator of its own": own_generator,
    "self-conditioning": self_conditioning,
    "a moving average": moving_average,
    "momentum": momentum,
    "the first answer of a shape": first_answer_of_a_shape,
    "a counter": counts_its_calls,
}
ROWS: dict[str, Callable[[], Model]] = {
    "the first time for all": lambda: lambda x, t: answer(x, t[:1].expand_as(t)),
    "the last time for all": lambda: lambda x, t: answer(x, t[-1:].expand_as(t)),
    "the mean time for all": lambda: lambda x, t: answer(x, t.double().mean().expand(len(t))),
    "the mean of the rows": lambda: lambda x, t: answer(x, t) + 0.2 * x.mean(0),
    "batch norm in training": trained_batch_norm,
    "the rows' largest entry": lambda: lambda x, t: answer(x / x.abs().max().clamp(min=1), t),
    "attention over rows": lambda: lambda x, t: answer((x.flatten(1).float().softmax(0)).to(x.dtype).view_as(x), t),
    "the row before": lambda: lambda x, t: answer(x, t) + 0.1 * torch.cat([torch.zeros_like(x[:1]), x[:-1]]),
    "the row after": lambda: lambda x, t: answer(x, t) + 0.1 * torch.cat([x[1:], torch.zeros_like(x[:1])]),
    "rows that were sorted": lambda: lambda x, t: answer(x.sort(0).values, t),
}
