# SPDX-License-Identifier: Apache-2.0
"""Networks whose rows depend on more than themselves, made by combining what may go wrong, and a judge of their samples.

A network remembers (where, what, how long, and what it does with it), or its rows heed each other, their number or their
order. It is right to refuse it, or to return the plain loop's sample up to the estimate.

    python tests/solver/row_adversary.py [networks [seed [check]]]

runs that many networks, drawn from the full product, on every setting, and prints a line for each that is silently wrong, and
why a few rows may not show it.
"""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Schedule,
    Table,
    collocation,
    jacobi,
    paradigms,
    parasolver,
    quasi_newton,
    sample,
    srds,
)
from paradiff.samplers import ddim, ddpm, dpmpp_2m, flow_euler
from paradiff.solver import Method

Model = Callable[[Tensor, Tensor], Tensor]
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

NOISY, SHORT, FLOW = (
    ddpm(Schedule.linear(), 40, prediction="sample"),
    ddim(Schedule.linear(), 24, prediction="sample"),
    flow_euler(30, shift=3.0),
)
SETTINGS: dict[str, tuple[Table, Method, int, int | None]] = {
    # name: (table, method, samples, rows of a network call)
    "jacobi": (NOISY, jacobi(tolerance=1e-4), 1, None),
    "parasolver, window 8": (NOISY, parasolver(8, 1e-4), 1, None),
    "parasolver, window 5, three samples": (SHORT, parasolver(5, 1e-4), 3, None),
    "parasolver, the whole chain": (FLOW, parasolver(tolerance=1e-4), 2, None),
    "parasolver, calls of 4": (NOISY, parasolver(16, 1e-4), 1, 4),
    "paradigms": (SHORT, paradigms(6, 1e-4), 1, None),
    "quasi-Newton": (SHORT, quasi_newton(tolerance=1e-4), 1, None),
    "quasi-Newton, multistep": (dpmpp_2m(Schedule.linear(), 20, prediction="sample"), quasi_newton(tolerance=1e-4), 2, None),
    "srds": (SHORT, srds(tolerance=1e-4), 1, None),
    "srds, two samples": (NOISY, srds(tolerance=1e-4), 2, None),
    "collocation": (ddpm(Schedule.linear(), 200, prediction="sample"), collocation(tolerance=1e-2), 1, None),
    "collocation, two samples": (ddim(Schedule.linear(), 100, prediction="sample"), collocation(tolerance=1e-2), 2, None),
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


def plain(model: Model, table: Table, noise: Keyed, samples: list[int]) -> Tensor:
    """The plain loop of some samples in one batch, `[B, ...]`."""
    states = [torch.stack([noise.start(k).float() * table.start_scale for k in samples])]
    outputs: list[Tensor] = []
    for i in range(table.steps):
        t = table.t[i].expand(len(samples))
        t = t.long() if bool((table.t[:-1] == table.t[:-1].round()).all()) else t.float()
        outputs.append(model(states[-1] * float(table.scale[i]), t))
        new = float(table.c[i]) * torch.stack([noise.draw(k, range(i, i + 1))[0].float() for k in samples])
        for j in range(min(table.band, i + 1)):
            new = new + float(table.a[i, j]) * states[i - j] + float(table.b[i, j]) * outputs[i - j]
        states.append(new)
    return states[-1]


def judged(kind: str, given: tuple[Any, ...], setting: str, check: Any = "first") -> tuple[str, str]:
    """What a run came to: `refused`, `right`, or `WRONG`; and what was said. `untouched`: what is wrong with the network
    acted in the plain loop alone, which makes more calls, or such of other shapes."""
    table, method, samples, rows = SETTINGS[setting]
    make, noise = MAKERS[kind], Keyed(SHAPE, 5, samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = sample(Evaluator(make(*given), max_rows=rows), table, noise, method, check=check)
        except ValueError as error:
            return "refused", str(error)
    told = torch.tensor([e.estimated_error for e in found.error_estimates])
    together = plain(make(*given), table, noise, [*range(samples)])
    by_themselves = torch.cat([plain(make(*given), table, noise, [k]) for k in range(samples)])
    text = ""
    without = torch.cat([plain(answer, table, noise, [k]) for k in range(samples)])
    for what, wanted in (("right", by_themselves), ("right", together), ("untouched", without)):
        rms = (found.sample - wanted).flatten(1).square().mean(1).sqrt()
        size = wanted.flatten(1).square().mean(1).sqrt().clamp(min=1)
        text += f" off by {float(rms.max()):.1e} of {float(size.max()):.1f}, told {float(told.max()):.1e};"
        if bool((rms <= torch.maximum(2 * told, 2e-5 * size)).all()):
            return what, f"{text} {found.rounds} rounds, {found.checked_rows} checked"
    return "WRONG", text


def main() -> None:
    given = (*sys.argv[1:], *("150", "0", "first")[len(sys.argv) - 1 :])
    count, seed, check = int(given[0]), int(given[1]), given[2]
    torch.set_num_threads(1)
    verdicts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for kind, given in drawn(count, seed):
        lost = []
        for setting in SETTINGS:
            what, _ = judged(kind, given, setting, check)
            verdicts[what] += 1
            if what == "WRONG":
                lost.append(setting)
        if lost:
            why = unseen(kind, given)
            wrong[why or "to be seen"] += len(lost)
            print(f"{kind} {given}: {len(lost)} of {len(SETTINGS)}: {', '.join(lost)} ({why})", flush=True)
    print(f"{count} networks, seed {seed}, check {check}: {dict(verdicts)}; silently wrong: {dict(wrong)}")
    sys.exit("to be seen" in wrong or (check == "every" and bool(wrong)))


if __name__ == "__main__":
    main()
