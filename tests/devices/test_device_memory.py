# SPDX-License-Identifier: Apache-2.0
"""Memory of a device that runs out at one network call after another: the rows come in smaller calls, and the sample is the
same. Where one row, or one state of a pipeline, does not fit, the error is raised, as by the plain call; the next run is none
the worse for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import EXACT, METHODS, SHAPE, TABLES, fitted, gap, network
from test_device_pipelines import EXACTLY, ROUNDING, short
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff import Evaluator, Keyed
from paradiff.solver import Method

LARGE = 2**60
"""Bytes that no device has."""

OTHERS: dict[str, Method] = {
    "srds": paradiff.srds(3),
    "srds, batched": paradiff.srds(3, ordering="batched"),
    "collocation": paradiff.collocation(),
    "chords": paradiff.chords(3),
    "quasi_deer": paradiff.quasi_deer(),
}


class Short:
    """A network whose call of number `at` needs more memory than there is.

    Attributes:
        rows: Of each call.
        failed: Rows of the call that failed; 0 for none yet.
    """

    def __init__(self, at: int) -> None:
        self.at, self.rows, self.failed = at, list[int](), 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows.append(len(x))
        if len(self.rows) == self.at:
            self.failed = len(x)
            torch.empty(LARGE, dtype=torch.uint8, device=x.device)
        return network(x, t)


def numbers(calls: int) -> list[int]:
    """The numbers of a few calls of a run, the first and the last among them."""
    return sorted({1, 2, calls // 2, calls - 1, calls} - {0})


@pytest.mark.parametrize("check", ["off", "first"])
@pytest.mark.parametrize("name", [*list(METHODS)[:20], *OTHERS])
def test_a_run_goes_on_in_smaller_calls(name: str, check: Any) -> None:
    table = TABLES["ddim" if name in ("chords", "quasi_deer") else "exponential_sde" if "piadm" in name else "ddpm"]
    method = OTHERS[name] if name in OTHERS else fitted(METHODS[name](table), table, 5)

    def run(model: Any) -> tuple[paradiff.Solution, Evaluator]:
        evaluator = Evaluator(model, device="pseudo")
        return paradiff.sample(evaluator, table, Keyed(SHAPE, 0), method, dtype=torch.float64, check=check), evaluator

    whole = Short(0)
    wanted, _ = run(whole)
    for at in numbers(len(whole.rows)):
        model = Short(at)
        try:
            found, evaluator = run(model)
        except torch.OutOfMemoryError:
            assert model.failed == 1
            continue
        assert model.failed > 1
        assert evaluator.max_rows == (model.failed + 1) // 2
        assert gap(found.sample, wanted.sample) < EXACT
        assert found.rounds == wanted.rounds
    assert torch.equal(run(Short(0))[0].sample, wanted.sample)


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_pipelines_call_goes_on_in_smaller_calls(executor: Any) -> None:
    pipe, call = CASES["sd"].make(), short("sd")
    wanted = call(pipe)
    pipe.to("pseudo")
    own = pipe.unet.forward
    seen: list[int] = []

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(sample))
        if len(seen) == at:
            torch.empty(LARGE, dtype=torch.uint8, device=sample.device)
        return own(sample, *args, **kwargs)

    pipe.unet.forward = forward

    def parallel() -> paradiff.pipelines.Report:
        with paradiff.parallelize(pipe, EXACTLY, executor=executor, check="off") as run:
            assert gap(call(pipe).cpu(), wanted) < ROUNDING
        return run.report

    at = 0
    parallel()
    widths, state = seen.copy(), seen[0]
    for at in numbers(len(widths)):
        seen.clear()
        if widths[at - 1] > state:
            report = parallel()
            assert report.executor == executor
            assert report.max_rows == (widths[at - 1] // state + 1) // 2 * state
        else:  # one state does not fit
            with pytest.raises(torch.OutOfMemoryError):
                parallel()
    at = 0
    assert parallel().max_rows is None


@pytest.mark.parametrize(("executor", "copies"), [("vector", 1), ("lanes", 2.5)])
def test_the_conditioning_of_guidance_is_copied_once_for_each_state(executor: Any, copies: float) -> None:
    """Its two rows cannot be shown to all states as a view. No round has a second copy, and none is left after the call. In
    lanes the call of each state holds what the plain one does besides: both rows, and the negative one by itself."""
    pipe = CASES["sd"].make().to("pseudo")
    own, tokens = pipe.unet.forward, 2**15
    embeds = torch.randn(1, tokens, pipe.unet.config.cross_attention_dim, device="pseudo")
    size = 2 * embeds.numel() * embeds.element_size()  # of the two rows

    def forward(sample: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return own(sample, t, encoder_hidden_states=encoder_hidden_states[:, :4], **kwargs)

    pipe.unet.forward = forward
    peaks: dict[int, int] = {}
    for window in (2, 4, 8):
        torch.pseudo.reset_peak_memory_stats()
        before = torch.pseudo.memory_allocated()
        with paradiff.parallelize(pipe, paradiff.parasolver(window, tolerance=0.0), executor=executor, check="off") as run:
            pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=embeds,
                num_inference_steps=10,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            )
        assert run.report.executor == executor
        assert run.report.rounds > 4
        peaks[window] = torch.pseudo.max_memory_allocated() - before
        assert torch.pseudo.memory_allocated() - before < size / 4
    for one, two in ((2, 4), (4, 8)):
        assert peaks[two] - peaks[one] < (copies + 0.1) * (two - one) * size
