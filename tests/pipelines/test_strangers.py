# SPDX-License-Identifier: Apache-2.0
"""A part of what strangers.py tries: none is silently wrong, and none is refused or followed by chance."""

from __future__ import annotations

from typing import Any

import pytest
from strangers import METHODS, PARTS, judged

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
