# SPDX-License-Identifier: Apache-2.0
"""The watch on random draws: what it says of a generator that has advanced."""

from __future__ import annotations

import threading
import time

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
