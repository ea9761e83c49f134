# SPDX-License-Identifier: Apache-2.0
"""Networks: closed-form data, bundled and other pixel models, diffusers pipelines."""

from typing import TYPE_CHECKING

from paradiff.lazy import lazily

if TYPE_CHECKING:
    from paradiff.models.exact import Empirical, Gaussian, Mixture
    from paradiff.models.folding import Folding
    from paradiff.models.frames import Frames
    from paradiff.models.masked import Masked
    from paradiff.models.pipeline import load_pipeline
    from paradiff.models.pixel import Model, load
    from paradiff.models.plane import Plane
    from paradiff.models.policy import PolicyModel, load_policy
    from paradiff.models.self_conditioned import SelfConditioned
    from paradiff.models.variance import learned_variance
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Empirical": "paradiff.models.exact",
            "Folding": "paradiff.models.folding",
            "Frames": "paradiff.models.frames",
            "Gaussian": "paradiff.models.exact",
            "Masked": "paradiff.models.masked",
            "Mixture": "paradiff.models.exact",
            "Model": "paradiff.models.pixel",
            "Plane": "paradiff.models.plane",
            "PolicyModel": "paradiff.models.policy",
            "SelfConditioned": "paradiff.models.self_conditioned",
            "learned_variance": "paradiff.models.variance",
            "load": "paradiff.models.pixel",
            "load_pipeline": "paradiff.models.pipeline",
            "load_policy": "paradiff.models.policy",
        },
    )

__all__ = [
    "Empirical",
    "Folding",
    "Frames",
    "Gaussian",
    "Masked",
    "Mixture",
    "Model",
    "Plane",
    "PolicyModel",
    "SelfConditioned",
    "learned_variance",
    "load",
    "load_pipeline",
    "load_policy",
]
