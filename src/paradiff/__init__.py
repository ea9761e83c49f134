# SPDX-License-Identifier: Apache-2.0
"""Parallel-in-time sampling for diffusion and flow models.

Everything here is imported when it is first asked for: the core needs torch, numpy, filelock and platformdirs.
"""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily

if TYPE_CHECKING:
    from paradiff import chain, methods, models, pipelines, planning, samplers, serving, solver
    from paradiff.chain import noise
    from paradiff.chain import slope as slopes
    from paradiff.chain.noise import Keyed, Recorded
    from paradiff.chain.table import Table
    from paradiff.methods.chords.method import chords
    from paradiff.methods.deer.method import quasi_deer
    from paradiff.methods.parataa import parataa
    from paradiff.methods.piadm import piadm_ode, piadm_sde
    from paradiff.methods.presets import (
        collocation,
        jacobi,
        paradigms,
        parasolver,
        quasi_newton,
        sequential,
        srds,
    )
    from paradiff.pipelines.calibrate import calibrate
    from paradiff.pipelines.explanation import explain
    from paradiff.pipelines.native import (
        ParallelInTimeConfig,
        disable_parallel_in_time,
        enable_parallel_in_time,
        is_parallel_in_time_enabled,
        parallel,
    )
    from paradiff.pipelines.plan import plan
    from paradiff.pipelines.run import parallelize
    from paradiff.planning.auto import auto
    from paradiff.planning.policy import Policy
    from paradiff.planning.sampling import sample
    from paradiff.planning.side_by_side import compare
    from paradiff.samplers.schedule import Schedule
    from paradiff.samplers.scheduler.probe import from_scheduler
    from paradiff.solver.by_row import by_row
    from paradiff.solver.evaluator import Evaluator
    from paradiff.solver.loop import solve
    from paradiff.solver.protocol import Method
    from paradiff.solver.solution import Solution
    from paradiff.solver.trajectory import Trajectory
    from paradiff.version import __version__
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Evaluator": "paradiff.solver.evaluator",
            "Keyed": "paradiff.chain.noise",
            "Method": "paradiff.solver.protocol",
            "ParallelInTimeConfig": "paradiff.pipelines.native",
            "Policy": "paradiff.planning.policy",
            "Recorded": "paradiff.chain.noise",
            "Schedule": "paradiff.samplers.schedule",
            "Solution": "paradiff.solver.solution",
            "Table": "paradiff.chain.table",
            "Trajectory": "paradiff.solver.trajectory",
            "__version__": "paradiff.version",
            "auto": "paradiff.planning.auto",
            "by_row": "paradiff.solver.by_row",
            "calibrate": "paradiff.pipelines.calibrate",
            "chain": "paradiff.chain:",
            "chords": "paradiff.methods.chords.method",
            "collocation": "paradiff.methods.presets",
            "compare": "paradiff.planning.side_by_side",
            "disable_parallel_in_time": "paradiff.pipelines.native",
            "enable_parallel_in_time": "paradiff.pipelines.native",
            "explain": "paradiff.pipelines.explanation",
            "from_scheduler": "paradiff.samplers.scheduler.probe",
            "is_parallel_in_time_enabled": "paradiff.pipelines.native",
            "jacobi": "paradiff.methods.presets",
            "methods": "paradiff.methods:",
            "models": "paradiff.models:",
            "noise": "paradiff.chain.noise:",
            "paradigms": "paradiff.methods.presets",
            "parallel": "paradiff.pipelines.native",
            "parallelize": "paradiff.pipelines.run",
            "parasolver": "paradiff.methods.presets",
            "parataa": "paradiff.methods.parataa",
            "piadm_ode": "paradiff.methods.piadm",
            "piadm_sde": "paradiff.methods.piadm",
            "pipelines": "paradiff.pipelines:",
            "plan": "paradiff.pipelines.plan",
            "planning": "paradiff.planning:",
            "quasi_deer": "paradiff.methods.deer.method",
            "quasi_newton": "paradiff.methods.presets",
            "sample": "paradiff.planning.sampling",
            "samplers": "paradiff.samplers:",
            "sequential": "paradiff.methods.presets",
            "serving": "paradiff.serving:",
            "slopes": "paradiff.chain.slope:",
            "solve": "paradiff.solver.loop",
            "solver": "paradiff.solver:",
            "srds": "paradiff.methods.presets",
        },
    )

__all__ = [
    "Evaluator",
    "Keyed",
    "Method",
    "ParallelInTimeConfig",
    "Policy",
    "Recorded",
    "Schedule",
    "Solution",
    "Table",
    "Trajectory",
    "__version__",
    "auto",
    "by_row",
    "calibrate",
    "chain",
    "chords",
    "collocation",
    "compare",
    "disable_parallel_in_time",
    "enable_parallel_in_time",
    "explain",
    "from_scheduler",
    "is_parallel_in_time_enabled",
    "jacobi",
    "methods",
    "models",
    "noise",
    "paradigms",
    "parallel",
    "parallelize",
    "parasolver",
    "parataa",
    "piadm_ode",
    "piadm_sde",
    "pipelines",
    "plan",
    "planning",
    "quasi_deer",
    "quasi_newton",
    "sample",
    "samplers",
    "sequential",
    "serving",
    "slopes",
    "solve",
    "solver",
    "srds",
]
