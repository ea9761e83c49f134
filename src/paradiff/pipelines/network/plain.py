# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that hold nothing else and never change."""

from __future__ import annotations

import enum

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size, range, slice)
