# SPDX-License-Identifier: Apache-2.0
"""The bound that a call's report states, where the call was calibrated (`paradiff.calibrate`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from paradiff.pipelines.host.host import Host
from paradiff.pipelines.known import OWN, STEPS, call_key
from paradiff.pipelines.report import Report
from paradiff.pipelines.settings import Settings
from paradiff.planning.calibrations import Subject, bound_of, clauses, store
from paradiff.planning.fingerprint import fingerprint
from paradiff.planning.store import digest
from paradiff.solver.protocol import Chooses, Method
from paradiff.solver.solution import Status


def call_subject(host: Host, given: Mapping[str, Any], method: Method, dtype: torch.dtype) -> Subject:
    """The subject of a call's calibration: its networks, its scheduler, and all its arguments but the generator.

    Args:
        host: What owns the chain.
        given: The call's arguments by name.
        method: The method.
        dtype: Dtype of the solver's states.
    """
    scheduler = host.scheduler
    config = sorted((str(name), str(value)) for name, value in dict(getattr(scheduler, "config", {})).items())
    code = fingerprint([type(scheduler), getattr(scheduler, "alphas_cumprod", None)])
    chain = [type(scheduler).__qualname__, code, config, {name: repr(given[name]) for name in STEPS if name in given}]
    kinds = [str(dtype), host.device.type, sorted(str(network_dtype(one)) for one in host.networks.values())]
    said = {name: fingerprint(value) for name, value in sorted(given.items()) if name not in OWN}
    key = digest(call_key(host, given), chain, fingerprint(method), kinds, said)
    return Subject(host.name, type(scheduler).__name__, method, key, [*host.networks.values()], ())


def network_dtype(network: torch.nn.Module) -> torch.dtype | None:
    """The dtype of a network's first weight; None where it has none."""
    return next((weight.dtype for weight in network.parameters()), None)


def bounded(report: Report, host: Host, given: Mapping[str, Any], settings: Settings) -> Report:
    """A call's report with the bound of a stored calibration, where there is one; or with the reason why one was left out.

    A call that was stopped has no bound, nor has one that begins from a trajectory or whose callback may change its states.

    Args:
        report: The report of a parallel call.
        host: What owns the chain.
        given: The call's arguments by name.
        settings: The settings of the run.
    """
    method, estimate = settings.method, report.error_estimate
    changed = any(given.get(name) is not None for name in OWN if name != "generator")
    if report.status is Status.STOPPED or estimate is None or isinstance(method, Chooses) or changed or store().empty:
        return report
    if settings.start is not None:
        return report
    calibrated, notes = bound_of(call_subject(host, given, method, settings.dtype))
    message = "; ".join([report.message, *clauses(calibrated, estimate.estimated_error), *notes])
    return dataclasses.replace(report, message=message, calibrated=calibrated)
