# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: measures how far a method's samples err on a model, so that later runs state a bound of their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paradiff.chain.table import Table
from paradiff.errors import require_kind, shown
from paradiff.planning.calibration import COVERAGE, Calibration
from paradiff.planning.calibrations import SEEDS, calibration_of, require_calibrated
from paradiff.solver.protocol import Method


def calibrate(
    model: Any,
    chain: Table | Mapping[str, Any],
    method: Method,
    seeds: Sequence[int] = SEEDS,
    *,
    coverage: float = COVERAGE,
    shape: Sequence[int] | None = None,
) -> Calibration:
    """Calibrates a method on a network and its chain, or on a pipeline's call: how large errors are beside their estimates.

        print(paradiff.calibrate(model, table, paradiff.collocation(window=4)))
        print(paradiff.calibrate(pipe, {"prompt": "a lighthouse"}, paradiff.quasi_newton(window=4)))

    Each seed is sampled by the method and by the sequential chain, those of a network in one batch. The ratios of true errors
    to estimates give the factor by which a share of samples, 95 of 100 by default, err by at most so many times their estimate:
    the ceil((n + 1)·coverage)-th smallest of n ratios, by split conformal prediction (planning/calibration.py says exactly what
    that guarantees). It is kept in the user's cache folder (`PARADIFF_CACHE` names another one), and later runs of the same
    method, with the same tolerance and window, on the same model and chain state it beside their estimates:
    `Solution.error_bound`, `Report.error_bound`.

    Args:
        model: A network, an evaluator of one whose conditioning has a row for each seed, or a diffusers pipeline.
        chain: The table of the network's chain; for a pipeline the arguments of its call by name.
        method: The method, with its tolerance and window; not `auto`, which chooses anew for each run.
        seeds: The seeds, at least 19 for a coverage of 0.95, and 99 for 0.99. The bound is for samples of other seeds.
        coverage: The share of samples that the bound is to hold for, between 0 and 1.
        shape: Shape of one sample of a network; None for that of the model.

    Raises:
        ValueError: If an argument is of another kind, the seeds are too few, the method does not fit the chain, or too many
            runs were stopped before they met the method's rule.
    """
    if hasattr(model, "scheduler") and hasattr(model, "components"):
        from paradiff.pipelines.calibrate_call import calibrate_call

        require_calibrated(method, seeds, coverage)
        if not isinstance(chain, Mapping):
            raise ValueError(
                f"the pipeline's calibration was given {shown(chain)}; give the arguments of its call by name, such as "
                '{"prompt": "a lighthouse", "num_inference_steps": 50}'
            )
        if shape is not None:
            raise ValueError("a pipeline has the shape of its samples itself; leave the shape out")
        return calibrate_call(model, chain, method, seeds, coverage)
    require_kind("the chain", chain, Table, ", such as model.table('ddim', 50)")
    assert isinstance(chain, Table)
    return calibration_of(model, chain, method, seeds, shape=shape, coverage=coverage)
