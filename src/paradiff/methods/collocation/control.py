# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers of collocation, as frozen objects that a benchmark can scan and a test can replace.

`ORDER_ZERO` is for interpolation of order 0, constants at averaged states, which stochastic chains use; `HIGHER_ORDER` is for
interpolation of order 1 and above, which deterministic chains use; `SHORT` is for those of them that are too short for its
first mesh, `NARROW` for narrow windows on longer ones of up to 256 steps; from windows of 8 rows on `SHORT_WIDE` takes their
place. Every field says what it means, its unit and range, what raising it does, and how it was measured. "The digits network"
is the bundled network of 0.7 million parameters, on chains of 1000 steps. One network is the evidence for most numbers: see
docs/methods/collocation.md for the others that were tried afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from paradiff.chain.slope import DATA_VARIANCE
from paradiff.errors import require_between, require_kind, require_real, require_whole
from paradiff.methods.tolerance import DEFAULT_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Falloff:
    """How the monitor function decays on one side: it is divided by 1 + (distance past `begin` / `width`)^`power` (one such
    term for each side).

    Attributes:
        begin: log(alpha^2/sigma^2) at which the decay begins.
        width: Distance in log(alpha^2/sigma^2), positive, at which the term reaches 1. Raising it decays more slowly.
        power: Positive exponent. Raising it decays more abruptly.
    """

    begin: float
    width: float
    power: float

    def __post_init__(self) -> None:
        require_between("begin", self.begin, -math.inf, math.inf)
        require_real("width", self.width, positive=True)
        require_real("power", self.power, positive=True)


@dataclass(frozen=True, kw_only=True)
class MeshControl:
    """Where mesh points go (mesh.py).

    The shape of the monitor function was measured on the digits network; its numbers were not scanned one by one.

    Attributes:
        plateau: Height of the monitor function's constant part, positive; only its ratio to `peak` counts.
        peak: What multiplies the decision (chain/sensitivity.py), 0 or more. Raising it puts more mesh points where the sample
            decides what it will be.
        stochastic_lead: Distance in log(alpha^2/sigma^2) before signal-to-noise ratio 1 at which that has its peak on
            stochastic chains. Raising it moves the peak towards noise. The digits network, DDPM, window 16: 48 samples took
            27.4, 25.7 and 28.2 rounds in the mean with 0.5, 0.8 and 1.2; 32 of them 21.8, 25.4 and 25.4 with 0.8, 1.2 and 1.6.
        deterministic_lead: The same on deterministic chains, whose clean-data estimates bend most near signal-to-noise ratio 1.
        noise_side: Decay towards pure noise, on stochastic chains only.
        data_side: Decay towards data, where the noise becomes invisible, on stochastic chains only.
        bins: Number of equal parts of the range of log(alpha^2/sigma^2) for which node counts are stored (mesh_store.py).
            Raising it resolves the range more finely and makes files of other counts unreadable. Not scanned on its own.
        unknown_parts: Parts, 2 or more, into which an interval is subdivided when its error could not be estimated. Not scanned
            on its own.
        subdivision_exponent: n parts in place of one interval leave n^-p of its error, together and in quadrature, with this
            p: each part leaves n^-2 as much.
        level_margin: Refinement is tried while the common level of error is at most this factor, above 1, times the largest
            share. A limit of rounding.
        level_growth: Factor, above 1, by which that level is raised when the mesh would have more intervals than allowed. A
            step of a search: raising it wastes more of the allowance.
    """

    plateau: float = 1.0
    peak: float = 2.0
    stochastic_lead: float = 0.8
    deterministic_lead: float = 0.3
    noise_side: Falloff = Falloff(begin=-0.6, width=1.3, power=1.8)
    data_side: Falloff = Falloff(begin=5.0, width=2.5, power=2.0)
    bins: int = 12
    unknown_parts: int = 2
    subdivision_exponent: float = 1.5
    level_margin: float = 1.01
    level_growth: float = 1.3

    def __post_init__(self) -> None:
        for name in ("plateau", "subdivision_exponent"):
            require_real(name, getattr(self, name), positive=True)
        require_real("peak", self.peak)
        for name in ("stochastic_lead", "deterministic_lead"):
            require_between(name, getattr(self, name), -math.inf, math.inf)
        for name in ("noise_side", "data_side"):
            require_kind(name, getattr(self, name), Falloff)
        require_whole("bins", self.bins, 1)
        require_whole("unknown_parts", self.unknown_parts, 2)
        for name in ("level_margin", "level_growth"):
            require_between(name, getattr(self, name), 1, math.inf)
        if self.level_growth == 1:
            raise ValueError("level_growth is 1; it must be above 1, or the search does not end")


@dataclass(frozen=True, kw_only=True)
class StoreControl:
    """What is stored about the meshes of earlier samples (mesh_store.py). None of these numbers was scanned on its own.

    Attributes:
        prior_weight: Number of samples, positive, as which the default mesh counts in the stored shares of the bins. Raising it
            makes a file learn more slowly.
        most_samples: Samples after which an entry is left unchanged. Raising it averages over more of them.
        outlier: A sample's node count is clipped to this factor, 1 or more, times the stored count, so that rare hard samples
            do not dominate it. Raising it lets counts grow faster.
        least_share: A sample's node count is clipped from below to this fraction of that of the default mesh. Raising it keeps
            counts near the default's.
        fewest: Lower bound, in nodes, of what is stored for a bin, so that every bin keeps some weight. Raising it makes stored
            meshes more even.
        target: Fraction of the tolerance that the interpolation error shall be of a sample with the stored count. Raising it
            stores fewer nodes, so that more samples are refined.
    """

    prior_weight: int = 4
    most_samples: int = 24
    outlier: float = 1.3
    least_share: float = 0.75
    fewest: float = 1e-2
    target: float

    def __post_init__(self) -> None:
        require_whole("prior_weight", self.prior_weight, 1)
        require_whole("most_samples", self.most_samples, 1)
        require_between("outlier", self.outlier, 1, math.inf)
        for name in ("least_share", "fewest", "target"):
            require_real(name, getattr(self, name), positive=True)


@dataclass(frozen=True, kw_only=True)
class DefectControl:
    """How the defect of two intervals taken as one becomes the error of the two (defect.py).

    Attributes:
        halving_ratio: Order 0: factor by which the error of an interval exceeds that of its two halves. 2 sqrt(2) for smooth
            statistics; 1.6 to 2.8 was measured on the digits network against its own sequential states, and 1.2 to 1.6 towards
            pure noise. Raising it lowers all estimates of order 0.
        least_ratio: Lower bound of the observed convergence ratio at higher orders. Raising it lowers estimates where the
            forcing is rough in time. Not scanned on its own.
        most_ratio: Upper bound of the same. Raising it lowers estimates where the forcing is smooth. Not scanned on its own.
        ratio_safety: The observed ratio is divided by this factor, 1 or more. Raising it raises estimates. Not scanned on its
            own.
        late_sensitivity: Order 0: how strongly the sample responds to a defect late in the chain, relative to data of one
            variance. On three samples of the digits network 0.2 to 0.8 was measured from log(alpha^2/sigma^2) = 3 on; 0.4 left
            errors of four times the estimate on a mixture in the plane. Raising it raises late estimates.
        early_sensitivity: How much is added to it where all is undecided (chain/sensitivity.py); on the same samples 1.3 to 6
            was measured in sum below -1, about 2 at 0, and up to 26 for one about to decide. Raising it raises early estimates.
        neighbours: Number of neighbours on either side in whose directions a defect of order 0 is propagated too. Raising it
            averages over more directions, at the cost of 2 solves each. Not scanned on its own.
    """

    halving_ratio: float = 2.2
    least_ratio: float = 1.2
    most_ratio: float = 3.0
    ratio_safety: float = 1.5
    late_sensitivity: float = 0.7
    early_sensitivity: float = 2.7
    neighbours: int = 2

    def __post_init__(self) -> None:
        for name in ("halving_ratio", "least_ratio", "most_ratio", "ratio_safety"):
            require_real(name, getattr(self, name), positive=True)
        for name in ("late_sensitivity", "early_sensitivity"):
            require_real(name, getattr(self, name))
        require_whole("neighbours", self.neighbours, 0)


@dataclass(frozen=True, kw_only=True)
class ErrorControl:
    """How estimates of the interpolation error are made safe, and calibrated by refinements (error.py).

    Attributes:
        safety: Factor on every estimate, 0 or more; 0 takes every mesh for good enough. Raising it refines more samples. Not
            scanned on its own.
        tail_safety: Order 0: relative increase of the safety factor, 0 or more, for a sample whose defects grow without bound;
            in proportion to 1 - amplification^-`tail_exponent`. Raising it refines sensitive samples more. Not scanned on its
            own.
        tail_exponent: Positive exponent of that. Raising it reaches the full increase at smaller amplification. Not scanned on
            its own.
        chance_safety: Order 0: relative increase of the safety factor, 0 or more, for samples of few numbers, whose defects are
            small by chance; in proportion to n^-1/2 - `many_numbers`^-1/2 of n numbers. Raising it refines small samples more.
        cold_safety: Order 0: relative increase of the safety factor, 0 or more, times the shortfall of the chain's noise
            (chain/shortfall.py). Digits network, DDPM 1000 with noise times 0.6, window 32, seeds 1000 to 1023 and 1100 to
            1147: with 1.25, 1.8 and 2.5 1, none and none of 72 samples erred by more than their estimates, in 24.6, 26.7 and
            28.8 rounds on average; DDPM 200 with noise times 0.7, window 16, seeds 1000 to 1047: 4, 3 and 2 of 48. Raising it
            refines such samples more.
        many_numbers: Numbers in a sample, positive, from which on there is none. That of the digits, on which `safety` was
            measured.
        benign_amplification: Orders from 1: amplification, 1 or more, below which a move at a refinement that is smaller than
            predicted lowers the next estimate. Raising it trusts more samples' moves. Not scanned on its own.
        least_relaxation: Factor, up to 1, below which no estimate is lowered so. Raising it trusts small moves less. Not
            scanned on its own.
        told: Factor, 1 or more, by which an estimate below the tolerance is told larger, up to the tolerance (error.py).
            Raising it tells more caution and changes no sample. Order 0, the digits network, seeds 2000 on: of 40 samples of
            DDPM 1000 at window 32 and 32 of DDPM 200 at window 16, 5 and 5 erred by more than was told with 1.3, 3 and 4 with
            1.6, and no fewer with 3; of seeds 3000 on, 1 of 32 and 6 of 48 with 1.6. Of higher orders: on short chains, Euler
            25 at window 8, seeds 20300 to 20347, 7 of 48 erred by more with 1.3, and one with 3. Of long ones, the text network
            with guidance 4, DDIM 300 at window 4, seeds 220 to 243, 4 of 24 erred by more with 1.3 and one with 3; of 32 of the
            digits network, DDIM 500, 2 and none.
        refined_told: Further factor, 1 or more, where the mesh of the sample was refined: finer ones show fewer directions in
            which errors grow. Digits network, DDIM 100 at window 3, seeds 6000 to 6047: 2 of 48 samples, of refined meshes,
            erred by more than twice what they told with 1, none with 2.3.
        cold_told: Relative increase of `told`, 0 or more, times the shortfall of the chain's noise. Digits network, DDPM 200
            with noise times 0.7 from 64 nodes, window 16, seeds 1000 to 1031: 4 of 32 samples erred by more than was told with
            0, and 2 with 2. Raising it tells more caution and changes no sample.
        decided_error: Largest estimated error of a state while the sample decides what it becomes, positive, root mean square
            in units of the node's noise level divided by the decision (error.py); above, the mesh is refined. Digits as
            point masses, DDPM: 3 of 80 samples that ended as another digit without it end right with 0.01, where most states
            are within 0.005. Raising it leaves more samples on another side of a decision.
        few_exponent: For samples of n numbers, fewer than `many_numbers`, it is larger by (`many_numbers` / n) to this power, 0
            or more. Raising it leaves more small samples on another side of a decision.
        free_growth: Growth of early errors along the path found (growth.py), 1 or more, beyond which it falls with the root of
            the excess. benchmarks/conditions.py, DDPM 200: without this, and with a `few_exponent` of 1/2, 7 of 2560 samples of
            two points and 3 of 442 of digits as point masses ended on another point, all of which are above it; so are 5 % and
            9 % of all samples, and none of 39 of the digits network. Raising it leaves more samples on another side.
        growth_bound: B of equation (2) there, positive. Raising it lets chance say more often that a path grows. 1, 2 and 4
            told the samples that ended on another point about equally well from the others.
        decided_again: Factor, 1 or more, by which a sample's states must be nearer once they were farther off. Raising it
            refines such samples more. DDPM 200: with 1.5 two samples of `free_growth`'s remained on another point, with 2.5
            none; mixtures of 64 numbers took 11.8 and 12.6 rounds.
        least_decision: Decision, 0 to 1, from which on a node lies in its midst. Not scanned on its own.
        checkpoints: Most nodes, 1 or more, at which that is seen. Raising it costs time and misses less between them. Not
            scanned on its own.
    """

    safety: float
    tail_safety: float = 0.8
    tail_exponent: float = 2
    chance_safety: float = 3.5
    cold_safety: float = 1.8
    many_numbers: int = 64
    benign_amplification: float = 1.5
    least_relaxation: float = 0.4
    told: float = 1.3
    refined_told: float = 1.0
    cold_told: float = 2.0
    decided_error: float = 0.01
    few_exponent: float = 0.25
    free_growth: float = 4.0
    growth_bound: float = 2.0
    decided_again: float = 2.5
    least_decision: float = 0.2
    checkpoints: int = 8

    def __post_init__(self) -> None:
        require_real("safety", self.safety)
        require_real("tail_safety", self.tail_safety)
        require_real("chance_safety", self.chance_safety)
        require_real("cold_safety", self.cold_safety)
        require_real("cold_told", self.cold_told)
        require_whole("many_numbers", self.many_numbers, 1)
        for name in ("tail_exponent", "decided_error", "growth_bound"):
            require_real(name, getattr(self, name), positive=True)
        for name in ("told", "refined_told", "decided_again", "free_growth"):
            require_between(name, getattr(self, name), 1, math.inf)
        require_real("few_exponent", self.few_exponent)
        require_between("least_decision", self.least_decision, 0, 1)
        require_whole("checkpoints", self.checkpoints, 1)
        require_between("benign_amplification", self.benign_amplification, 1, math.inf)
        require_between("least_relaxation", self.least_relaxation, 0, 1)


@dataclass(frozen=True, kw_only=True)
class CollocationControl:
    """All tuned numbers of one kind of interpolation.

    Attributes:
        order: Degree of the interpolation where the caller gives none.
        nodes: Number of nodes of the first mesh at the tolerance `reference_tolerance`. Raising it costs evaluations and spares
            refinements.
        cold_nodes: Relative increase of the first mesh, 0 or more, times the shortfall of the chain's noise
            (chain/shortfall.py), up to half of `first_share`. Since `cold_safety` asks more of such chains, nearly every first
            mesh had to be refined by a few nodes. Digits network, DDPM 1000 with noise times 0.6, window 32, rounds (most) and
            samples that err by more than they tell: seeds 1000 to 1047 27.7 (110) and 2 of 48 with 0, 29.2 (108) and none with
            0.5; 1100 to 1147 24.9 (109) and 21.6 (47), none by either. On DDPM 200 with
            noise times 0.7, window 16, seeds 2000 to 2047, none of 48 samples errs by more than it tells from 56 nodes and 6 do
            from 64, hence the half. Raising it costs evaluations and spares refinements.
        extrapolation: How far the forcing of a node that was not evaluated is extrapolated along log(alpha^2/sigma^2) from the
            last two before it that were, as a multiple of their distance; beyond, and with 0 from the start, it is constant.
            The digits network, DDIM 100 at window 3, 12 seeds: 19.5 rounds with 0, 17.9 with 1, 17.0 with 2, 16.9 with 4.
        reference_tolerance: Root mean square error, in the data's units, to which `nodes` belongs. Raising it gives all
            tolerances more nodes.
        reference_steps: Steps of a chain, 1 or more, to which `nodes` belongs. Raising it gives all chains fewer nodes.
        steps_exponent: The first mesh has (steps / `reference_steps`)^`steps_exponent` times as many nodes, 0 or more: with
            1/4, 21 nodes for 50 steps are 18 for 25 and 25 for 100. The digits network, DDIM 50, seeds 20000 to 20095: at
            windows 3 and 4, 6 and 2 of 96 samples erred by more than their estimates with 22 nodes, none with 21.
        node_exponent: The first mesh has (`reference_tolerance` / tolerance)^`node_exponent` times as many nodes. The exponents
            2/3 and 1/3 are those of errors that fall as n^-1.5 and n^-3.
        least_nodes: Fraction of `nodes` that the first mesh has at any tolerance: a smaller one would have to be refined. Not
            scanned on its own.
        resolved_share: Fraction of `nodes` below which a mesh does not tell its own error, unless it takes all nodes; it is
            refined before the sample is found. benchmarks/conditions.py, two points, 200 steps: 8 nodes ended on the wrong
            point in 20 of 100 samples of DDPM and 12 of DDIM. Raising it refines more of the meshes that callers give.
        variance: Variance of the data, positive, as long as neither the caller nor a file gives one (chain/slope.py).
            benchmarks/sparse.py and benchmarks/shift.py scan it.
        variance_margin: Factor, above 1, by which the mean square of the first sample that has nearly converged must differ
            from the variance for the variance to be replaced; its square for a variance that was given. Raising it replaces it
            more rarely. Not scanned on its own.
        iteration_share: Fraction of the tolerance below which the iteration error counts as converged. Raising it spares sweeps
            and leaves less for interpolation.
        early_factor: Multiple of the tolerance below which the iteration error must be for the interpolation error to be
            estimated before the sweeps have converged; 0 waits for convergence. Raising it refines earlier, from estimates that
            are less certain.
        node_share: A node is evaluated again when its staleness exceeds this multiple of `iteration_share` times the tolerance,
            divided by the number of nodes. Raising it evaluates fewer nodes a round.
        refined_share: Target interpolation error after refinement, as a fraction of the tolerance. Raising it adds fewer nodes,
            so that another refinement is likelier.
        refined_exponent: The target is divided by (error / tolerance)^`refined_exponent`. Raising it adds more nodes where the
            error is far above the tolerance.
        first_share: Fraction of the chain's nodes, 0 to 1: a chain of which the first mesh would hold more is left to the
            window method from the first round on. Raising it interpolates shorter chains.
        handover_share: Fraction of the chain's nodes, 0 to 1: a sample that would need more is handed over to the window method
            over all nodes. Raising it keeps more samples in collocation.
        handover_least: Nodes up to which a mesh is kept whatever their share, 0 or more: what is solved is kept, where the
            window method would begin anew. Chains of 100 steps, 16 seeds each: with 0 two samples of the text network took 27
            and 32 rounds at window 32, and one of the digits network 32 at window 16; with 256 they take 13, 19 and 16, and all
            others as many as before. Raising it keeps larger systems.
        lost: Estimated interpolation error, positive, as a multiple of the sample's root mean square, above which it is handed
            over to the window method at once; with 1e6 none is. In a narrow window a mesh of most nodes, and the next one, take
            more rounds than the chain has steps. The digits network, DDIM 100 at window 3, seeds 8005 and 8032: 90 and 134
            rounds without it, 83 and 89 with 1. Raising it refines more meshes.
        head_share: Fraction of the tolerance: where the defects of the nodes that have settled come to more before later nodes
            were evaluated at all, the mesh between them is refined at once (head.py); 0 never does that. The text network,
            guidance 4, DDIM 50, 6 seeds: 25.5 rounds at window 3 with 0, 23.3 with 0.5; the digits network's
            samples have up to 0.3. Raising it refines fewer samples early.
        head_wanted: Target of that refinement, positive, as a fraction of the tolerance. 0.15 and 0.3 take as many rounds.
        most_heads: Most times that it is done for one sample, 0 or more. Not scanned on its own.
        whole_share: The same fraction, 0 or more, where every round of a deterministic chain evaluates all nodes, after
            `whole_sweeps` of them (head.py); 0 never refines then. The text network, guidance 4, DDIM 50, seeds 9000 to 9015,
            all nodes in a round: 13.6 rounds with 0, 11.3 with 1, 11.4 with 1.4, 11.6 with 2, 12.7 with 4; of 32 samples of
            the digits network 32 are refined for nothing with 0.5, one with 1, none with 1.4. Raising it refines fewer samples
            early.
        whole_sweeps: Rounds after which that is looked at, 1 or more: 2, 3, 4 and 5 take 11.1, 11.3, 11.4 and 11.5 rounds of
            the text network and 243, 225, 226 and 234 evaluations. Raising it has better forcings for a later mesh.
        handover_error: Multiple of the tolerance that the estimated error may be for the window method to start from the sample
            found; farther off, it misleads. Raising it starts from worse samples.
        most_parts: Most parts into which an interval is subdivided at once. Raising it needs fewer refinements; estimates from
            few nodes of high order are coarse, hence 4 there.
        most_sweeps: Multiple of the rounds that one sweep takes, after which a sample that has not converged is given up. With
            20, one of 64 samples of a mixture of sharp Gaussians, 512 numbers, DPM++(2M) 50 at window 4, took 145 rounds, with
            6 it takes 63. Raising it waits longer.
        by_effect: For how long after a refinement new nodes come first, and then those whose staleness moves the sample most,
            in place of all along the chain: a multiple, 0 or more, of the rounds that one pass over the mesh takes. The digits
            network, DDIM 100, seeds 30000 to 30095 at windows 3, 4, 8 and 16: 22.6, 19.1, 12.2 and 10.2 rounds with 0, at most
            94; 20.2, 17.0, 10.9 and 9.5 always, at most 66; 11 and 13 of these 384 erred by more than their estimates. Long
            chains take many nodes, and what is early in them moves the sample for long: DDIM 500 at windows 4 and 8, 32
            samples, 18.4 and 13.3 rounds with 0, and 22.8 and 15.5 always, at most 231; with 0.5 as many as with 0, and of 24
            samples of the text network, guidance 4, DDIM 300 at window 4, 5 erred by more than was told in 28.9 rounds, in
            place of 1 in 37.9. Averaged states are followed along the chain: DDPM 1000 takes 20.5 rounds at window 32 with 0,
            22.9 always. Raising it follows early changes later.
        lipschitz_cap: Multiple of the Lipschitz constant of the clean-data estimate for Gaussian data up to which a node's is
            taken for granted before it was observed. Raising it evaluates nodes again sooner.
        rounding_share: State changes below this fraction of the network's relative precision are treated as rounding. Raising
            it ignores larger changes, and lets networks of low precision converge sooner.
        pair_rounding: State changes below this multiple of the network's relative precision make no secant pair. Raising it
            keeps noisier pairs out, and later pairs of converging nodes too.
        most_pairs: Most secant pairs in the system of a round, over all nodes; with more nodes than a few hundred each has
            fewer. Bounds memory and time, which grow with its square and cube.
        pair_uncertainty: Share of a change, 0 to 1, that stays uncertain along directions that secant pairs cover: the forcing
            is not linear. Raising it evaluates nodes again sooner.
        spread: Places, 0 or more, up to which the newest secant pairs of neighbours count for a node where the interpolation
            error is estimated (estimator.py). In a small window nodes are evaluated too rarely for their own pairs to show what
            grows. The digits network, DDIM 50, 128 samples at each of windows 3 and 4: 7 of 256 erred by more than twice their
            estimate with 0, 3 with 1, 1 with 2 and 1 with 3; window 3 took 14.7, 15.9, 17.5 and 21.0 rounds. Since single steps
            are left out of the mesh's shares (mesh.py), seeds 20100 to 20195: of 96 samples at each of windows 2, 3 and 4, 7, 3
            and 3 erred by more than their estimates with 0, and 3, 0 and 1 with 1; DDIM 100 at windows 3 and 4: 12 and 12 with
            0, 7 and 7 with 1, 3 and 4 with 2, in 17.3, 19.5 and 22.0 rounds at window 3. So it is 1 on short chains (`SHORT`),
            and 2 on longer ones (`NARROW`). Raising it costs memory for 4 states a node and place.
        enough_pairs: Secant pairs from which on a node takes none of its neighbours', 0 or more; 0 lets neighbours count
            always. The digits network, 96 samples of DDIM 50 at windows 8 and 16 and of DDIM 100 at window 8: of these 288 six
            erred by more than their estimate with 2, none by more than twice. Of 144 of DDIM 100 at windows 3 and 4 three did,
            after their meshes had been refined. Raising it refines more samples.
        wide: Window, in rows, 1 or more, from which on the numbers of `SHORT_WIDE` take the place of `SHORT`'s and `NARROW`'s.
            Raising it keeps more windows careful.
        narrow: Windows below are narrow, in rows, 1 or more. On chains of up to `narrow_steps` the numbers are then those of
            `NARROW`: by `HIGHER_ORDER`'s, digits network, 48 samples of DDIM 100, 10, 8, 5 and 3 erred by more than their
            estimates at windows 3, 4, 8 and 16, 5 of them by more than twice; by `NARROW`'s 1, 3, 1 and 3, one by more than
            twice. It costs rounds: 21.4, 20.2 and 15.0 become 29.0, 23.7 and 15.8. At window 16, seeds 0 to 47: by
            `HIGHER_ORDER`'s 5 erred by more than their estimates, in 9.6 rounds and 120 evaluations, by `SHORT_WIDE`'s none, in
            9.3 and 111. Raising it makes wider windows careful.
        narrow_steps: See `narrow`; steps of a chain, 1 or more. Of 12 samples of DDIM 1000 one erred by more than twice its
            estimate at window 4 by either.
        trusted_move: How far a node's state may have moved since it was evaluated for the sample to count as found, as a
            multiple of the node's noise level, root mean square. The staleness knows the slopes that were observed; on the
            wrong side of a decision a network answers to nothing, so that nodes which moved farther are evaluated again.
            benchmarks/conditions.py: without it 4 of 16 samples of two points, DDPM 200 without a window, ended on the wrong
            point, with 0.1 none. Raising it trusts older evaluations.
        most_gain: Largest factor, positive, by which the sample may answer to an error of a network's output: above, the
            coefficients multiply rounding, and the window method takes over. 0.05 to 4 on the chains of paradiff.samplers.
            Raising it trusts coefficients of more extreme levels.
        most_volatility: Largest volatility of a chain (chain/volatility.py), positive, that is interpolated; 1 is that of
            ancestral samplers. Measured on EDM's chains with churn, mixtures of five points, window 16: of 320 samples at
            volatilities of 0.5 to 3.6 none erred by more than its estimate, of 64 at 6.5 two fell on another point, and of 192
            of AlphaFold 3's chains, 12 to 22, 18 erred by more. Raising it interpolates rougher chains.
        most_shortfall: Largest shortfall of noise of a chain of ancestral steps (chain/shortfall.py), 0 to 1, that is
            interpolated: that of noise times 0.6, the coldest that was measured (`cold_safety`). Raising it interpolates colder
            chains.
        most_other_shortfall: The same of other chains, whose states do not move as the averaged state takes them to
            (interval.py, equation (5)), and at states that are not averaged. Raising it interpolates such chains.
        most_undecided: Largest share of the noise in the variance of a sample, 0 to 1, for data of mean square 1, on a chain
            whose samples begin from an earlier run's and are interpolated; where a chain ends earlier, the window method
            solves all nodes. Steps at little noise contract what early changes become, and the staleness counts on it. Plans by
            one of two ways (tests/planning/test_policy.py) on the first 10, 20, 30 and 36 of 40 steps, shares of 0.02 to 0.83,
            seeds 0 to 3: 21 of 192 that began from the last plan erred by more than twice their estimate with 1, none with
            0.01. Raising it interpolates samples of such chains.
        most_square: Largest mean square of the data, positive and by powers of 2, of a sample that is interpolated; the window
            method takes larger ones over. Large data decide at high noise levels, where a mesh has few nodes. Two points in the
            plane, DDPM 200, seeds 300 to 331: at 32 and 64 none of 32 samples erred by more than twice its estimate, at 512 5
            ended on the other point without a window and 6 at window 16, at 4096 8 and 8. DDIM 100: none of 128 up to 4096,
            one of 32 at 2^20 (seeds 300 to 331, 900 to 931). Raising it interpolates larger data.
        unseen_amplification: Amplification of early errors, 1 or more, that is assumed of a sample which the window method
            solves from its first round on a stochastic chain, or whose sweeps did not converge. With 1, one of 8 samples of the
            digits network, DDPM 100, erred by 0.06 at tolerance 4e-3, and one of 64 of a mixture of sharp Gaussians, 512
            numbers, DDIM 100 at window 4, ended at another of them. Raising it sweeps more.
        handover_secants: Secant pairs a node of the window method that takes over. Raising it costs memory.
        all_nodes: Nodes of a chain up to which all are evaluated where the forcings' difference to an earlier run is sought,
            and one round holds them, or the chain is stochastic.
        few_nodes: The same where it takes several rounds. The text network, DDIM 100 at window 32, frames and guidance: 7.0 and
            9.5 rounds with all 100 nodes, 5.9 and 8.2 with a first mesh of 32; DDIM 50 at window 8: 11.8 with all, 13.1 with a
            mesh. Raising it evaluates all nodes of longer chains.
        round_nodes: Nodes up to which the first mesh of such a difference is enlarged to fill a round. DDIM 200, frames at
            window 32: 8.6 rounds with 16, 7.0 with 24, 6.1 with 32; the digits network, DDIM 100 at window 4: 10.2 with 16,
            13.4 with 32. Raising it costs evaluations.
        near: How far a number of a state may be from an earlier run's, as a multiple of the node's noise level, positive, for
            that run's evaluation to count as one there; farther off, it counts as one of the state itself. Raising it trusts
            earlier secant pairs over longer ways.
        handover_window: Its window where the caller gives no bound: over the whole chain, every sweep would evaluate every
            node. Raising it takes fewer rounds and more evaluations.
        mesh: Where mesh points go.
        store: What is stored about earlier meshes.
        defect: How defects become errors.
        error: How estimates are made safe and calibrated.

    A number whose measurement is not described was not scanned on its own.
    """

    order: int
    nodes: int
    cold_nodes: float = 0.0
    reference_tolerance: float = DEFAULT_TOLERANCE
    reference_steps: int = 1000
    steps_exponent: float = 0.0
    extrapolation: float = 0.0
    node_exponent: float
    least_nodes: float = 0.75
    resolved_share: float
    variance: float = DATA_VARIANCE
    variance_margin: float = 16.0
    iteration_share: float
    early_factor: float = 10.0
    node_share: float = 1.4
    refined_share: float
    refined_exponent: float
    first_share: float
    handover_share: float
    handover_least: int = 0
    lost: float = 1e6
    head_share: float = 0.0
    head_wanted: float = 0.3
    most_heads: int = 2
    whole_share: float = 0.0
    whole_sweeps: int = 3
    handover_error: float = 4.0
    most_parts: int
    most_sweeps: int = 20
    by_effect: float = 0.0
    lipschitz_cap: float = 4.0
    rounding_share: float = 0.125
    pair_rounding: float = 64
    most_pairs: int = 600
    pair_uncertainty: float = 0.25
    spread: int = 0
    enough_pairs: int = 0
    wide: int = 8
    narrow: int = 32
    narrow_steps: int = 256
    trusted_move: float = 0.1
    most_gain: float = 1e3
    most_volatility: float = 4.0
    most_shortfall: float = 0.41
    most_other_shortfall: float = 0.03
    most_undecided: float = 0.01
    most_square: float = 2.0**17
    unseen_amplification: float = 8.0
    handover_secants: int = 1
    all_nodes: int = 128
    few_nodes: int = 64
    round_nodes: int = 32
    near: float = 0.3
    handover_window: int = 32
    mesh: MeshControl = field(default_factory=MeshControl)
    store: StoreControl
    defect: DefectControl = field(default_factory=DefectControl)
    error: ErrorControl

    def __post_init__(self) -> None:
        require_between("order", self.order, 0, 8)
        wholes = {"order": 0, "nodes": 2, "most_parts": 2, "most_sweeps": 1, "most_pairs": 0}
        wholes |= {"whole_sweeps": 1}
        wholes |= {"most_heads": 0, "spread": 0, "enough_pairs": 0, "handover_secants": 0, "handover_window": 1}
        wholes |= {"all_nodes": 1, "few_nodes": 1, "round_nodes": 2}
        wholes |= {"reference_steps": 1, "narrow": 1, "wide": 1, "narrow_steps": 1, "handover_least": 0}
        for name, least in wholes.items():
            require_whole(name, getattr(self, name), least)
        for name in (
            "near",
            "head_wanted",
            "reference_tolerance",
            "variance",
            "iteration_share",
            "refined_share",
            "lipschitz_cap",
            "lost",
            "most_gain",
            "most_volatility",
            "most_square",
        ):
            require_real(name, getattr(self, name), positive=True)
        for name in (
            "node_exponent",
            "cold_nodes",
            "steps_exponent",
            "least_nodes",
            "early_factor",
            "node_share",
            "refined_exponent",
            "handover_error",
        ):
            require_real(name, getattr(self, name))
        for name in (
            "rounding_share",
            "pair_rounding",
            "trusted_move",
            "extrapolation",
            "head_share",
            "by_effect",
            "whole_share",
        ):
            require_real(name, getattr(self, name))
        require_between("unseen_amplification", self.unseen_amplification, 1, math.inf)
        require_between("variance_margin", self.variance_margin, 1, math.inf)
        shares = (
            "first_share",
            "handover_share",
            "pair_uncertainty",
            "resolved_share",
            "most_shortfall",
            "most_other_shortfall",
            "most_undecided",
        )
        for name in shares:
            require_between(name, getattr(self, name), 0, 1)
        kinds = {"mesh": MeshControl, "store": StoreControl, "defect": DefectControl, "error": ErrorControl}
        for name, kind in kinds.items():
            require_kind(name, getattr(self, name), kind)

    def most_kept(self, candidates: int) -> int:
        """Most nodes of a mesh that is not handed over, of so many that there may be."""
        return max(math.floor(self.handover_share * candidates), min(self.handover_least, candidates))


ORDER_ZERO = CollocationControl(
    order=0,
    nodes=56,
    cold_nodes=0.5,
    node_exponent=2 / 3,
    iteration_share=0.25,
    refined_share=0.75,
    refined_exponent=0.15,
    first_share=0.35,
    handover_share=0.35,
    resolved_share=0.75,
    most_parts=16,
    store=StoreControl(target=0.6),
    most_square=128.0,
    error=ErrorControl(safety=1.0, told=1.6),
)
HIGHER_ORDER = CollocationControl(
    order=3,
    nodes=32,
    extrapolation=2.0,
    node_exponent=1 / 3,
    iteration_share=0.3,
    refined_share=0.5,
    refined_exponent=0.0,
    first_share=0.5,
    handover_share=0.5,
    handover_least=256,
    resolved_share=0.5,
    most_parts=4,
    most_sweeps=6,
    whole_share=1.2,
    store=StoreControl(target=0.4),
    error=ErrorControl(safety=1.5, told=3.0),
)
NARROW = replace(
    HIGHER_ORDER,
    nodes=21,
    reference_steps=50,
    steps_exponent=0.25,
    least_nodes=1.0,
    refined_share=0.8,
    resolved_share=2 / 3,
    first_share=0.75,
    handover_share=1.0,
    head_share=0.5,
    by_effect=1e3,
    lost=1.0,
    spread=2,
    error=ErrorControl(safety=1.5, told=3.0, refined_told=2.3),
)
SHORT = replace(NARROW, spread=1, error=ErrorControl(safety=1.5, told=3.0))
SHORT_WIDE = replace(SHORT, spread=2, enough_pairs=2, lost=1e6)

DIFFERENCES = CollocationControl(
    order=3,
    nodes=16,
    extrapolation=0.0,
    node_exponent=1 / 3,
    iteration_share=0.3,
    refined_share=0.5,
    refined_exponent=0.0,
    first_share=1.0,
    handover_share=1.0,
    resolved_share=0.75,
    most_parts=4,
    store=StoreControl(target=0.4),
    error=ErrorControl(safety=1.5),
)
