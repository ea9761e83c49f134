"""One thread: the tests' tensors are small, and sums over several threads could differ between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipelines import Cli, make_cli, save_pipeline

torch.set_num_threads(1)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line, run in this process."""
    return make_cli(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a tiny network."""
    return save_pipeline(tmp_path_factory.mktemp("models") / "tiny")
