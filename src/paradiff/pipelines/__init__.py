# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines in parallel over time: their own call and their own loop, whose passes are the solver's rounds."""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily

if TYPE_CHECKING:
    from paradiff.pipelines.blocks import parallel_block, parallel_blocks
    from paradiff.pipelines.explanation import Explanation, explain
    from paradiff.pipelines.pictures import pictures_of
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
            "parallel_block": "paradiff.pipelines.blocks",
            "parallel_blocks": "paradiff.pipelines.blocks",
            "parallelize": "paradiff.pipelines.run",
            "pictures_of": "paradiff.pipelines.pictures",
        },
    )

__all__ = [
    "Explanation",
    "Report",
    "Run",
    "explain",
    "parallel_block",
    "parallel_blocks",
    "parallelize",
    "pictures_of",
]
