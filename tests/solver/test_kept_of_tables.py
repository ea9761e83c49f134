# SPDX-License-Identifier: Apache-2.0
"""`torch.set_default_device` in a script, or `with torch.device(...)`: tables met for the first time are solved all the same.

`meta` stands for any other device. Its tensors have no numbers, so that nothing could be made of one by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import METHODS, SHAPE, fitted, network
from test_default_dtype import OTHERS

from paradiff import Keyed, Schedule, Table, auto, collocation, sample
from paradiff.samplers import ddim, ddpm
from paradiff.solver import Method

S = Schedule.linear()
FRESH: dict[str, Callable[[], Table]] = {
    "ddpm": lambda: ddpm(S, 60),
    "ddim": lambda: ddim(S, 60),
    "a slice": lambda: ddim(S, 60)[10:],
}
"""Tables of which nothing is kept yet, long enough for every method."""

KINDS: dict[str, Callable[[Table], Method]] = {
    **{name: lambda table, make=make: fitted(make(table), table, 5) for name, make in METHODS.items()},
    **{name: lambda table, make=make: make() for name, make in OTHERS.items()},
    "collocation, window 16": lambda table: collocation(window=16),
    "auto, fewest evaluations": lambda table: auto(objective="evaluations"),
}


@pytest.mark.parametrize("chain", FRESH)
@pytest.mark.parametrize("name", KINDS)
def test_methods_sample_as_without_it(name: str, chain: str) -> None:
    start = torch.ones(2, *SHAPE) if chain == "a slice" else None

    def found() -> Any:
        table = FRESH[chain]()
        method = KINDS[name](table)
        try:
            return method.edges(table), sample(network, table, Keyed(SHAPE, 0, 2), KINDS[name](table), start=start).sample
        except ValueError as refusal:
            return str(refusal)

    with torch.device("meta"):
        other = found()
    wanted = found()
    assert isinstance(wanted, str) == isinstance(other, str)
    if isinstance(wanted, str):
        assert other == wanted
    else:
        assert other[0] == wanted[0]
        assert torch.equal(other[1], wanted[1])
