# SPDX-License-Identifier: Apache-2.0
"""The watch on random draws: what it says of a generator that has advanced."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from paradiff.chain.generators import borrowed
from paradiff.errors import Unsupported
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.loop.random_watch import RandomWatch


def test_a_draw_is_the_loops_or_where_there_are_others_maybe_another_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()
    watch = RandomWatch([generator])
    watch.check()
    torch.rand(1, generator=generator)
    for threads, ending in (
        (1, "a generator among the call's arguments, in the order of its steps$"),
        (2, "or another thread of this process draws meanwhile$"),
    ):
        monkeypatch.setattr(threading, "active_count", lambda count=threads: count)
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
