# SPDX-License-Identifier: Apache-2.0
"""Tensors of other kinds as noise, start and outputs: they are refused in a sentence, or count as plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import SHAPE, TABLES, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from paradiff import Keyed, Method, parasolver, quasi_newton, sample, sequential, srds

NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
METHODS = [sequential(), parasolver(), quasi_newton(), srds()]


class Named(Tensor):
    """A tensor by another name."""


class Alone(Tensor):
    """A tensor by another name that computes with none of torch's own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(type(one) is Tensor for one in args):
            raise TypeError("a plain tensor is beside")
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(Tensor):
    """A tensor that holds another one, and answers for it."""

    @staticmethod
    def __new__(cls: type[Wrapped], held: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)  # pyright: ignore

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*(one.held if isinstance(one, Wrapped) else one for one in args), **(kwargs or {}))
        return Wrapped(found) if isinstance(found, Tensor) else found


class Made:
    """Keyed noise of which something else is made."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self.make, self.source, self.shape, self.samples = make, Keyed(SHAPE, 3), SHAPE, 1

    def start(self, sample: int) -> Any:
        return self.make(self.source.start(sample))

    def draw(self, sample: int, nodes: range) -> Any:
        return self.make(self.source.draw(sample, nodes))


PLAIN = [nn.Parameter, lambda v: v.clone().requires_grad_(), lambda v: v.as_subclass(Named), lambda v: v.as_subclass(Alone)]
OTHER = {
    "a Tensor of shape .*, sparse_coo": lambda v: v.to_sparse(),
    "a Tensor of shape .*, on the meta device": lambda v: v.to("meta"),
    "a nested Tensor": lambda v: torch.nested.as_nested_tensor([v]),
    "a Tensor of shape .* and torch.complex64": lambda v: torch.complex(v, v),
    "a Wrapped of shape": Wrapped,
    "an array of shape": lambda v: v.numpy(),
}
SHAPES = {"one axis more": lambda v: v[None], "one axis less": lambda v: v[..., 0], "an axis of 1": lambda v: v[..., :1]}


@NESTED
@pytest.mark.parametrize("given", OTHER)
def test_noise_that_is_no_dense_tensor_of_numbers_is_refused(given: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^`start` of sample 0 of the noise returned {given}.*; it must return a dense torch"
    ):
        sample(network, TABLES["ddpm"], Made(OTHER[given]), quasi_newton())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_noise_of_another_shape_is_refused(shape: str, method: Method) -> None:
    with pytest.raises(ValueError, match=r"`start` of sample 0 of the noise returned a Tensor of shape .* of shape \(\d"):
        sample(lambda x, t: 0.5 * x, TABLES["ddpm"], Made(SHAPES[shape]), method)

    class Late(Made):
        def start(self, sample: int) -> Any:
            return self.source.start(sample)

    with pytest.raises(ValueError, match=r"`draw` of sample 0 of the noise returned a Tensor of shape .* of shape \(\d"):
        sample(lambda x, t: 0.5 * x, TABLES["ddpm"], Late(SHAPES[shape]), method)


@NESTED
@pytest.mark.parametrize("given", OTHER)
def test_a_start_that_is_no_dense_tensor_of_numbers_is_refused(given: str) -> None:
    start = OTHER[given](Keyed(SHAPE, 3).start(0)[None])
    with pytest.raises(ValueError, match=rf"^start is {given}.*; give a dense tensor of real numbers of shape"):
        sample(network, TABLES["ddim"], Keyed(SHAPE), quasi_newton(), start=start)


@pytest.mark.parametrize("make", PLAIN)
@pytest.mark.parametrize("method", METHODS)
def test_tensors_by_another_name_count_as_plain_ones(make: Callable[[Tensor], Tensor], method: Method) -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE, 3)
    expected = sample(network, table, noise, method).sample
    start = make(noise.start(0)[None])
    runs = [
        sample(network, table, Made(make), method),
        sample(network, table, noise, method, start=start),
        sample(lambda x, t: make(network(x, t)), table, noise, method),
    ]
    for found in runs:
        assert type(found.sample) is Tensor
        assert not found.sample.requires_grad
        assert torch.equal(found.sample, expected)
    assert type(start) is type(make(noise.start(0)))


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_compute_in_their_own_way_are_refused(method: Method) -> None:
    with pytest.raises(
        ValueError, match=r"^the model returned a Wrapped, which computes in its own way; it must return a plain"
    ):
        sample(lambda x, t: Wrapped(network(x, t)), TABLES["ddim"], Keyed(SHAPE), method)


@pytest.mark.parametrize("write", [lambda x: x.resize_(0), lambda x: x.transpose_(1, 2), lambda x: x.data.unsqueeze_(0)])
def test_a_model_may_resize_its_rows(write: Callable[[Tensor], Any]) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        found = network(x, t)
        write(x)
        return found

    table, noise = TABLES["ddim"], Keyed(SHAPE)
    found, expected = (sample(one, table, noise, quasi_newton()).sample for one in (model, network))
    assert torch.equal(found, expected)


def test_samples_are_refused_where_tensors_hold_no_numbers() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"within a mode of torch that makes each tensor a FakeTensor, of which"),
    ):
        sample(network, TABLES["ddim"], Keyed(SHAPE), quasi_newton())
