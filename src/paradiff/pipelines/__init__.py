"""Diffusers pipelines run in parallel over time: their own call, their own loop, one sweep a turn."""

from paradiff.pipelines.explanation import Explanation, explain
from paradiff.pipelines.report import Report
from paradiff.pipelines.run import Run, parallelize

__all__ = ["Explanation", "Report", "Run", "explain", "parallelize"]
