# SPDX-License-Identifier: Apache-2.0
"""What a server does at low load, at full load, and where it is killed.

- latency: one request at a time. How many times as fast a request by `auto` is as one by single steps, beside the factor that
  `paradiff.plan` foretells for the model and the chain; also for calls that take as long on many rows as on one.
- throughput: many requests at once, beside the same samples by a plain loop over full batches of the sequential chain, in turn.
- requests: 200 of mixed chains, seeds and methods over HTTP, each compared with its own sequential sample.
- kills: a server that is killed amid its work, and the next one on its folder; another that is terminated.

Seconds are the processor's, on one thread: the whole clock of a machine without other work. Those of throughput stand beside
the wall clock's.

    python benchmarks/serving.py --threads 1 --json benchmarks/results/serving.json
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Results, console, options
from safetensors.torch import load, load_file

import paradiff
from paradiff.app.request import Request
from paradiff.app.serve import served
from paradiff.app.web import Server
from paradiff.chain.noise import Keyed
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.models.pixel import Model
from paradiff.models.pixel import load as load_model
from paradiff.serving import Engine, SampleRequest, ServedModel
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample

PARTS = ["latency", "throughput", "requests", "kills"]
CHAINS = (("ddim", 50), ("ddpm", 100), ("ddpm", 1000))
RESTS = 8e-3
"""Seconds of a call on a device that no rows fill."""

ACTIVE = 64
wall = time.perf_counter


class Resting:
    """A network whose calls take as long as those of a device that no rows fill."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The outputs; the clock is told the device's seconds in place of the network's."""
        global hidden
        begin = time.process_time()
        found = self._model(x, t)
        hidden += time.process_time() - begin - RESTS
        return found


hidden = 0.0
"""Seconds of networks beyond those of the device that they stand for."""


def clock() -> float:
    """The processor's seconds; where a device is stood for, its own."""
    return time.process_time() - hidden


def model_of(kind: str) -> tuple[Model, ServedModel]:
    """The digits model, and as it is served: on this machine, or on a device that no rows fill."""
    model = load_model("digits")
    given = served(model, Request(model="digits"))
    if kind == "own":
        return model, given
    return model, ServedModel(denoiser=Resting(model), shape=given.shape, chain=given.chain)


def solved(engine: Engine, requests: list[SampleRequest]) -> tuple[float, float, list[Any]]:
    """Seconds of requests that are sent at once, by the processor and by the wall clock; the requests."""
    begin, on_wall = clock(), wall()
    jobs = [engine.submit(request) for request in requests]
    for job in jobs:
        engine.wait(job)
        assert job.finished is not None, job.message
    return clock() - begin, wall() - on_wall, jobs


def latency(kind: str, sampler: str, steps: int, seeds: int) -> dict[str, Any]:
    """One request at a time."""
    _, given = model_of(kind)
    table = given.chain(SampleRequest(sampler=sampler, steps=steps))
    foretold = paradiff.plan(Evaluator(given.denoiser), table, Keyed(given.shape))
    best = foretold.choices[0]
    engine = Engine(given, probe=SampleRequest(sampler=sampler, steps=steps))
    plain, parallel, errors, estimates = [], [], [], []
    jobs: list[Any] = []
    for seed in range(500, 500 + seeds + 1):
        found = {
            method: solved(engine, [SampleRequest(seed=seed, sampler=sampler, steps=steps, method=method)])
            for method in ("sequential", "auto")
        }
        if seed == 500:  # the first sets things up
            continue
        plain.append(found["sequential"][0])
        parallel.append(found["auto"][0])
        jobs.append(found["auto"][2][0].finished)
        errors.append(float((jobs[-1].sample - found["sequential"][2][0].finished.sample).square().mean().sqrt()))
        estimates.append(jobs[-1].estimate.estimated_error)
    engine.close()
    return {
        "part": "latency",
        "device": kind,
        "chain": f"{sampler} {steps}",
        "seeds": seeds,
        "sequential_seconds": statistics.median(plain),
        "seconds": statistics.median(parallel),
        "factor": statistics.median(plain) / statistics.median(parallel),
        "foretold": foretold.sequential.seconds / best.seconds,
        "foretold_by": best.label,
        "method": sorted({one.family for one in jobs}),
        "widest": max(one.widest for one in jobs),
        "rounds": statistics.mean(one.estimate.rounds for one in jobs),
        "error": max(errors),
        "above_estimate": sum(a > b + 1e-5 for a, b in zip(errors, estimates, strict=True)),
    }


@torch.no_grad()
def in_batches(model: Model, table: Table, seeds: range) -> torch.Tensor:
    """Samples `[B, ...]` of the sequential chain in full batches, by a plain loop: one call of the network a step, and the
    noises of each sample drawn by a generator of its own, as diffusers draws them."""
    step, found = Step(table, torch.device("cpu"), torch.float32), []
    for first in seeds[::ACTIVE]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(first, min(first + ACTIVE, seeds.stop))]

        def drawn(generators: list[torch.Generator] = generators) -> torch.Tensor:
            return torch.stack([torch.randn(model.shape, generator=generator) for generator in generators])

        x = table.start_scale * drawn()
        for i in range(table.steps):
            at = slice(i, i + 1)
            m = model(step.seen(at, x), step.t[i].expand(len(x)))
            x = step(at, [x], [table.convert(at, x, m)], drawn() if table.stochastic else None)
        found.append(x)
    return torch.cat(found)


def throughput(sampler: str, steps: int, count: int, turns: int) -> dict[str, Any]:
    """Many requests at once, and the same samples in batches, in turn."""
    model, given = model_of("own")
    table = given.chain(SampleRequest(sampler=sampler, steps=steps))
    assert table.band == 1
    engine, apart, single = Engine(given, active=ACTIVE, queue=count), 0.0, 0
    seconds: dict[str, list[float]] = {"batches": [], "server": [], "batches_wall": [], "server_wall": []}
    shares: list[float] = []
    for turn in range(turns + 1):
        begin, on_wall = clock(), wall()
        expected = in_batches(model, table, range(count))
        batches = clock() - begin, wall() - on_wall
        requests = [SampleRequest(seed=seed, sampler=sampler, steps=steps) for seed in range(count)]
        *by_server, jobs = solved(engine, requests)
        if turn:  # the first sets things up
            for name, pair in (("batches", batches), ("server", by_server)):
                seconds[name].append(pair[0])
                seconds[f"{name}_wall"].append(pair[1])
            shares.append(batches[0] / by_server[0])
        walked = [job.finished.widest == 1 for job in jobs]  # one that begins alone may have had a window
        single += sum(walked)
        apart = max(apart, float((torch.stack([job.finished.sample for job in jobs]) - expected)[walked].abs().max()))
    rows = engine.metrics.value("rows_total") / engine.metrics.value("rounds_total")
    engine.close()
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "part": "throughput",
        "chain": f"{sampler} {steps}",
        "requests": count,
        "active": ACTIVE,
        "turns": turns,
        "rows_a_round": rows,
        "seconds": found,
        "share_of_batches": statistics.median(shares),
        "shares": shares,
        "share_of_batches_wall": found["batches_wall"] / found["server_wall"],
        "by_single_steps": single / (count * (turns + 1)),
        "largest_difference": apart,
    }


def sent(url: str, content: dict[str, Any]) -> str:
    """Sends a request; its id."""
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/samples", json.dumps(content).encode(), headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)["id"]


def got(url: str) -> bytes:
    """What is at an address."""
    with urllib.request.urlopen(url, timeout=90) as answer:
        return answer.read()


def mixed(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of mixed chains, seeds and methods."""
    draw = random.Random(seed)
    return [
        {
            "seed": 2000 + k,
            "sampler": draw.choice(["ddim", "ddpm", "euler", "dpmpp_2m", "heun"]),
            "steps": draw.choice([10, 20, 25, 50, 100]),
            "method": draw.choice(["auto", "auto", "sequential", "quasi_newton", "parasolver", "collocation"]),
        }
        for k in range(count)
    ]


def alone(model: ServedModel, content: dict[str, Any]) -> torch.Tensor:
    """The sequential sample of a request by itself."""
    request = SampleRequest.of_json(content)
    noise = model.noise(request, torch.device("cpu"))
    return sample(Evaluator(model.denoiser), model.chain(request), noise, paradiff.sequential(), check="off").sample[0]


def compared(model: ServedModel, contents: list[dict[str, Any]], samples: list[torch.Tensor]) -> list[float]:
    """The error of each sample to its own sequential one."""
    pairs = zip(contents, samples, strict=True)
    return [float((found - alone(model, content)).square().mean().sqrt()) for content, found in pairs]


def requests(count: int) -> dict[str, Any]:
    """Mixed requests over HTTP, most of them at once and some one after the other."""
    _, model = model_of("own")
    contents = mixed(count, seed=1)
    with Server("127.0.0.1", 0) as server:
        server.engine = engine = Engine(model, active=ACTIVE)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ids = []
        for k, content in enumerate(contents):
            ids.append(sent(server.url, content))
            if k % 10 == 0:
                got(f"{server.url}/samples/{ids[-1]}?wait=60")
        reports = [json.loads(got(f"{server.url}/samples/{id}?wait=60")) for id in ids]
        samples = [load(got(f"{server.url}/samples/{id}?format=safetensors"))["sample"] for id in ids]
        engine.close()
        server.shutdown()
    errors = compared(model, contents, samples)
    exact = [e for e, report in zip(errors, reports, strict=True) if report["status"] == "exact"]
    others = [(e, report) for e, report in zip(errors, reports, strict=True) if report["status"] != "exact"]
    return {
        "part": "requests",
        "requests": count,
        "done": sum(report["state"] == "done" for report in reports),
        "exact": len(exact),
        "exact_error": max(exact, default=0.0),
        "others": len(others),
        "others_error": max((e for e, _ in others), default=0.0),
        "above_tolerance": sum(e > 4e-3 for e, _ in others),
        "above_estimate": sum(e > report["estimated_error"] + 1e-5 for e, report in others),
        "above_twice_the_estimate": sum(e > 2 * report["estimated_error"] + 1e-5 for e, report in others),
    }


def started(folder: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a folder, and where it is."""
    line = [sys.executable, "-m", "paradiff", "serve", "digits", "--port", "0", "--out", folder, "--threads", "1"]
    process = subprocess.Popen([*line, "--drain", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for said in process.stdout:
        found = re.search(r"http://127\.0\.0\.1:[0-9]+", said)
        if found:
            return process, found.group()
    raise RuntimeError("the server did not start")


def kills(count: int) -> dict[str, Any]:
    """A killed server, a terminated one, and the one that solves what they left."""
    _, model = model_of("own")
    contents, named = mixed(count, seed=2), 0
    ids: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for how, part in ((signal.SIGKILL, contents[: count // 2]), (signal.SIGTERM, contents[count // 2 :])):
            process, url = started(folder)
            ids += [sent(url, content) for content in part]
            time.sleep(0.3)
            process.send_signal(how)
            _, said = process.communicate(timeout=60)
            named += said.count("left for the next start: ")
        whole = len([*Path(folder).glob("*.safetensors")])
        process, url = started(folder)
        states = [json.loads(got(f"{url}/samples/{id}?wait=60"))["state"] for id in ids]
        samples = [load_file(Path(folder) / f"{id}.safetensors")["sample"] for id in ids]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    errors = compared(model, contents, samples)
    return {
        "part": "kills",
        "requests": count,
        "whole_before_the_last_start": whole,
        "named_by_the_terminated": named,
        "done": states.count("done"),
        "error": max(errors),
        "above_tolerance": sum(e > 4e-3 for e in errors),
    }


def main() -> None:
    """Measures the parts."""
    given = options(__doc__, PARTS)
    time.perf_counter = clock
    results = Results(given.json, keep=given.keep)
    results.drop(row for row in results.rows if row["part"] not in given.only)
    seeds = min(given.seeds, 3 if given.quick else 8)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PARADIFF_CACHE"] = folder
        runs: list[tuple[str, Any]] = [
            *(("throughput", partial(throughput, *chain, 128, 2 if given.quick else 5)) for chain in CHAINS[:2]),
            *(("latency", partial(latency, kind, *chain, seeds)) for chain in CHAINS for kind in ("own", "resting")),
            ("requests", partial(requests, 200)),
            ("kills", partial(kills, 40)),
        ]
        for part, run in runs:
            if part in given.only:
                row = run()
                console.print(row)
                results.add(row)
    results.save()


if __name__ == "__main__":
    main()
