# SPDX-License-Identifier: Apache-2.0
"""Tables made by hand, whose levels are a guide only: what is refused, and that estimates hold where levels say little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import SHAPE, chain, network
from torch import Tensor, nn

import paradiff
from paradiff import Keyed, Method, Table, parasolver, quasi_newton, sample, sequential, srds

STEPS = 14
SAMPLED = {"prediction": "sample"}


def by_hand(**changes: Any) -> Table:
    """DDIM's coefficients on evenly spaced signal levels, of which fields are changed."""
    alpha = torch.linspace(0.02, 0.999, STEPS + 1, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    a = alpha[1:] / alpha[:-1]
    fields = {"t": torch.linspace(999, 0, STEPS + 1, dtype=torch.float64), "alpha": alpha, "sigma": sigma}
    fields |= {"a": a[:, None], "b": (sigma[1:] - a * sigma[:-1])[:, None], "c": torch.zeros(STEPS, dtype=torch.float64)}
    return Table(**{"name": "hand", "prediction": "epsilon", "exact_levels": False, **fields, **changes})


HAND = by_hand()


class Wrapped(Tensor):
    """A tensor that holds another one, and answers for it."""

    @staticmethod
    def __new__(cls: type[Wrapped], held: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)  # pyright: ignore

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(one.held if isinstance(one, Wrapped) else one for one in args), **(kwargs or {}))


class Named(Tensor):
    """A tensor by another name."""


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("c", [0.0] * STEPS, r"\[0.0, 0.0"),
        ("c", np.zeros(STEPS), r"an array of shape \(14,\) and float64"),
        ("c", torch.zeros(STEPS, dtype=torch.float64).to_sparse(), r"a Tensor of shape \(14,\)"),
        ("c", torch.zeros(STEPS, dtype=torch.float64, device="meta"), r"a Tensor of shape \(14,\)"),
        ("c", torch.zeros(STEPS, dtype=torch.complex128), r"a Tensor of shape \(14,\) and torch.complex128"),
        ("c", torch.zeros((), dtype=torch.float64), "tensor"),
        ("c", Wrapped(torch.zeros(STEPS, dtype=torch.float64)), r"a Wrapped of shape \(14,\)"),
        ("a", None, "None"),
        ("t", 20, "20"),
        ("scale", 1.0, "1.0"),
    ],
)
def test_what_is_no_dense_tensor_of_numbers_is_refused(name: str, value: object, given: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^table 'hand': {name} is {given}.*; it must be a dense torch tensor of real numbers"
    ):
        by_hand(**{name: value})


@pytest.mark.parametrize("take", [nn.Parameter, lambda v: v.clone().requires_grad_(), lambda v: v.as_subclass(Named)])
def test_a_tensor_by_another_name_is_taken_as_a_plain_one(take: Callable[[Tensor], Tensor]) -> None:
    table = by_hand(a=take(HAND.a), b=take(HAND.b), sigma=take(HAND.sigma))
    assert table == HAND
    assert type(table.a) is Tensor
    assert not table.a.requires_grad
    assert type(sample(network, table, Keyed(SHAPE), quasi_newton()).sample) is Tensor


def set_at(values: Tensor, node: int | slice, value: float) -> Tensor:
    found = values.clone()
    found[node] = value
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -HAND.alpha}, "alpha is -0.02 at node 0; levels are standard deviations, 0 or more"),
        ({"sigma": set_at(HAND.sigma, 3, -0.5)}, "sigma is -0.5 at node 3; levels are standard deviations"),
        (
            {"sigma": set_at(HAND.sigma, 7, 0)},
            r"p = .* and q = -0 at node 7 \(alpha = .*, sigma = 0, epsilon prediction\); p and q",
        ),
        ({"alpha": set_at(HAND.alpha, 0, 0)}, r"has p = inf and q = -inf at node 0 .* give levels above 0 there"),
        ({"clean": torch.zeros(STEPS, 2, dtype=torch.float64)}, "has p = 0 and q = 0 at node 0"),
        ({"start_scale": float("nan")}, "start_scale is nan; it must be a number, 0 or more, and finite"),
        ({"start_scale": "1"}, "start_scale is '1'; it must be a number"),
        ({"first": -3}, "first is -3; it must be a whole number, at least 0"),
        ({"first": 1.5}, "first is 1.5; it must be a whole number"),
    ],
)
def test_levels_that_tell_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^table 'hand': .*{message}"):
        by_hand(**changes)


@pytest.mark.parametrize("method", [sequential(), parasolver(tolerance=1e-4), srds(tolerance=1e-3)])
def test_whole_times_that_no_integer_holds_are_handed_on_as_they_are(method: Method) -> None:
    table = by_hand(t=(HAND.t * 1e16).round())
    seen: set[float] = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float64
        seen.update(t.tolist())
        return x * torch.cos(t / 1e19).view(-1, 1, 1)

    noise = Keyed(SHAPE)
    found = sample(model, table, noise, method, dtype=torch.float64, check="off")  # which makes up times of its own
    assert seen <= set(table.t.tolist())
    x = noise.start(0).double()
    for i in range(STEPS):
        x = table.a[i, 0] * x + table.b[i, 0] * model(x[None], table.t[i : i + 1])[0]
    assert (found.sample[0] - x).square().mean().sqrt() <= 2e-3 * x.std()


@pytest.mark.parametrize(
    "changes",
    [
        {**SAMPLED, "sigma": set_at(HAND.sigma, 7, 0)},
        {**SAMPLED, "sigma": set_at(HAND.sigma, slice(4, 9), 0)},
        {"alpha": torch.full_like(HAND.alpha, 0.7), "sigma": torch.full_like(HAND.sigma, 0.7)},
    ],
)
def test_parareal_calls_no_sample_exact_whose_error_it_cannot_know(changes: dict[str, Any]) -> None:
    table, noise = by_hand(**changes), Keyed(SHAPE)
    found = sample(network, table, noise, srds(tolerance=1e-3), dtype=torch.float64)
    error = float((found.sample[0] - chain(network, table, noise)[-1]).square().mean().sqrt())
    assert error <= max(2 * found.error_estimates[0].estimated_error, 1e-12)


@pytest.mark.parametrize(
    "method",
    [sequential(), parasolver(tolerance=1e-3), quasi_newton(), srds(), paradiff.collocation(), paradiff.chords(cores=2)],
)
def test_levels_whose_squares_overflow_leave_the_chain_as_it_is(method: Method) -> None:
    table, noise = by_hand(alpha=1e-20 * HAND.alpha, sigma=1e-20 * HAND.sigma), Keyed(SHAPE)
    found = sample(network, table, noise, method, dtype=torch.float64)
    error = float((found.sample[0] - chain(network, table, noise)[-1]).square().mean().sqrt())
    assert error <= max(2 * found.error_estimates[0].estimated_error, 1e-12)


def test_blocks_cannot_be_spread_where_no_node_has_both_signal_and_noise() -> None:
    table = by_hand(**SAMPLED, sigma=0 * HAND.sigma)
    with pytest.raises(ValueError, match=r"^2 blocks were asked of table 'hand', no node of which has both signal and noise"):
        sample(network, table, Keyed(SHAPE), paradiff.piadm_ode(2))
