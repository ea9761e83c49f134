# SPDX-License-Identifier: Apache-2.0
"""Networks: closed-form data, bundled and other pixel models, diffusers pipelines."""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily

if TYPE_CHECKING:
    from paradiff.models.exact import Empirical, Gaussian, Mixture
    from paradiff.models.pipeline import load_pipeline
    from paradiff.models.pixel import Model, load
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Empirical": "paradiff.models.exact",
            "Gaussian": "paradiff.models.exact",
            "Mixture": "paradiff.models.exact",
            "Model": "paradiff.models.pixel",
            "load": "paradiff.models.pixel",
            "load_pipeline": "paradiff.models.pipeline",
        },
    )

__all__ = [
    "Empirical",
    "Gaussian",
    "Mixture",
    "Model",
    "load",
    "load_pipeline",
]
