# SPDX-License-Identifier: Apache-2.0
"""The contents of run.json (docs/run_json.md): one run of the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paradiff.planning.effectivity import Effectivity
from paradiff.solver.records import Record
from paradiff.solver.solution import ErrorBound, Solution

if TYPE_CHECKING:
    from paradiff.app.calls import Call  # which imports all that pipelines need, also where a pixel model is sampled

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What was asked for, what took effect, and where and when it ran.

    Attributes:
        arguments: What the user asked for, defaults included.
        effective: The method's options as they took effect.
        environment: From environment.py.
        date: ISO 8601, UTC.
    """

    arguments: Mapping[str, Any]
    effective: Mapping[str, Any]
    environment: Mapping[str, Any]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def to_json(self) -> dict[str, Any]:
        """The fields that run.json begins with."""
        return {
            "schema_version": SCHEMA_VERSION,
            "date": self.date,
            "arguments": dict(self.arguments),
            "effective": dict(self.effective),
            "environment": dict(self.environment),
        }


def report(
    heading: Heading,
    solution: Solution,
    seconds: float,
    seeds: Sequence[int],
    sequential: tuple[Solution, float] | None,
) -> dict[str, Any]:
    """The contents for a pixel model, whose seeds are one batch.

    Args:
        heading: What was asked for, and where it ran.
        solution: The parallel run.
        seconds: Its whole clock.
        seeds: The seed of every sample.
        sequential: The sequential run and its whole clock, or None.
    """
    samples, bound = [], solution.calibrated
    for k, (seed, error_estimate) in enumerate(zip(seeds, solution.error_estimates, strict=True)):
        error = None
        if sequential is not None:
            gap = difference(solution.sample[k], sequential[0].sample[k])
            error = {"rms": gap.square().mean().sqrt().item(), "max": gap.max().item()}
        samples.append(
            {
                "seed": seed,
                "rounds": error_estimate.rounds,
                "evaluations": error_estimate.evaluations,
                "residual": error_estimate.residual,
                "estimated_error": error_estimate.estimated_error,
                "interpolation_error": error_estimate.interpolation_error,
                "error_bound": None if bound is None else bound.of(error_estimate.estimated_error),
                "error": error,
            }
        )
    result: dict[str, Any] = {
        **heading.to_json(),
        "rounds": solution.rounds,
        "evaluations": solution.evaluations,
        "seconds": seconds,
        "status": solution.message,
        "status_code": solution.status.code,
        "samples": samples,
        "calibrated": _calibrated(bound),
        "effectivity": None,
        "sequential": None,
        "speedup": None,
        "history": [_record(entry, seeds) for entry in solution.history],
        "pipeline": None,
    }
    if sequential is not None:
        reference, clock = sequential
        result["sequential"] = {"rounds": reference.rounds, "evaluations": reference.evaluations, "seconds": clock}
        result["speedup"] = {"rounds": reference.rounds / solution.rounds, "seconds": clock / seconds}
        pairs = ((one["estimated_error"], one["error"]["rms"]) for one in samples)
        result["effectivity"] = Effectivity.of(pairs).to_json()
    return result


def pipeline_report(heading: Heading, pipeline: str, calls: Sequence[Call], given: Mapping[str, Any]) -> dict[str, Any]:
    """The contents for a pipeline, whose seeds are calls one after the other: rounds, rows and seconds add up.

    Args:
        heading: What was asked for, and where it ran.
        pipeline: Its class's name.
        calls: One a seed.
        given: The arguments of its call.
    """
    samples, plain = [], [call.plain for call in calls if call.plain is not None]
    for call in calls:
        error_estimate, steps = call.report.error_estimate, None if call.plain is None else call.plain.steps or None
        error = None
        if call.plain is not None:
            gap = difference(call.output.data, call.plain.output.data)
            error = {"rms": gap.square().mean().sqrt().item(), "max": gap.max().item()}
        samples.append(
            {
                "seed": call.seed,
                "rounds": steps if error_estimate is None else call.report.rounds,
                "evaluations": steps if error_estimate is None else call.report.rows,
                "residual": 0.0 if error_estimate is None else error_estimate.residual,
                "estimated_error": 0.0 if error_estimate is None else error_estimate.estimated_error,
                "interpolation_error": 0.0 if error_estimate is None else error_estimate.interpolation_error,
                "error_bound": call.report.error_bound,
                "error": error,
            }
        )
    seconds = sum(call.seconds for call in calls)
    worst = min(calls, key=lambda call: call.report.status.trust).report
    result: dict[str, Any] = {
        **heading.to_json(),
        "rounds": _total(samples, "rounds"),
        "evaluations": _total(samples, "evaluations"),
        "seconds": seconds,
        "status": worst.message,
        "status_code": worst.status.code,
        "samples": samples,
        "calibrated": _calibrated(next((call.report.calibrated for call in calls if call.report.calibrated), None)),
        "effectivity": None,
        "sequential": None,
        "speedup": None,
        "history": [_record(entry, [call.seed]) for call in calls for entry in call.report.history],
        "pipeline": {
            "class": pipeline,
            "scheduler": calls[0].report.scheduler,
            "arguments": dict(given),
            "calls": [
                {
                    "seed": call.seed,
                    "executor": call.report.executor,
                    "steps": call.report.steps,
                    "checks": call.report.checks,
                    "network_calls": call.report.network_calls,
                    "network_rows": call.report.network_rows,
                    "refused_calls": call.report.refused_calls,
                    "refused_rows": call.report.refused_rows,
                    "seconds": call.seconds,
                    "network_seconds": call.report.network_seconds,
                    "status": call.report.message,
                    "status_code": call.report.status.code,
                    "warnings": call.report.warnings,
                }
                for call in calls
            ],
        },
    }
    if plain:
        steps, clock = sum(p.steps for p in plain) or None, sum(p.seconds for p in plain)
        result["sequential"] = {"rounds": steps, "evaluations": steps, "seconds": clock}
        gain = steps / result["rounds"] if steps and result["rounds"] else None
        result["speedup"] = {"rounds": gain, "seconds": clock / seconds}
    return result


def _calibrated(bound: ErrorBound | None) -> dict[str, Any] | None:
    """What a calibration says, if there was one."""
    return None if bound is None else dataclasses.asdict(bound)


def _total(samples: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """The sum over the samples, if it is known of all of them."""
    counts = [one[name] for one in samples]
    return None if None in counts else sum(counts)


def _record(entry: Record, seeds: Sequence[int]) -> dict[str, Any]:
    """One entry of the history."""
    return {"seed": seeds[entry.sample], **entry.to_json()}


def difference(sample: Tensor, reference: Tensor) -> Tensor:
    """Absolute difference of two samples, in float64."""
    return (sample.double() - reference.double()).abs().cpu()


def write_json(contents: dict[str, Any], path: Path) -> None:
    """Writes JSON; infinities become null."""
    path.write_text(json.dumps(_finite(contents), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value
