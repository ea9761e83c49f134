# SPDX-License-Identifier: Apache-2.0
"""Equation (1) of system.py for one sample: its noises put in, and its coefficients on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.dense_output import DenseOutput
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.staleness import lipschitz_floor
from paradiff.methods.collocation.system import CollocationSystem, draw, noise_states, weighted

Drawn = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""The noises of intervals (`system.draw`), by their mesh points."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleSystem:
    """The collocation system of one sample; b members, d numbers each.

    Attributes:
        system: The collocation system.
        drawn: The noises of its intervals, in their order; empty on deterministic chains.
        influence: `[M+1, M]` R.
        base: `[M+1, b, d]` f x[0] + n.
        lipschitz_floor: `[M]` Lipschitz constant of the forcing that is taken for granted at each node.
        q_u: `[M]` size of the weight of the network's output in the forcing, positive.
        trusted: Mean squares of how far each node's state may move before it is evaluated again.
    """

    system: CollocationSystem
    drawn: Drawn
    influence: Tensor
    base: Tensor
    lipschitz_floor: Tensor
    q_u: Tensor
    trusted: list[float]

    def states(self, forcings: Tensor) -> Tensor:
        """`[M+1, b, d]` states of the nodes and, last, the sample, with the forcings `[M, b, d]` fixed."""
        return self.base + weighted(self.influence, forcings)

    @staticmethod
    def of(
        setup: CollocationSetup, system: CollocationSystem, x0: Tensor, noise: Noise, sample: int, *, drawn: Drawn
    ) -> SampleSystem:
        """The system of one sample.

        Args:
            setup: What all samples share.
            system: The collocation system.
            x0: `[b, d]` the state at node 0.
            noise: x[0] and the noises of every sample.
            sample: The sample.
            drawn: Noises of intervals that were drawn before.
        """
        rec, nodes = system.recurrence, system.nodes
        kept: Drawn = {}
        share = x0.new_zeros(1)
        if setup.table.stochastic:
            for interval in system.intervals:
                span = (interval.left, interval.right)
                kept[span] = drawn[span] if span in drawn else draw(interval, noise, sample)
            share = setup.move(system.noises([*kept.values()])).view(-1, *x0.shape)
        return SampleSystem(
            system=system,
            drawn=kept,
            influence=setup.move(system.influence),
            base=setup.move(system.initial)[:, None, None] * x0 + share,
            lipschitz_floor=setup.move(lipschitz_floor(rec, nodes, setup.control.lipschitz_cap)),
            trusted=_trusted(setup, system).tolist(),
            q_u=setup.move(rec.q_u[nodes].abs().clamp(min=1e-300)),
        )

    def dense_output(
        self, setup: CollocationSetup, x0: Tensor, forcings: Tensor, shape: tuple[int, ...], noise: Noise, sample: int
    ) -> DenseOutput:
        """The states of all fine nodes, as tensors of `shape`, from the forcings `[M, b, d]`."""
        system = self.system
        initial, influence = setup.move(system.point_initial[:-1]), setup.move(system.point_influence[:-1])
        carried = weighted(influence.flatten(0, 1), forcings).view(*initial.shape, *x0.shape)
        states = initial[..., None, None] * x0 + carried
        if setup.table.stochastic:
            noises = noise_states(system.point_noise_weights[:-1].flatten(0, 1), [*self.drawn.values()])
            states = states + setup.move(noises).view(-1, *x0.shape).view_as(states)
        states, forcings = states.view(*initial.shape, *shape), forcings.view(-1, *shape)
        return DenseOutput(system, forcings, states, noise=noise, sample=sample, move=setup.move)


def _trusted(setup: CollocationSetup, system: CollocationSystem) -> Tensor:
    """`[M]` mean squares of moves: a share of the node's noise level, or of the network's rounding of its state."""
    table, rec = setup.table, system.recurrence
    alpha, sigma = table.alpha[system.nodes], table.sigma[system.nodes]
    size = alpha**2 * rec.variance + sigma**2
    return torch.maximum(setup.control.trusted_move**2 * sigma**2, setup.resolution**2 * size)
