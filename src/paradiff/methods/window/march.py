# SPDX-License-Identifier: Apache-2.0
"""The plain chain, all samples in step: what a window of one node does, without a window for each sample.

Every round evaluates the network at node i of all samples and takes step i. So a sequential run of a batch costs what a loop
written by hand costs, and a gain that is measured against it is one over that loop.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from paradiff.methods.window.salvage import finite_nodes
from paradiff.methods.window.setup import WindowSetup
from paradiff.solver.protocol import Batch, March, Marched, Problem
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate

AHEAD = 16
"""Steps whose noises are drawn together, and after which states are seen to be finite: one wait for the device."""


def march(setup: WindowSetup, problem: Problem) -> March:
    """Walks the chain; yields the rows of a round, and is sent their outputs and the states, where those were changed.

    Raises:
        ValueError: If a state is not finite.
    """
    step, table, noise = setup.step, setup.table, problem.noise
    count = noise.samples
    given = [problem.start_of(k) for k in range(count)]
    x = torch.stack(
        [
            setup.move(noise.start(k)) * table.start_scale if start is None else setup.move(start)
            for k, start in enumerate(given)
        ]
    )
    states, outputs = [x], list[Tensor]()
    past = [torch.zeros_like(x)] * (table.band - 1)
    samples, rms, z = torch.arange(count), list[list[float]](), None
    changes: list[Tensor] = []
    for i in range(table.steps):
        at, nodes = slice(i, i + 1), torch.full((count,), i)
        answer, edited = yield Batch(step.seen(at, x), step.t[nodes], nodes, samples, step.t[:-1], count)
        x = x if edited is None else edited
        m = table.convert(nodes, x, answer)
        states, outputs = [x, *states[1:]], [m, *outputs]
        if table.stochastic:
            if i % AHEAD == 0:
                nodes_ahead = range(i, min(i + AHEAD, table.steps))
                z = torch.stack([setup.move(noise.draw(k, nodes_ahead)) for k in range(count)], dim=1)
            assert z is not None
        new = step(at, [*states, *past], [*outputs, *past], None if z is None else z[i % AHEAD])
        changes.append(step.mean_square(new - x))
        states, outputs, x = [new, *states][: table.band], outputs[: table.band - 1], new
        if (i + 1) % AHEAD == 0 or i + 1 == table.steps:
            rms += [[math.sqrt(v) for v in row] for row in torch.stack(changes).tolist()]
            changes = []
            begin = i // AHEAD * AHEAD
            for node, k in itertools.product(range(begin, i + 1), range(count)):
                if not math.isfinite(rms[node][k]):
                    finite_nodes(setup, torch.full_like(new[k : k + 1], torch.nan), k, node, 1)
    history = [WindowRecord(i + 1, k, i, [rms[i][k]], 1) for i, k in itertools.product(range(table.steps), range(count))]
    estimates = [ErrorEstimate(0.0, 0.0, table.steps, table.steps) for _ in range(count)]
    return Marched(x, estimates, history)
