# SPDX-License-Identifier: Apache-2.0
"""Two devices of one process share the rows of a round: the samples of one device, each row evaluated where it belongs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from pipelines import tiny_unet
from tiny import CASES
from torch import Tensor, nn

from paradiff import Evaluator, Keyed, Schedule, jacobi, parallelize, parasolver, sample
from paradiff.samplers import ddpm

SHAPE = (2, 4, 4)
TABLE = ddpm(Schedule.linear(), 10)


class Net(nn.Module):
    """A small network that notes the devices that it was called on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(2, 2, 3, padding=1)
        self.seen: list[str] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.device == t.device == y.device == self.inner.weight.device
        self.seen.append(str(x.device))
        return 0.5 * self.inner(x) + y[:, :, None, None] * t[:, None, None, None].to(x.dtype) / 1000


def run(device: str, **options: Any) -> tuple[Tensor, Net]:
    net = Net().to(device, torch.float64)
    y = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2).to(device)
    evaluator = Evaluator(net, conditioning={"y": y}, device=device, **options)
    return sample(evaluator, TABLE, Keyed(SHAPE, range(3)), jacobi(tolerance=0.0), dtype=torch.float64).sample.cpu(), net


@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "0"], "all"])
def test_devices_give_the_sample_of_one(device: str, names: list[str] | str) -> None:
    devices = names if isinstance(names, str) else [f"{device}:{name}" for name in names]
    shared, _ = run(f"{device}:0", devices=devices)
    alone, _ = run(f"{device}:0", shares=2 if names == "all" else len(names))
    assert torch.equal(shared, alone)


def test_each_device_evaluates_its_part(device: str) -> None:
    net = Net().to(f"{device}:0", torch.float64)
    other = copy.deepcopy(net)
    y = torch.ones(1, 2, dtype=torch.float64, device=f"{device}:0")
    evaluator = Evaluator(net, conditioning={"y": y}, devices=[f"{device}:0", f"{device}:1"])
    there = evaluator._elsewhere[1].denoiser
    sample(evaluator, TABLE, Keyed(SHAPE, [0]), jacobi(tolerance=0.0), dtype=torch.float64)
    assert set(net.seen) == {f"{device}:0"}
    assert set(there.seen) == {f"{device}:1"}  # pyright: ignore[reportFunctionMemberAccess]
    assert torch.equal(other.inner.weight, net.inner.weight)


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_a_pipelines_denoiser_is_copied_and_follows_changed_weights(device: str) -> None:
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler(num_train_timesteps=50)).to(f"{device}:0")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 8, "output_type": "np"}
    shared = parallelize(pipe, parasolver(window=4), devices=[f"{device}:0", f"{device}:1"], dtype=torch.float64)
    alone = parallelize(pipe, parasolver(window=4), shares=2, dtype=torch.float64)
    for _ in range(2):
        one, other = (r(**call, generator=torch.Generator().manual_seed(0)).images for r in (shared, alone))
        assert (one == other).all()
        assert shared.report.executor == alone.report.executor == "vector"
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(0.9)


def test_a_model_that_holds_tensors_out_of_reach_is_refused(device: str) -> None:
    weight = torch.ones(1, device=f"{device}:0")
    with pytest.raises(ValueError, match=f"holds tensors that cannot be moved to {device}:1; give a torch.nn.Module"):
        Evaluator(lambda x, t: x * weight, devices=[f"{device}:0", f"{device}:1"])


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_networks_that_are_offloaded_are_refused(offload: str, device: str) -> None:
    pipe = CASES["sd"].make()
    getattr(pipe, offload)(device=f"{device}:0")
    with pytest.raises(ValueError, match=r"hooks of another library move the pipeline's networks \(.*unet.*leave out devices"):
        parallelize(pipe, devices=[f"{device}:0", f"{device}:1"])


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_networks_that_are_offloaded_in_groups_are_called_plainly(executor: Any, device: str) -> None:
    pipe = CASES["sd"].make().to(f"{device}:0")
    pipe.unet.enable_group_offload(f"{device}:0", torch.device("cpu"), offload_type="leaf_level")
    run = parallelize(pipe, parasolver(window=4), devices=[f"{device}:0", f"{device}:1"], executor=executor)
    with (
        pytest.warns(
            RuntimeWarning, match="forward is wrapped by another library .offloading.*other devices get no copy of it"
        ),
        run,
    ):
        CASES["sd"].run(pipe)
    assert run.report.executor == "sequential"


def test_the_pipelines_own_device_comes_first(device: str) -> None:
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler()).to(f"{device}:1")
    with pytest.raises(
        ValueError, match=f"the pipeline is on {device}:1, and the first of the devices is {device}:0; give its"
    ):
        parallelize(pipe, devices=[f"{device}:0", f"{device}:1"])
