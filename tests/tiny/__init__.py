# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of random weights, built in memory, one for every kind of loop that the library must follow.

`CASES[name].make()` builds a pipeline; `CASES[name].run(pipe, seed)` is an ordinary call of it.
"""

from __future__ import annotations

from tiny import audio, cascades, edits, films, flows, images, pixels, stable, video
from tiny.case import Case, calling, noise, randomize
from tiny.stable import SCHEDULERS, with_scheduler

CASES: dict[str, Case] = {case.name: case for family in (pixels, stable, images, video, audio) for case in family.CASES}

FURTHER: dict[str, Case] = {case.name: case for family in (edits, flows, films, cascades) for case in family.CASES}
"""Further pipelines of diffusers, run less often than `CASES`: in tests/pipelines/test_further_pipelines.py only."""

__all__ = ["CASES", "FURTHER", "SCHEDULERS", "Case", "calling", "noise", "randomize", "with_scheduler"]
