# SPDX-License-Identifier: Apache-2.0
"""Samples of which some elements are not sought: places that fill a sample up to a common size, and elements that are given.

The solvers hold zeros there: neither noise nor outputs reach these places. The network is shown what the loop would have there:
zeros; the given values, as planners clamp the ends of a plan after every step (Janner et al. 2022); or the given values at the
node's level of noise, v·alpha[i] + sigma[i]·e, as RePaint does (Lugmayr et al. 2022, eq. 8a). The noise e is the row's own; or,
of a table that says what its published loop draws there (`samplers.repaint`, `with_jumps`), made of the recorded draws.

Errors are those of the elements that are sought. A sample with n of them among d is solved at sqrt(d/n) times its size, so that
every mean over all elements, in whatever method, is that over these n. (`srds` is more cautious for
samples of few elements, and counts all places.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.correlated import Correlated
from paradiff.chain.home import made_at_home
from paradiff.chain.noise import Noise, Recorded, Seen, noise_along, origin
from paradiff.chain.table import Table
from paradiff.errors import require_truth, shown
from paradiff.solver.by_row import ByRow, Rows, by_row


class Masked:
    """What is sought of each sample, and what is shown elsewhere. They are compared by identity.

    Args:
        table: The chain. A limit on its clean data is applied by the model, to samples at their own size.
        noise: Its noise.
        mask: `[*shape]` or `[B, *shape]` True for the elements that are sought; it may have ones in place of axes along which
            it is the same, as `[B, A, 1]`.
        values: `[*shape]` or `[B, *shape]` what is given elsewhere, in the data's units; zeros by default.
        noised: Whether the network is shown given values at the node's level of noise.

    Attributes:
        table: As given, without a limit: the one that a run is of.
        noise: As given.
        mask: `[B, *shape]` as given.
        stretch: `[B]` sqrt(d/n), float64.

    Raises:
        ValueError: If a shape or a kind is another, the mask of a sample has no element, or `noised` is given without values.
    """

    @made_at_home
    def __init__(self, table: Table, noise: Noise, mask: Tensor, values: Tensor | None = None, *, noised: bool = False) -> None:
        if not isinstance(table, Table):
            raise ValueError(f"the table is {shown(table)}; give a Table, such as paradiff.samplers.ddpm(schedule, 1000)")
        require_truth("noised", noised)
        if noised and values is None:
            raise ValueError("noised=True was given without values; give what is known of the elements that are not sought")
        wanted = (noise.samples, *noise.shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not _fits(mask, wanted):
            raise ValueError(f"the mask is {shown(mask)}; give a tensor of truth values of shape {wanted}, or {wanted[1:]}")
        self.table, self.noise, self._noised = replace(table, clip=None, clip_weight=None), noise, noised
        self._limit = None if table.clip is None or table.clip_weight is None else (table.clip, table.clip_weight)
        self.mask = mask.detach().cpu().expand(wanted)
        counts = self.mask.flatten(1).sum(1)
        if not bool((counts > 0).all()):
            raise ValueError(
                f"the mask of sample {int((counts == 0).nonzero()[0])} has no element that is sought; give one at least"
            )
        if values is not None and (not isinstance(values, Tensor) or not _fits(values, wanted)):
            raise ValueError(f"the values are {shown(values)}; give a tensor of shape {wanted}, or {wanted[1:]}")
        given = torch.zeros(wanted) if values is None else values.detach().cpu().expand(wanted)
        if not bool((torch.isfinite(given) | self.mask).all()):
            raise ValueError("a given value is not finite; give numbers wherever the mask is False")
        self._given = torch.where(self.mask, 0.0, given.double())
        self.stretch = (self.mask[0].numel() / counts.double()).sqrt()
        self._along = noise_along(noise, table.draws, table.first)
        told = None if table.draws is None else table.draws.given
        self._signal, self._level, self._drawn = table.alpha, table.sigma, None
        if table.draws is not None and told is not None:
            self._signal = torch.tensor([signal for signal, _ in told], dtype=torch.float64)
            self._level = torch.tensor([math.hypot(*(w for _, w in terms)) for _, terms in told], dtype=torch.float64)
            if noised and isinstance(origin(noise), Recorded):
                self._drawn = noise_along(noise, table.draws.of_given, table.first)

    def __repr__(self) -> str:
        return f"Masked({int(self.mask.sum())} of {self.mask.numel()} elements of {self.noise.samples} samples)"

    @made_at_home
    def model(self, denoiser: Callable[..., Tensor]) -> ByRow:
        """The model for `sample` beside `masked.kept()`.

        Args:
            denoiser: `denoiser(x, t, **conditioning)`, as for whole samples. What it returns elsewhere is not looked at.
        """
        table, mask, given = self.table, self.mask[:, None], self._given[:, None]
        nodes = table.steps
        mask, given = (v.expand(-1, nodes, *v.shape[2:]) for v in (mask, given))
        stretch = self.stretch.view(-1, 1, *[1] * len(self.noise.shape)).expand(-1, nodes, *[1] * len(self.noise.shape))

        def kept(x: Tensor, t: Tensor, rows: Rows, **conditioning: Any) -> Tensor:
            sought, factor, elsewhere = rows.pick(mask) > 0, rows.pick(stretch), rows.pick(given)
            if self._noised:
                elsewhere = rows.of(self._signal) * elsewhere + self._noise_of(rows)
            scale = rows.of(table.scale)
            shown = torch.where(sought, x / factor, scale * elsewhere)
            found = denoiser(shown, t, **conditioning)
            if self._limit is not None:  # chain/clipping.py
                limit, weight = self._limit
                clean = rows.of(table.p) / scale * shown + rows.of(table.q) * found
                found = found + rows.of(weight) * (limit(clean) - clean)
            return torch.where(sought, factor * found, 0.0)

        return by_row(kept, table, self.kept(), smooth=not self._noised)

    def _noise_of(self, rows: Rows) -> Tensor:
        """`[R, ...]` the noise of given values at the rows' nodes."""
        if self._drawn is not None:
            return rows.drawn(self._drawn)
        own = rows.randn()
        mapped = self.noise.mapped(own).to(own) if isinstance(self.noise, Correlated) else own
        return rows.of(self._level) * mapped

    def kept(self) -> Noise:
        """The noise of the elements that are sought."""
        return Seen(self, self.noise)

    def placed(self, sample: Tensor) -> Tensor:
        """`[B, *shape]` the samples of a run, with what is given in its places.

        Raises:
            ValueError: If the samples have another shape.
        """
        if not isinstance(sample, Tensor) or sample.shape != self.mask.shape:
            raise ValueError(f"the samples are {shown(sample)}; give those of the run, of shape {tuple(self.mask.shape)}")
        factor = self.stretch.view(-1, *[1] * len(self.noise.shape)).to(sample)
        return torch.where(self.mask.to(sample.device), sample / factor, self._given.to(sample))

    def start(self, sample: int) -> Tensor:
        """The draw behind x[0], of the elements that are sought, at the size at which the sample is solved."""
        return self._at(sample, self._along.start(sample))

    def draw(self, sample: int, nodes: range) -> Tensor:
        """The same of z at consecutive nodes, `[len(nodes), *shape]`."""
        return self._at(sample, self._along.draw(sample, nodes))

    def _at(self, sample: int, drawn: Tensor) -> Tensor:
        return torch.where(self.mask[sample].to(drawn.device), drawn.double() * self.stretch[sample].to(drawn.device), 0.0)


def _fits(value: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether a tensor can be expanded to a shape whose first axis, that of samples, it may lack."""
    own = tuple(value.shape)
    if len(own) not in (len(wanted), len(wanted) - 1):
        return False
    return all(a in (1, b) for a, b in zip(own[::-1], wanted[::-1], strict=False))
