# SPDX-License-Identifier: Apache-2.0
"""PIADM-SDE and PIADM-ODE: Picard iteration over blocks of the chain.

Source: Chen, Ren, Ying and Rotskoff, "Accelerating Diffusion Models with Parallel Sampling: Inference at Sub-Linear Time
Complexity", NeurIPS 2024, arXiv 2405.15986. The reverse process is cut into O(log d) blocks of length O(1). Within a block all
steps are solved at once: from a constant path and noises drawn once, a sweep evaluates the score at every state and runs the
exponential integrator (samplers/exponential.py) with it,

    y[m+1] = e^(h/2) y[m] + b[m] s(y old[m]) + c[m] xi[m],                                                      (1)

and the block's end after K sweeps is the next block's start. (1) is the window loop's sweep with the slope e^(h/2), which is
`freeze_epsilon` on every such table: a change of the state is carried on as if the score (or the noise estimate, a multiple
of it) did not answer to it. So a block is a window, and PIADM a method of the one loop.

Two modes. With `sweeps` given, the paper's: so many sweeps, from a constant path. Without, the library's: a node passes when
the estimated error says so (methods/window/budget.py), a block starts from frozen clean data, and any slope may carry the
changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from paradiff.chain.slope import DATA_VARIANCE, Slope, freeze_epsilon, identity, shifted
from paradiff.errors import shown
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.methods.window.blocks import Blocks
from paradiff.methods.window.corrector import Corrector
from paradiff.methods.window.method import WindowMethod
from paradiff.methods.window.options import Chains, Predictor


def _method(
    name: str,
    chains: Chains,
    blocks: int | Sequence[int],
    sweeps: int | None,
    slope: Slope | None,
    predictor: Predictor | None,
    tolerance: float | None,
    stagger: int | None,
    carry: bool,
    window: int | None,
    corrector: Corrector | None = None,
) -> WindowMethod:
    if sweeps is not None and tolerance is not None:
        raise ValueError(
            f"{name} got sweeps = {shown(sweeps)} and tolerance = {shown(tolerance)}; a fixed number of sweeps heeds no "
            "tolerance: give one"
        )
    published = sweeps is not None
    own = freeze_epsilon if published else identity if chains == "stochastic" else shifted(DATA_VARIANCE)
    return WindowMethod(
        name,
        slope=own if slope is None else slope,
        window=window,
        predictor=predictor if predictor is not None else "copy" if published else "clean",
        tolerance=0.0 if published else DEFAULT_TOLERANCE if tolerance is None else tolerance,
        rule="sweeps" if published else "error",
        sweeps=sweeps,
        blocks=Blocks(blocks, stagger, carry),
        corrector=corrector,
        chains=chains,
    )


def piadm_sde(
    blocks: int | Sequence[int],
    sweeps: int | None = None,
    *,
    slope: Slope | None = None,
    predictor: Predictor | None = None,
    tolerance: float | None = None,
    stagger: int | None = None,
    carry: bool = True,
    window: int | None = None,
) -> WindowMethod:
    """PIADM-SDE: Picard iteration over blocks of a stochastic chain.

    Source: Chen, Ren, Ying and Rotskoff, arXiv 2405.15986, algorithm 1. `paradiff.planning.Theory("sde", ...)` gives the
    parameters that its theorem 3.3 asks for.

    Differs from the paper in: any stochastic table, not only that of the score form; leading nodes, which after k sweeps are
    exact, are not evaluated again; a window may be narrower than a block.

    Args:
        blocks: Number of blocks, balanced in log(alpha/sigma), or the nodes of their edges (`Grid.edges`).
        sweeps: K, sweeps of every block (the paper's mode); None for the error rule.
        slope: The linear part (chain/slope.py). By default `freeze_epsilon`, the paper's, with `sweeps`; without,
            `identity`, which leaves the smallest errors on trained networks.
        predictor: The initial guess for a block's path (methods/window/options.py): by default the paper's `copy` of its first
            state with `sweeps`, and else `clean`.
        tolerance: Without `sweeps`, the root mean square error that the sample may have by estimate, in the data's units;
            4e-3 by default.
        stagger: Sweeps of a block after which the next one joins it, the diagonal schedule (Zhou and Sugiyama, arXiv
            2412.07435); None for blocks in turn.
        carry: Whether changes cross the edges of blocks in flight together in the same sweep; the published schedule lets
            them cross in the next one, and takes more rounds.
        window: Most nodes solved at once, which bounds the memory; None for whole blocks.

    Raises:
        ValueError: If a number is out of its range, or `sweeps` and `tolerance` are both given.
    """
    return _method("piadm_sde", "stochastic", blocks, sweeps, slope, predictor, tolerance, stagger, carry, window)


def piadm_ode(
    blocks: int | Sequence[int],
    sweeps: int | None = None,
    corrector: Corrector | None = None,
    *,
    slope: Slope | None = None,
    predictor: Predictor | None = None,
    tolerance: float | None = None,
    stagger: int | None = None,
    carry: bool = True,
    window: int | None = None,
) -> WindowMethod:
    """PIADM-ODE: Picard iteration over blocks of a deterministic chain.

    Source: Chen, Ren, Ying and Rotskoff, arXiv 2405.15986, algorithm 2. `paradiff.planning.Theory("ode", ...)` gives the
    parameters that its theorem 3.5 asks for.

    Differs from the paper in: any deterministic table, not only that of the score form; leading nodes, which after k sweeps are
    exact, are not evaluated again; a window may be narrower than a block; no corrector unless one is given, for at equal rounds
    `piadm_sde` came nearer to the law in nearly every case measured (docs/methods/piadm.md).

    Args:
        blocks: Number of blocks, balanced in log(alpha/sigma), or the nodes of their edges (`Grid.edges`).
        sweeps: K, sweeps of every block (the paper's mode); None for the error rule.
        corrector: What follows every block at whose end noise is left: `underdamped_langevin(...)`
            (methods/window/corrector.py). The sample is then that of the sequential chain with the same corrector. Not with a
            stagger.
        slope: The linear part (chain/slope.py). By default `freeze_epsilon`, the paper's, with `sweeps`; without,
            `shifted(0.25)`, data of variance 1/4, which takes the fewest rounds.
        predictor: The initial guess for a block's path (methods/window/options.py): by default the paper's `copy` of its first
            state with `sweeps`, and else `clean`.
        tolerance: Without `sweeps`, the root mean square error that the sample may have by estimate, in the data's units;
            4e-3 by default.
        stagger: Sweeps of a block after which the next one joins it, the diagonal schedule (Zhou and Sugiyama, arXiv
            2412.07435); None for blocks in turn.
        carry: Whether changes cross the edges of blocks in flight together in the same sweep; the published schedule lets
            them cross in the next one, and takes more rounds.
        window: Most nodes solved at once, which bounds the memory; None for whole blocks.

    Raises:
        ValueError: If a number is out of its range, `sweeps` and `tolerance` are both given, or a stagger and a
            corrector.
    """
    return _method("piadm_ode", "deterministic", blocks, sweeps, slope, predictor, tolerance, stagger, carry, window, corrector)
