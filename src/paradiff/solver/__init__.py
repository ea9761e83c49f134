# SPDX-License-Identifier: Apache-2.0
"""The loop that solves a chain, what it is given and what it returns."""

from paradiff.solver.by_row import ByRow, Rows
from paradiff.solver.deadline import Deadline
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.loop import drive, sample, solve
from paradiff.solver.previews import Preview, Previews
from paradiff.solver.protocol import (
    Batch,
    EditedOutputs,
    Evaluate,
    Method,
    Observer,
    Problem,
    Query,
    Round,
    Run,
    Solver,
)
from paradiff.solver.ranks import Ranks
from paradiff.solver.records import ChordsRecord, CollocationRecord, PararealRecord, Record, WindowRecord
from paradiff.solver.solution import ErrorBound, ErrorEstimate, Solution, Status
from paradiff.solver.trajectory import Trajectory

__all__ = [
    "Batch",
    "ByRow",
    "ChordsRecord",
    "CollocationRecord",
    "Deadline",
    "Denoiser",
    "EditedOutputs",
    "ErrorBound",
    "ErrorEstimate",
    "Evaluate",
    "Evaluator",
    "Method",
    "Observer",
    "PararealRecord",
    "Preview",
    "Previews",
    "Problem",
    "Query",
    "Ranks",
    "Record",
    "Round",
    "Rows",
    "Run",
    "Solution",
    "Solver",
    "Status",
    "Trajectory",
    "WindowRecord",
    "drive",
    "sample",
    "solve",
]
