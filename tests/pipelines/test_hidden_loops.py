# SPDX-License-Identifier: Apache-2.0
"""Loops that the methods of the pipeline's class do not show: under another name of the scheduler, in a function, in
an object. What their passes leave in variables is read from the function that runs."""

from __future__ import annotations

import linecache

import diffusers
import pytest
from test_further_loops import both

BODY = """
    s = pipe.scheduler
    SETUP
    for i, t in enumerate(s.timesteps):
        v = pipe.net(x, t) * (1 - 0.002 * i)
        x = s.step(v, t, x)[0]
        AFTER
    return x RESULT
"""
WHERE = {
    "another name": "def loop(pipe, x, generator):" + BODY,
    "a function": "def loop(self, x, generator):\n    return type(self).outer(self, x)\n\ndef outer(pipe, x):" + BODY,
    "a function within": "def loop(pipe, x, generator):\n    def run(x):"
    + BODY.replace("\n    ", "\n        ")
    + "    return run(x)\n",
    "an object": "def loop(self, x, generator):\n    return type(self).Sampler()(self, x)\n\nclass Sampler:\n"
    "    def __call__(self, pipe, x):" + BODY.replace("\n    ", "\n        ") + "\n",
}
"""Places of a loop."""

LEFT = {
    # name: (setup, after the step, what is returned, reason)
    "nothing": ("pass", "pass", "", None),
    "a mean": ("m = 0 * x", "m = m + x", "+ m / 30", "leave m to the next one"),
    "a half": ("m = x", "m = 0.5 * (m + x)", "+ m", "leave m to the next one"),
    "a sum in place": ("m = 0 * x", "m += x", "+ m / 30", "leave m to the next one|add to m, which is read after"),
    "a count": ("k = 0", "k += 1\n        if k == 30: x = 0.5 * x", "", "leave k to the next one"),
    "a count of steps": ("k = -1", "k += 2\n        x = x if k < 59 else x.clamp(-0.1, 0.1)", "", "leave k to the next one"),
    "a count for a log": ("k = 0", "k += 1\n        if k % 10 == 0: print(k)", "", None),
    "one state": ("m = x", "if i == 12: m = x", "+ m", "leaves m to what follows the loop"),
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("where", WHERE)
def test_what_passes_leave_in_variables_is_seen(where: str, left: str) -> None:
    setup, after, result, reason = LEFT[left]
    margin = next(line for line in WHERE[where].splitlines() if "AFTER" in line).removesuffix("AFTER")
    after = after.replace("\n        ", f"\n{margin}")
    text = WHERE[where].replace("SETUP", setup).replace("AFTER", after).replace(" RESULT", result)
    plain, found, report = both(text, "lanes", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    if reason is None:
        assert report.executor == "lanes", report.warnings
        assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error
    else:
        assert report.executor == "sequential"
        assert (found == plain).all()
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(report.warnings)


def test_a_loop_without_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = WHERE["another name"].replace("SETUP", "m = 0 * x").replace("AFTER", "m = m + x").replace("RESULT", "+ m / 30")
    monkeypatch.setattr(linecache, "getlines", lambda *_: [])
    plain, found, report = both(text, "lanes", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert (found == plain).all()
    assert "the source of loop, where its loop may be, cannot be read" in report.warnings[0]
