# SPDX-License-Identifier: Apache-2.0
"""Samplers that centre, rotate and shift their structure at random before each step, as AlphaFold 3's does (algorithms 18, 19).

The sequential loop of positions x `[A, 3]` with a model D is, at each node i,

    x <- R[i] (x - mean x) + t[i],      x <- x + (the noise that the table adds),      x <- the step with D(x)        (1)

Seen from axes that move along, with C[i] = R[i] ... R[0] and y = C[i]^T (x - mean x), it is the table's own recurrence,

    y[i+1] = a[i] y[i] + b[i] m[i] + c[i] P C[i+1]^T z[i],      m[i] = P C[i]^T D(C[i] y[i] + o[i])                   (2)

where P takes away the mean over atoms. The structure's mean is known beforehand: o[i] = t[i] + c[i-1] mean z[i-1].
So a chain of scalar coefficients is left, on states that are free of their mean, for a model of the node (solver/by_row.py).
The sample is x[N] = C[N-1] y[N], free of its mean: the same structure as that of (1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.noise import Keyed, Noise, Recorded, Seen, keys_of, noise_along, origin
from paradiff.chain.table import Table
from paradiff.errors import require_real, require_truth, require_whole, shown
from paradiff.solver.by_row import ByRow, Rows, by_row

ORTHOGONAL = 1e-5
"""How far the product of a rotation with its transpose may be from the identity."""


class Frames:
    """The rotations and shifts of each node. They are compared by identity.

    Args:
        table: The chain, one-step, with as many steps as there are rotations.
        noise: The chain's noise: samples of shape `[A, 3]`, A atoms.
        rotations: `[B, N, 3, 3]` R of (1), for each sample and node.
        shifts: `[B, N, 3]` t of (1); zeros by default.
        mask: `[A]` or `[B, A]` True for atoms, False for places that fill a sample up; all are atoms by default. Others are at
            zero, take no part in means, and the model is shown zeros there.

    Attributes:
        table: As given.
        noise: As given.
        turned: `[B, N, 3, 3]` C of (2), float64.
        shifts: `[B, N, 3]` t of (1), float64.
        mask: `[B, A, 1]` 1 for atoms, else 0, float64.
        stretch: `[B]` the size at which a sample is solved, so that errors are those of its atoms (models/masked.py), float64.

    Raises:
        ValueError: If the table reads several steps back, shapes disagree, a rotation is none, or a sample has no atom.
    """

    @made_at_home
    def __init__(
        self, table: Table, noise: Noise, rotations: Tensor, shifts: Tensor | None = None, *, mask: Tensor | None = None
    ) -> None:
        if not isinstance(table, Table) or table.band != 1 or table.clip is not None:
            raise ValueError(
                f"the table is {shown(table)}; frames are those of a chain that reads one step back and limits nothing, such "
                "as paradiff.samplers.alphafold3()"
            )
        samples, shape, steps = noise.samples, tuple(noise.shape), table.steps
        if len(shape) != 2 or shape[1] != 3:
            raise ValueError(f"samples have the shape {shape}; those that are rotated have [atoms, 3]")
        if not isinstance(rotations, Tensor) or rotations.shape != (samples, steps, 3, 3):
            raise ValueError(
                f"the rotations are {shown(rotations)}; give a tensor {[samples, steps, 3, 3]}, one for each sample and step"
            )
        if shifts is not None and (not isinstance(shifts, Tensor) or shifts.shape != (samples, steps, 3)):
            raise ValueError(f"the shifts are {shown(shifts)}; give a tensor {[samples, steps, 3]}, or None for no shifts")
        own = rotations.detach().to("cpu", torch.float64)
        off = (own @ own.mT - torch.eye(3, dtype=torch.float64)).abs().amax((2, 3))
        wrong = ~(off <= ORTHOGONAL) | ~(torch.linalg.det(own) > 0)
        if bool(wrong.any()):
            sample, node = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the frame of sample {sample} at node {node} is no rotation: R R^T is {float(off[sample, node]):.2g} from the "
                f"identity, and det R = {float(torch.linalg.det(own[sample, node])):.3g}; give matrices of determinant 1 whose "
                "columns are orthonormal"
            )
        self.table, self.noise = table, noise
        self.turned = own.clone()
        for i in range(1, steps):
            self.turned[:, i] = own[:, i] @ self.turned[:, i - 1]
        self.mask = _mask(mask, samples, shape[0])
        self.stretch = (shape[0] / self.mask.sum((1, 2))).sqrt()
        self.shifts = torch.zeros(samples, steps, 3, dtype=torch.float64) if shifts is None else shifts.detach().cpu().double()
        self._along = noise_along(noise, table.draws, table.first)

    def __repr__(self) -> str:
        return f"Frames({self.noise.samples} samples of {self.noise.shape[0]} atoms, {self.table.steps} steps)"

    @classmethod
    @made_at_home
    def drawn(
        cls, table: Table, noise: Noise, *, seed: int | None = None, deviation: float = 1.0, mask: Tensor | None = None
    ) -> Frames:
        """Uniform rotations (Shoemake 1992) and normal shifts, keyed by the sample.

        Args:
            table: The chain.
            noise: Its noise.
            seed: What they are keyed by, beside the sample; by default the seed of `Keyed` noise, and 0 for other noise.
            deviation: Of the shifts, in the data's units.
            mask: See the class.

        Raises:
            ValueError: As the class does, and if `seed` or `deviation` is out of range.
        """
        require_real("the deviation of the shifts", deviation)
        if seed is not None:
            require_whole("the seed", seed, 0, most=2**64 - 1)
        keys = keys_of(noise, seed)
        found = []
        for key, sample in keys:
            own = Keyed((table.steps, 7), seed=key, samples=sample + 1)
            # A block of counters that no chain's noise of these keys comes to.
            found.append(own.draw(sample, range(DRAWN, DRAWN + 1))[0].double())
        drawn = torch.stack(found)
        return cls(table, noise, _rotations(drawn[..., :4]), deviation * drawn[..., 4:], mask=mask)

    @made_at_home
    def model(self, denoiser: Callable[..., Tensor], *, equivariant: bool = False) -> ByRow:
        """The model of (2), for `sample` beside `frames.moving()`.

        Args:
            denoiser: D: positions `[R, A, 3]` and times `[R]`, and conditioning by name; returns clean positions, or what the
                table's network predicts.
            equivariant: Whether it turns and shifts with its positions, so that outputs vary smoothly from node to node in the
                moving axes, and may be interpolated.

        Raises:
            ValueError: If `equivariant` is no truth value.
        """
        require_truth("equivariant", equivariant)
        steps, offsets = self.table.steps, self._offsets()
        atoms_of, size_of = (v.expand(-1, steps, -1, -1) for v in (self.mask[:, None], self.stretch[:, None, None, None]))

        def moving(x: Tensor, t: Tensor, rows: Rows, **conditioning: Any) -> Tensor:
            turn, offset, atoms, size = (rows.pick(values) for values in (self.turned, offsets, atoms_of, size_of))
            placed = (x / size @ turn.mT + rows.of(self.table.scale) * offset[:, None]) * atoms
            return size * _centred(denoiser(placed, t, **conditioning) @ turn, atoms)

        return by_row(moving, self.table, self.moving(), smooth=equivariant, symmetry=turned_a_little)

    def moving(self) -> Noise:
        """The noise of (2)."""
        return Seen(self, self.noise)

    def placed(self, sample: Tensor) -> Tensor:
        """`[B, A, 3]` the structures of (1), free of their means, from samples of (2).

        Raises:
            ValueError: If the samples have another shape.
        """
        wanted = self.noise.samples, *self.noise.shape
        if not isinstance(sample, Tensor) or tuple(sample.shape) != wanted:
            raise ValueError(f"the samples are {shown(sample)}; give those of the run, of shape {wanted}")
        return sample / self.stretch[:, None, None].to(sample) @ self.turned[:, -1].to(sample).mT

    def start(self, sample: int) -> Tensor:
        """The draw behind y[0], at the size at which the sample is solved."""
        added = self._added(sample)
        own = self._along.start(sample).double() - added
        return self.stretch[sample] * _centred(own + added @ self.turned[sample, 0], self.mask[sample])

    def draw(self, sample: int, nodes: range) -> Tensor:
        """P C^T z at consecutive nodes, at the size at which the sample is solved."""
        z = self._along.draw(sample, nodes).double()
        after = [min(n + 1, self.table.steps - 1) for n in nodes]
        return self.stretch[sample] * _centred(z @ self.turned[sample, after], self.mask[sample])

    def _offsets(self) -> Tensor:
        """`[B, N, 3]` o of (2)."""
        found = self.shifts.clone()
        steps = self.table.steps
        for k in range(self.noise.samples):
            atoms = self.mask[k]
            means = (self._along.draw(k, range(steps - 1)).double() * atoms).sum(1) / atoms.sum() if steps > 1 else 0.0
            found[k, 1:] += self.table.c[: steps - 1, None] * means
            found[k, 0] += self.table.start_scale * (self._added(k) * atoms).sum(0) / atoms.sum()
        return found

    def _added(self, sample: int) -> Tensor:
        """`[A, 3]` the noise that node 0 adds, beside the start's scale; zeros where it is one draw with the start."""
        draws, drawn = self.table.draws, self._along.start(sample).double()
        if draws is None or draws.start is None or not isinstance(origin(self.noise), Recorded):
            return torch.zeros_like(drawn)
        return drawn - draws.start[0] * self.noise.start(sample).double()


DRAWN = 2**40
"""The block of counters that random frames are drawn from."""


def turned_a_little(values: Tensor) -> Tensor:
    """`[W, 3, A, 3]` what the generators of rotations make of positions `[W, A, 3]`."""
    x, y, z = values.unbind(-1)
    nothing = torch.zeros_like(x)
    turns = [[-y, x, nothing], [z, nothing, -x], [nothing, -z, y]]
    return torch.stack([torch.stack(turn, -1) for turn in turns], 1)


def _rotations(normal: Tensor) -> Tensor:
    """`[..., 3, 3]` uniform rotations from normal numbers `[..., 4]`, as unit quaternions."""
    w, x, y, z = (normal / normal.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)


def _centred(x: Tensor, atoms: Tensor) -> Tensor:
    """Positions `[..., A, 3]` without their mean over atoms, and zero elsewhere."""
    mean = (x * atoms).sum(-2, keepdim=True) / atoms.sum(-2, keepdim=True)
    return (x - mean) * atoms


def _mask(given: Tensor | None, samples: int, atoms: int) -> Tensor:
    """`[B, A, 1]` 1 for atoms."""
    if given is None:
        return torch.ones(samples, atoms, 1, dtype=torch.float64)
    if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape not in ((atoms,), (samples, atoms)):
        raise ValueError(f"the mask is {shown(given)}; give a tensor of truth values, {[atoms]} or {[samples, atoms]}")
    found = given.detach().cpu().expand(samples, atoms)
    if not bool(found.any(1).all()):
        raise ValueError(f"the mask of sample {int((~found.any(1)).nonzero()[0])} has no atom; give one at least")
    return found[..., None].double()
