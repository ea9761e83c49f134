"""One thread, unless OMP_NUM_THREADS asks for others: the tests' tensors are small, and sums over several threads could differ
between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pipelines import Cli, make_cli, save_pipeline

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def whichever_tests_ran_before() -> Iterator[None]:
    """Gives each test the same numbers from torch's global generator, and leaves the number of threads as it was."""
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line, run in this process."""
    return make_cli(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a tiny network."""
    return save_pipeline(tmp_path_factory.mktemp("models") / "tiny")
