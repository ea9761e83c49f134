# SPDX-License-Identifier: Apache-2.0
"""The random draws behind a chain's noises, where a scheduler does not draw once a step and use that draw there.

Step i of a sequential run makes counts[i] standard normal draws of the state's shape. The noise of equation (1) of table.py is

    z[i] = sum_k w[i,k] d[k],      sum_k w[i,k]^2 = 1 where c[i] > 0,                                           (1)

with d[0], d[1] ... all draws of the run after that of its start, in order. A chain may begin after a first noise,

    x[0]/start_scale = w e + sum_k w[k] d[k],                                                              (2)

with e the draw of the run's own start.

Loops that put known data v back into a state at every step draw the noise for them, too. At node i they have

    signal[i] v + sum_k w[i,k] d[k],                                                                        (3)

with d[-1] = e.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Source = Literal["given", "torch", "own"]


@dataclass(frozen=True)
class Draws:
    """See the module.

    Attributes:
        scheduler: The name of the scheduler's class.
        counts: `[N]` draws that each step makes.
        terms: For each step the pairs of k and w[i,k] that are not 0; none where c[i] = 0.
        source: `given`, drawn with the generator that the run is given; `torch`, with torch's own whichever is given; `own`,
            with generators that the scheduler makes, such as those of a Brownian tree.
        before: Draws that the chain makes before these steps, of which they are a part.
        start: The weight w and the pairs of k and w[k] of equation (2); None where the chain begins at the run's own start.
        given: `[N+1]` for each node the signal and the pairs of k and w of equation (3); None where no loop says.
        dtypes: Dtypes of a run whose steps draw in another one, each with that.
    """

    scheduler: str
    counts: tuple[int, ...]
    terms: tuple[tuple[tuple[int, float], ...], ...]
    source: Source = "given"
    before: int = 0
    start: tuple[float, tuple[tuple[int, float], ...]] | None = None
    given: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = ()

    def part(self, begin: int, end: int) -> Draws:
        """Those of the steps from one node to another."""
        before = self.before + sum(self.counts[:begin])
        start = self.start if begin == 0 else None
        given = None if self.given is None else self.given[begin : end + 1]
        return replace(
            self, counts=self.counts[begin:end], terms=self.terms[begin:end], before=before, start=start, given=given
        )

    @property
    def of_given(self) -> Draws:
        """Those whose noise at node i is that of equation (3)."""
        assert self.given is not None
        return replace(self, terms=tuple(terms for _, terms in self.given), start=None, given=None)

    @property
    def one_a_step(self) -> bool:
        """Whether step i makes one draw, which is its noise, as far as steps have any."""
        last = max((i + 1 for i, own in enumerate(self.terms) if own), default=0)
        drawn = all(count == 1 for count in self.counts[:last])
        plain = all(own in ((), ((i, 1.0),)) for i, own in enumerate(self.terms))
        return drawn and plain and self.source == "given"
