# SPDX-License-Identifier: Apache-2.0
"""The double itself: it refuses what CUDA refuses, allows what CUDA allows, and counts what makes the host wait.

Each rule is CUDA's, as torch's own kernels and its indexing have it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import double
import pytest
import torch
from torch import Tensor, nn

MIXED = "Expected all tensors to be on the same device"


def x(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape).to("pseudo")


def noted(action: Callable[[], object]) -> list[str]:
    """What an action reports."""
    with double.counting() as counts:
        action()
    return sorted(what for (what, _), number in counts.lines.items() for _ in range(number))


# Tensors of two devices.

REFUSED: dict[str, Callable[[], object]] = {
    "sum with a tensor of the CPU": lambda: x(3) + torch.ones(3),
    "sum of a number of the device with a tensor of the CPU": lambda: torch.ones(3) + x(1)[0],
    "product of matrices": lambda: x(2, 2) @ torch.ones(2, 2),
    "a weight": lambda: nn.functional.linear(x(2, 3), torch.ones(4, 3)),
    "a bias": lambda: nn.functional.conv2d(x(1, 1, 3, 3), x(1, 1, 3, 3), torch.ones(1)),
    "a kernel": lambda: nn.functional.conv2d(x(1, 1, 3, 3), torch.ones(1, 1, 3, 3)),
    "a norm's weight": lambda: nn.functional.group_norm(x(1, 2, 3), 1, torch.ones(2), torch.ones(2)),
    "an embedding": lambda: nn.functional.embedding(torch.tensor([0]), x(3, 2)),
    "concatenation": lambda: torch.cat([x(2), torch.ones(2)]),
    "stacking with a number of the CPU": lambda: torch.stack([x(1)[0], torch.tensor(1.0)]),
    "two numbers of the CPU": lambda: torch.addcmul(x(2), torch.tensor(1.0), torch.tensor(2.0)),
    "writing into the CPU": lambda: torch.ones(3).add_(x(3)),
    "a number of the CPU as the output": lambda: torch.tensor(1.0).add_(x(1)[0]),
    "an index of the device into the CPU": lambda: torch.ones(3)[torch.tensor([0, 1], device="pseudo")],
    "index_select by the CPU": lambda: x(3).index_select(0, torch.tensor([0])),
    "gather by the CPU": lambda: x(3).gather(0, torch.tensor([0])),
    "masked_fill by the CPU": lambda: x(3).masked_fill(torch.tensor([True, False, True]), 0.0),
    "values of the CPU": lambda: x(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "where with a condition of the CPU": lambda: torch.where(torch.tensor([True, False]), x(2), x(2)),
    "comparison": lambda: torch.equal(x(2), torch.ones(2)),
    "the second device": lambda: x(2) + x(2).to("pseudo:1"),
    "a number of the second device": lambda: x(2) + x(1).to("pseudo:1")[0],
}


@pytest.mark.parametrize("what", REFUSED)
def test_mixed_devices_are_refused(what: str) -> None:
    with pytest.raises(RuntimeError, match=f"{MIXED}|indices should be either on cpu|too many CPU scalars"):
        REFUSED[what]()


def test_a_number_of_the_cpu_goes_with_the_device() -> None:
    number = torch.tensor(2.0)
    for found, wanted in [
        (x(3) * number, [0.0, 2.0, 4.0]),
        (number - x(3), [2.0, 1.0, 0.0]),
        (x(3) > number, [False, False, False]),
        (x(3).clone().add_(number), [2.0, 3.0, 4.0]),
        (x(3).masked_fill(x(3) > 0, number), [0.0, 2.0, 2.0]),
        (torch.addcmul(x(3), x(3), number), [0.0, 3.0, 6.0]),
    ]:
        assert found.device == torch.device("pseudo:0")
        assert found.tolist() == wanted
    assert noted(lambda: x(3) * number) == ["wait: blocking upload"]  # that of x itself
    one = x(3)
    assert noted(lambda: one * number) == []
    assert noted(lambda: torch.where(one > 0, one, number)) == ["wait: blocking upload"]


def test_indices_of_the_cpu_are_copied_and_masks_of_the_device_are_read() -> None:
    one = x(4)
    assert one[torch.tensor([3, 1])].tolist() == [3.0, 1.0]
    assert "wait: blocking upload" in noted(lambda: one[torch.tensor([3, 1])])
    assert "wait: blocking upload" in noted(lambda: one[[3, 1]])
    assert "wait: blocking upload" in noted(lambda: one[torch.tensor([True, False, True, False])])
    index, mask = torch.tensor([1, 2], device="pseudo"), one > 1
    assert noted(lambda: one[index]) == []
    assert one[mask].tolist() == [2.0, 3.0]
    assert "wait: a mask as an index" in noted(lambda: one[mask])
    assert noted(lambda: one[1:3]) == []
    assert noted(lambda: one[1]) == []
    assert "wait: item" in noted(lambda: one[index[0]])
    two = one.clone()
    two[index] = torch.tensor(7.0)
    assert two.tolist() == [0.0, 7.0, 7.0, 3.0]


WAITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda v: v[0].item(), "wait: item"),
    "float": (lambda v: float(v[0]), "wait: item"),
    "int": (lambda v: int(v[0]), "wait: item"),
    "bool": (lambda v: bool(v[0]), "wait: item"),
    "tolist": (lambda v: v.tolist(), "wait: to the host"),
    "cpu": (lambda v: v.cpu(), "wait: to the host"),
    "numpy after cpu": (lambda v: v.cpu().numpy(), "wait: to the host"),
    "a copy that is asked not to wait, to memory that is not pinned": (
        lambda v: torch.empty(3).copy_(v, non_blocking=True),
        "wait: to the host",
    ),
    "nonzero": (lambda v: v.nonzero(), "wait: nonzero"),
    "masked_select": (lambda v: v.masked_select(v > 0), "wait: masked_select"),
    "unique": (lambda v: v.unique(), "wait: _unique2"),
    "equal": (lambda v: torch.equal(v, v + 1), "wait: equal"),
    "all": (lambda v: bool((v > 0).all()), "wait: item"),
    "a list as a tensor": (lambda v: torch.tensor([1.0], device=v.device), "wait: blocking upload"),
    "a copy to the device": (lambda v: torch.ones(2).to(v.device), "wait: blocking upload"),
    "a checked inverse": (lambda v: torch.linalg.inv(torch.eye(2, device=v.device)), "wait: item"),
    "synchronize": (lambda v: torch.accelerator.synchronize(), "wait: synchronize"),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted(what: str) -> None:
    action, wait = WAITS[what]
    value = x(3)
    assert wait in noted(lambda: action(value))


def test_what_does_not_wait_is_not_counted() -> None:
    one = x(3, 3)
    network = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.LayerNorm(3)).to("pseudo")
    actions: list[Callable[[], object]] = [
        lambda: network(one),
        lambda: torch.zeros(3, device="pseudo") + torch.randn(3, device="pseudo"),
        lambda: torch.arange(3, device="pseudo").clamp(0, 1),
        lambda: torch.linalg.inv_ex(torch.eye(3, device="pseudo")).inverse,
        lambda: one.view(9)[2:4].sum().sqrt().expand(2),
        lambda: torch.where(one > 0, one, 0.0),
    ]
    for action in actions:
        assert noted(action) == []
    assert noted(lambda: torch.ones(2).to("pseudo", non_blocking=True)) == ["upload"]
    pinned = torch.ones(2).pin_memory()
    assert pinned.is_pinned()
    assert noted(lambda: pinned.copy_(one[0, :2], non_blocking=True)) == ["download"]
    assert noted(lambda: one.to("pseudo:1")) == ["between devices"]


def test_lines_of_the_package_are_named() -> None:
    from paradiff.chain.step import uploaded
    from paradiff.chain.table import equal

    with double.counting() as counts:
        uploaded([1], torch.device("pseudo"))
        equal(x(2), x(2))
    places = {what: place for what, place in counts.lines if place != "outside"}
    assert places["upload"].startswith("chain/step.py:")
    assert places["wait: equal"].startswith("chain/table.py:")
    assert counts.waits == 1
    assert counts.blocking == 0  # those of this test are not the package's
    assert counts.of("wait: blocking upload", without="") == 2


# Devices, memory, generators.


def test_there_are_two_devices() -> None:
    assert torch.pseudo.device_count() == torch.accelerator.device_count() == 2
    assert torch.randn(2, device="pseudo:1").device.index == 1
    with torch.pseudo.device(1):
        assert torch.empty(1, device="pseudo").device.index == 1
    assert torch.empty(1, device="pseudo").device.index == 0
    assert (x(2).to("pseudo:1") * 2 + 1).device.index == 1
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="pseudo:2")


def test_memory_has_an_end() -> None:
    before = torch.pseudo.memory_allocated()
    with double.limited(4096):
        held = torch.empty(512, device="pseudo")
        assert torch.pseudo.memory_allocated() - before == 2048
        with pytest.raises(torch.OutOfMemoryError, match="pseudo out of memory"):
            torch.empty(1024, device="pseudo")
        torch.empty(1024, device="pseudo:1")  # which has its own
        del held
        torch.empty(1024, device="pseudo")
    torch.pseudo.reset_peak_memory_stats()
    assert torch.pseudo.memory_allocated() == before
    torch.empty(2048, device="pseudo")
    assert torch.pseudo.max_memory_allocated() - before == 4 * 2048


def test_generators_are_the_devices_own() -> None:
    one, other = torch.Generator("pseudo").manual_seed(3), torch.Generator("pseudo").manual_seed(3)
    drawn = torch.randn(4, generator=one, device="pseudo")
    assert torch.equal(drawn, torch.randn(4, generator=other, device="pseudo"))
    assert not torch.equal(drawn.cpu(), torch.randn(4, generator=torch.Generator().manual_seed(3)))
    state = one.get_state()
    assert state.device.type == "cpu"
    again = torch.randn(4, generator=one, device="pseudo")
    other.set_state(state)
    assert torch.equal(again, torch.randn(4, generator=other, device="pseudo"))
    assert one.initial_seed() == 3
    torch.manual_seed(1)
    first = torch.randn(2, device="pseudo")
    torch.manual_seed(1)
    assert torch.equal(first, torch.randn(2, device="pseudo"))
    assert not torch.equal(first, torch.randn(2, device="pseudo"))


@pytest.mark.parametrize(
    ("generator", "device"), [("cpu", "pseudo"), ("pseudo", "cpu"), ("pseudo:1", "pseudo:0"), ("pseudo:0", "pseudo:1")]
)
def test_generators_of_other_devices_are_refused(generator: str, device: str) -> None:
    with pytest.raises(RuntimeError, match="Expected a"):
        torch.randn(2, generator=torch.Generator(generator), device=device)


def test_tensors_are_copied_saved_and_moved(tmp_path: Path) -> None:
    network = nn.Linear(2, 2).to("pseudo:1")
    assert network.weight.device == torch.device("pseudo:1")
    copied = copy.deepcopy(network)
    assert copied.weight.device == network.weight.device
    assert copied.weight.data_ptr() != network.weight.data_ptr()
    assert torch.equal(copied.weight, network.weight)
    torch.save(network.state_dict(), tmp_path / "weights")
    loaded = torch.load(tmp_path / "weights", map_location="cpu")
    assert torch.equal(loaded["weight"], network.weight.cpu())
    assert torch.equal(pickle.loads(pickle.dumps(x(3))).cpu(), x(3).cpu())
    one = x(6)
    view = one.view(2, 3).T[1:]
    view.zero_()
    assert one.tolist() == [0.0, 0.0, 0.0, 3.0, 0.0, 0.0]


def test_autocast_computes_in_half_precision() -> None:
    one, weight = x(2, 2), x(2, 2)
    with torch.autocast("pseudo", torch.bfloat16):
        assert (one @ weight).dtype == torch.bfloat16
        assert nn.functional.conv2d(x(1, 1, 3, 3), x(1, 1, 3, 3)).dtype == torch.bfloat16
        assert one.softmax(0).dtype == torch.float32
    assert (one @ weight).dtype == torch.float32


def test_networks_are_compiled() -> None:
    graphs: list[Any] = []

    def counting(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append({value.device.type for value in inputs if isinstance(value, Tensor)})
        return graph.forward

    network = nn.Sequential(nn.Linear(2, 2), nn.SiLU()).to("pseudo")
    compiled = torch.compile(network, backend=counting, dynamic=False)
    with torch.no_grad():
        for rows in (2, 2, 3):
            assert torch.equal(compiled(x(rows, 2)), network(x(rows, 2)))
    assert graphs == [{"pseudo"}] * 2  # one for each shape
    torch._dynamo.reset()
