# SPDX-License-Identifier: Apache-2.0
"""The command on several ranks: the files of one process, written by one of them, and one sentence where it cannot be."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipelines import hollow
from processes import environment, free_port, processes

SHORT = ["sample", "digits", "--sampler", "ddim", "--steps", "12", "--seeds", "0-1", "--window", "4", "--device", "cpu"]
PARALLEL = [*SHORT, "--method", "parasolver"]


def command(arguments: list[str], others: list[str] | None = None) -> tuple[int, str, str]:
    """The command in this process; on ranks other than the first with other arguments, if there are any."""
    from paradiff.app import cli, launched

    launched.leave = sys.exit
    cli.leave = sys.exit
    given = arguments if others is None or launched.rank() == 0 else others
    sys.argv = ["paradiff", given[0], "--timeout", "20", *given[1:]]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_one_rank_writes_the_files_and_shows_the_figures(tmp_path: Path) -> None:
    first, second = (one.value for one in processes(2, command, [*PARALLEL, "--out", str(tmp_path / "two")]))
    alone = command([*PARALLEL, "--out", str(tmp_path / "one")])
    assert (first[0], second[0], alone[0]) == (0, 0, 0), (first, second)
    assert second[1:] == ("", "")
    assert "written to" in first[1]
    assert sorted(os.listdir(tmp_path / "two")) == ["run.json", "samples.png", "seed-0.png", "seed-1.png"]
    contents = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert contents[0]["rounds"] == contents[1]["rounds"] < 12
    assert contents[0]["evaluations"] == contents[1]["evaluations"]
    for name in ("seed-0.png", "seed-1.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def stopped(line: list[str]) -> tuple[list[float], int, str]:
    """The command, under torchrun, of whose ranks a signal stops the second before it comes to the others; and the seconds for
    which torch is told to wait for it."""
    import torch.distributed as dist

    from paradiff.app import launched

    os.environ[launched.LAUNCHER] = "a run"
    if launched.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    waits: list[float] = []
    meet = dist.rendezvous

    def rendezvous(url: str, *, timeout: datetime.timedelta) -> Any:
        waits.append(timeout.total_seconds())
        return meet(url, timeout=timeout)

    dist.rendezvous = rendezvous
    code, _, sentence = command([*line, "--timeout", "5"])
    return waits, code, sentence


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_rank_that_is_stopped_before_it_comes_ends_in_time(tmp_path: Path) -> None:
    first, second = processes(2, stopped, [*SHORT, "--out", str(tmp_path / "two")])
    waits, code, sentence = first.value
    assert (code, second.code) == (1, -signal.SIGKILL)
    assert sentence.startswith("error: the 2 ranks did not come together within 5 s (process ")
    assert " on this machine was stopped by a signal; rank 0 met " in sentence
    assert waits == [4]  # so that the error comes within 5
    assert not (tmp_path / "two").exists()


def within(folders: list[str], line: list[str]) -> tuple[int, str, str]:
    """A command in a folder of this rank's own."""
    from paradiff.app import launched

    os.chdir(folders[launched.rank()])
    return command(line)


def test_previews_and_a_trajectory_are_written_by_one_rank(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "kept").mkdir()
    line = [*PARALLEL, "--previews", "seen", "--save-trajectory", "kept/run", "--out", "out"]
    ended = processes(2, within, list(map(str, folders)), line)
    assert [one.value[0] for one in ended] == [0, 0], ended
    assert sorted(os.listdir(folders[0])) == ["kept", "out", "seen"]
    assert os.listdir(folders[0] / "seen")
    assert os.listdir(folders[0] / "kept")
    assert os.listdir(folders[1]) == []


def test_weights_are_read_by_one_rank_and_decoded_by_it(tmp_path: Path) -> None:
    from tiny import CASES
    from tiny.case import quiet

    with quiet():
        CASES["sd"].make().save_pretrained(tmp_path / "whole" / "sd")
    hollow(tmp_path / "whole" / "sd", tmp_path / "hollow" / "sd")
    line = ["sample", "sd", "--prompt", "a cat", "--size", "16x16", "--steps", "8", "--window", "4", "--device", "cpu"]
    line += ["--method", "parasolver", "--compare", "--out"]
    folders = [str(tmp_path / "whole"), str(tmp_path / "hollow")]
    ended = processes(2, within, folders, [*line, str(tmp_path / "two")])
    assert [one.value[0] for one in ended] == [0, 0], ended
    assert within(folders, [*line, str(tmp_path / "one")])[0] == 0
    pictures = [(tmp_path / count / "seed-0.png").read_bytes() for count in ("one", "two")]
    assert pictures[0] == pictures[1]
    contents = [json.loads((tmp_path / count / "run.json").read_text()) for count in ("one", "two")]
    for name in ("rounds", "evaluations"):
        assert contents[0][name] == contents[1][name]
    assert contents[0]["evaluations"] > contents[0]["rounds"]  # several rows a round
    for name in ("rounds", "evaluations"):
        assert contents[0]["sequential"][name] == contents[1]["sequential"][name] == 8


def test_ranks_of_other_arguments_are_named_and_write_nothing(tmp_path: Path) -> None:
    given = [*SHORT, "--out", str(tmp_path / "out")]
    ended = processes(2, command, given, [*given, "--tolerance", "0.5"])
    for one in ended:
        code, out, err = one.value
        assert (code, out) == (1, "")
        assert "was started with another --tolerance than rank 0 of 2" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    first, second = (one.value for one in processes(2, command, [*SHORT, "--out", str(tmp_path)]))
    assert first[0] == 2
    assert first[2] == (
        f"error: the output folder {str(tmp_path)!r} is not empty; give another one, or --overwrite to replace its files\n"
    )
    assert second[0] == 1
    assert second[2].startswith("rank 1: error: rank 0 of 2")
    assert os.listdir(tmp_path) == ["mine"]


def test_a_device_that_is_not_there_is_refused_by_every_rank(tmp_path: Path) -> None:
    line = [*SHORT[:-1], "cuda:7", "--out", str(tmp_path / "out")]
    for rank, one in enumerate(processes(2, command, line)):
        assert one.value[0] == 2
        assert one.value[2] == f"{'rank 1: ' * rank}error: device 'cuda:7' is not available; use cpu or auto\n"


@pytest.mark.parametrize(("name", "text"), [("RANK", "one"), ("WORLD_SIZE", "-2")])
def test_a_variable_of_torchrun_that_is_no_number_is_refused(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from paradiff.app import launched

    for key, value in environment(1, 2, 1).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"the environment variable {name} is '{text}'; it must be a whole number"):
        launched.rank()


@contextlib.contextmanager
def hosts() -> Iterator[list[tuple[list[str], str]]]:
    """What a command is begun with on each of two hosts, and the interface between them: network namespaces where they can be
    made, else this machine twice."""
    names = [f"paradiff-{os.getpid()}-{k}" for k in range(2)]
    ends = [f"pd{os.getpid() % 100000}{k}" for k in "ab"]
    lines = [*(f"netns add {name}" for name in names), f"link add {ends[0]} type veth peer name {ends[1]}"]
    for k, (name, end) in enumerate(zip(names, ends, strict=True)):
        lines += [f"link set {end} netns {name}", f"-n {name} addr add 10.9.0.{k + 1}/24 dev {end}"]
        lines += [f"-n {name} link set {end} up", f"-n {name} link set lo up"]
    try:
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield [([], "lo"), ([], "lo")]
    else:
        yield [(["ip", "netns", "exec", name], end) for name, end in zip(names, ends, strict=True)]
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_torchrun_starts_it_on_two_hosts(tmp_path: Path) -> None:
    line = [*SHORT, "--out", str(tmp_path / "out")]
    agents = []
    with hosts() as two:
        head, port = "10.9.0.1" if two[0][0] else "127.0.0.1", free_port()
        for k, (begin, interface) in enumerate(two):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(k)]
            torchrun += ["--nproc-per-node", "1", "--master-addr", head, "--master-port", str(port), "-m", "paradiff"]
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
            pipe = subprocess.PIPE
            agents.append(
                subprocess.Popen([*begin, *torchrun, *line], env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            )
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("written to" in text for text in said) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["run.json", "samples.png", "seed-0.png", "seed-1.png"]
