# SPDX-License-Identifier: Apache-2.0
"""A part of what strangers.py tries: none is silently wrong, and none is refused or followed by chance."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary
from attacks import Conditioned, written
from stranger_parts import ReadsNumber, put
from strangers import METHODS, PARTS, judged
from torch import Tensor, nn

from paradiff import parallelize

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers call numpy
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

FOLLOWED = [
    "a hook that holds the pipeline",
    "a part that reads what is the same",
    "a helper of the pipeline itself",
    "a helper that sets the pipeline itself",
    "a helper that holds the scheduler",
    "a hook that holds the scheduler's levels",
    "a step of the scheduler that a helper holds",
    "a network that reads a context",
    "a switched autocast that is seen",
    "a scheduler that writes",
    "a scheduler with a buffer",
    "a buffer for the time, on the pipeline",
    "traced",
]
"""What lanes follow."""

REFUSED = {
    "a network that answers by the first row's time": "gave a state other values among",
    "a network that reads the pipeline": "reads _gain of the Adversary, which is another one in each pass",
    "a network that holds the pipeline, switched": "reads _gain of the Adversary",
    "a part that holds the scheduler": "reads (_?step_index) of the FlowMatchEulerDiscreteScheduler",
    "a switched class": "changes ReadsClass.w, which a network reads",
    "a switched number": "changes NUMBER, which a network reads",
    "a switched attribute of a function": "changes number.w, which a network reads",
    "a switched environment": "changes the environment, which a network reads",
    "a switched global": r"changes GLOBAL\['w'\], which a network reads",
    "a queue that a thread fills": "calls get of a Queue within self, by which it waits for another thread",
    "a value set by another thread": "calls wait of a Event",
    "a barrier": "calls wait of a Barrier",
    "a look ahead": "copies its scheduler",
    "a scheduler that mixes images": "mixes the samples of a batch",
    "a scheduler that holds another": "has no set_timesteps in its class",
    "a deque of outputs": "keeps something from one pass to the next",
    "a bar's count": "bar.n|keeps something from one pass to the next",
    "a level edited in the loop": "changes the sigmas of its scheduler",
}
"""Why lanes refuse the others."""


@pytest.mark.parametrize("name", FOLLOWED)
def test_it_is_followed(name: str) -> None:
    verdict = judged(name, "lanes", METHODS["coarse"][1]())
    assert verdict.kind == "parallel", verdict.text


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_for_its_reason(name: str) -> None:
    verdict = judged(name, "lanes", METHODS["coarse"][1]())
    assert verdict.kind == "refused", verdict.text
    with pytest.raises(AssertionError, match=REFUSED[name]):
        raise AssertionError(verdict.text)


@pytest.mark.parametrize("name", list(PARTS)[::6])
@pytest.mark.parametrize("method", ["coarse", "lanes, narrow"])
def test_it_gives_the_plain_sample_or_the_plain_call(name: str, method: Any) -> None:
    executor, make = METHODS[method]
    verdict = judged(name, executor, make())
    assert verdict.kind in ("parallel", "refused", "same error"), verdict.text


def test_a_callback_that_changes_what_a_network_reads_elsewhere_is_refused() -> None:
    kind = Adversary.of(written({"setup": "pass"}))

    class Called(kind):
        def __call__(self, generator: Any = None, callback_on_step_end: Any = None) -> Any:
            return kind.__call__(self, generator)

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        put(0.5)
        return tensors

    pipe = Called(ReadsNumber(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    try:
        with pytest.raises(ValueError, match="callback_on_step_end changed NUMBER after step 0"):
            parallelize(pipe, METHODS["fine"][1]())(callback_on_step_end=callback)
    finally:
        put(1.0)


class Whole(nn.Module):
    """An object whose velocity is computed by a part that holds it, and whose loop sets what the part reads."""

    k: Any

    def __init__(self, within: bool) -> None:
        super().__init__()
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.net, self.scheduler, self.k = Conditioned(), scheduler, 0
        self.velocity: Any = lambda x, t: self.net(x, t) * (1.0 if within else 1 - 0.02 * self.k)
        if within:
            self.net.a.register_forward_hook(lambda module, args, output: output * (1 - 0.02 * self.k))

    @torch.no_grad()
    def walk(self, generator: torch.Generator) -> Tensor:
        scheduler: Any = self.scheduler
        scheduler.set_timesteps(24)
        x = torch.randn(2, 8, generator=generator)
        for i, t in enumerate(scheduler.timesteps):
            self.k = i
            x = scheduler.step(self.velocity(x, t), t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("within", [False, True])
def test_a_part_that_holds_an_object_sees_what_its_loop_sets_or_the_call_is_plain(within: bool) -> None:
    wanted = Whole(within).walk(torch.Generator().manual_seed(1))
    run = parallelize(Whole(within), METHODS["coarse"][1](), entry="walk")
    if within:
        with pytest.warns(RuntimeWarning, match="changes self.k, which a network reads"):
            assert torch.equal(run(generator=torch.Generator().manual_seed(1)), wanted)
    else:
        found = run(generator=torch.Generator().manual_seed(1))
        assert run.report.executor == "lanes"
        assert float((found - wanted).square().mean().sqrt()) < 1e-3
