# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines in parallel over time: their own call and their own loop, whose passes are the solver's rounds."""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily

if TYPE_CHECKING:
    from paradiff.pipelines.explanation import Explanation, explain
    from paradiff.pipelines.report import Report
    from paradiff.pipelines.run import Run, parallelize
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Explanation": "paradiff.pipelines.explanation",
            "Report": "paradiff.pipelines.report",
            "Run": "paradiff.pipelines.run",
            "explain": "paradiff.pipelines.explanation",
            "parallelize": "paradiff.pipelines.run",
        },
    )

__all__ = [
    "Explanation",
    "Report",
    "Run",
    "explain",
    "parallelize",
]
