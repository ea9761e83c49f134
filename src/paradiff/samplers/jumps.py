# SPDX-License-Identifier: Apache-2.0
"""Jumps back up the chain, as RePaint resamples what it inpaints (Lugmayr et al., arXiv 2201.09865, algorithm 1).

A jump takes the state that a step lands on from its level l up through some levels, without the network:

    x <- f x + s z,      f = alpha'/alpha,      s^2 = sigma'^2 - f^2 sigma^2,                                     (1)

once for each level. It follows a step, so that both are one step of the table: with F the product of the factors after a noise,

    x[i+1] = F a x[i] + F b m[i] + F c z + sum_k F[k] s[k] z[k],                                                   (2)

and every node is one at which the network is called. `Recorded` noise draws as the published loops do: once in each step,
whether or not it adds noise, and once in each (1), in the dtype in which the table's own steps draw. An element whose datum v
is known is shown at node i + 1 as the loop puts it there, with the step's own draw for its noise as diffusers has it, and
carried up by the same jump (`Draws.given`, models/masked.py):

    F (alpha v + sigma z) + sum_k F[k] s[k] z[k].                                                                  (3)

At node 0 it is what the start drew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from paradiff.chain.draws import Draws
from paradiff.chain.home import made_at_home
from paradiff.chain.table import Table
from paradiff.errors import require_whole, shown
from paradiff.samplers.forms import Clipping
from paradiff.samplers.preserving import ddim
from paradiff.samplers.schedule import Schedule

Climb = Callable[[int], list[tuple[float, float]]]
"""Of a node, f and s of the draws of equation (1) that take a state at the node after it up to it."""


@made_at_home
def with_jumps(table: Table, *, jump_length: int = 10, jump_n_sample: int = 10) -> Table:
    """A sampler that goes back up and down again: `jump_length` levels up from every `jump_length`-th one, counted from that of
    the last network call, where there is room, `jump_n_sample` - 1 times. The names are the paper's.

    Args:
        table: The sampler, one-step, whose noise ratio falls from node to node; the paper's is `ddpm(schedule, 250)`.
        jump_length: Levels of a jump, 1 to N - 1.
        jump_n_sample: How often each stretch is walked down: 1 for no jumps.

    Raises:
        ValueError: If an argument is out of range, or the table reads several steps back, is a slice, or draws its noise
            otherwise than once a step.
    """
    if not isinstance(table, Table) or table.band != 1 or table.first:
        raise ValueError(
            f"the table is {shown(table)}; jumps are those of a whole chain that reads one step back, such as "
            "paradiff.samplers.ddpm(schedule, 250)"
        )
    if table.draws is not None and not table.draws.one_a_step:
        raise ValueError(
            f"table {table.name!r} draws its noise as {table.draws.scheduler} does, and jumps are those of chains that draw "
            "once a step; give one of those, such as paradiff.samplers.ddpm"
        )
    _check(table.steps, jump_length, jump_n_sample)
    ratio = table.sigma / table.alpha
    risen = (~(ratio[1:] < ratio[:-1])).nonzero()
    if len(risen):
        raise ValueError(
            f"the noise ratio of table {table.name!r} does not fall at step {int(risen[0])}; jumps need one that does"
        )

    def climb(node: int) -> list[tuple[float, float]]:
        factor = float(table.alpha[node] / table.alpha[node + 1])
        square = float(table.sigma[node]) ** 2 - (factor * float(table.sigma[node + 1])) ** 2
        return [(factor, math.sqrt(max(square, 0.0)))]

    visits = _visits(table.steps, jump_length, jump_n_sample, late=False)
    return _jumping(f"{table.name} with jumps", table, visits, climb, "RePaint")


@made_at_home
def repaint(
    schedule: Schedule,
    steps: int = 250,
    *,
    eta: float = 0.0,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    clip: Clipping | None = None,
) -> Table:
    """diffusers' RePaintScheduler, for a network that predicts epsilon: DDIM's steps, and jumps in single training times.

    It differs from the paper, and from `with_jumps`, in two things. A jump begins one level later, the last one at the clean
    datum. And with N below T, the draws of a jump are those of the T//N training times above the ones that it undoes, so that a
    state has a little more noise after a jump than its level says. (diffusers 0.32, and no other version, also scales the
    noise of known elements by its variance in place of its deviation.)

    Args:
        schedule: The schedule.
        steps: N, from 2 to T.
        eta: 0 for DDIM, 1 for DDPM's noise.
        jump_length: Levels of a jump, 1 to N - 1.
        jump_n_sample: How often each stretch is walked down: 1 for no jumps.
        clip: A limit on the clean data; diffusers' default is `Clip(1.0)`.

    Raises:
        ValueError: If an argument is out of range.
    """
    base = ddim(schedule, steps, eta=eta, clip=clip)
    _check(steps, jump_length, jump_n_sample)
    stride = schedule.train_steps // steps

    def climb(node: int) -> list[tuple[float, float]]:
        time = (steps - 1 - node) * stride
        return [(math.sqrt(1 - beta), math.sqrt(beta)) for beta in schedule.betas[time : time + stride].tolist()]

    visits = _visits(steps, jump_length, jump_n_sample, late=True)
    return _jumping("repaint", base, visits, climb, "RePaintScheduler")


def _check(steps: int, jump_length: object, jump_n_sample: object) -> None:
    if steps < 2:
        raise ValueError("a chain of one step has no room for jumps; give two steps at least")
    require_whole("jump_length", jump_length, 1, f", the steps of the chain less 1 at most, here {steps - 1}", most=steps - 1)
    require_whole("jump_n_sample", jump_n_sample, 1, most=10**4)


def _visits(steps: int, length: int, times: int, *, late: bool) -> list[tuple[int, int]]:
    """The node that each network call is at, and the levels that the state is taken up after the step from there.

    Args:
        steps: N.
        length: Levels of a jump.
        times: How often a stretch is walked.
        late: Whether a jump comes after the step from its level, as in diffusers, or after the one to it, as in the paper.
    """
    left = dict.fromkeys(range(0, steps - length, length), times - 1)  # levels, counted from the last node but one
    level, found = steps - 1, []
    while level >= 0:
        place = level if late else level - 1
        jumps = left.get(place, 0) > 0
        left[place] = left.get(place, 0) - 1
        found.append((steps - 1 - level, length if jumps else 0))
        level += length - 1 if jumps else -1
    return found


def _jumping(name: str, base: Table, visits: list[tuple[int, int]], climb: Climb, published: str) -> Table:
    """The table of equation (2)."""
    factors, deviations, reached, counts, terms = [], [], [], [], []
    given: list[tuple[float, tuple[tuple[int, float], ...]]] = [(0.0, ((-1, base.start_scale),))]
    drawn = 0
    for node, levels in visits:
        ups = [one for k in range(levels) for one in climb(node - k)]
        after = [math.prod(f for f, _ in ups[k + 1 :]) for k in range(len(ups))]
        factor = math.prod(f for f, _ in ups)
        noises = [(drawn + 1 + k, later * s) for k, (later, (_, s)) in enumerate(zip(after, ups, strict=True))]
        alpha, sigma = base.reached[node].tolist()
        own = [(drawn, factor * float(base.c[node])), *noises]
        size = math.hypot(*(w for _, w in own))
        factors.append(factor)
        deviations.append(size)
        reached.append([factor * alpha, math.hypot(factor * sigma, *(w for _, w in noises))])
        counts.append(1 + len(ups))
        terms.append(tuple((k, w / size) for k, w in own if w > 0))
        given.append((factor * alpha, tuple((k, w) for k, w in [(drawn, factor * sigma), *noises] if w > 0)))
        drawn += 1 + len(ups)
    dtypes = () if base.draws is None else base.draws.dtypes
    at = torch.tensor([node for node, _ in visits])
    nodes = torch.cat([at, torch.tensor([base.steps])])
    factor = torch.tensor(factors, dtype=torch.float64)
    found = {key: getattr(base, key)[nodes] for key in ("t", "alpha", "sigma", "scale")}
    found |= {key: None if (v := getattr(base, key)) is None else v[at] for key in ("clean", "clip_weight")}
    return dataclasses.replace(
        base,
        name=name,
        **found,
        a=factor[:, None] * base.a[at],
        b=factor[:, None] * base.b[at],
        c=torch.tensor(deviations, dtype=torch.float64),
        reached=torch.tensor(reached, dtype=torch.float64),
        draws=Draws(published, tuple(counts), tuple(terms), given=tuple(given), dtypes=dtypes),
    )
