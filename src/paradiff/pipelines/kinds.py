# SPDX-License-Identifier: Apache-2.0
"""The classes of diffusers' pipelines: the ordinary and the modular ones, where diffusers has these."""

from __future__ import annotations

import diffusers

MODULAR: type | None = getattr(diffusers, "ModularPipeline", None)
"""The class of modular pipelines; None in diffusers before 0.35."""

PIPELINES: tuple[type, ...] = (diffusers.DiffusionPipeline, *([] if MODULAR is None else [MODULAR]))
"""The classes of all pipelines."""
