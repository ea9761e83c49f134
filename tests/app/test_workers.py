# SPDX-License-Identifier: Apache-2.0
"""Several devices of one `paradiff generate`: a process for each, which meet in the folder and end together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipelines import Cli
from work import die, fail, hang, note

from paradiff.app import workers
from paradiff.app.bulk import Bulk
from paradiff.app.generate import join
from paradiff.app.request import Request
from paradiff.app.workers import Workers, working

CHAIN = ("--sampler", "ddim", "--steps", 8, "--seeds", "0-13", "--shard", 4, "--batch", 4, "--window", 2)


def test_what_became_of_each_is_told(tmp_path: Path) -> None:
    names = ("note", "fail", "die")
    found = [Workers(work, [(str(tmp_path / "at"),)], [work.__name__]) for work in (note, fail, die)]
    for one in found:
        one.finish(wait=True)
    assert dict(zip(names, [one.failures for one in found], strict=True)) == {
        "note": [],
        "fail": ["fail: it broke"],
        "die": [f"die: its process ended with code -{signal.SIGKILL.value}"],
    }
    assert (tmp_path / "at").exists()


def pid_in(path: Path) -> int:
    """The process that has noted itself."""
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    return int(path.read_text())


def runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1].split("\n")[0]
    except OSError:
        return False


def test_none_outlives_the_block(tmp_path: Path) -> None:
    with working(hang, [(str(tmp_path / "at"),)], ["it"]):
        pid = pid_in(tmp_path / "at")
    assert not runs(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_none_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from work import hang\n"
        "from paradiff.app.workers import working\n"
        "if __name__ == '__main__':\n"
        f"    with working(hang, [({str(tmp_path / 'at')!r},)], ['it']) as workers:\n"
        "        workers.finish(wait=True)\n"
    )
    first = subprocess.Popen([sys.executable, str(script)])
    pid = pid_in(tmp_path / "at")
    first.kill()
    first.wait()
    until = time.monotonic() + workers.WITHIN
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs(pid)


def test_two_devices_make_the_bytes_of_one(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    line = ("generate", tiny, *CHAIN)
    assert cli(*line, "--device", "cpu", "--out", tmp_path / "one").code == 0
    found = cli(*line, "--device", "cpu,cpu", "--out", tmp_path / "two")
    assert (found.code, found.err) == (0, "")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == wanted


def test_a_further_process_begins_with_shards_of_its_own(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """It makes the shards at its places first, and then all that is missing; here there is nobody else."""
    line = ("generate", tiny, *CHAIN, "--device", "cpu")
    assert cli(*line, "--out", tmp_path / "one").code == 0
    request = Request(
        model=str(tiny),
        method="parasolver",
        sampler="ddim",
        steps=8,
        seeds="0-13",
        window=2,
        device="cpu,cpu",
        threads=1,
        out=str(tmp_path / "two"),
    )
    join(Bulk(request=request, shard=4, batch=4, last=None, format="safetensors"), "cpu", 1, 2)
    made = sorted((tmp_path / "two").glob("shard*"), key=lambda path: path.stat().st_mtime_ns)
    assert [int(path.stem.split("-")[1]) for path in made] == [1, 3, 0, 2]
    assert all(path.read_bytes() == (tmp_path / "one" / path.name).read_bytes() for path in made)
