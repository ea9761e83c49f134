# SPDX-License-Identifier: Apache-2.0
"""Trajectories: what runs keep, their files, and what is refused to begin from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mixture, network
from safetensors.torch import load_file, save_file

import paradiff
from paradiff import Keyed, Method, Solution, Trajectory, collocation, quasi_newton, sequential, srds
from paradiff.chain.clipping import Clip
from paradiff.planning import LatencyCurve, curves
from paradiff.samplers.preserving import ddim, ddpm
from paradiff.samplers.schedule import Schedule
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.trajectory import Part

TABLE = ddpm(Schedule.linear(), 24)
NOISE = Keyed((2, 3), 5, samples=2)
NOISE_STARTS = torch.stack([NOISE.start(0), NOISE.start(1)])


def kept(method: Method) -> Solution:
    return paradiff.sample(network, TABLE, NOISE, method, keep_trajectory=True)


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    found = kept(quasi_newton()).trajectory
    assert found is not None
    return found


def test_the_plain_chain_s_trajectory_is_its_states_and_what_the_network_said() -> None:
    solution = kept(sequential())
    assert solution.trajectory is not None
    assert torch.equal(solution.sample, paradiff.sample(network, TABLE, NOISE, sequential()).sample)  # which marches
    for k, part in enumerate(solution.trajectory.parts):
        assert part.nodes.tolist() == [*range(24)]
        assert torch.equal(part.states[0], NOISE.start(k))
        outputs = network(part.states, TABLE.t[:-1])
        clean = TABLE.p.float().view(-1, 1, 1) * part.states + TABLE.q.float().view(-1, 1, 1) * outputs
        assert torch.allclose(part.clean, clean, atol=1e-4)  # float32, of numbers up to q = 150
    assert paradiff.sample(network, TABLE, NOISE, sequential()).trajectory is None


@pytest.mark.parametrize("method", [quasi_newton(), collocation(nodes=12), collocation(order=1, nodes=12)], ids=repr)
def test_a_file_holds_a_trajectory(method: Method, tmp_path: Path) -> None:
    table = ddim(Schedule.linear(), 60)
    denoiser, noise = mixture().denoiser(table), Keyed((16,), 5, samples=2)
    before = paradiff.sample(denoiser, table, noise, method, keep_trajectory=True).trajectory
    assert before is not None
    before.save(tmp_path / "a.safetensors")
    after = Trajectory.load(tmp_path / "a.safetensors")
    assert (after.table, after.digest, after.steps, after.shape) == (before.table, before.digest, before.steps, before.shape)
    for one, other in zip(before.parts, after.parts, strict=True):
        assert one.points == other.points
        for name in ("nodes", "states", "clean", "dx", "dclean"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
    starts = (before, after, tmp_path / "a.safetensors", str(tmp_path / "a.safetensors"))
    found = [paradiff.sample(denoiser, table, noise, collocation(), start=start).sample for start in starts]
    assert all(torch.equal(found[0], one) for one in found)
    assert [*tmp_path.iterdir()] == [tmp_path / "a.safetensors"]  # and no scratch file


def test_parts_that_share_memory_are_kept_each(trajectory: Trajectory, tmp_path: Path) -> None:
    part = trajectory.parts[0]
    half = dataclasses.replace(part, states=part.states.repeat_interleave(2, -1)[..., ::2])
    twice = dataclasses.replace(trajectory, parts=(part, half, part))
    twice.save(tmp_path / "twice.safetensors")
    found = Trajectory.load(tmp_path / "twice.safetensors")
    assert len(found.parts) == 3
    assert all(torch.equal(one.states, part.states) for one in found.parts)


def test_files_that_are_none_are_refused(trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    trajectory.save(path)
    whole = path.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # which may be a view of the file
    about = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot be read as safetensors, since it was cut short or is another kind"):
            Trajectory.load(path)
    with pytest.raises(ValueError, match=r"the trajectory '.*b' is not there; give its file"):
        Trajectory.load(tmp_path / "b")
    with pytest.raises(ValueError, match=r"is no file; give its file"):
        Trajectory.load(tmp_path)
    with pytest.raises(ValueError, match=r"the trajectory cannot be written to '.*nowhere.*': No such file or directory"):
        trajectory.save(tmp_path / "nowhere" / "a")
    wrong = {
        "its states are torch.int32": tensors | {"0/states": tensors["0/states"].int()},
        "its states are torch.float8_e4m3fn": tensors | {"0/states": tensors["0/states"].to(torch.float8_e4m3fn)},
        "it lacks '1/clean'": {name: value for name, value in tensors.items() if name != "1/clean"},
        "have the shapes": tensors | {"0/states": tensors["0/states"][:5].clone()},
        "not in order among the 24": tensors | {"0/nodes": tensors["0/nodes"].flip(0)},
        "it holds NaN or infinity": tensors | {"1/clean": tensors["1/clean"] * torch.nan},
        "its changes have shape": tensors | {"1/dx": tensors["1/dx"][1:].clone()},
    }
    for text, content in wrong.items():
        save_file(content, path, metadata=about)
        with pytest.raises(ValueError, match=rf"is no stored trajectory \(.*{text}.*\); give a file that Trajectory\.save"):
            Trajectory.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"is no stored trajectory"):
        Trajectory.load(path)
    told = json.loads(about["paradiff"])
    texts = ["{", "[" * 100_000, *(json.dumps(told | {name: 1e400}) for name in ("steps", "samples"))]
    for text in texts:
        save_file(tensors, path, metadata={"paradiff": text})
        with pytest.raises(ValueError, match=r"is no stored trajectory"):
            Trajectory.load(path)
    for points in ([0, 5, 5, 24], [0, 9, 5, 24], [1, 24], [0, 25], [[0, 5], [9, 24]], [0.0, 24.0], []):
        save_file(tensors | {"0/points": torch.tensor(points)}, path, metadata=about)
        with pytest.raises(ValueError, match=r"mesh points are not in order from node 0 to the end, node 24"):
            Trajectory.load(path)


def test_a_trajectory_outlives_its_file(trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    trajectory.save(path)
    found = Trajectory.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    for one, other in zip(found.parts, trajectory.parts, strict=True):
        assert torch.equal(one.states, other.states)


def test_a_trajectory_of_something_else_is_refused(trajectory: Trajectory) -> None:
    start = r"start is a trajectory of table 'ddpm' with 24 steps, and the chain is another one"
    others = (
        ddpm(Schedule.linear(), 25),
        ddpm(Schedule.cosine(), 24),
        ddim(Schedule.linear(), 24),
        ddpm(Schedule.linear(), 24, clip=Clip(1.0)),
    )
    for table in others:
        with pytest.raises(ValueError, match=start):
            paradiff.sample(network, table, NOISE, quasi_newton(), start=trajectory)
    for noise in (Keyed((2, 3), 5), Keyed((3, 2), 5, samples=2)):
        with pytest.raises(ValueError, match=r"start is a trajectory of 2 samples of shape \(2, 3\), and"):
            paradiff.sample(network, TABLE, noise, quasi_newton(), start=trajectory)
    plain = paradiff.sample(network, TABLE, NOISE, quasi_newton())
    with pytest.raises(ValueError, match=r"a Solution whose trajectory was not kept; give keep_trajectory=True"):
        paradiff.sample(network, TABLE, NOISE, quasi_newton(), start=plain)
    with pytest.raises(ValueError, match=r"start and trajectory are both trajectories; give one"):
        paradiff.sample(network, TABLE, NOISE, quasi_newton(), start=trajectory, trajectory=trajectory)
    with pytest.raises(ValueError, match=r"trajectory is 3; give a Trajectory"):
        paradiff.sample(network, TABLE, NOISE, quasi_newton(), trajectory=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"keep_trajectory is 1; give True or False"):
        paradiff.sample(network, TABLE, NOISE, quasi_newton(), keep_trajectory=1)  # pyright: ignore[reportArgumentType]


def foreign(tensor: torch.Tensor, value: float) -> torch.Tensor:
    found = tensor.clone()
    found.view(-1)[5] = value
    return found


CHANGED: dict[str, tuple[Callable[[Part], dict[str, Any]], str]] = {
    # name: (what is put in place of a part's own, what is said of it)
    "nan states": (lambda part: {"states": foreign(part.states, math.nan)}, "it holds NaN or infinity"),
    "infinite estimates": (lambda part: {"clean": foreign(part.clean, math.inf)}, "it holds NaN or infinity"),
    "states of another dtype": (lambda part: {"states": part.states.double()}, "its states are torch.float64 and its"),
    "whole numbers": (lambda part: {"states": part.states.int(), "clean": part.clean.int()}, "its states are torch.int32"),
    "meta": (lambda part: {"states": part.states.to("meta"), "clean": part.clean.to("meta")}, "it lies on the meta device"),
    "no tensor": (lambda part: {"states": [1.0]}, r"its states are \[1.0\], no tensor"),
    "fewer states": (lambda part: {"states": part.states[:-1]}, "its nodes and states have the shapes"),
    "wider states": (lambda part: {"states": part.states.repeat(1, 1, 2)}, "its nodes and states have the shapes"),
    "fewer estimates": (lambda part: {"clean": part.clean[:-1]}, "its estimates not one a node"),
    "no nodes": (lambda part: {"nodes": part.nodes[:0]}, "its nodes and states have the shapes"),
    "nodes in real numbers": (lambda part: {"nodes": part.nodes.double()}, "its nodes and states have the shapes"),
    "nodes backwards": (lambda part: {"nodes": part.nodes.flip(0)}, "its nodes are not in order among the 24 of the chain"),
    "nodes before the chain": (lambda part: {"nodes": part.nodes - 3}, "its nodes are not in order"),
    "nodes after it": (lambda part: {"nodes": part.nodes + 5}, "its nodes are not in order"),
    "mesh points": (lambda part: {"points": (3, 1, 99)}, "its mesh points are not in order from node 0 to the end, node 24"),
    "changes of states alone": (lambda part: {"dx": part.states[:, None]}, "its changes of states and of estimates"),
    "changes of another shape": (lambda part: {"dx": part.states, "dclean": part.states}, "its changes have shape"),
    "a base of a base": (
        lambda part: {"base": dataclasses.replace(part, base=part)},
        "its base has a base of its own",
    ),
}


@pytest.mark.parametrize("method", [quasi_newton(), collocation(), paradiff.auto()], ids=repr)
@pytest.mark.parametrize("name", CHANGED)
def test_what_no_run_keeps_is_refused(name: str, method: Method, trajectory: Trajectory) -> None:
    change, said = CHANGED[name]
    parts = trajectory.parts
    start = dataclasses.replace(trajectory, parts=(parts[0], dataclasses.replace(parts[1], **change(parts[1]))))
    with pytest.raises(
        ValueError, match=f"start is a trajectory whose sample 1 is none: .*{said}.*; give one as a run kept it"
    ):
        paradiff.sample(network, TABLE, NOISE, method, start=start)


FOREIGN: dict[str, Callable[[Trajectory], Trajectory]] = {
    "the batch in another order": lambda own: dataclasses.replace(own, parts=own.parts[::-1]),
    "of another noise": lambda own: own.map(lambda x: x.flip(0)),
    "nothing": lambda own: own.map(torch.zeros_like),
    "of another sign": lambda own: own.map(torch.neg),
    "far too large": lambda own: own.map(lambda x: 1000 * x),
    "of every third node": lambda own: dataclasses.replace(
        own,
        parts=tuple(
            dataclasses.replace(
                part, nodes=part.nodes[::3], states=part.states[::3], clean=part.clean[::3], dx=None, dclean=None
            )
            for part in own.parts
        ),
    ),
}


@pytest.mark.parametrize("method", [quasi_newton(), quasi_newton(window=6), collocation(), paradiff.auto()], ids=repr)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_trajectory_that_fits_leads_to_the_chains_own_sample(name: str, method: Method, trajectory: Trajectory) -> None:
    """Whatever it is of: it is a first guess."""
    found = paradiff.sample(network, TABLE, NOISE, method, start=FOREIGN[name](trajectory))
    off = (found.sample - paradiff.sample(network, TABLE, NOISE, sequential()).sample).square().mean((1, 2)).sqrt()
    told = torch.tensor([estimate.estimated_error for estimate in found.error_estimates])
    assert (off <= 2 * told + 2e-6).all()  # the last is rounding


@pytest.mark.parametrize(
    "method",
    [sequential(), srds(), paradiff.chords(), paradiff.quasi_deer(), collocation(target="sde")],
    ids=repr,
)
def test_methods_that_cannot_begin_from_one_say_so(method: Method, trajectory: Trajectory) -> None:
    with pytest.raises(ValueError, match=rf"^{method.name} cannot begin from a trajectory: .*; leave start out, or use quasi"):
        paradiff.sample(network, TABLE, NOISE, method, start=trajectory)


@pytest.mark.parametrize("method", [srds(), paradiff.chords(), paradiff.quasi_deer()], ids=lambda m: m.name)
def test_methods_that_keep_none_say_so(method: Method) -> None:
    with pytest.raises(ValueError, match=rf"^{method.name} keeps no trajectory; use quasi_newton, parasolver or collocation"):
        paradiff.sample(network, TABLE, NOISE, method, keep_trajectory=True)


def test_a_trajectory_can_be_moved(trajectory: Trajectory) -> None:
    moved = trajectory.map(lambda x: torch.roll(x, 1, -1))
    assert torch.equal(moved.parts[1].states, trajectory.parts[1].states.roll(1, -1))
    assert torch.equal(moved.parts[1].clean, trajectory.parts[1].clean.roll(1, -1))
    assert moved.parts[0].dx is not None
    assert repr(moved) == "Trajectory of 2 x (2, 3): 24 nodes of table 'ddpm', 24 steps"
    with pytest.raises(ValueError, match=r"the trajectory's states were changed to .*; keep their shape \(24, 2, 3\)"):
        trajectory.map(lambda x: x[..., 1:])


def test_auto_begins_from_a_trajectory_and_keeps_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARADIFF_CACHE", str(tmp_path))
    table = ddim(Schedule.linear(), 60)
    evaluator = Evaluator(network)
    first = paradiff.sample(evaluator, table, NOISE, paradiff.auto(), keep_trajectory=True)
    assert first.trajectory is not None
    for flat, told in ((True, " and a trajectory to begin from"), (False, "sequential(), since")):
        curves.keep(evaluator, NOISE, LatencyCurve({r: 1e-2 * (1 if flat else r) for r in (1, 2, 64)}, {2: 0.0}))
        exact = paradiff.sample(network, table, NOISE, sequential())
        found = paradiff.sample(evaluator, table, NOISE, paradiff.auto(), start=first)
        kept = paradiff.sample(evaluator, table, NOISE, paradiff.auto(), keep_trajectory=True)
        assert told in found.message
        assert kept.trajectory is not None
        assert float((found.sample - exact.sample).square().mean().sqrt()) < 4e-3
        assert (found.rounds < 30) is flat


def test_what_changes_evenly_is_extrapolated() -> None:
    runs = [
        paradiff.sample(network, TABLE, NOISE, sequential(), start=scale * NOISE_STARTS, keep_trajectory=True)
        for scale in (1.0, 1.01, 1.02)
    ]
    first, second, third = (run.trajectory for run in runs)
    assert first is not None
    assert second is not None
    assert third is not None
    foretold = second.extrapolated(first)
    for found, part, last in zip(foretold.parts, third.parts, second.parts, strict=True):
        for name in ("states", "clean"):
            wanted = getattr(part, name)
            assert (getattr(found, name) - wanted).abs().max() < 0.2 * (getattr(last, name) - wanted).abs().max()
    assert torch.allclose(second.extrapolated(first, 0.0).parts[0].states, second.parts[0].states)


def test_what_does_not_go_on_is_refused(trajectory: Trajectory) -> None:
    with pytest.raises(ValueError, match="1 x"):
        trajectory.extrapolated(trajectory.only(0))
    with pytest.raises(ValueError, match="share"):
        trajectory.extrapolated(trajectory, float("nan"))
    fewer = dataclasses.replace(
        trajectory,
        parts=tuple(
            dataclasses.replace(p, nodes=p.nodes[1:], states=p.states[1:], clean=p.clean[1:]) for p in trajectory.parts
        ),
    )
    with pytest.raises(ValueError, match="23 nodes before and at 24 others"):
        trajectory.extrapolated(fewer)


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_regular_file_is_not_replaced(linked: bool, trajectory: Trajectory, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if linked else pipe
    if linked:
        path.symlink_to(pipe)
    with pytest.raises(ValueError, match=r"cannot be written to '.*pipe', which is no regular file; name another one"):
        trajectory.save(path)
    assert pipe.is_fifo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "pipe"][1 - linked :]
