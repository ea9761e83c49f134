# SPDX-License-Identifier: Apache-2.0
"""The named methods: functions that return a `WindowMethod`, for SRDS a `PararealMethod`, for collocation a
`CollocationMethod`.

| method | slope G | nodes | predictor | rule |
|---|---|---|---|---|
| `sequential` | any | all, window 1 | - | - |
| `jacobi` | 0 | all | frozen clean data | error |
| `paradigms` | identity | all | copy of the last state | change |
| `parasolver` | identity | every S-th | frozen clean data | error or change |
| `quasi_newton` | Gaussian, corrected by secants | all | frozen clean data | error |
| `srds` | a coarse propagator's own change | block edges | a coarse sweep | error, change, sample or image |
| `collocation` | Gaussian, corrected by secants | a few, of the method's own choice | nearest forcing | error |
| `piadm_sde`, `piadm_ode` | a[i] of the score form | all, block by block | copy of the block's start | sweeps or error |
| `quasi_deer` | diagonal of the step's own derivative, by probes | all | copy of the last state | error |
| `chords` | a long step's own change | those of its cores | long steps from start to start | error or change |
| `parataa` | a[i] in epsilon form over k nodes, Anderson mixing | all | copy of the last state | residual |

Others are in piadm.py, parataa.py, chords and deer. All but `collocation` solve the same equations and so, run to the end (at
tolerance 0, SRDS with as many iterations as blocks, PIADM with as many sweeps as steps, CHORDS with all answers), return the
same sample: that of the sequential chain with the same noises. `collocation` estimates how far from that its sample is, and
with `exact=True` goes on until it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from paradiff.chain.slope import DATA_VARIANCE, Slope, identity, shifted, zero
from paradiff.errors import require_one_of
from paradiff.methods.collocation.control import CollocationControl
from paradiff.methods.collocation.mesh_store import require_store
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.collocation.options import Target
from paradiff.methods.parareal.method import PararealMethod
from paradiff.methods.parareal.options import Choice, Ordering, StopRule
from paradiff.methods.piadm import piadm_ode as piadm_ode
from paradiff.methods.piadm import piadm_sde as piadm_sde
from paradiff.methods.secant import DAMPING
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.methods.window.method import WindowMethod


def sequential() -> WindowMethod:
    """The chain itself, one step a round: window 1. N rounds, N evaluations, whatever the tolerance."""
    return WindowMethod("sequential", slope=zero, window=1, predictor="copy", tolerance=0.0)


def jacobi(window: int | None = None, tolerance: float = DEFAULT_TOLERANCE) -> WindowMethod:
    """Jacobi (fixed-point) iteration: every node takes its step from the last sweep's states.

    Source: Song, Meng, Liao and Ermon, "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving",
    arXiv 2002.03629, algorithm 1. Information moves one node a sweep, so that a chain of N steps takes close to N sweeps: the
    method to compare with.

    Differs from the paper in: a window that slides; new nodes filled by frozen clean data; the error rule
    (methods/window/budget.py) in place of a bound on the change.

    Args:
        window: Nodes solved at once; None for all.
        tolerance: Root mean square error that the sample may have by estimate, in the data's units.
    """
    return WindowMethod("jacobi", slope=zero, window=window, tolerance=tolerance)


def paradigms(window: int | None = None, tolerance: float = 0.1) -> WindowMethod:
    """ParaDiGMS: Picard iteration over a sliding window.

    Source: Shih, Belkhale, Ermon, Sadigh and Anari, "Parallel Sampling of Diffusion Models", arXiv 2305.16317, algorithm 1.
    Every sweep adds up the drifts of all nodes from the window's first state; the window slides past the leading nodes whose
    squared change, divided by the dimension, is at most tolerance^2 times the variance of the step's noise, and past the one
    after them; new nodes copy the last state.

    Differs from the published code (diffusers' pipeline of that name) in: the noise that a node's change is measured by is
    that of the step that reaches it, there that of the step that leaves it, which is zero at the end; this costs or saves at
    most a sweep. Each sample has a window of its own, where that code advances a batch by its slowest sample.

    Args:
        window: Nodes solved at once; None for all.
        tolerance: In units of the standard deviation of a step's noise. The paper uses 0.1 for 1000 DDPM steps, and as
            deterministic samplers of fewer steps have larger steps, they need less: 0.01 for 50 or 200 DDIM steps.
    """
    return WindowMethod("paradigms", slope=identity, window=window, predictor="copy", tolerance=tolerance, rule="change")


def parasolver(
    window: int | None = None,
    tolerance: float | None = None,
    *,
    stride: int | Sequence[int] = 1,
    warmup: int = 0,
    slope: Slope = identity,
    rule: Literal["error", "change"] = "error",
) -> WindowMethod:
    """ParaSolver: a hierarchical parallel integral solver.

    Source: "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025. The chain is split into
    sub-intervals of `stride` sequential steps. A sweep walks all sub-intervals of the window side by side, takes the residual
    at their ends, and solves the banded system with unit diagonal that the slope makes of it: with the identity, a prefix
    sum. The window starts, and its new nodes are filled, with the sampler's own steps and noises and the newest clean-data
    estimate frozen, after `warmup` steps that are really taken (the paper's "preconditioning steps"; here a preconditioner
    is G).

    With stride S > 1 the reference is still the chain of all steps: at convergence the result does not depend on S. A
    multistep sampler then reads, at the start of a sub-interval, the outputs that the neighbour's last sweep left there. To
    restart its order instead, make the table do so (`dpmpp_2m(..., restarts=...)`): that chain is then the reference.

    Differs from the paper in: no warm-up step by default (its quick start takes 5; without one the first clean-data estimate
    is 0, the centre of the data); the rule: `error` bounds the estimated error of the sample, `change` is the paper's,
    ||change||^2/d <= tolerance^2 v with v the posterior variance between nodes; each sample has a window of its own; the
    clean-data estimate follows the update of the state that it was made from; the slope may be any.

    Args:
        window: Sub-intervals solved at once; None for all.
        tolerance: With rule `error`, the root mean square error that the sample may have by estimate, 4e-3 by default. With
            rule `change`, in units of the standard deviation of the noise between nodes, 0.1 by default.
        stride: Steps in a sub-interval, or the lengths of all sub-intervals after the warm-up.
        warmup: Steps taken one after the other before the window opens.
        slope: How changes are carried (chain/slope.py).
        rule: `error` or `change`.
    """
    require_one_of("rule", rule, ("error", "change"))
    if tolerance is None:
        tolerance = 0.1 if rule == "change" else DEFAULT_TOLERANCE
    return WindowMethod("parasolver", slope, window, stride, warmup, "clean", tolerance, rule)


def quasi_newton(
    window: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    *,
    secants: int = 3,
    neighbours: int = 0,
    neighbour_damping: float = DAMPING,
    slope: Slope | None = None,
    warmup: int = 0,
) -> WindowMethod:
    """ParaSolver's window with a slope that learns: multisecant quasi-Newton sweeps.

    Every sweep evaluates the network again at nodes that it has evaluated before. What the outputs did while the states moved
    corrects the slope at each node, in the directions in which its state has been moving (secant.py). This pays where the
    network answers to its state more strongly than any slope says, most of all with guidance; it costs 2 k + 2 states of
    memory a node and one batched product of the pairs with each other a sweep.

    Our own. Near it: Broyden's method; ParaTAA's triangular Anderson mixing (arXiv 2402.09970), which mixes whole iterates
    with coefficients that all nodes share.

    Args:
        window: Nodes solved at once; None for all.
        tolerance: Root mean square error that the sample may have by estimate, in the data's units.
        secants: Pairs kept for each node, k, 1000 at most.
        neighbours: From how many nodes before it a node takes the pairs, too: 2 saves a tenth of the rounds where states are
            structures of molecules, whose outputs answer in few directions; the product of pairs grows with its square.
        neighbour_damping: How little a node trusts those pairs beside its own, 0 or more: lambda of secant.py, as part of a
            pair's mean square; that of its own is 0.01. On AlphaFold 3's 200 steps, slope of variance 16, 32 atoms (seeds 300
            to 303) with four neighbours take 36.8 rounds with 0.01, 35.0 with 0.1 and 34.0 with 0.4; 64 atoms (seeds 300 to
            302) with four 39.0 with 0.01 and 38.0 with 0.4, with eight 37.7 with 0.2 and 36.3 with 0.4.
        slope: The slope that is corrected; `shifted(0.25)` by default, that of data of variance 1/4.
        warmup: Steps taken one after the other before the window opens.
    """
    slope = shifted(DATA_VARIANCE) if slope is None else slope
    return WindowMethod(
        "quasi_newton",
        slope,
        window,
        warmup=warmup,
        tolerance=tolerance,
        secants=secants,
        neighbours=neighbours,
        neighbour_damping=neighbour_damping,
    )


def srds(
    blocks: int | Sequence[int] | None = None,
    coarse: Choice = "one step",
    ordering: Ordering = "pipelined",
    tolerance: float | None = None,
    *,
    rule: StopRule = "error",
    iterations: int | None = None,
    window: int | None = None,
    rows: int | None = None,
) -> PararealMethod:
    """SRDS: self-refining diffusion samplers, Parareal over blocks of the chain.

    Source: Selvam, Merchant and Ermon, "Self-Refining Diffusion Samplers: Enabling Parallelization via Parareal Iterations",
    NeurIPS 2024, arXiv 2412.08292, algorithm 1 and its pipelined form. From one coarse sweep the edges of the blocks are
    refined by x[i+1] <- F(x[i]) + (G(x[i] new) - G(x[i])), with F the block's fine steps and G one coarse step
    (methods/parareal/method.py). After as many iterations as there are blocks the sample is that of the sequential chain;
    `pipelined` gets there in the chain's own number of rounds, and never needs more.

    A stochastic sampler works as a deterministic one does: noises are fixed beforehand, and a coarse step receives the exact
    aggregate of its block's. A multistep sampler's history travels with the block edge, so that the reference is the true
    chain; to restart its order instead, make the table do so (`dpmpp_2m(..., restarts=...)`).

    Differs from the paper in: any number of blocks, of lengths that need not be equal; a coarse propagator may be more than
    one step; convergence is judged for each sample by an estimate of its error that needs no further iteration (rule `error`),
    where the paper waits until the sample stops changing (`sample`, `image`); blocks whose start is final stop.

    Args:
        blocks: Number of blocks B, balanced, or their edges as fine nodes, 0 and N included. None for the planner's number,
            the nearest whole number to sqrt(K N) for N steps (to sqrt(N) if batched), K being `iterations` or 2.
        coarse: `one step` (the paper); `two step`, which extrapolates the clean-data estimate along its trend and is worth most
            on deterministic chains; a number of steps a block; the fine nodes it visits, block edges included; a coarse table
            whose nodes are fine nodes; or a slope (chain/slope.py), which costs no network calls and makes the method
            ParaSolver's over whole blocks.
        ordering: Of the rows: `pipelined`, or `batched` with barriers between sweeps.
        tolerance: With rule `error`, the root mean square error that the sample may have by estimate, 4e-3 by default. With
            `change`, in units of the standard deviation of the noise of a step between block edges, 0.1 by default. With
            `sample`, the root mean square change of the sample in its own units, 4e-3 by default; with `image`, the mean
            change of the picture in grey levels of 0 ... 255, 0.1 by default (the threshold of a public implementation).
        rule: `error`, `change` (edge by edge along the chain), `sample` or `image`.
        iterations: Iterations to be made whatever the rule would say.
        window: Blocks in flight; memory is then O(window) states instead of O(blocks).
        rows: Most rows that one sample puts in one round: fewer evaluators than blocks.
    """
    require_one_of("rule", rule, get_args(StopRule))
    if tolerance is None:
        tolerance = {"error": DEFAULT_TOLERANCE, "change": 0.1, "sample": 4e-3, "image": 0.1}[rule]
    return PararealMethod("srds", blocks, coarse, ordering, tolerance, rule, iterations, window, rows)


def collocation(
    nodes: int | Sequence[int] | Literal["auto"] = "auto",
    *,
    window: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    order: int | None = None,
    shift: float | Literal["auto"] = "auto",
    secants: int = 4,
    max_nodes: int | None = None,
    exact: bool = False,
    target: Target = "chain",
    warm_start: str | Path | None = None,
    control: CollocationControl | None = None,
) -> CollocationMethod:
    """Collocation: the sample of a long chain from fewer evaluations than the chain has steps.

    The network is evaluated at a few nodes. Its nonlinear part is interpolated between them, and the fine chain's own
    coefficients and noises enter exactly (methods/collocation/interval.py, system.py). All nodes are iterated to
    self-consistency by quasi-Newton sweeps (solver.py). The interpolation error is estimated (defect.py, error.py), and the
    mesh is refined where it is too large (refine.py). A sample that would need a large part of the chain's nodes is handed over
    to the window method. Collocation pays on long chains; a chain of few steps has nothing to interpolate.

    Our own. Near it: exponential collocation; Lagrange interpolation in Picard blocks (arXiv 2510.18242); collocation of low
    degree (arXiv 2601.10708); schemes of strong order 1.5 for the averaged states of stochastic chains.

    Args:
        nodes: Number of nodes of the first mesh, the fine nodes themselves (0 first), or `auto`: by the tolerance.
        window: Most rows that a sample puts in one round; None for no bound. A small window costs few rounds more and saves
            evaluations.
        tolerance: Root mean square error to the target that the sample may have by estimate, in the data's units.
        order: Degree of the interpolation in log(alpha^2/sigma^2) between nodes; 0 takes constants at averaged states. None
            for 0 on stochastic chains and 3 on deterministic ones.
        shift: Variance of the data, which sets the linear part that is not interpolated; `auto` starts from 1/4 and replaces
            it by the mean square of the sample if that is far off; a given one is replaced where it is 256 times off.
        secants: Secant pairs kept for each node; 0 for plain Picard sweeps, 1000 at most.
        max_nodes: Most nodes that a sample may have; as many as the chain has by default.
        exact: Goes on over all nodes of the chain, from the sample found, until the window method's own estimate (that of
            quasi_newton), tightened for samples that amplify early errors, is within the tolerance.
        target: `chain`: the sequential chain's sample. `ode` or `sde`: that of the equation which the chain discretizes, on
            its range of levels, from the same start (samplers/continuum.py).
        warm_start: File that stores where samples of this model needed their nodes, for later ones to start from
            (methods/collocation/mesh_store.py); made if it does not exist.
        control: The tuned numbers (methods/collocation/control.py); those of the interpolation's order by default.

    Raises:
        ValueError: If `warm_start` is a file that is no mesh store, or in a folder that does not exist.
    """
    method = CollocationMethod(
        nodes=nodes,
        order=order,
        shift=shift,
        window=window,
        tolerance=tolerance,
        secants=secants,
        max_nodes=max_nodes,
        exact=exact,
        target=target,
        warm_start=warm_start,
        control=control,
    )
    if method.warm_start is not None:
        require_store(Path(method.warm_start))
    return method
