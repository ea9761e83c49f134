# SPDX-License-Identifier: Apache-2.0
"""A judge of the samples of networks whose rows depend on more than themselves (faulty_networks.py).

It is right to refuse such a network, or to return the plain loop's sample up to the estimate.

    python tests/solver/row_adversary.py [networks [seed [check [runs [seen]]]]]

runs that many networks, drawn from the full product, on every setting, and prints a line for each that is silently wrong, and
why a few rows may not show it. Of several runs with one network, each with other noise, the first that is refused or wrong
counts; with `seen` each is taken for the one that was seen in the run before, whatever it consists of.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from typing import Any
from unittest import mock

import torch
from faulty_networks import MAKERS, SHAPE, Model, answer, drawn, unseen
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Schedule,
    Table,
    collocation,
    jacobi,
    paradigms,
    parasolver,
    quasi_newton,
    sample,
    srds,
)
from paradiff.samplers import ddim, ddpm, dpmpp_2m, flow_euler
from paradiff.solver import Method

NOISY, SHORT, FLOW = (
    ddpm(Schedule.linear(), 40, prediction="sample"),
    ddim(Schedule.linear(), 24, prediction="sample"),
    flow_euler(30, shift=3.0),
)
SETTINGS: dict[str, tuple[Table, Method, int, int | None]] = {
    # name: (table, method, samples, rows of a network call)
    "jacobi": (NOISY, jacobi(tolerance=1e-4), 1, None),
    "parasolver, window 8": (NOISY, parasolver(8, 1e-4), 1, None),
    "parasolver, window 5, three samples": (SHORT, parasolver(5, 1e-4), 3, None),
    "parasolver, the whole chain": (FLOW, parasolver(tolerance=1e-4), 2, None),
    "parasolver, calls of 4": (NOISY, parasolver(16, 1e-4), 1, 4),
    "paradigms": (SHORT, paradigms(6, 1e-4), 1, None),
    "quasi-Newton": (SHORT, quasi_newton(tolerance=1e-4), 1, None),
    "quasi-Newton, multistep": (dpmpp_2m(Schedule.linear(), 20, prediction="sample"), quasi_newton(tolerance=1e-4), 2, None),
    "srds": (SHORT, srds(tolerance=1e-4), 1, None),
    "srds, two samples": (NOISY, srds(tolerance=1e-4), 2, None),
    "collocation": (ddpm(Schedule.linear(), 200, prediction="sample"), collocation(tolerance=1e-2), 1, None),
    "collocation, two samples": (ddim(Schedule.linear(), 100, prediction="sample"), collocation(tolerance=1e-2), 2, None),
}


def plain(model: Model, table: Table, noise: Keyed, samples: list[int]) -> Tensor:
    """The plain loop of some samples in one batch, `[B, ...]`."""
    states = [torch.stack([noise.start(k).float() * table.start_scale for k in samples])]
    outputs: list[Tensor] = []
    for i in range(table.steps):
        t = table.t[i].expand(len(samples))
        t = t.long() if bool((table.t[:-1] == table.t[:-1].round()).all()) else t.float()
        outputs.append(model(states[-1] * float(table.scale[i]), t))
        new = float(table.c[i]) * torch.stack([noise.draw(k, range(i, i + 1))[0].float() for k in samples])
        for j in range(min(table.band, i + 1)):
            new = new + float(table.a[i, j]) * states[i - j] + float(table.b[i, j]) * outputs[i - j]
        states.append(new)
    return states[-1]


class Alike:
    """What every network consists of, where each is taken for one that was seen."""

    def same(self, other: Alike) -> bool:
        """It is."""
        return True


def judged(
    kind: str, given: tuple[Any, ...], setting: str, check: Any = "first", runs: int = 1, seen: bool = False
) -> tuple[str, str]:
    """What the runs with a network came to: `refused`, `right`, or `WRONG`; and what was said. `untouched`: what is wrong with
    the network acted in the plain loop alone, which makes more calls, or such of other shapes."""
    network = MAKERS[kind](*given)
    with mock.patch("paradiff.solver.seen.identity_of", return_value=Alike()) if seen else contextlib.nullcontext():
        what, said = "right", ""
        for number in range(runs):
            what, text = run(network, kind, given, setting, check, Keyed(SHAPE, 5 + number, SETTINGS[setting][2]))
            said = f"run {number + 1}: {text}" if runs > 1 else text
            if what in ("refused", "WRONG"):
                break
    return what, said


def run(network: Model, kind: str, given: tuple[Any, ...], setting: str, check: Any, noise: Keyed) -> tuple[str, str]:
    """What a run came to, as `judged` has it."""
    table, method, samples, rows = SETTINGS[setting]
    make = MAKERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = sample(Evaluator(network, max_rows=rows), table, noise, method, check=check)
        except ValueError as error:
            return "refused", str(error)
    told = torch.tensor([e.estimated_error for e in found.error_estimates])
    together = plain(make(*given), table, noise, [*range(samples)])
    by_themselves = torch.cat([plain(make(*given), table, noise, [k]) for k in range(samples)])
    text = ""
    without = torch.cat([plain(answer, table, noise, [k]) for k in range(samples)])
    for what, wanted in (("right", by_themselves), ("right", together), ("untouched", without)):
        rms = (found.sample - wanted).flatten(1).square().mean(1).sqrt()
        size = wanted.flatten(1).square().mean(1).sqrt().clamp(min=1)
        text += f" off by {float(rms.max()):.1e} of {float(size.max()):.1f}, told {float(told.max()):.1e};"
        if bool((rms <= torch.maximum(2 * told, 2e-5 * size)).all()):
            return what, f"{text} {found.rounds} rounds, {found.checked_rows} checked"
    return "WRONG", text


def main() -> None:
    words = (*sys.argv[1:], *("150", "0", "first", "1", "")[len(sys.argv) - 1 :])
    count, seed, check, runs, seen = int(words[0]), int(words[1]), words[2], int(words[3]), bool(words[4])
    torch.set_num_threads(1)
    verdicts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    late = 0
    for kind, given in drawn(count, seed):
        lost = []
        for setting in SETTINGS:
            what, said = judged(kind, given, setting, check, runs, seen)
            verdicts[what] += 1
            if what == "WRONG":
                late += said.startswith("run ") and not said.startswith("run 1:")
                lost.append(setting)
        if lost:
            why = unseen(kind, given)
            wrong[why or "to be seen"] += len(lost)
            print(f"{kind} {given}: {len(lost)} of {len(SETTINGS)}: {', '.join(lost)} ({why})", flush=True)
    print(f"{count} networks, seed {seed}, check {check}, runs {runs}{', taken for seen' * seen}: {dict(verdicts)}; ", end="")
    print(f"silently wrong: {dict(wrong)}{f', {late} of them in a later run' if runs > 1 else ''}")
    sys.exit("to be seen" in wrong or (check == "every" and bool(wrong)))


if __name__ == "__main__":
    main()
