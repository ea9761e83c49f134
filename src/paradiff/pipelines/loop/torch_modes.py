# SPDX-License-Identifier: Apache-2.0
"""Torch's modes of a thread (gradients, inference, autocast), kept for each lane."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from paradiff.chain.home import at_home
from paradiff.solver.accelerator import kinds


@dataclass(frozen=True)
class Modes:
    """The modes at one moment: gradients, inference, and for each kind of device whether autocast is on and its dtype; `home`,
    whether tensors that are given no device are the CPU's."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    home: bool = False

    @staticmethod
    def now() -> Modes:
        """The modes in force."""
        autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in kinds())
        return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @staticmethod
    def exact() -> Modes:
        """The modes for a solver's arithmetic: no gradients, no autocast, which would compute in half precision, and tables on
        the CPU."""
        return Modes(False, torch.is_inference_mode_enabled(), tuple((False, d) for _, d in Modes.now().autocast), home=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sets these modes; at the end the modes of before are set again, even if they were changed within."""
        before = Modes.now()
        home = at_home() if self.home else contextlib.nullcontext()
        with home, torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            self._autocast()
            try:
                yield
            finally:
                before._autocast()

    def _autocast(self) -> None:
        for device, (enabled, dtype) in zip(kinds(), self.autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
