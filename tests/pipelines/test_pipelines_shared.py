# SPDX-License-Identifier: Apache-2.0
"""Pipelines on ranks: the pictures and reports of one process, with text encoders and autoencoders on one of them."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from problems import gap
from processes import on_ranks
from tiny import CASES
from torch.distributed.device_mesh import DeviceMesh

import paradiff
from paradiff.errors import Unsupported
from paradiff.models.pipeline import load_pipeline
from paradiff.pipelines.network.batched_call import batched_call
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.settings import Executor
from paradiff.pipelines.tensor.windowed import Windowed
from paradiff.solver import Ranks
from paradiff.solver.machine import Machine

CALL = {"prompt": "a red circle left of a blue square", "num_inference_steps": 6, "output_type": "np"}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def called(
    executor: Executor, seed: int = 0, machine: Machine | None = None, **options: Any
) -> tuple[np.ndarray, list[Any], list[Any]]:
    """The picture of a call, what its report counts, and its records."""
    pipe = load_pipeline("shapes", machine=machine)
    pipe.set_progress_bar_config(disable=True)
    options = {"dtype": torch.float64} | options
    run = paradiff.parallelize(pipe, paradiff.parasolver(window=3), executor=executor, **options)
    images = run(**CALL, generator=torch.Generator().manual_seed(seed)).images
    report = run.report
    counts = [report.executor, report.rounds, report.rows, report.checks, report.network_calls, report.network_rows]
    return images, counts, [record.to_json() for record in report.history]


def counted(
    mesh: DeviceMesh, executor: Executor, light: bool = False, fails: bool = False, dtype: torch.dtype = torch.float64
) -> Any:
    """The same on ranks, and how often the classes of the encoders were called; `light`, where the first rank alone holds
    them."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    calls: list[str] = []

    def noted(kind: type, method: str) -> None:
        own = getattr(kind, method)

        def note(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(method)
            if fails and method == "decode":
                raise ArithmeticError("the decoder failed")
            return own(self, *args, **kwargs)

        setattr(kind, method, note)

    noted(CLIPTextModel, "forward")
    noted(AutoencoderKL, "decode")
    ranks = Ranks(mesh, timeout=20)
    return *called(executor, mesh=ranks, machine=Machine(ranks) if light else None, dtype=dtype), calls


@pytest.mark.parametrize(("executor", "dtype"), [("vector", torch.float32), ("lanes", torch.float64)])
def test_pictures_and_reports_are_those_of_one_process(executor: Executor, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)  # as on the ranks, since sums over several threads round otherwise
    images, counts, records = called(executor, shares=2, dtype=dtype)
    first, second = on_ranks(2, counted, executor, False, False, dtype)
    assert (first.error, second.error) == ("", "")
    for one in (first, second):
        assert (one.value[0] == images).all()
        assert one.value[1] == counts
        assert one.value[2] == records
    assert "decode" in first.value[3]
    assert "forward" in first.value[3]
    assert second.value[3] == []


@pytest.mark.parametrize("executor", ["vector", "lanes", "sequential"])
def test_where_the_first_rank_alone_holds_the_encoders_all_get_the_picture(executor: Executor) -> None:
    torch.set_num_threads(1)
    images, counts, records = called(executor, shares=2)
    for rank, one in enumerate(on_ranks(2, counted, executor, True)):
        assert one.error == ""
        assert (one.value[0] == images).all()
        assert one.value[1] == counts
        assert one.value[2] == records
        assert one.value[3] == (["forward", "forward", "decode"] if rank == 0 else [])


def test_an_error_after_the_loop_is_that_of_all_ranks() -> None:
    for one in on_ranks(2, counted, "vector", True, True):
        assert one.error == "ArithmeticError: the decoder failed"


def test_a_network_of_one_rank_is_not_called_with_a_window() -> None:
    network = torch.nn.Linear(2, 2)
    batching = Batching(alone=[network])
    rows = Windowed.wrap(torch.zeros(3, 1, 2), object())
    with pytest.raises(Unsupported, match="its loop calls a Linear, which the first rank alone holds"):
        batched_call(batching, "Linear", network.forward, (rows,), {})
    with pytest.raises(Unsupported, match="its loop calls a Linear"):
        batching.home(network.forward, (), {"x": [rows]})


def seeded(mesh: DeviceMesh) -> None:
    called("vector", seed=mesh.get_rank(), mesh=mesh)


def test_generators_of_other_seeds_are_found() -> None:
    for one in on_ranks(2, seeded):
        assert one.error.startswith("RanksFailed: rank 1 of 2")
        assert "was started with another generator than rank 0 of 2" in one.error


def beside_context_parallelism(mesh: DeviceMesh) -> tuple[float, float, str]:
    """How far a call by places along `time`, each of two ranks that share a sequence, and the plain call of these two are from
    that of one process; and the executor."""
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # by which diffusers names the rank's device, and of which there is none
    case, few = CASES["flux"], {"num_inference_steps": 6}
    alone, pipe = case.run(case.make(), **few), case.make()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    plain = case.run(pipe, **few)
    with paradiff.parallelize(pipe, paradiff.quasi_newton(window=3, tolerance=0.0), mesh=mesh, mesh_axis="time") as run:
        found = case.run(pipe, **few)
    return gap(found, alone), gap(plain, alone), run.report.executor


@pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="this diffusers has no context parallelism")
def test_a_call_is_shared_along_time_and_along_its_sequence() -> None:
    for one in on_ranks(4, beside_context_parallelism, axes={"time": 2, "ring": 1, "ulysses": 2}):
        assert one.error == ""
        found, plain, executor = one.value
        assert max(found, plain) < 1e-5  # of the size of the sample, in float32
        assert executor == "vector"
