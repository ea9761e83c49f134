# SPDX-License-Identifier: Apache-2.0
"""Serving: the step-level contract by which the rows of many requests share network calls, and a small reference engine."""

from paradiff.serving.engine import Engine, Full, Job
from paradiff.serving.model import ServedModel
from paradiff.serving.request import SampleRequest
from paradiff.serving.stepwise import Finished, MergedRows, Stepwise

__all__ = ["Engine", "Finished", "Full", "Job", "MergedRows", "SampleRequest", "ServedModel", "Stepwise"]
