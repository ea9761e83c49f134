"""The loop that solves a chain, what it is given and what it returns."""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily

if TYPE_CHECKING:
    from paradiff.solver.evaluator import Batch, Denoiser, Evaluator
    from paradiff.solver.loop import EditedOutputs, sample, solve
    from paradiff.solver.solution import CollocationRecord, ErrorEstimate, PararealRecord, Record, Solution, WindowRecord
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Batch": "paradiff.solver.evaluator",
            "CollocationRecord": "paradiff.solver.solution",
            "Denoiser": "paradiff.solver.evaluator",
            "EditedOutputs": "paradiff.solver.loop",
            "ErrorEstimate": "paradiff.solver.solution",
            "Evaluator": "paradiff.solver.evaluator",
            "PararealRecord": "paradiff.solver.solution",
            "Record": "paradiff.solver.solution",
            "Solution": "paradiff.solver.solution",
            "WindowRecord": "paradiff.solver.solution",
            "sample": "paradiff.solver.loop",
            "solve": "paradiff.solver.loop",
        },
    )

__all__ = [
    "Batch",
    "CollocationRecord",
    "Denoiser",
    "EditedOutputs",
    "ErrorEstimate",
    "Evaluator",
    "PararealRecord",
    "Record",
    "Solution",
    "WindowRecord",
    "sample",
    "solve",
]
