"""One run of the command line: its folder of results, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from paradiff.app.calls import Call
from paradiff.solver.records import Record
from paradiff.solver.solution import Solution


@contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A scratch folder beside `path` whose files become `path`'s when the block ends well, and vanish when it does not.

    With `overwrite` the files of the run replace those of the same name, one by one, each whole; others stay.

    Raises:
        ValueError: If `path` is a file, a folder that is not empty (without `overwrite`), or cannot be written.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"the output {str(path)!r} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"the output folder {str(path)!r} is not empty; give another one, or --overwrite to replace its files")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        os.chmod(scratch, 0o777 & ~_umask())
    except OSError as error:
        raise ValueError(f"the output {str(path)!r} cannot be written: {error.strerror}; give another folder") from error
    try:
        yield scratch
        if path.is_dir() and any(path.iterdir()):
            for file in scratch.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def report(
    solution: Solution,
    seconds: float,
    seeds: list[int],
    sequential: tuple[Solution, float] | None,
    arguments: dict[str, Any],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The contents of run.json (docs/run_json.md).

    Args:
        solution: The parallel run.
        seconds: Its whole clock.
        seeds: The seed of every sample.
        sequential: The sequential run and its whole clock, or None.
        arguments: What the user asked for, defaults included.
        environment: From environment.py.
    """
    samples = []
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
                "error": error,
            }
        )
    result: dict[str, Any] = {
        "arguments": arguments,
        "environment": environment,
        "rounds": solution.rounds,
        "evaluations": solution.evaluations,
        "seconds": seconds,
        "status": solution.message,
        "samples": samples,
        "sequential": None,
        "speedup": None,
        "history": [_record(entry, seeds) for entry in solution.history],
        "pipeline": None,
    }
    if sequential is not None:
        reference, clock = sequential
        result["sequential"] = {"rounds": reference.rounds, "evaluations": reference.evaluations, "seconds": clock}
        result["speedup"] = {"rounds": reference.rounds / solution.rounds, "seconds": clock / seconds}
    return result


def pipeline_report(
    pipeline: str,
    calls: Sequence[Call],
    given: Mapping[str, Any],
    arguments: dict[str, Any],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The contents of run.json for a pipeline, whose seeds are calls one after the other: rounds, rows and seconds add up.

    Args:
        pipeline: Its class's name.
        calls: One a seed.
        given: The arguments of its call.
        arguments: What the user asked for, defaults included.
        environment: From environment.py.
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
                "error": error,
            }
        )
    seconds = sum(call.seconds for call in calls)
    result: dict[str, Any] = {
        "arguments": arguments,
        "environment": environment,
        "rounds": _total(samples, "rounds"),
        "evaluations": _total(samples, "evaluations"),
        "seconds": seconds,
        "status": min(calls, key=lambda call: call.report.status.trust).report.message,
        "samples": samples,
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
                    "network_rows": call.report.network_rows,
                    "seconds": call.seconds,
                    "network_seconds": call.report.network_seconds,
                    "status": call.report.message,
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
