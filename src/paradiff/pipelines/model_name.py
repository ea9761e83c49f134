# SPDX-License-Identifier: Apache-2.0
"""What the model of a chain's owner is called in stored trajectories."""

from __future__ import annotations

from paradiff.pipelines.host.host import Host
from paradiff.solver.trajectory import Trajectory, require_model

DENOISERS = ("unet", "transformer", "prior")


def model_name(host: Host) -> str:
    """What owns the chain, and the classes and sizes of its denoisers; of all networks where none has a denoiser's name."""
    parts = [network for name, network in host.networks.items() if name in DENOISERS] or [*host.networks.values()]
    sizes = [f"{type(part).__name__} of {sum(p.numel() for p in part.parameters())} weights" for part in parts]
    return ", ".join([host.name, *sizes])


def of_model(found: Trajectory, host: Host) -> Trajectory:
    """A trajectory, if it is one of a host's model.

    Raises:
        ValueError: If it is one of another.
    """
    require_model(found, model_name(host))
    return found
