# SPDX-License-Identifier: Apache-2.0
"""Calibrations of a model's methods, made once and kept in the user's cache folder (store.py); runs state their bounds.

A calibration is of a model with its weights, a chain, the shape of its samples, a method with all its hyper-parameters,
tolerance and window among them, the dtypes, and the versions. A run of any other has no bound.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paradiff.chain.noise import Keyed, Noise, Recorded
from paradiff.chain.table import Table
from paradiff.errors import is_whole, shown
from paradiff.planning.calibration import COVERAGE, Calibration, require_coverage, require_enough
from paradiff.planning.fingerprint import PACKAGES, fingerprint
from paradiff.planning.identity import conditioning_keys, network_key
from paradiff.planning.store import Store, digest
from paradiff.solver.agreement import versions
from paradiff.solver.arguments import evaluates
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Chooses, Evaluate, Method, Problem
from paradiff.solver.solution import ErrorBound, Solution, Status

SEEDS = range(10**6, 10**6 + 39)
"""The seeds of a calibration where none are given. Of 39 the bound is the second largest ratio, so that one odd seed does not
decide it; the share of samples that it covers has a standard deviation of 0.034."""

MOST_SEED = 2**63
"""Seeds are smaller: those of torch's generators, as pipelines take them."""


def store(folder: Path | None = None) -> Store:
    """Where calibrations are kept; None for the user's cache folder."""
    return Store("calibration", folder, renewed_by="paradiff calibrate")


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What a calibration is of. Subjects are compared by identity.

    Attributes:
        model: The model.
        chain: The chain, its name and steps.
        method: The method.
        key: Of its entry in the store.
        networks: The networks, whose weights are read where there is an entry.
        conditioning: Digests of the conditioning of samples; empty where there is none.
    """

    model: str
    chain: str
    method: Method
    key: str
    networks: Sequence[Any]
    conditioning: Sequence[str]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What has to be as it was. Reads the weights."""
        found = fingerprint([*self.networks])
        own = {"model": self.model, "chain": self.chain, "method": repr(self.method), "key": self.key}
        return {**own, "weights": found.weights, "code with its settings": found.settings, **versions(*PACKAGES)}


def subject_of(evaluate: Evaluate, table: Table, shape: Sequence[int], method: Method, dtype: torch.dtype) -> Subject:
    """The subject of a network's calibration.

    Args:
        evaluate: The model.
        table: The chain.
        shape: Shape of one sample.
        method: The method.
        dtype: Dtype of the states.
    """
    model = evaluate.denoiser if isinstance(evaluate, Evaluator) else evaluate
    return Subject(
        getattr(model, "__qualname__", type(model).__qualname__),
        f"{table.name} of {table.steps} steps",
        method,
        digest(network_key(evaluate, dtype), [*shape], fingerprint(table), fingerprint(method), dtype),
        [model],
        conditioning_keys(evaluate),
    )


def stored_calibration(subject: Subject, folder: Path | None = None) -> tuple[Calibration | None, list[str]]:
    """The stored calibration of a subject, None where there is none that holds; and sentences: which was left out, and why.

    Args:
        subject: What it is of.
        folder: Where calibrations are kept; None for the user's cache folder.
    """
    kept = store(folder)
    path = kept.path(subject.key)
    if path is None or not os.path.exists(path):  # which no name is too long for
        return None, []
    content, notice = kept.read(subject.key, subject.facts)
    if content is None:
        return None, [] if notice is None else [notice]
    try:
        found = Calibration.of_json(content)
    except ValueError as error:
        return None, [f"the stored calibration {str(path)!r} was left out: {error}"]
    if not {*subject.conditioning} <= {*found.conditioning}:
        return None, [f"the stored calibration {str(path)!r} was left out, since it is of other conditioning than this run's"]
    return found, []


def bounded(
    solution: Solution,
    evaluate: Evaluate,
    table: Table,
    noise: Noise,
    method: Method,
    dtype: torch.dtype = torch.float32,
    *,
    folder: Path | None = None,
) -> Solution:
    """A run's solution with the bound of a stored calibration, where there is one; or with the reason why one was left out.

    A run that was stopped has no bound, nor has one whose noise is not drawn by `Keyed` or `Recorded`.

    Args:
        solution: The solution of a run from the noise's own beginning.
        evaluate: The model.
        table: The chain.
        noise: The run's noise.
        method: The method.
        dtype: Dtype of the states.
        folder: Where calibrations are kept; None for the user's cache folder.
    """
    drawn = type(noise) in (Keyed, Recorded)
    if solution.status is Status.STOPPED or not drawn or isinstance(method, Chooses) or store(folder).empty:
        return solution
    calibrated, notes = bound_of(subject_of(evaluate, table, noise.shape, method, dtype), folder)
    message = "; ".join([solution.message, *clauses(calibrated, solution.estimated_error), *notes])
    return dataclasses.replace(solution, message=message, calibrated=calibrated)


def bound_of(subject: Subject, folder: Path | None = None) -> tuple[ErrorBound | None, list[str]]:
    """The bound of a stored calibration, as `stored_calibration` finds it."""
    found, notes = stored_calibration(subject, folder)
    return None if found is None else found.bound, notes


def clauses(bound: ErrorBound | None, estimated_error: float) -> list[str]:
    """The clause of a bound, where there is one."""
    return [] if bound is None else [bound.said(estimated_error)]


def calibration_of(
    denoiser: Denoiser | Evaluate,
    table: Table,
    method: Method,
    seeds: Sequence[int] = SEEDS,
    *,
    shape: Sequence[int] | None = None,
    coverage: float = COVERAGE,
    folder: Path | None = None,
) -> Calibration:
    """Calibrates a method on a network (`paradiff.calibrate`), and stores what was found.

    Args:
        denoiser: The model, or an evaluator of it, whose conditioning has a row for each seed.
        table: The chain.
        method: The method.
        seeds: The seeds, a sample each.
        shape: Shape of one sample; None for that of the model.
        coverage: The share of samples that the bound is to hold for.
        folder: Where calibrations are kept; None for the user's cache folder.

    Raises:
        ValueError: If an argument is of another kind, the method does not fit the chain, or too few runs came to their end.
    """
    require_calibrated(method, seeds, coverage)
    evaluate = denoiser if evaluates(denoiser) else Evaluator(denoiser)
    noise = Keyed(shape_of(evaluate) if shape is None else shape, list(seeds))
    rows = {len(value) for value in evaluate.conditioning.values()} if isinstance(evaluate, Evaluator) else set()
    if rows - {len(seeds)}:
        raise ValueError(
            f"the conditioning has {min(rows - {len(seeds)})} rows, and {len(seeds)} seeds are to be run; give one row a seed"
        )
    runs = runs_of(evaluate, table, noise, method)
    subject = subject_of(evaluate, table, noise.shape, method, torch.float32)
    return kept_calibration(subject, runs, len(seeds), coverage, folder)


def runs_of(evaluate: Evaluate, table: Table, noise: Noise, method: Method) -> list[tuple[float, float]]:
    """True error and estimate of each sample that was not stopped; all of them are one batch, in which each is its own.

    Args:
        evaluate: The model.
        table: The chain.
        noise: The samples.
        method: The method.

    Raises:
        ValueError: If the method does not fit the chain.
    """
    plain = sample(evaluate, table, noise, method.reference(), check="off").sample
    found = sample(evaluate, table, noise, method)
    errors = (found.sample.double() - plain.double()).square().flatten(1).mean(1).sqrt().tolist()
    pairs = zip(errors, found.error_estimates, strict=True)
    if found.status is Status.STOPPED:  # the batch was, and some of its samples by themselves were not
        run = method.prepare(Problem(table=table, noise=noise, device=evaluate.device))
        pairs = [(error, of) for error, of in pairs if run.status([of])[0] is not Status.STOPPED]
    return [(error, of.estimated_error) for error, of in pairs]


def kept_calibration(
    subject: Subject, runs: Sequence[tuple[float, float]], seeds: int, coverage: float, folder: Path | None = None
) -> Calibration:
    """The calibration of the runs that were not stopped, which is stored in place of an older one.

    Args:
        subject: What it is of.
        runs: The true error and the estimate of each.
        seeds: How many runs there were with those that were stopped.
        coverage: The share of samples that the bound is to hold for.
        folder: Where calibrations are kept; None for the user's cache folder.

    Raises:
        ValueError: If the runs are too few.
    """
    if len(runs) < seeds:
        require_enough(len(runs), coverage, f"of {seeds} seeds came to their end, the runs of others were stopped")
    made = Calibration(
        chain=subject.chain,
        method=repr(subject.method),
        errors=[error for error, _ in runs],
        estimates=[estimate for _, estimate in runs],
        coverage=coverage,
        stopped=seeds - len(runs),
        conditioning=sorted({*subject.conditioning}),
    )
    notice = store(folder).write(subject.key, subject.facts, made.to_json())
    return made if notice is None else dataclasses.replace(made, notes=(notice,))


def require_calibrated(method: Any, seeds: Any, coverage: Any) -> None:
    """Refuses what cannot be calibrated.

    Raises:
        ValueError: If an argument is of another kind, a seed was given twice, there are too few, or the method is chosen anew
            for each run, or learns from it.
    """
    require_coverage(coverage)
    if isinstance(method, Chooses):
        raise ValueError(
            f"the method is {shown(method)}, whose choices depend on the clock; calibrate the one that it chooses, which "
            "`paradiff plan` names"
        )
    if not isinstance(method, Method):
        raise ValueError(f"the method is {shown(method)}; give one of paradiff's, such as paradiff.parasolver(window=16)")
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Sequence):
        raise ValueError(f"the seeds are {shown(seeds)}; give whole numbers, such as range(39)")
    wrong = next((seed for seed in seeds if not is_whole(seed) or not 0 <= seed < MOST_SEED), None)
    if wrong is not None:
        raise ValueError(f"a seed is {shown(wrong)}; it must be a whole number in 0 ... 2^63 - 1")
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed was given twice, and each has to be a sample of its own; give each once")
    if not method.solves_chain:
        raise ValueError(
            f"{method.name} was given another target than the chain, and errors are measured against the chain's own sample; "
            "leave the target at 'chain'"
        )
    if getattr(method, "warm_start", None) is not None:
        raise ValueError(f"{method.name} was given a warm_start, whose file changes with every run; leave it out")
    require_enough(len(seeds), coverage)


def shape_of(evaluate: Evaluate) -> Sequence[int]:
    """The shape of a model's samples.

    Raises:
        ValueError: If the model does not tell it.
    """
    shape = getattr(evaluate.denoiser if isinstance(evaluate, Evaluator) else evaluate, "shape", None)
    if shape is None:
        raise ValueError("the model does not tell the shape of its samples; give shape, such as shape=(3, 64, 64)")
    return shape
