# SPDX-License-Identifier: Apache-2.0
"""Probes by forward-mode derivatives: an evaluator for quasi-DEER (solver.py)."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.solver.evaluator import Denoiser
from paradiff.solver.protocol import Batch


class ForwardProbes:
    """Answers each probe x + h v of a state x by m(x) + h J v, with J v from `torch.func.jvp`; other rows by the model.

    A network call has the rows of the states only, and costs two to three times a plain one. The model has to consist of
    operations with forward-mode derivatives; else `torch.func.jvp` says which lacks one, and finite differences, which need no
    evaluator of their own, are the way. A probe that is checked by itself (`check`) differs by h^2. Objects are compared by
    identity.

    Args:
        model: The model as a function `(x, t) -> m` of rows.
        device: Where it lives.
        dtype: What it computes in; None for the dtype of the states.
    """

    def __init__(self, model: Denoiser, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        self._model, self.device, self.dtype = model, torch.device(device), dtype

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs `[R, ...]` of a batch, in the dtype of its states."""
        places: dict[tuple[int, int], int] = {}
        keys = zip(batch.samples.tolist(), batch.nodes.tolist(), strict=True)
        state = [places.setdefault(key, k) for k, key in enumerate(keys)]
        own = [k for k, of in enumerate(state) if k == of]
        probes = [k for k, of in enumerate(state) if k != of]
        with torch.inference_mode(False), warnings.catch_warnings():
            # torch's own, where it reads the formulas of its first forward-mode derivative
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
            x = batch.x.clone().to(self.dtype or batch.x.dtype)
            t = batch.t.clone().to(self.device, non_blocking=True)
            found = torch.empty_like(x)
            with torch.no_grad():
                at = uploaded(own, x.device)
                found[at] = self._model(x[at], t[at]).to(found)
                for left in self._passes(state, probes):
                    base, at = uploaded([[state[k] for k in left], left], x.device)
                    network = functools.partial(self._at, t[base])
                    value, derivative, *_ = torch.func.jvp(network, (x[base],), (x[at] - x[base],))
                    found[at] = (value + derivative).to(found)
        return found.to(batch.x.dtype)

    def evaluate_again(self, batch: Batch) -> Tensor:
        """Outputs `[R, ...]` of rows that are evaluated once more to be compared: each by the model, none as a probe."""
        with torch.no_grad():
            x = batch.x.to(self.dtype or batch.x.dtype)
            return self._model(x, batch.t.to(self.device, non_blocking=True)).to(batch.x.dtype)

    def _at(self, t: Tensor, x: Tensor) -> Tensor:
        """The model with its times first."""
        return self._model(x, t)

    @staticmethod
    def _passes(state: list[int], probes: list[int]) -> list[list[int]]:
        """The probes, in one call where a state has one, in several where it has more."""
        calls: list[list[int]] = []
        seen: dict[int, int] = {}
        for k in probes:
            number = seen.get(state[k], 0)
            seen[state[k]] = number + 1
            if number == len(calls):
                calls.append([])
            calls[number].append(k)
        return calls
