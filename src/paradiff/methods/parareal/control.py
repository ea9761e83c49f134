# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers of SRDS."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from paradiff.errors import require_between, require_whole


@dataclass(frozen=True, kw_only=True)
class PararealControl:
    """The tuned numbers of the stopping rule (stopping.py) and of the planner of blocks.

    `caution`, `least_mismatch` and the two decisions were fitted on the bundled network: DDIM and DDPM of 25 to 1000 steps,
    seeds 0 to 7. No number was scanned on its own.

    Attributes:
        caution: Factor of the estimated error; 1 or more. A larger one makes the rule `error` stop later.
        least_mismatch: l of the rule's equation (2), 0 or more: what the propagators' mismatch counts far from any decision, as
            a multiple of that for Gaussian data.
        deterministic_decision: k of equation (2), 0 or more, for deterministic chains: by how much more the mismatch counts
            where a state decides which of several samples it becomes.
        stochastic_decision: The same for stochastic chains, whose noise keeps the question open.
        first_theta: Contraction that is assumed before any was observed, 0 or more.
        least_theta: The smallest contraction believed, 0 or more: a smaller one may be chance.
        forgetting: Share of theta that survives an iteration which observed less, 0 ... 1. A larger one stops later.
        early_share: Share of the tolerance that edges before the last may use to settle early, 0 ... 1, where no window has to
            slide: it saves evaluations and no rounds. 0 lets no edge settle but exactly.
        windowed_share: The same where a window has to slide, as a share of what has come due along the chain. The edges that
            follow are not seen yet, and a sample that decides at one of them answers to an error before it up to a
            thousandfold. Of 960 samples of mixtures in 2, 32 and 256 dimensions (DDPM 20 and 60, DDIM 40, DPM++(2M) 15;
            windows 2 and 4) 14 silently erred by more than the tolerance of 4e-3 at a share of 1, 5 at 0.3, and none at 0.1, at
            8 % more rounds.
        expected_iterations: K of the planner's formula when none is forced, 1 or more: the planned number of blocks grows with
            its square root.

    Raises:
        ValueError: If a number is out of its range.
    """

    caution: float = 1.75
    least_mismatch: float = 0.3
    deterministic_decision: float = 2.5
    stochastic_decision: float = 6.0
    first_theta: float = 1.0
    least_theta: float = 0.5
    forgetting: float = 0.7
    early_share: float = 0.01
    windowed_share: float = 0.1
    expected_iterations: int = 2

    def __post_init__(self) -> None:
        ranges = {
            "caution": (1, math.inf),
            "forgetting": (0, 1),
            "early_share": (0, 1),
            "windowed_share": (0, 1),
        }
        require_whole("the control's expected_iterations", self.expected_iterations, 1)
        for field in fields(self):
            least, most = ranges.get(field.name, (0, math.inf))
            require_between(f"the control's {field.name}", getattr(self, field.name), least, most)
