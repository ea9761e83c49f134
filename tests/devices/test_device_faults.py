# SPDX-License-Identifier: Apache-2.0
"""The double finds faults that the CPU hides: each is planted, and a run that passes without it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import SHAPE, TABLES, gap, network
from test_device_methods import beside, on, within_budget
from test_device_pipelines import ROUNDING
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff import Keyed, Recorded
from paradiff.chain.step import Step
from paradiff.methods import secant
from paradiff.pipelines.loop import driver

Plant = Callable[[pytest.MonkeyPatch], None]


def run() -> None:
    """A run on noise from the device's own generator, with the budget of a round."""

    def noise() -> Recorded:
        return Recorded(SHAPE, torch.Generator("pseudo").manual_seed(1))

    found, counts = beside(TABLES["ddpm"], paradiff.quasi_newton(window=5, tolerance=0.0), noise)
    within_budget(found, counts, 1, 1)


def changed(name: str, change: Callable[[Step, Tensor], object]) -> Plant:
    """A method of `Step` that does something more with the tensor that it is given last."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        own = getattr(Step, name)

        def faulty(self: Step, *arguments: Any) -> Tensor:
            change(self, arguments[-1])
            return own(self, *arguments)

        monkeypatch.setattr(Step, name, faulty)

    return plant


def left_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "move", lambda self, values: values.to(self.dtype))


def drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Recorded,
        "_randn",
        lambda self, g, count, dtype: torch.randn((count, self._group, *self.shape), generator=g, dtype=dtype),
    )


def checked_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.linalg.inv
    monkeypatch.setattr(secant.torch.linalg, "inv_ex", lambda matrix: SimpleNamespace(inverse=own(matrix)))


FAULTS: dict[str, tuple[Plant, str]] = {
    "a table left on the CPU": (left_on_the_cpu, "Expected all tensors to be on the same device"),
    "an item() in the loop": (changed("mean_squares", lambda _, x: x.sum().item()), "wait: item at chain/step|wait: item"),
    "a generator of the wrong device": (drawn_on_the_cpu, "Expected a 'cpu' device type for generator"),
    "a mask on the host": (changed("mean_squares", lambda _, x: x[(x == x).flatten(1).all(1).cpu()]), "wait: to the host"),
    "a mask of the device": (changed("mean_squares", lambda _, x: x[(x == x).flatten(1).all(1)]), "wait: a mask as an index"),
    "a list as an index": (changed("seen", lambda _, x: x[[*range(len(x))]]), "wait: blocking upload"),
    "a copy to the device that waits": (changed("seen", lambda s, x: torch.ones(1).to(x.device)), "wait: blocking upload"),
    "an inverse that looks whether it exists": (checked_inverse, "wait: item"),
}


def test_the_run_passes_without_a_fault() -> None:
    run()


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, sign = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=sign):
        run()


def test_a_wait_in_a_pipelines_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_device_pipelines import rounds_of

    own = driver.relative_difference

    def reading(found: Tensor, wanted: Tensor) -> Tensor:
        found.sum().item()
        return own(found, wanted)

    monkeypatch.setattr(driver, "relative_difference", reading)
    assert min(counts.waits for counts, _ in rounds_of("vector", "ddim", monkeypatch)[2:]) > 2


def test_a_lanes_start_that_is_compared_at_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_device_pipelines import rounds_of

    from paradiff.pipelines.executors import lane

    own = lane._near
    monkeypatch.setattr(lane, "_near", lambda sample, origin: torch.tensor(bool(own(sample, origin))))
    assert max(counts.waits for counts, new in rounds_of("lanes", "ddim", monkeypatch)[3:] if new) > 2


def test_the_window_of_times_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from paradiff.pipelines.network import batched_call

    monkeypatch.setattr(batched_call, "beside", lambda window, device: window)
    pipe = CASES["ddpm"].make().to("pseudo")
    run = paradiff.parallelize(pipe, paradiff.parasolver(), executor="vector")
    with run, pytest.raises(RuntimeWarning, match="called sequentially"):
        CASES["ddpm"].run(pipe)


# Two devices at once.


def test_two_devices_in_two_threads() -> None:
    table, method = TABLES["ddpm"], paradiff.quasi_newton(window=5, tolerance=0.0)
    found: dict[str, Tensor] = {}

    def work(device: str) -> None:
        found[device] = on(device, network, table, method, Keyed(SHAPE, 3)).sample

    threads = [threading.Thread(target=work, args=(f"pseudo:{k}",)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[f"pseudo:{k}"].device.index for k in range(2)] == [0, 1]
    assert torch.equal(found["pseudo:0"].cpu(), found["pseudo:1"].cpu())


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_pipeline_on_the_second_device(executor: Any) -> None:
    pipe = CASES["sd_euler_ancestral"].make()
    wanted = CASES["sd_euler_ancestral"].run(pipe, num_inference_steps=4)
    pipe.to("pseudo:1")
    with paradiff.parallelize(pipe, paradiff.quasi_newton(window=3, tolerance=0.0), executor=executor) as run:
        found = CASES["sd_euler_ancestral"].run(pipe, num_inference_steps=4)
    assert run.report.executor == executor
    assert gap(found.cpu(), wanted) < ROUNDING


def test_a_model_on_another_device_than_its_rows_is_refused() -> None:
    weight = torch.ones(SHAPE, device="pseudo:1", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"was given rows on pseudo:0, .* pseudo:0 and pseudo:1"):
        on("pseudo:0", lambda x, t: network(x * weight, t), TABLES["ddpm"], paradiff.sequential(), Keyed(SHAPE))
