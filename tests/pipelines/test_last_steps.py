# SPDX-License-Identifier: Apache-2.0
"""Loops that hand on more of their last step's result than the new state, such as its estimate of the clean data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from paradiff import Method, parallelize, parasolver, quasi_newton, srds

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own


@dataclass
class Kept:
    """What a loop returns."""

    sample: Tensor
    clean: Any


class Walker:
    """A loop that hands on the last estimate of the clean data: as it is, in a dict or a dataclass, or in an attribute."""

    def __init__(self, scheduler: Any, how: str) -> None:
        torch.manual_seed(0)
        self.net, self.scheduler, self.how = nn.Linear(8, 8), scheduler, how
        self.clean: Any = None

    @torch.no_grad()
    def walk(self, x: Tensor) -> Any:
        self.scheduler.set_timesteps(16)
        found: Any = None
        for t in self.scheduler.timesteps:
            found = self.scheduler.step(torch.tanh(self.net(self.scheduler.scale_model_input(x, t))), t, x)
            x = found.prev_sample
        if self.how == "attribute":
            self.clean = found.pred_original_sample
            return x
        clean = found.pred_original_sample
        return {"alone": clean, "dict": {"x": x, "clean": [clean]}, "dataclass": Kept(x, clean), "whole": found}[self.how]

    def clean_of(self, result: Any) -> Tensor:
        """The estimate."""
        if self.how == "attribute":
            return self.clean
        if self.how == "dict":
            return result["clean"][0]
        return result if self.how == "alone" else result.clean if self.how == "dataclass" else result.pred_original_sample


@pytest.mark.parametrize("method", [parasolver(tolerance=1e-4), quasi_newton(), srds()], ids=["parasolver", "newton", "srds"])
@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("how", ["alone", "dict", "dataclass", "whole", "attribute"])
@pytest.mark.parametrize("kind", [diffusers.HeunDiscreteScheduler, diffusers.DDIMScheduler])
def test_it_is_the_plain_calls(kind: Any, how: str, executor: Any, method: Method) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    plain, walker = Walker(kind(), how), Walker(kind(), how)
    wanted = plain.clean_of(plain.walk(x * plain.scheduler.init_noise_sigma))
    run = parallelize(walker, method, executor=executor, entry="walk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = walker.clean_of(run(x * walker.scheduler.init_noise_sigma))
    report = run.report
    assert isinstance(found, Tensor)
    if report.executor == "sequential":
        assert torch.equal(found, wanted)
        assert "reads more of a step's result than the new state" in " ".join(report.warnings)
    else:
        assert kind is diffusers.DDIMScheduler  # whose chain reads one state back
        assert float((found - wanted).square().mean().sqrt()) <= 1e-2
