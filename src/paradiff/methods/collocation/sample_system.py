# SPDX-License-Identifier: Apache-2.0
"""Equation (1) of system.py for one sample: its noises put in, and its coefficients on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.dense_output import DenseOutput
from paradiff.methods.collocation.noises import MeshNoises
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.staleness import lipschitz_floor
from paradiff.methods.collocation.system import CollocationSystem, noise_states, weighted
from paradiff.methods.collocation.warm import Carried, WarmStart


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleSystem:
    """The collocation system of one sample; b members, d numbers each.

    Attributes:
        system: The collocation system.
        doubled: Its doubled intervals; None from order 1.
        noises: The noises of all these; None on deterministic chains.
        influence: `[M+1, M]` R.
        reach: `[M k, M k]` -R without the sample, each entry once for each two of the k secant pairs that a node may have.
        x0: `[b, d]` x[0].
        base: `[M+1, b d]` the part of the states and the sample that depends on no forcing.
        lipschitz_floor: `[M]` Lipschitz constant of the forcing that is taken for granted at each node.
        q_u: `[M]` size of the weight of the network's output in the forcing, positive.
        trusted: Mean squares of how far each node's state may move before it is evaluated again.
        carried: The forcings that differences are to; None where forcings themselves are interpolated.
    """

    system: CollocationSystem
    doubled: DoubledIntervals | None
    noises: MeshNoises | None
    influence: Tensor
    reach: Tensor
    x0: Tensor
    base: Tensor
    lipschitz_floor: Tensor
    q_u: Tensor
    trusted: list[float]
    carried: Carried | None = None

    def states(self, forcings: Tensor) -> Tensor:
        """`[M+1, b, d]` states of the nodes and, last, the sample, with the forcings `[M, b, d]` fixed."""
        return torch.addmm(self.base, self.influence, forcings.flatten(1)).view(-1, *self.x0.shape)

    @staticmethod
    def of(
        setup: CollocationSetup,
        system: CollocationSystem,
        x0: Tensor,
        noise: Noise,
        sample: int,
        *,
        before: MeshNoises | None = None,
        warm: WarmStart | None = None,
    ) -> SampleSystem:
        """The system of one sample.

        Args:
            setup: What all samples share.
            system: The collocation system.
            x0: `[b, d]` the state at node 0.
            noise: x[0] and the noises of every sample.
            sample: The sample.
            before: The noises of another mesh of the same recurrence.
            warm: What it begins from; None for nothing.
        """
        rec, nodes, pairs = system.recurrence, system.nodes, setup.pairs_of(system)
        influence = setup.move(system.influence)
        doubled = setup.doubled(system) if system.averaged else None
        noises = None
        if setup.table.stochastic:
            noises = MeshNoises.of(system, doubled, noise, sample, x0, before)
        base = setup.move(system.initial)[:, None] * x0.flatten()
        if noises is not None:
            base.addmm_(setup.move(system.noise_weights).flatten(1), noises.ends.flatten(0, 1).flatten(1))
            if system.averaged:
                base[:-1] += noises.averaged.flatten(1)
        carried = None if warm is None else warm.carried(system)
        if carried is not None:
            base += carried.states
        return SampleSystem(
            carried=carried,
            system=system,
            doubled=doubled,
            noises=noises,
            influence=influence,
            reach=-influence[:-1].repeat_interleave(pairs, 0).repeat_interleave(pairs, 1),
            x0=x0,
            base=base,
            lipschitz_floor=setup.move(lipschitz_floor(rec, nodes, setup.control.lipschitz_cap)),
            trusted=_trusted(setup, system).tolist(),
            q_u=setup.move(rec.q_u[nodes].abs().clamp(min=1e-300)),
        )

    def dense_output(
        self, setup: CollocationSetup, forcings: Tensor, shape: tuple[int, ...], noise: Noise, sample: int
    ) -> DenseOutput:
        """The states of all fine nodes, as tensors of `shape`, from the forcings `[M, b, d]`."""
        system = self.system
        initial, influence = setup.move(system.point_initial[:-1]), setup.move(system.point_influence[:-1])
        carried = weighted(influence.flatten(0, 1), forcings).view(*initial.shape, *self.x0.shape)
        states = initial[..., None, None] * self.x0 + carried
        if self.noises is not None:
            weights = setup.move(system.point_noise_weights[:-1].flatten(0, 1))
            states = states + noise_states(weights, self.noises.ends).view_as(states)
        beside = None
        if self.carried is not None:
            states = states + self.carried.points[:-1]
            beside = self.carried.forcings.view(-1, *shape)
        states, forcings = states.view(*initial.shape, *shape), forcings.view(-1, *shape)
        return DenseOutput(system, forcings, states, noise=noise, sample=sample, move=setup.move, beside=beside)


def _trusted(setup: CollocationSetup, system: CollocationSystem) -> Tensor:
    """`[M]` mean squares of moves: a share of the node's noise level, or of the network's rounding of its state."""
    table, rec = setup.table, system.recurrence
    alpha, sigma = table.alpha[system.nodes], table.sigma[system.nodes]
    size = alpha**2 * rec.variance + sigma**2
    return torch.maximum(setup.control.trusted_move**2 * sigma**2, setup.resolution**2 * size)
