# SPDX-License-Identifier: Apache-2.0
"""The watch on random draws: what it says of a generator that has advanced."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CASES
from torch import nn

import paradiff
from paradiff.chain.generators import borrowed
from paradiff.errors import Unsupported
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.loop.random_watch import RandomWatch
from paradiff.pipelines.settings import Executor


def test_a_draw_is_the_loops_or_where_there_are_others_maybe_another_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()
    watch = RandomWatch([generator])
    watch.check()
    torch.rand(1, generator=generator)
    with pytest.raises(Unsupported, match="UNet draws random numbers in its call"):
        watch.check("UNet")
    for threads, ending in (
        (1, "a generator among the call's arguments, in the order of its steps$"),
        (2, "or another thread of this process draws meanwhile$"),
    ):
        monkeypatch.setattr(threading, "enumerate", lambda count=threads: [threading.current_thread()] * count)
        with pytest.raises(Unsupported, match=ending):
            watch.check()
    watch.mark()
    watch.check()


DRAWS: dict[str, Callable[[], Any]] = {
    "torch's generator": lambda: torch.rand(()),
    "Python's generator": random.random,
    "numpy's generator": np.random.rand,
}


@pytest.fixture
def numpys_generator() -> Iterator[None]:
    """Leaves numpy's global generator as it was."""
    generator, state = np.random.get_bit_generator(), np.random.get_state()
    yield
    np.random.set_bit_generator(generator)
    np.random.set_state(state)


@pytest.mark.usefixtures("numpys_generator")
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_of_a_global_generator_is_seen(name: str) -> None:
    watch = RandomWatch([])
    for _ in range(2):
        watch.mark()
        watch.check()
        DRAWS[name]()
        with pytest.raises(Unsupported, match=f"from {name}"):
            watch.check()


@pytest.mark.usefixtures("numpys_generator")
def test_numpys_draws_are_seen_whole_pairs_halves_and_blocks_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(1)
    watch = RandomWatch([])
    for _ in range(4):  # the second and the fourth number are kept halves of pairs, which move no word
        watch.mark()
        np.random.randn()
        with pytest.raises(Unsupported, match="numpy's"):
            watch.check()
    watch.mark()
    np.random.bytes(4 * 624)  # the place of the next word is the same after it
    with pytest.raises(Unsupported, match="numpy's"):
        watch.check()
    watch.mark()
    monkeypatch.delattr("ctypes.string_at")  # another kind's memory is not read
    np.random.set_bit_generator(np.random.PCG64(1))
    with pytest.raises(Unsupported, match="numpy's"):
        watch.check()
    watch.mark()
    watch.check()
    np.random.rand()
    with pytest.raises(Unsupported, match="numpy's"):
        watch.check()


def test_generators_that_the_library_borrows_in_another_thread_count_as_untouched() -> None:
    watch, before, lent = RandomWatch([]), Snapshot({}), threading.Event()

    def borrow() -> None:
        with borrowed():
            torch.default_generator.manual_seed(5)
            lent.set()
            time.sleep(0.2)

    borrower = threading.Thread(target=borrow)
    borrower.start()
    lent.wait()
    watch.check()
    assert before.same
    borrower.join()


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_network_with_dropout_is_named_and_its_call_is_the_plain_one(executor: Executor) -> None:
    case = CASES["ddpm"]
    pipe = case.make()
    for module in pipe.unet.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(3)
    plain, after = case.run(pipe), torch.rand(())
    torch.manual_seed(3)
    run = paradiff.parallelize(pipe, paradiff.quasi_newton(window=3), executor=executor)
    reason = r"UNet2DModel draws random numbers in its call.*put it into eval\(\) mode"
    with pytest.warns(RuntimeWarning, match=reason), run:
        fallen_back = case.run(pipe)
    assert torch.equal(fallen_back, plain)
    assert torch.equal(torch.rand(()), after)
