# SPDX-License-Identifier: Apache-2.0
"""Runs methods side by side on a model, each against the sequential chain of the same noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from paradiff.chain.noise import Noise, noise_along
from paradiff.chain.table import Table
from paradiff.errors import require_kind, require_real, require_truth, shown
from paradiff.methods.presets import sequential
from paradiff.planning.comparison import Compared, Comparison, SampleCost
from paradiff.planning.latency import LatencyCurve
from paradiff.solver.arguments import evaluates, require_model, require_problem
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Batch, Evaluate, Method, Round
from paradiff.solver.solution import Solution

FAILED = 1500
"""Rounds beyond the chain's steps at which a method that does not come to rest is given up."""

CHAIN = "sequential"
"""The label of the chain itself."""


def compare(
    denoiser: Denoiser | Evaluate,
    table: Table,
    noise: Noise,
    methods: Sequence[Method] | Mapping[str, Method],
    *,
    rivals: Mapping[str, Table | tuple[Table, Denoiser | Evaluate]] | None = None,
    curve: LatencyCurve | None = None,
    alone: bool = True,
    unit: float | None = None,
) -> Comparison:
    """Compares methods on a user's own model, chain and noise.

    The model is called without checks: a model whose rows depend on each other shows as an error.

    Args:
        denoiser: The model, or an evaluator of it, as `paradiff.sample` takes it.
        table: The sampler whose sequential sample is sought.
        noise: x[0] and the noises; each of its samples is measured.
        methods: The methods, by the labels of their rows; a sequence has the methods' own reprs for labels.
        rivals: Tables of other samplers, whose sequential chains are walked from the same x[0]: what a user would take
            instead, such as a multistep solver of fewer steps; with a model, where theirs is another function of the times.
            Their noise, if they add any, is that of their own steps.
        curve: The latency curve that gains are computed by; None for this machine's clock. A measured one is
            `paradiff.planning.measure_latency(...)`.
        alone: Whether each sample is run by itself, as at batch 1, the methods taking turns; else all in one batch.
        unit: What errors are divided by; None for the standard deviation of the sequential samples.

    Returns:
        The rows; `print` it for a table, `plot` it, `save` it.

    Raises:
        ValueError: If an argument is of another kind, there is no method, two have the same label, or the sequential samples,
            whose standard deviation errors are told in, are all alike.
    """
    given = _labelled(methods)
    for method in given.values():
        require_problem(table, noise, method)
    others = _rivals(rivals, given)
    require_truth("alone", alone)
    if unit is not None:
        require_real("the unit", unit, positive=True)
    if curve is not None and not isinstance(curve, LatencyCurve):
        raise ValueError(f"the latency curve is {shown(curve)}; give a LatencyCurve, such as LatencyCurve({{1: 1.0, 4: 1.44}})")
    evaluate = _evaluator(denoiser)
    chains = {CHAIN: _Chain(evaluate, table, sequential())}
    chains |= {label: _Chain(evaluate, table, method) for label, method in given.items()}
    for label, rival in others.items():
        own, model = rival if isinstance(rival, tuple) else (rival, evaluate)
        chains[label] = _Chain(_evaluator(model), own, sequential())
    runs, refused = _runs(noise, chains, alone)
    reference = torch.cat([run.solution.sample for run in runs[CHAIN]])
    spread = float(reference.double().std()) if unit is None else unit
    if not 0 < spread < math.inf:
        raise ValueError(
            f"the sequential samples have a standard deviation of {spread:g}, in which no error can be told: give the unit of "
            "errors, unit=1.0, say"
        )
    peak = float(reference.max() - reference.min()) / spread
    rows = [
        _row(label, of.table if label in others else of.method, runs[label], reference, spread, label in others)
        for label, of in chains.items()
        if label in runs
    ]
    return Comparison(f"{table.name} of {table.steps} steps", rows, refused, alone, spread, peak, curve)


@dataclass(frozen=True, eq=False)
class _Chain:
    """What is run under one label."""

    evaluate: Evaluate
    table: Table
    method: Method


@dataclass(frozen=True, eq=False)
class _Sampled:
    """A run of one sample, or of all."""

    solution: Solution
    widths: Sequence[int]
    seconds: float


def _labelled(methods: Any) -> dict[str, Method]:
    """Methods by label.

    Raises:
        ValueError: If there is none, or two have the same label.
    """
    if not isinstance(methods, Sequence | Mapping) or isinstance(methods, str) or not methods:
        raise ValueError(
            f"methods are {shown(methods)}; give a list of them, such as [paradiff.parasolver(), paradiff.srds()], or a dict "
            "of labels and methods"
        )
    pairs = [*methods.items()] if isinstance(methods, Mapping) else [(repr(method), method) for method in methods]
    for label, _ in pairs:
        if not isinstance(label, str) or label == CHAIN:
            raise ValueError(f"a method's label is {shown(label)}; give a text, and not {CHAIN!r}, the chain itself")
    twice = next((label for k, (label, _) in enumerate(pairs) if label in dict(pairs[:k])), None)
    if twice is not None:
        raise ValueError(f"the method {shown(twice)} was given twice; give each once, or a dict of labels and methods")
    return dict(pairs)


def _evaluator(model: Any) -> Evaluate:
    """A model as an evaluator.

    Raises:
        ValueError: If it is none.
    """
    if evaluates(model):
        return model
    require_model(model)
    return Evaluator(cast(Denoiser, model))


def _rivals(rivals: Any, methods: Mapping[str, Method]) -> Mapping[str, Any]:
    """The rivals.

    Raises:
        ValueError: If they are no dict, one has a method's label, or one is no table.
    """
    if rivals is None:
        return {}
    if not isinstance(rivals, Mapping):
        raise ValueError(f"rivals are {shown(rivals)}; give a dict of labels and tables")
    taken = next((label for label in rivals if label in methods or label == CHAIN), None)
    if taken is not None:
        raise ValueError(f"a rival is called {shown(taken)}, as another row is; give it a label of its own")
    for rival in rivals.values():
        pair = isinstance(rival, tuple) and len(rival) == 2
        require_kind("a rival", rival[0] if pair else rival, Table, ", or a pair of a Table and a model")
    return rivals


def _runs(noise: Noise, chains: Mapping[str, _Chain], alone: bool) -> tuple[dict[str, list[_Sampled]], dict[str, str]]:
    """The runs of each chain, one a sample or one of all, the chains taking turns; and why some were refused."""
    runs: dict[str, list[_Sampled]] = {label: [] for label in chains}
    refused: dict[str, str] = {}
    for first in range(noise.samples) if alone else (None,):
        for label, chain in chains.items():
            if label in refused:
                continue
            try:
                runs[label].append(_run(chain, noise, first))
            except ValueError as error:
                if label == CHAIN:
                    raise
                refused[label] = str(error)
                del runs[label]
    return runs, refused


def _run(chain: _Chain, noise: Noise, only: int | None) -> _Sampled:
    """One run: of one sample, or of all."""
    evaluate, table, method = chain.evaluate, chain.table, chain.method
    counting = _Counting(evaluate, only or 0)
    own = noise_along(noise, table.draws, 0)
    begin = time.perf_counter()
    solution = sample(
        counting,
        table,
        own if only is None else _One(own, only),
        method,
        observer=None if method.name == CHAIN else _patience(table.steps + FAILED),
        check="off",
    )
    return _Sampled(solution, counting.widths, time.perf_counter() - begin)


def _patience(most: int) -> Callable[[Round], None]:
    """An observer that gives a run up.

    Raises:
        ValueError: After so many rounds.
    """

    def observe(round: Round) -> None:
        if round.number > most:
            raise ValueError(f"it did not come to rest in {most} rounds")

    return observe


class _Counting:
    """An evaluator that keeps the rows of its calls; sample 0 of its batches is sample `first` of the conditioning."""

    def __init__(self, evaluate: Evaluate, first: int) -> None:
        self._evaluate, self._first = evaluate, first
        self.device, self.dtype = evaluate.device, evaluate.dtype
        self.widths: list[int] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.widths.append(len(batch.x))
        return self._evaluate(replace(batch, samples=batch.samples + self._first))


class _One:
    """One sample of a noise."""

    samples = 1

    def __init__(self, noise: Noise, sample: int) -> None:
        self._noise, self._sample, self.shape = noise, sample, noise.shape

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0]."""
        return self._noise.start(self._sample + sample)

    def draw(self, sample: int, nodes: range) -> Tensor:
        """The draws of consecutive nodes."""
        return self._noise.draw(self._sample + sample, nodes)


def _row(label: str, shown_as: object, runs: Sequence[_Sampled], reference: Tensor, unit: float, rival: bool) -> Compared:
    """The row of one chain."""
    found = torch.cat([run.solution.sample for run in runs])
    errors = (found.double() - reference.double()).square().flatten(1).mean(1).sqrt() / unit
    estimates = [(run, e) for run in runs for e in run.solution.error_estimates]
    samples = [
        SampleCost(
            rounds=e.rounds,
            evaluations=e.evaluations,
            error=error,
            estimated_error=float("inf") if rival else e.estimated_error / unit,
            widths=tuple(run.widths),
            seconds=run.seconds / len(run.solution.sample),
        )
        for (run, e), error in zip(estimates, errors.tolist(), strict=True)
    ]
    status = min((run.solution.status for run in runs), key=lambda status: status.trust)
    return Compared(label=label, method=repr(shown_as), samples=samples, status=status.code, rival=rival)
