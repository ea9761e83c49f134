# SPDX-License-Identifier: Apache-2.0
"""The head of a mesh: the nodes from the first on that have settled while later ones are still to be evaluated.

In a small window nodes settle in order, and the defects of the first ones (defect.py) are known long before the sample is. No
secant pair tells yet how later nodes amplify them, so they reach the sample by the chain's linear part alone, which is too
small rather than too large. Where they are large even so, the mesh will have to be refined there, and every node after them
be evaluated once more. To refine the head at once spares that.

Where every round evaluates all nodes, none settles long before the others. After a few sweeps the forcings are near enough to
their ends for the defects to tell where the mesh is far too coarse. Then it is refined while the sweeps have not converged
anyway: a mesh that is refined at their end costs as many further sweeps as were saved.
"""

from __future__ import annotations

from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.collocation.control import CollocationControl
from paradiff.methods.collocation.defect import interpolation_defects
from paradiff.methods.collocation.error import InterpolationError
from paradiff.methods.collocation.system import CollocationSystem, weighted


def head_error(
    system: CollocationSystem, influence: Tensor, forcings: Tensor, settled: int, control: CollocationControl
) -> InterpolationError | None:
    """The part of the interpolation error that the settled nodes show; None where they are too few for a defect, and at
    order 0. Waits for the device.

    Args:
        system: The collocation system, with M nodes.
        influence: `[M+1, M]` its influence matrix on the device.
        forcings: `[M, b, d]`.
        settled: Number of nodes, from the first on, that have settled.
        control: The tuned numbers.
    """
    if system.averaged:
        return None
    omitted, weights = interpolation_defects(system)
    known = [j for j, row in enumerate(weights.bool()) if not bool(row[settled:].any())]
    if not known:
        return None
    places = [omitted[j] for j in known]
    own = weights[known].to(forcings.dtype).to(forcings.device, non_blocking=True)
    defects = weighted(own, forcings)
    reach = influence[-1, uploaded(places, forcings.device)]
    squares = (reach[:, None] * defects.square().mean(2).sqrt()).square().amax(1)
    factor = control.error.safety / control.defect.most_ratio
    return InterpolationError((factor * squares.sqrt()).tolist(), [(n - 1, n) for n in places])
