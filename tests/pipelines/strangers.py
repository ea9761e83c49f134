# SPDX-License-Identifier: Apache-2.0
"""Loops, networks and schedulers of kinds that the other adversaries have not: what passes share by the pipeline or a network.

Each is a few lines put into the loop of attacks.py, a network or a scheduler. A call is right if it gives the plain call's
sample up to its estimate, or the plain call itself with a reason; and if generators, networks and what the pipeline keeps are
as after the plain call.

    python tests/pipelines/strangers.py [words in names]

runs all of them, or those with such names, in several executors and methods, and prints the verdicts.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy
import torch
from adversary import Adversary, Verdict
from attacks import SCHEDULERS, Conditioned, written
from stranger_loops import LOOPS
from stranger_parts import CHANGES, CONTEXT, GLOBAL, KINDS, LOCAL, NETWORKS, Guider, Optioned, ReadsClass, number, put
from torch import Tensor, nn

from paradiff import collocation, parallelize, parasolver, quasi_newton

METHODS: dict[str, tuple[str, Callable[[], Any]]] = {
    "fine": ("auto", lambda: parasolver(tolerance=1e-4)),
    "coarse": ("auto", lambda: quasi_newton(tolerance=2e-2)),
    "lanes, fine": ("lanes", lambda: parasolver(tolerance=1e-4)),
    "lanes, narrow": ("lanes", lambda: parasolver(window=5, tolerance=1e-3)),
    "collocation": ("auto", lambda: collocation(tolerance=1e-3)),
}
"""Executors and methods."""

PARTS: dict[str, Mapping[str, str]] = {
    **LOOPS,
    **{f"a network that {name}": {"network": name} for name in NETWORKS if not name.startswith(("reads", "asks"))},
    **{
        name: {"change": name}
        for name in CHANGES
        if not name.startswith(("holds", "a hook within", "a hook on", "a helper", "a queue in"))
    },
    **{name: {"kind": name} for name in KINDS},
}
"""All of them by their names."""


def judged(name: str, executor: Any, method: Any) -> Verdict:
    """The plain call and the parallel one, compared."""
    parts = PARTS[name]
    scope = {"GLOBAL": GLOBAL, "CONTEXT": CONTEXT, "LOCAL": LOCAL, "Guider": Guider, "put": put, "number": number}
    scope |= {"diffusers": diffusers, "nn": nn}
    kind = Adversary.of(written({"pass": "pass", **{k: v for k, v in parts.items() if k in SLOTS}}), **scope)

    def made() -> Any:
        torch.manual_seed(0)
        GLOBAL.clear()
        GLOBAL["w"] = 1.0
        LOCAL.__dict__.clear()
        CONTEXT.set(1.0)
        ReadsClass.w = 1.0
        put(1.0)
        vars(number).clear()
        scheduler = KINDS[parts["kind"]] if "kind" in parts else SCHEDULERS[parts.get("scheduler", "flow")]
        pipe = kind(NETWORKS[parts["network"]]() if "network" in parts else Optioned(), scheduler())
        object.__setattr__(pipe, "second", Conditioned(5))
        if "change" in parts:
            CHANGES[parts["change"]](pipe)
        return pipe

    def called(pipe: Any, call: Any) -> tuple[Any, list[Any]]:
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        generator = torch.Generator().manual_seed(3)
        try:
            found = call(generator=generator)
        except Exception as error:
            found = error
        after = [generator.get_state(), torch.get_rng_state(), torch.tensor(hash(random.getstate()) % 2**31)]
        return found, [*after, *pipe.net.state_dict().values(), torch.tensor(float(torch.get_default_dtype() == torch.float32))]

    pipe = made()
    plain, state = called(pipe, pipe)
    kept = getattr(pipe, parts["reads"]) if "reads" in parts else None
    hooks = len(pipe.net._forward_hooks), pipe.net.training
    torch.set_default_dtype(torch.float32)
    pipe = made()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call = parallelize(pipe, method, executor=executor)
        found, after = called(pipe, call)
    torch.set_default_dtype(torch.float32)
    if isinstance(found, ValueError) and "states were changed between steps" in str(found):
        return Verdict("refused", str(found))
    if isinstance(plain, Exception) or isinstance(found, Exception):
        same = type(plain) is type(found) and str(plain) == str(found)
        return Verdict("same error" if same else "ERROR", f"{found!r}; plainly {plain!r}"[:400])
    report = call.report
    if not all(torch.equal(a, b) for a, b in zip(state, after, strict=True) if isinstance(a, Tensor)):
        which = [
            k for k, (a, b) in enumerate(zip(state, after, strict=True)) if isinstance(a, Tensor) and not torch.equal(a, b)
        ]
        return Verdict("WRONG", f"a generator or buffer is elsewhere than after the plain call: {which}; {report.warnings}")
    if (len(pipe.net._forward_hooks), pipe.net.training) != hooks:
        return Verdict("WRONG", "the network is another one than after the plain call")
    rms = float((found.double() - plain.double()).square().mean().sqrt())
    if report.executor == "sequential":
        wrong = "repeats" not in parts and not (rms == 0 and (kept is None or getattr(pipe, parts["reads"]) == kept))
        if not [w for w in caught if "called sequentially" in str(w.message)]:
            return Verdict("SILENT", report.message)
        return Verdict("WRONG" if wrong else "refused", (f"off by {rms:.1e}: " if wrong else "") + report.warnings[-1])
    told, size = report.error_estimate.estimated_error, max(1.0, float(plain.square().mean().sqrt()))  # pyright: ignore[reportOptionalMemberAccess]
    text = f"{report.executor}, {report.rounds} rounds, RMS error {rms:.1e}, estimate {told:.1e}"
    if "reads" in parts:
        now = getattr(pipe, parts["reads"])
        close = len(now) == len(kept) if isinstance(kept, list) else abs(now - kept) <= max(2 * told, 1e-5)
        if not close:
            return Verdict("WRONG", f"pipe.{parts['reads']} is {now} where the plain call's is {kept}; {text}"[:300])
    return Verdict("parallel" if rms <= max(2 * told, 1e-5 * size) else "WRONG", text)


SLOTS = ("setup", "head", "before", "within", "step", "after", "end")


def main() -> None:
    verdicts = Counter[str]()
    names = [name for name in PARTS if any(word in name for word in sys.argv[1:] or [name])]
    for name in names:
        for tolerance, (executor, method) in METHODS.items():
            try:
                verdict = judged(name, executor, method())
            except Exception as error:
                verdict = Verdict("CRASH", f"{type(error).__name__}: {error}")
            verdicts[verdict.kind] += 1
            print(f"{verdict.kind:8} {name}, {tolerance}: {verdict.text[:260]}", flush=True)
    print(f"{len(names)} calls, {dict(verdicts)}")


if __name__ == "__main__":
    main()
