# SPDX-License-Identifier: Apache-2.0
"""A model that was seen to be right is checked by two rows; what may be another model is checked anew."""

from __future__ import annotations

import enum
import functools
import gc
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from faulty_networks import SHAPE, Model, answer, column
from torch import Tensor, nn

from paradiff import Evaluator, Keyed, Schedule, Table, parasolver, quasi_newton, sample, sequential
from paradiff.samplers import ddim, ddpm
from paradiff.solver import Method
from paradiff.solver.identity import identity_of
from paradiff.solver.seen import MODELS
from paradiff.solver.witnesses import Witnesses

TABLE = ddim(Schedule.linear(), 24, prediction="sample")
METHOD = parasolver(8, 1e-4)
SEEN = 2
"""Rows of a run whose model was seen."""


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.1), nn.BatchNorm1d(2)
        self.scale, self.scales, self.options = 1.0, [1.0], {"by": 1.0}

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.norm(self.drop(self.layer(x))) * self.scale * self.scales[0] * self.options["by"]
        return torch.tanh(h + column(t, x) / 1000)

    def method(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)


def made() -> Network:
    return Network().eval()


def rows(model: Any, seed: int = 0, *, table: Table = TABLE, method: Method = METHOD, samples: int = 1, **more: Any) -> int:
    """Rows that a run's check evaluated."""
    given = model if isinstance(model, Evaluator) else Evaluator(model, **more)
    return sample(given, table, Keyed(SHAPE, seed, samples), method).checked_rows


WAYS: dict[str, Callable[[Network], Any]] = {
    "a module": lambda network: network,
    "a function": lambda network: lambda x, t: network(x, t),
    "a partial": lambda network: functools.partial(network, y=None),
    "a method": lambda network: network.method,
    "a compiled module": lambda network: torch.compile(network, backend="eager"),
    "a compiled function": lambda network: torch.compile(lambda x, t: network(x, t), backend="eager"),
    "a function without gradients": lambda network: torch.no_grad()(lambda x, t: network(x, t)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_passed_once_is_checked_by_two_rows(way: str) -> None:
    network = made()
    model = WAYS[way](network)
    first, *later = (rows(model, seed) for seed in range(4))
    assert first > 10
    assert later == [SEEN] * 3
    if way == "a method":
        assert rows(network.method) == SEEN  # another object, of the same network
    network.train(True)
    network.drop.p = 0.0
    network.norm.eval()
    assert rows(model) > 10  # another mode


def test_a_small_table_of_inference_tensors_is_read() -> None:
    with torch.inference_mode():
        table = torch.zeros(4)
    model = lambda x, t: answer(x, t) + 0 * table  # noqa: E731
    assert [rows(model, seed) for seed in range(2)][1] == SEEN
    before = identity_of(model)
    with torch.inference_mode():
        table.add_(1)
    after = identity_of(model)
    assert before is not None
    assert after is not None
    assert not before.same(after)


def test_what_is_made_anew_was_not_seen() -> None:
    network = made()
    for way in ("a function", "a partial", "a compiled module"):
        assert [rows(WAYS[way](network)) > 10 for _ in range(2)] == [True] * 2
        gc.collect()


@torch.no_grad()
def fill(network: Network) -> None:
    network.layer.weight.mul_(1.1)


CHANGES: dict[str, Callable[[Network], object]] = {
    "mode": lambda network: network.norm.train() and setattr(network.norm, "training", True),
    "mode of a part": lambda network: network.drop.train() and setattr(network.drop, "p", 0.0),
    "weights in place": fill,
    "weights exchanged": lambda network: setattr(network.layer, "weight", nn.Parameter(network.layer.weight.detach().clone())),
    "memory of weights": lambda network: setattr(network.layer.weight, "data", network.layer.weight.detach().clone()),
    "a part": lambda network: setattr(network, "drop", nn.Identity()),
    "a hook": lambda network: network.layer.register_forward_hook(lambda *_: None),
    "a hook before": lambda network: network.register_forward_pre_hook(lambda *_: None),
    "a number": lambda network: setattr(network, "scale", 0.9),
    "a number in a list": lambda network: network.scales.append(2.0),
    "a number in a dictionary": lambda network: network.options.update(by=0.9),
    "a buffer": lambda network: network.norm.register_buffer("more", torch.zeros(1)),
    "its forward": lambda network: setattr(network, "forward", functools.partial(Network.forward, network)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["a module", "a function", "a method", "a compiled module"])
def test_a_model_that_was_changed_was_not_seen(change: str, way: str) -> None:
    network = made()
    model = WAYS[way](network)
    before = identity_of(model)
    assert before is not None
    again = identity_of(model)
    assert again is not None
    assert before.same(again)
    CHANGES[change](network)
    after = identity_of(model)
    assert after is None or not before.same(after)


KEPT: list[Tensor] = []


class Counting(nn.Module):
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        Counting.calls += 1
        return answer(x, t)


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.last = answer(x, t)
        return self.last


def of_this_module(x: Tensor, t: Tensor) -> Tensor:
    KEPT.append(x[:1])
    return answer(x, t)


def counter() -> Model:
    number = itertools.count()
    return lambda x, t: answer(x, t) + 0 * next(number)


def dictionary() -> Model:
    kept: dict[int, Tensor] = {}
    return lambda x, t: (kept.update({len(kept): x}), answer(x, t))[1]


def with_generator(draw: Any) -> Model:
    return lambda x, t: answer(x, t) + 0 * float(draw())


def cached() -> Model:
    of_time = functools.lru_cache(lambda t: 0 * t)
    return lambda x, t: answer(x, t) + of_time(float(t[0]))


@pytest.mark.parametrize(
    "make",
    [
        Counting,
        Keeping,
        lambda: of_this_module,
        counter,
        dictionary,
        lambda: with_generator(np.random.default_rng(0).random),
        lambda: with_generator(random.Random(0).random),
        lambda: with_generator(functools.partial(torch.rand, 1, generator=torch.Generator().manual_seed(0))),
        cached,
        lambda: torch.jit.trace(made(), (torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.long)), check_trace=False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_with_a_state_that_moves_or_cannot_be_read_was_not_seen(make: Callable[[], Any]) -> None:
    model = make()
    assert [rows(model, seed) > 10 for seed in range(3)] == [True] * 3


def test_a_run_of_another_kind_is_checked_wholly() -> None:
    model = made()
    label = torch.zeros(2, 1)
    kinds: list[dict[str, Any]] = [
        {},
        {"table": ddim(Schedule.linear(), 25, prediction="sample")},
        {"table": ddpm(Schedule.linear(), 24, prediction="sample")},
        {"method": parasolver(9, 1e-4)},
        {"method": parasolver(8, 1e-3)},
        {"method": quasi_newton(8, 1e-4)},
        {"samples": 2},
        {"max_rows": 5},
        {"pad": True},
        {"dtype": torch.float32},
        {"samples": 2, "conditioning": {"y": label}},
        {"samples": 2, "conditioning": {"y": torch.tensor([[0.0], [1.0]])}},
        {"samples": 2, "conditioning": {"y": label.long()}},
        {"samples": 2, "conditioning": {"y": torch.zeros(2, 3)}},
        {"shared": {"y": torch.zeros(3)}},
    ]
    for kind in kinds:
        assert rows(model, **kind) > 10, kind
        assert rows(model, 1, **kind) == SEEN, kind
    double = made().double()
    assert sample(Evaluator(double, dtype=torch.float64), TABLE, Keyed(SHAPE, 0), METHOD).checked_rows > 10
    assert sample(double, TABLE, Keyed(SHAPE, 0), METHOD, dtype=torch.float64).checked_rows > 10


def test_runs_without_a_whole_check_show_nothing() -> None:
    model = made()
    noise = Keyed(SHAPE, 0)
    assert sample(model, TABLE, noise, METHOD, check="off").checked_rows == 0
    assert sample(model, TABLE, noise, METHOD, observer=lambda round: True).checked_rows > SEEN
    assert sample(model, TABLE, noise, METHOD).checked_rows > 10
    assert sample(model, TABLE, noise, METHOD, check="every").checked_rows > 100
    assert rows(model) == SEEN
    assert sample(model, TABLE, noise, METHOD, observer=lambda round: True).checked_rows == 0
    assert rows(model) > 10  # since a run was not whole


class Late(nn.Module):
    """A network that uses one row's time for all once its flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return answer(x, torch.where(self.flag[1] > 0, t[:1].expand_as(t), t))


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_fault_that_begins_later_is_found_by_two_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Late()
    rows(model)
    model.flag.data[1] = 1  # of which torch counts no version, at a place that is not read
    with pytest.raises(ValueError, match="answered node"):
        rows(model, seed)
    with pytest.raises(ValueError, match="otherwise among"):
        rows(model, seed)  # what was refused was not seen
    model.flag.data[1] = 0
    rows(model)
    model.flag.data[1] = 1
    monkeypatch.setattr(Witnesses, "compare_few", lambda *_: None)
    assert rows(model, seed) == 0


def test_weights_that_are_written_through_data_are_another_models() -> None:
    model = made()
    rows(model)
    assert rows(model, 1) == SEEN
    for write in (lambda w: w.mul_(1.01), lambda w: w.copy_(torch.ones_like(w)), lambda w: w.neg_()):
        write(model.layer.weight.data)
        assert rows(model, 2) > 10
        assert rows(model, 3) == SEEN


def test_the_samples_are_those_of_a_run_that_is_checked_wholly() -> None:
    model = made()
    first, later = (sample(model, TABLE, Keyed(SHAPE, 0), METHOD) for _ in range(2))
    assert (first, first.checked_rows > later.checked_rows) == (later, True)


def test_models_are_held_weakly() -> None:
    model = made()
    rows(model)
    assert len(MODELS._known) == 1
    del model
    gc.collect()
    assert not MODELS._known


def test_the_plain_loop_is_checked_by_two_rows_too() -> None:
    model = made()
    assert [rows(model, seed, method=sequential(), samples=2) for seed in range(2)][1] == SEEN


class Bare:
    """What holds one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t)


class Other(Bare):
    """The same by another name."""


NOTHING = Bare(0)
ALIKE: list[Any] = [
    *(0, 1, 2, False, True, 0.0, -0.0, 1.0, 1 + 0j, "", "0", b"", b"0", None, ...),
    *((), (0,), (1,), (True,), (1.0,), ("1",), ((1,),), [], [0], [1], [True], [[]], [()], {}, {"a": 1}, {"a": True}, {"b": 1}),
    *({1: "a"}, {True: "a"}, {"1": "a"}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, set(), {0}, {1}, {"1"}, frozenset({1}), range(1)),
    *(torch.float32, "torch.float32", torch.device("cpu"), "cpu", np.float32(1), np.float64(1), np.int64(1), np.zeros(1), Bare),
    *(np.zeros((1, 2)), np.zeros((2, 1)), np.zeros(1, np.float32), Other, Bare(0), Bare(1), Other(0), (Bare(0),), [Bare(0)]),
    *([NOTHING, NOTHING], [NOTHING, Bare(0)], [NOTHING, [2]], *([NOTHING, n] for n in range(12))),
    *([Bare(0), Other(0), Bare(0)], [Bare(0), Other(0), Other(0)], torch.contiguous_format, len, nn.ReLU(), nn.SiLU()),
    *([1, 2], [2, 1], [[1], 2], [[1, 2]], ("a", "b"), (("a",), "b"), "dict", ["dict"], ["torch.float32"], slice(0), slice(1)),
]


def test_values_that_look_alike_are_told_apart() -> None:
    model = Bare(None)

    def read(value: Any) -> Any:
        model.value = value
        found = identity_of(model)
        assert found is not None, value
        return found

    found = [read(value) for value in ALIKE]
    for k, one in enumerate(found):
        assert one.same(read(ALIKE[k])), ALIKE[k]
        same = [ALIKE[j] for j, other in enumerate(found) if j != k and one.same(other)]
        assert not same, (ALIKE[k], same)


class Pretending:
    """An object that says that it is of another class."""

    def __init__(self, held: Any) -> None:
        self.held, self.name = held, "one"

    @property
    def __class__(self) -> Any:
        return type(self.held)


def test_an_object_that_says_it_is_of_another_class_is_read_as_what_it_is() -> None:
    class Colour(enum.Enum):
        RED = 1

    for held in (Colour.RED, torch.zeros(2), len, 1):
        model = Bare(Pretending(held))
        before = identity_of(model)
        model.value.more = 1
        after = identity_of(model)
        assert before is None or after is None or not before.same(after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("view", ["plain", "strided", "transposed", "conjugated", "negative"])
def test_values_written_past_torchs_count_are_seen_where_they_are_read(dtype: torch.dtype, view: str) -> None:
    whole = torch.ones(6, 4).to(dtype)
    part = {"plain": whole, "strided": whole[::2], "transposed": whole.T}.get(view)
    if part is None:
        if view == "negative" or not dtype.is_complex:
            part = torch._neg_view(whole) if dtype not in (torch.bool, torch.int64) else whole
        else:
            part = whole.conj()
    model = Bare(part)
    before, again = identity_of(model), identity_of(model)
    whole.data[0, 0] = 0
    after = identity_of(model)
    assert before is not None
    assert again is not None
    assert after is not None
    assert before.same(again)
    assert not before.same(after)
