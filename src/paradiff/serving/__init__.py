# SPDX-License-Identifier: Apache-2.0
"""Serving: the step-level contract by which the rows of many requests share network calls, and a small reference engine."""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily
from paradiff.serving.engine import Engine, Full, Job
from paradiff.serving.model import ServedModel
from paradiff.serving.request import SampleRequest
from paradiff.serving.stepwise import Finished, MergedRows, Stepwise

if TYPE_CHECKING:
    from paradiff.serving.pipeline import served_pipeline
else:
    __getattr__, _ = lazily(__name__, {"served_pipeline": "paradiff.serving.pipeline"})

__all__ = [
    "Engine",
    "Finished",
    "Full",
    "Job",
    "MergedRows",
    "SampleRequest",
    "ServedModel",
    "Stepwise",
    "served_pipeline",
]
