# SPDX-License-Identifier: Apache-2.0
"""One thread, unless OMP_NUM_THREADS asks for others: the tests' tensors are small, and sums over several threads could differ
between runs. Cases of a diffusers newer than the one installed are left out. Ctrl-C is heeded, also where a shell started the
tests in the background and had it ignored."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from each_value import given, with_each_value
from packaging.version import Version
from pipelines import Cli, make_cli, save_pipeline

from paradiff.pipelines.known import forget_calls
from paradiff.solver.seen import MODELS

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
THREADS = torch.get_num_threads()
os.environ["PARADIFF_CACHE"] = ""  # no test reads or writes what the user's own runs have measured

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

NEWER = {
    **dict.fromkeys(["hunyuan", "hunyuan_true_cfg", "wan", "wan_euler", "SCM"], "0.33"),
    **dict.fromkeys(["flow euler, stochastic", "flow lcm"], "0.34"),
    **dict.fromkeys(["qwen", "wan22", "wan22_expand_timesteps", "QwenImagePipeline"], "0.35"),
    **dict.fromkeys(["z_image", "z_image_truncated"], "0.36"),
}
"""The first diffusers in which a case's pipeline or scheduler is found, or gives numbers at all."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--each-value",
        action="store_true",
        help="run each value of each parameter of a test in one case at least, and not in all combinations with others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the cases of pipelines and schedulers that the installed diffusers does not have yet, and leaves out those that
    `--each-value` does not ask for."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            for value in item.callspec.params.values():
                first = NEWER.get(value) if isinstance(value, str) else None
                if first is not None and Version(diffusers.__version__) < Version(first):
                    item.add_marker(pytest.mark.skip(reason=f"{value} is there from diffusers {first} on"))
    if config.getoption("each_value"):
        cases = [item for item in items if isinstance(item, pytest.Function) and not any(item.iter_markers("skip"))]
        kept = with_each_value((item.nodeid.partition("[")[0], given(item)) for item in cases)
        left_out = {item for item, stays in zip(cases, kept, strict=True) if not stays}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def whichever_tests_ran_before() -> Iterator[None]:
    """Gives each test the same numbers from torch's global generator, knows no model that was seen in another test and no
    call for which the plain one was chosen there, and leaves the number of threads as it was."""
    torch.manual_seed(0)
    MODELS.forget()
    forget_calls()
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


@pytest.fixture
def samples_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of a random network are no data, and no estimate is made anew for their size."""
    monkeypatch.setattr("paradiff.chain.data_scale.LARGE", math.inf)
    monkeypatch.setattr("paradiff.chain.data_scale.SMALL", 0.0)
