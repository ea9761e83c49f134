# SPDX-License-Identifier: Apache-2.0
"""What is stored of earlier samples is where they needed nodes; it spares later ones rounds, and is never in the way."""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paradiff import Keyed, Schedule, Solution, Table, collocation, sample
from paradiff.methods.collocation import mesh_store
from paradiff.methods.collocation.control import HIGHER_ORDER
from paradiff.methods.collocation.mesh_store import MeshStore, node_counts
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.collocation.options import mesh_on
from paradiff.methods.collocation.solver import CollocationSolver
from paradiff.models.exact import Gaussian, Mixture
from paradiff.samplers import ddim, ddpm
from paradiff.solver import CollocationRecord

LINEAR = Schedule.linear()
PLANE = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-0.6, 0.2], [0.5, -0.3]]), torch.tensor([0.1, 0.2]))
BINS = HIGHER_ORDER.mesh.bins
TIGHT = 1e-4  # at which the nodes of an unknown model do not suffice


def run(table: Table, method: CollocationMethod, seed: int = 0, samples: int = 1, data: Any = PLANE) -> Solution:
    return sample(data.denoiser(table), table, Keyed((2,), seed, samples), method, dtype=torch.float64)


def entries(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["tables"]


def first_nodes(found: Solution) -> int:
    visit = found.history[0]
    assert isinstance(visit, CollocationRecord)
    return visit.of


def test_the_numbers_asked_for_leave_out_what_is_wanted_and_are_the_fewest() -> None:
    shares, wanted = [0.3, 0.05, 0.001, 0.12], 0.02
    numbers = node_counts(shares, wanted)

    def left(n: list[float]) -> float:
        return math.sqrt(sum((e / k**1.5) ** 2 for e, k in zip(shares, n, strict=True)))

    assert left(numbers) == pytest.approx(wanted)
    for _ in range(20):  # other numbers, as many in all, leave out more
        other = [n * math.exp(0.3 * float(torch.randn(()))) for n in numbers]
        other = [n * sum(numbers) / sum(other) for n in other]
        assert left(other) > wanted


def test_later_samples_need_fewer_rounds_and_evaluations(tmp_path: Path) -> None:
    table, path = ddim(LINEAR, 400), tmp_path / "nodes.json"
    few = replace(HIGHER_ORDER, extrapolation=0.0)  # which saves both of them evaluations
    plain, warm = (collocation(window=16, tolerance=TIGHT, warm_start=m, control=few) for m in (None, path))
    first, unknown = run(table, warm), run(table, plain)
    assert torch.equal(first.sample, unknown.sample)  # an empty store changes nothing
    for seed in range(1, 6):
        run(table, warm, seed)
    later, fresh = (run(table, method, 20, 4) for method in (warm, plain))
    assert later.rounds < fresh.rounds
    assert later.evaluations < 0.95 * fresh.evaluations
    wanted = run(table, collocation(exact=True, tolerance=1e-6), 20, 4).sample
    assert (later.sample - wanted).square().mean(1).sqrt().max() < 3 * TIGHT


def test_other_tolerances_share_an_entry(tmp_path: Path) -> None:
    table, path = ddim(LINEAR, 400), tmp_path / "nodes.json"
    for seed in range(4):
        run(table, collocation(tolerance=TIGHT, warm_start=path), seed)
    assert len(entries(path)) == 1
    counts = [first_nodes(run(table, collocation(tolerance=t, warm_start=path), 9)) for t in (1e-5, 1e-4, 1e-3)]
    assert counts[0] > counts[1] > counts[2]


def test_the_file_holds_a_few_numbers_for_each_table(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    for table in (ddim(LINEAR, 200), ddpm(LINEAR, 200), ddim(LINEAR, 200)):
        run(table, collocation(warm_start=path), 1)
    run(ddim(LINEAR, 200), collocation(order=2, warm_start=path), 1)
    content = entries(path)
    assert sorted((e["chain"], e["samples"]) for e in content.values()) == [("ddim", 1), ("ddim", 2), ("ddpm", 1)]
    for entry in content.values():
        assert len(entry["nodes"]) == BINS
        assert set(entry) == {"chain", "steps", "samples", "variance", "nodes"}
    assert len(path.read_text()) < 2000
    assert [file.name for file in tmp_path.iterdir()] == ["nodes.json"]


def test_it_is_left_as_it_is_after_enough_samples(tmp_path: Path) -> None:
    table, path = ddim(LINEAR, 200), tmp_path / "nodes.json"
    run(table, collocation(warm_start=path), 0, HIGHER_ORDER.store.most_samples)
    before = path.read_bytes()
    run(table, collocation(warm_start=path), 1)
    assert path.read_bytes() == before


def test_one_sample_that_needs_very_many_counts_as_a_few_more(tmp_path: Path) -> None:
    table = ddim(LINEAR, 200)
    prior = (HIGHER_ORDER.nodes * mesh_on(table, HIGHER_ORDER).in_bins()).tolist()
    totals = []
    for number in (40.0, 4000.0):
        path = tmp_path / f"{number}.json"
        store = MeshStore(path, table, HIGHER_ORDER, 3)
        store.record([number / BINS] * BINS, 0.25)
        store.save(prior)
        found = MeshStore(path, table, HIGHER_ORDER, 3).stored
        assert found is not None
        totals.append(sum(found.nodes))
    assert totals[0] == pytest.approx(math.sqrt(HIGHER_ORDER.nodes * 40), rel=0.02)
    assert totals[1] < 1.2 * HIGHER_ORDER.nodes
    store = MeshStore(tmp_path / "few.json", table, HIGHER_ORDER, 3)
    store.record([0.01] * BINS, 0.25)
    store.save(prior)
    found = MeshStore(tmp_path / "few.json", table, HIGHER_ORDER, 3).stored
    assert found is not None
    assert sum(found.nodes) == pytest.approx(HIGHER_ORDER.nodes * math.sqrt(HIGHER_ORDER.store.least_share), rel=0.02)


def test_nodes_lie_where_they_were_needed(tmp_path: Path) -> None:
    table, path = ddim(LINEAR, 400), tmp_path / "nodes.json"
    store = MeshStore(path, table, HIGHER_ORDER, 3, "chain")
    for _ in range(20):
        store.record([20.0, *[1.0] * (BINS - 1)], 0.25)
    store.save((HIGHER_ORDER.nodes * mesh_on(table, HIGHER_ORDER).in_bins()).tolist())
    learnt, usual = (collocation(warm_start=m) for m in (path, None))
    store = learnt.store(table)
    assert store is not None
    place = mesh_on(table, HIGHER_ORDER).in_bins
    assert float(place(0, 20)[0]) == pytest.approx(1)  # these steps lie in the first part
    early = [sum(point < 20 for point in m.edges(table, r)) for m, r in ((learnt, store.stored), (usual, None))]
    assert early[0] > 2 * early[1]


def test_the_variance_that_was_found_is_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, path = ddim(LINEAR, 400), tmp_path / "nodes.json"
    data = Gaussian(torch.tensor([1.0, -2.0]), 1e2 * torch.ones(2))
    shifts = list[float]()
    again = CollocationSolver._rescale
    monkeypatch.setattr(
        CollocationSolver, "_rescale", lambda self, variance: (shifts.append(variance), again(self, variance))[1]
    )
    run(table, collocation(tolerance=4e-2, warm_start=path), 3, data=data)
    assert len(shifts) == 1
    variance = next(iter(entries(path).values()))["variance"]
    assert variance == pytest.approx(shifts[0], rel=0.5)
    found = run(table, collocation(tolerance=4e-2, warm_start=path), 4, data=data)
    assert len(shifts) == 1
    wanted = run(table, collocation(exact=True, tolerance=1e-4), 4, data=data).sample
    assert (found.sample - wanted).square().mean().sqrt() < 4e-2
    store = collocation(warm_start=path).store(table)
    assert store is not None
    assert store.stored is not None
    assert store.stored.variance == variance


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("nodes", "Expecting value"),
        ("[]", "it does not say 'paradiff nodes 1'"),
        ('{"format": "paradiff nodes 1", "tables": 3}', "it does not say"),
        (b"\xff\xfe\x00", "decode"),
    ],
    ids=["no JSON", "no object", "no tables", "no text"],
)
def test_a_file_that_is_something_else_is_refused_and_kept(content: str | bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"nodes\.json', which is no mesh store \(.*{why}.*delete it, or give another"):
        collocation(warm_start=path)  # before there is a model, a table or a pipeline
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"nodes": [1.0] * BINS, "variance": 0.25}, "lacks 'samples'"),
        ({"nodes": [1.0] * 3, "variance": 0.25, "samples": 1}, "has 3 node counts"),
        ({"nodes": [-1.0] * BINS, "variance": 0.25, "samples": 1}, "node counts"),
        ({"nodes": [math.nan] * BINS, "variance": 0.25, "samples": 1}, "node counts"),
        ({"nodes": [1.0] * BINS, "variance": 0.25, "samples": math.inf}, "cannot convert float infinity"),
        ({"nodes": [10**400] * BINS, "variance": 0.25, "samples": 1}, "too large"),
        ({"nodes": [[[]]], "variance": 0.25, "samples": 1}, "lacks float"),
        ([[]], "lacks list"),
    ],
    ids=["no count", "few", "negative", "nan", "infinite count", "huge", "nested", "a list"],
)
def test_an_entry_that_is_damaged_is_refused(entry: dict[str, Any], why: str, tmp_path: Path) -> None:
    table, path = ddim(LINEAR, 100), tmp_path / "nodes.json"
    run(table, collocation(warm_start=path))
    content = json.loads(path.read_text())
    content["tables"] = dict.fromkeys(content["tables"], entry)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=why):
        run(table, collocation(warm_start=path))


def test_a_folder_that_is_not_there_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    table = ddim(LINEAR, 100)

    def never(*_: Any) -> Any:
        raise AssertionError("the network was evaluated")

    with pytest.raises(ValueError, match=r"absent/nodes\.json', whose folder does not exist; make it, or give another path"):
        sample(never, table, Keyed((2,), 0), collocation(warm_start=tmp_path / "absent" / "nodes.json"))


def test_what_cannot_be_written_costs_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, path = ddim(LINEAR, 100), tmp_path / "nodes.json"
    run(table, collocation(warm_start=path))
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("paradiff.methods.collocation.mesh_store.os.replace", full)
    with pytest.warns(UserWarning, match=r"was not saved to .*nodes\.json: no space left"):
        found = run(table, collocation(warm_start=path), 1)
    assert torch.isfinite(found.sample).all()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["nodes.json"]


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a loop"])
def test_what_is_no_regular_file_is_refused_and_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else path)
    with pytest.raises(ValueError, match=r"nodes\.json', which is no mesh store \((it is no regular file|.*[Ll]inks)"):
        run(ddim(LINEAR, 100), collocation(warm_start=path))


def test_a_file_of_many_bytes_is_refused_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"which is no mesh store \(it has 1099511627776 bytes"):
        run(ddim(LINEAR, 100), collocation(warm_start=path))


def test_stores_that_are_saved_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tables = tmp_path / "nodes.json", [ddim(LINEAR, steps) for steps in range(100, 106)]
    stores = [MeshStore(path, table, HIGHER_ORDER, 3) for table in tables]
    read = mesh_store.read_entries

    def slowly(path: Path) -> dict[str, Any]:
        found = read(path)
        time.sleep(0.02)  # in which another store would write
        return found

    monkeypatch.setattr(mesh_store, "read_entries", slowly)
    for store in stores:
        store.record([1.0] * BINS, 0.25)
    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(lambda store: store.save([1.0] * BINS), stores))
    assert sorted(entry["steps"] for entry in entries(path).values()) == list(range(100, 106))
    assert [file.name for file in tmp_path.iterdir()] == ["nodes.json"]


def test_runs_of_one_chain_that_are_made_at_once_all_count(tmp_path: Path) -> None:
    path, table = tmp_path / "nodes.json", ddim(LINEAR, 100)
    stores = [MeshStore(path, table, HIGHER_ORDER, 3) for _ in range(6)]  # none of which knows of another
    for k, store in enumerate(stores):
        store.record([1.0 + k] * BINS, 0.25)
    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(lambda store: store.save([1.0] * BINS), stores))
    assert [entry["samples"] for entry in entries(path).values()] == [6]


def test_a_file_that_became_another_is_left_alone_with_a_warning(tmp_path: Path) -> None:
    path, table = tmp_path / "nodes.json", ddim(LINEAR, 100)
    store = MeshStore(path, table, HIGHER_ORDER, 3)
    store.record([1.0] * BINS, 0.25)
    path.write_text("mine")
    with pytest.warns(UserWarning, match="where samples needed nodes was not saved"):
        store.save([1.0] * BINS)
    assert path.read_text() == "mine"
