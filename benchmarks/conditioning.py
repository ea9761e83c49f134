# SPDX-License-Identifier: Apache-2.0
"""What a long prefix costs that all rows of a window share: peak memory, and the seconds of a call on the window's rows.

The network is one layer of attention from 16 tokens of the state to a prefix of thousands, as in a video or a text model. Keys
and values are `projected` from the prefix in the call, or are the prefix, `cached`. The prefix is handed over in three ways:
`copies`, a copy for each row; `conditioning`, one row in memory, expanded to all rows; `shared`, without a row axis, once for
all rows. Each way runs in a process of its own; `mb` is its peak of resident memory above what it held before.

    python benchmarks/conditioning.py --quick
    python benchmarks/conditioning.py --json benchmarks/results/conditioning.json
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import time

import torch
from harness import Results, Row, options, show
from torch import Tensor, nn

from paradiff import Evaluator, Keyed, Schedule, quasi_newton, sample
from paradiff.samplers import ddim
from paradiff.solver import Batch

KINDS = ("projected", "cached")
WAYS = ("copies", "conditioning", "shared")
TOKENS, CHANNELS, WINDOW, STEPS = 16, 256, 32, 50


class Attention(nn.Module):
    """Tokens of the state attend to a prefix `[R, L, 2 C]`, or `[L, 2 C]` for all rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(2))
        self.kv = nn.Linear(2 * CHANNELS, 2 * CHANNELS) if kind == "projected" else nn.Identity()

    def forward(self, x: Tensor, t: Tensor, prefix: Tensor) -> Tensor:
        k, v = self.kv(prefix).expand(len(x), -1, -1).chunk(2, -1)
        q = self.q(x + t[:, None, None] / 1000)
        return self.out(nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


def peak() -> float:
    """Peak of resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, way: str, length: int, threads: int) -> Row:
    """One run, and a call on one row and on the window's rows."""
    torch.set_num_threads(threads)
    prefix = torch.randn(1, length, 2 * CHANNELS, generator=torch.Generator().manual_seed(0))
    shared, rows = ({"prefix": prefix[0]}, None) if way == "shared" else (None, {"prefix": prefix})
    evaluator = Evaluator(Attention(kind).eval(), shared=shared, conditioning=rows)
    evaluator._copies = way == "copies"
    before = peak()
    found = sample(evaluator, ddim(Schedule.linear(), STEPS), Keyed((TOKENS, CHANNELS), 0), quasi_newton(window=WINDOW))
    row: Row = {"keys_and_values": kind, "way": way, "prefix": length, "rounds": found.rounds, "mb": round(peak() - before)}
    for rows in (1, WINDOW):
        t = torch.arange(rows)
        batch = Batch(torch.randn(rows, TOKENS, CHANNELS), t, t, torch.zeros(rows, dtype=torch.int64))
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            evaluator(batch)
            seconds.append(time.perf_counter() - begin)
        row[f"ms_{rows}"] = round(1000 * min(seconds), 1)
    row["calls"] = round(row[f"ms_{WINDOW}"] / row["ms_1"], 2)
    return row


def main() -> None:
    given = options(__doc__)
    results = Results(given.json)
    for length in (1024,) if given.quick else (1024, 4096):
        for kind, way in itertools.product(KINDS, WAYS):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.add(pool.apply(measure, (kind, way, length, given.threads)))
    results.save(window=WINDOW, tokens=TOKENS, channels=CHANNELS, steps=STEPS)
    show(results.rows, ("keys_and_values", "way", "prefix", "rounds", "mb", "ms_1", f"ms_{WINDOW}", "calls"))


if __name__ == "__main__":
    main()
