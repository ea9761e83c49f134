"""Diffusers pipelines run in parallel over time: their own call, their own loop, one sweep a turn."""

from paradiff.pipelines.explain import Explanation, explain
from paradiff.pipelines.parallelize import Run, parallelize
from paradiff.pipelines.report import Report

__all__ = ["Explanation", "Report", "Run", "explain", "parallelize"]
