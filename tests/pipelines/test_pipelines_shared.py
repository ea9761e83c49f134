# SPDX-License-Identifier: Apache-2.0
"""Pipelines on ranks: the pictures and reports of one process, with text encoders and autoencoders on one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from processes import on_ranks
from torch.distributed.device_mesh import DeviceMesh

import paradiff
from paradiff.models.pipeline import load_pipeline
from paradiff.pipelines.settings import Executor

CALL = {"prompt": "a red circle left of a blue square", "num_inference_steps": 6, "output_type": "np"}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def called(executor: Executor, seed: int = 0, **options: Any) -> tuple[np.ndarray, list[Any], list[Any]]:
    """The picture of a call, what its report counts, and its records."""
    pipe = load_pipeline("shapes")
    pipe.set_progress_bar_config(disable=True)
    run = paradiff.parallelize(pipe, paradiff.parasolver(window=3), executor=executor, dtype=torch.float64, **options)
    images = run(**CALL, generator=torch.Generator().manual_seed(seed)).images
    report = run.report
    counts = [report.executor, report.rounds, report.rows, report.checks, report.network_calls, report.network_rows]
    return images, counts, [record.to_json() for record in report.history]


def counted(mesh: DeviceMesh, executor: Executor) -> Any:
    """The same on ranks, and how often the classes of the encoders were called."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    calls: list[str] = []

    def noted(kind: type, method: str) -> None:
        own = getattr(kind, method)

        def note(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(method)
            return own(self, *args, **kwargs)

        setattr(kind, method, note)

    noted(CLIPTextModel, "forward")
    noted(AutoencoderKL, "decode")
    return *called(executor, mesh=mesh), calls


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_pictures_and_reports_are_those_of_one_process(executor: Executor) -> None:
    torch.set_num_threads(1)  # as on the ranks, since sums over several threads round otherwise
    images, counts, records = called(executor, shares=2)
    first, second = on_ranks(2, counted, executor)
    assert (first.error, second.error) == ("", "")
    for one in (first, second):
        assert (one.value[0] == images).all()
        assert one.value[1] == counts
        assert one.value[2] == records
    assert "decode" in first.value[3]
    assert "forward" in first.value[3]
    assert second.value[3] == []


def seeded(mesh: DeviceMesh) -> None:
    called("vector", seed=mesh.get_rank(), mesh=mesh)


def test_generators_of_other_seeds_are_found() -> None:
    for one in on_ranks(2, seeded):
        assert one.error.startswith("RanksFailed: rank 1 of 2")
        assert "was started with another generator than rank 0 of 2" in one.error
