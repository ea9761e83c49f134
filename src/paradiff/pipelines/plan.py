# SPDX-License-Identifier: Apache-2.0
"""`plan`: says before anything is spent what is fastest on this machine, for a network or for a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paradiff.chain.noise import Keyed, Noise
from paradiff.chain.table import Table
from paradiff.errors import require_kind, shown
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.planning.cost import Devices
from paradiff.planning.curves import MEASURED
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.plan import Plan
from paradiff.planning.planner import plan_of
from paradiff.planning.wish import Objective


def plan(
    model: Any,
    chain: Table | Mapping[str, Any] | None = None,
    noise: Noise | None = None,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    most: int | None = None,
    devices: Devices | int = 1,
    curve: LatencyCurve | None = None,
    pilots: int = 1,
    objective: Objective | None = None,
    deadline: float | None = None,
    seconds: float = MEASURED,
) -> Plan:
    """Plans the sampling of a network, or a pipeline's call: which method and window is fastest here, and whether any pays.

        print(paradiff.plan(model, table))
        print(paradiff.plan(pipe, {"prompt": "a lighthouse", "num_inference_steps": 50}))

    The seconds of a call by its rows are measured in two seconds and kept in the user's cache folder (`PARADIFF_CACHE` names
    another one). What methods take is known from runs of this model, of which one or a few are made here and kept, and from the
    library's own models on like chains. `plan.method` is the method to take, `print(plan)` says why.

    Args:
        model: A network, an evaluator of one, or a diffusers pipeline.
        chain: The table of the network's chain; for a pipeline the arguments of its call by name.
        noise: For a network, the shape and the number of samples; one sample of the model's own shape by default.
        tolerance: Root mean square error that a sample may have by estimate, in the data's units.
        most: Most rows of a sample in a round; None for no bound.
        devices: Devices that share the rows of a round; where they are several, they are simulated.
        curve: A latency curve, such as that of another device; None for the one of this machine.
        pilots: Runs of each method that is tried, one at a time; 0 makes none.
        objective: What is made least, as `auto` has it: `latency` by default, `evaluations`, `memory`, or `anytime`.
            `plan.method` answers it, and `plan.answer` says why.
        deadline: Seconds within which the best sample is wanted; of a pipeline, those of its loop. None for no bound.
        seconds: How long the curve's measurement takes, about.

    Raises:
        ValueError: If an argument is of another kind, or contradicts another one.
    """
    if hasattr(model, "scheduler") and hasattr(model, "components"):
        from paradiff.pipelines.plan_call import plan_call

        if chain is not None and not isinstance(chain, Mapping):
            raise ValueError(
                f"the pipeline's plan was given {shown(chain)}; give the arguments of its call by name, such as "
                '{"prompt": "a lighthouse", "num_inference_steps": 50}'
            )
        if noise is not None:
            raise ValueError("a pipeline draws its noise itself; leave the noise out")
        return plan_call(
            model,
            chain or {},
            tolerance=tolerance,
            most=most,
            devices=devices,
            curve=curve,
            pilots=pilots,
            objective=objective,
            deadline=deadline,
        )
    require_kind("the chain", chain, Table, ", such as model.table('ddim', 50)")
    assert isinstance(chain, Table)
    if noise is None:
        shape = getattr(model, "shape", None)
        if shape is None:
            raise ValueError(
                "the model does not tell the shape of its samples; give noise, such as paradiff.Keyed((3, 64, 64))"
            )
        noise = Keyed(shape)
    return plan_of(
        model,
        chain,
        noise,
        tolerance=tolerance,
        most=most,
        devices=devices,
        curve=curve,
        pilots=pilots,
        objective=objective,
        deadline=deadline,
        seconds=seconds,
    )
