# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers of the error budget of a window."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paradiff.chain.shortfall import coldness
from paradiff.chain.slope import staged
from paradiff.chain.table import Table
from paradiff.errors import require_between, require_real, require_whole


@dataclass(frozen=True, kw_only=True)
class WindowControl:
    """The tuned numbers of the error budget (budget.py). The cautions were fitted so that 95 of 100
    samples err by less than their estimate (benchmarks/tolerance.py); none of the others was scanned on its own.

    Attributes:
        stochastic_caution: k of budget.py on stochastic chains, which forget; positive. A larger one lets nodes pass later.
        deterministic_caution: The same on deterministic chains, which do not forget.
        secant_caution: Factor of k on stochastic chains for methods with secant pairs, or mixed sweeps, 1 or more: these lower
            the changes that a sweep sees sooner than the errors, so that theta comes out too small.
        stage_caution: Factor of k on stochastic chains whose steps have several stages, 1 or more: the second stage of a long
            step answers to the first more strongly than equation (3) of chain/sensitivity.py says. Fitted on seeds 2000 to 2031
            of the digits network and a mixture in the plane, 18 and 40 steps of diffusers' KDPM2AncestralDiscreteScheduler.
        cold_caution: Relative increase of k, 0 or more, times the coldness (chain/shortfall.py) of the chain: where less noise
            is added, errors are forgotten less, and samples decide more sharply than the levels say. Of 96 samples of
            `quasi_newton` (digits network, DDPM 50 and 100, noise times 0.2 to 0.9, seeds 501 to 512) 11 err by more than 4e-3
            without it and 2 with it, and 14 and 4 are told more, at 4 % more rounds.
        carried_caution: Factor, 0 or more, on the errors that are carried along the chain as the network was seen to answer
            (carried_error.py). A larger one tells larger errors; nodes pass alike. This and the next were chosen on seeds 7000
            to 7023 of the digits network, chains of 18 to 50 steps, windows from 4 on.
        carried_decides: The same where it is judged whether they keep to the tolerance, 0 or more, and at most the method's
            caution: if so, no more than the tolerance is told of them. A larger one finds more samples to have left it.
        turned: r of carried_error.py on stochastic chains, 0 ... 1. With 1, 2 of 16 samples of the digits as point masses, on
            1000 steps of DDPM, were told more than their tolerance, at errors of a quarter of it and a fortieth.
        narrow: Nodes of the widest window, 0 or more, in which it is looked at how nodes answer (path_answer.py). On DDPM 100,
            a mixture of 512 numbers, seeds 22000 to 22127, 7 of 128 samples of `parasolver(window=4)` end at another Gaussian
            without it, none with it, at 8 % more rounds. With all nodes it costs 7 %, and no error was seen to need it.
        narrow_sensitivity: The least s of budget.py in such windows, positive: on trained networks, errors of nodes before the
            decision reach some samples twenty- to sixtyfold. On Euler ancestral 50 of the digits network, seeds 23000 to 23191,
            2 samples of `quasi_newton(window=4)` err by 7e-3 and 1e-2 at estimates below the half without it.
        answer_bound: B of path_answer.py, positive. A larger one lets chance say more often that a node answers strongly.
        volatile: Volatility (chain/volatility.py), 0 or more, above which it is looked at what the chain forgets
            (forgetting.py); that of ancestral chains is 1, of AlphaFold 3's 60 steps 9, of its 200 steps 24. With 2, one of 32
            molecules of 28 atoms on 60 steps (seeds 600 to 631) erred by 2.07 times its estimate, and by 1.02 times without it.
        wrong: w of forgetting.py, 0 ... 1. A larger one takes more for forgotten. AlphaFold 3's 200 steps at window 16,
            mixtures in 192 and 768 dimensions with deviations of 1 and 1/2 at a mean square of 256, tolerances 1 % and 4 % of
            its root, seeds 700 to 747: of 192 samples 11 end at another Gaussian with 0.05 and an infinite `deciding`, 47 with
            0.15.
        deciding: v of forgetting.py, positive. A larger one takes more for forgotten. Of the same samples none ends elsewhere
            with 0.3, and 4 with 1.
        astray: Part of a node's noise, positive, beyond which a change near the window's front shows that the nodes after it
            are on the way to another outcome (astray.py), where a chain forgets. A smaller one fills more nodes afresh.
            AlphaFold 3's 200 steps at window 16, `quasi_newton`, four points in 64 dimensions with deviations of 1 at a mean
            square of 256, seeds 300 to 315: 28.3 rounds on average, and 42.5 without it. Clouds of 64 atoms that turn freely,
            seeds 300 to 307: 35.9, 35.9 and 36.1 with 0.1, 0.3 and 0.5, and 39.1 without it.
        odds: Shift of the logarithm of two outcomes' odds, positive, from which on the errors of nodes may have made another
            sample (odds.py); the caution-th part of it in narrow windows, where fewer nodes show how errors grow. A smaller one
            tells so of more samples. Eight sharp points in 512 dimensions, DDIM 100, seed 3000: of 64 samples one ends at
            another point, at shifts of 0.13 and 0.16 with window 4, 3.4 with 8 and 3.8 with 16. The others stay at 0.12 and
            below, and on DDIM 50 at 0.13 and below, but for one that comes as close to the middle, at 0.32 to 0.45.
        outcome: How far apart two outcomes are at least, 0 or more, as a part of the data's root mean square. What is nearer is
            detail, of which the carried errors tell. Without it 4 of 96 samples of the digits network (DDIM 50 and 100, seeds
            2000 to 2047, `quasi_newton` at window 8) are told 0.02 to 0.04, and err by 5e-4 at most.
        first_theta: Contraction that is assumed before any was observed, 0 ... 1. A larger one lets the first nodes pass later.
        least_theta: The smallest contraction believed of a method with a slope, 0 ... 1: a smaller one may be chance.
        forgetting: Share of theta that survives a sweep which observed less, 0 ... 1. A larger one lets nodes pass later.

    Raises:
        ValueError: If a number is out of its range.
    """

    stochastic_caution: float = 1.0
    deterministic_caution: float = 10.0
    secant_caution: float = 3.0
    stage_caution: float = 5.0
    cold_caution: float = 2.5
    carried_caution: float = 3.0
    carried_decides: float = 1.5
    turned: float = 0.9
    narrow: int = 15
    narrow_sensitivity: float = 1.5
    answer_bound: float = 2.0
    volatile: float = 10.0
    wrong: float = 0.05
    deciding: float = 0.3
    astray: float = 0.5
    odds: float = 1.0
    outcome: float = 0.1
    first_theta: float = 0.5
    least_theta: float = 0.02
    forgetting: float = 0.7

    def __post_init__(self) -> None:
        for name in ("turned", "wrong", "first_theta", "least_theta", "forgetting"):
            require_between(f"the control's {name}", getattr(self, name), 0, 1)
        require_whole("the control's narrow", self.narrow, 0)
        for name in ("stochastic_caution", "deterministic_caution", "narrow_sensitivity"):
            require_real(f"the control's {name}", getattr(self, name), positive=True)
        for name in ("answer_bound", "deciding", "astray", "odds"):
            require_real(f"the control's {name}", getattr(self, name), positive=True)
        for name in ("secant_caution", "stage_caution"):
            require_between(f"the control's {name}", getattr(self, name), 1, math.inf)
        for name in ("cold_caution", "carried_caution", "carried_decides", "volatile", "outcome"):
            require_between(f"the control's {name}", getattr(self, name), 0, math.inf)

    def caution(self, table: Table, learns: bool) -> float:
        """k of budget.py.

        Args:
            table: The chain.
            learns: Whether earlier sweeps correct the present one.
        """
        if not table.stochastic:
            return self.deterministic_caution
        factors = (self.secant_caution if learns else 1) * (self.stage_caution if staged(table) else 1)
        return self.stochastic_caution * factors * (1 + self.cold_caution * coldness(table))
