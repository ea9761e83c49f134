# SPDX-License-Identifier: Apache-2.0
"""Torch's own generators, which all threads of a process share.

A scheduler that draws from them is tried out with their own states, or with others in their place, and those are put back.
Meanwhile no other thread of the library may read them: it would find draws that nobody made.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

HELD = threading.RLock()
"""Held by the thread that reads or lends them."""


@contextlib.contextmanager
def borrowed(device: torch.device | None = None) -> Iterator[None]:
    """Restores torch's own generators of the CPU, and of a device, at the end of a `with` block.

    Args:
        device: An accelerator whose generators have states; None for the CPU's generator alone.
    """
    forked = torch.random.fork_rng([]) if device is None else torch.random.fork_rng([device], device_type=device.type)
    with HELD, forked:
        yield
