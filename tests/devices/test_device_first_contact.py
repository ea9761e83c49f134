# SPDX-License-Identifier: Apache-2.0
"""What a user calls first on a device: bundled models, warm starts, previews, loops that are no pipelines, threads, compiled
networks, memory that runs out. Each run gives what the same run on the CPU gives, and no copy of a round blocks."""

from __future__ import annotations

import functools
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import double
import pytest
import torch
from pipelines import Cli
from problems import gap
from tiny import CASES
from tiny.policies import Denoiser, MaskedPolicy, QueuedPolicy
from torch import Tensor, nn

import paradiff
import paradiff.samplers.scheduler.probe as probe_module
from paradiff import Evaluator, Keyed, Solution, Table
from paradiff.models import load
from paradiff.pipelines.loop.audit import granted
from paradiff.planning.store import FOLDER
from paradiff.solver import Deadline, Method, Preview, Previews, Status
from paradiff.solver.location import location_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
ROUNDING = granted(torch.finfo(torch.float32).eps)
FINE = paradiff.quasi_newton(window=12, tolerance=1e-4)
CLOSE = 1e-3
"""Ten times the tolerance."""
COPIES = 24
"""Copies between host and device that a round may make, for any window."""
METHODS: dict[str, Callable[[], Method]] = {
    "parasolver": lambda: paradiff.parasolver(window=8),
    "quasi_newton": lambda: paradiff.quasi_newton(window=8),
    "collocation": lambda: paradiff.collocation(window=8),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of its own for what is kept of models."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "known"))


class Net(nn.Module):
    """A noise estimate that depends on the state a little bent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 3.0]), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.ndim - 1))
        return x * level.sqrt() + self.weight[0] * torch.sin(self.weight[1] * x) * (1 - level)

    def called(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)


SCHEDULE = paradiff.Schedule.linear()
TABLES = {"ddpm": paradiff.samplers.ddpm(SCHEDULE, 60), "ddim": paradiff.samplers.ddim(SCHEDULE, 60)}
NOISE, OTHER = Keyed((2, 4), 0), Keyed((2, 4), 1)


def both(table: Table, noise: Any, method: Method, **options: Any) -> tuple[Solution, Solution, double.Counts]:
    """A run on the CPU, and a second one on the device, in which the model was seen, with what was counted."""
    wanted = paradiff.sample(Net(), table, noise, method, **options)
    there = Net().to("pseudo")
    paradiff.sample(there, table, noise, method, **options)
    with double.counting() as counts:
        found = paradiff.sample(there, table, noise, method, **options)
    assert found.sample.device.type == "pseudo"
    return wanted, found, counts


def within_budget(found: Solution, counts: double.Counts, waits: int) -> None:
    """So many waits a round, beside those of rows that are checked; no copy that blocks; few copies."""
    assert counts.waits - counts.of("wait", under="solver/rounding.py") <= waits * found.rounds + 1, str(counts)
    assert counts.blocking == 0, str(counts)
    assert counts.copies <= COPIES * found.rounds, str(counts)


# A network of one's own.


def test_a_bundled_model_on_a_device_is_all_that_is_given() -> None:
    cpu, there = load("digits"), load("digits", device="pseudo")
    table = cpu.table("ddim", 30)
    for method in (paradiff.quasi_newton(window=8), paradiff.auto()):
        wanted = paradiff.sample(cpu, table, Keyed(cpu.shape), method)
        found = paradiff.sample(there, table, Keyed(cpu.shape), method)
        assert found.sample.device.type == "pseudo"
        assert gap(found.sample.cpu(), wanted.sample) < CLOSE
    assert paradiff.plan(there, table).choices


def test_rows_are_wanted_where_the_weights_are() -> None:
    net = Net().to("pseudo:1")
    models = [net, net.called, functools.partial(net), functools.partial(net.called), lambda x, t: net(x, t)]
    for model in (*models, load("digits", device="pseudo:1")):
        assert location_of(model) == torch.device("pseudo", 1)
    assert location_of(nn.ModuleList([net, Net()])) == torch.device("cpu")
    assert location_of(lambda x, t: x) == torch.device("cpu")
    found = paradiff.sample(lambda x, t: net(x.to("pseudo:1"), t.to("pseudo:1")).cpu(), TABLES["ddim"], NOISE, FINE)
    assert found.sample.device == torch.device("pseudo", 1)


def test_weights_that_are_not_found_are_named() -> None:
    hidden = {"net": [Net().to("pseudo")]}
    with pytest.raises(ValueError, match=r"was given rows on cpu, and some of its tensors are on another device .*: give the"):
        paradiff.sample(lambda x, t: hidden["net"][0](x, t), TABLES["ddim"], NOISE, FINE)


@pytest.mark.parametrize("chain", TABLES)
@pytest.mark.parametrize("name", METHODS)
def test_later_runs_of_a_model_keep_within_their_budget(name: str, chain: str) -> None:
    """What is estimated of errors that are carried along, of a chain's volatility and of a model that was seen waits for
    nothing."""
    wanted, found, counts = both(TABLES[chain], NOISE, METHODS[name]())
    assert gap(found.sample.cpu(), wanted.sample) < ROUNDING
    assert (found.rounds, found.checked_rows) == (wanted.rounds, 2)
    within_budget(found, counts, 1 + (name == "collocation"))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_begins_from_a_trajectory_of_any_device(name: str, tmp_path: Path) -> None:
    table, method = TABLES["ddim"], METHODS[name]()
    cold, there, counts = both(table, NOISE, method, keep_trajectory=True)
    within_budget(there, counts, 2)
    assert there.trajectory is not None
    there.trajectory.save(tmp_path / "there.safetensors")
    wanted = paradiff.sample(Net(), table, OTHER, method, start=cold)
    for start in (cold, there, tmp_path / "there.safetensors"):
        warm, found, counts = both(table, OTHER, method, start=start)
        assert gap(found.sample.cpu(), wanted.sample) < ROUNDING
        assert gap(warm.sample, wanted.sample) < ROUNDING
        assert found.rounds == wanted.rounds
        assert counts.blocking == 0, str(counts)


def test_previews_wait_once_each_and_deadlines_for_nothing() -> None:
    shown: list[Preview] = []

    def show(preview: Preview) -> None:
        shown.append(preview)

    method = paradiff.quasi_newton()
    wanted, found, counts = both(TABLES["ddim"], NOISE, method, observer=Previews(show))
    assert gap(found.sample.cpu(), wanted.sample) < ROUNDING
    assert len(shown) == 3 * found.rounds
    within_budget(found, counts, 2)
    _, found, counts = both(TABLES["ddim"], NOISE, method, observer=Deadline(1e3))
    within_budget(found, counts, 1)
    ended = paradiff.sample(Net().to("pseudo"), TABLES["ddim"], NOISE, method, observer=Deadline(1e-9))
    assert ended.status is Status.STOPPED


@pytest.mark.parametrize("device", ["cpu", "pseudo"])
@pytest.mark.parametrize("name", METHODS)
def test_a_solvers_arithmetic_is_outside_of_autocast(name: str, device: str) -> None:
    linear = nn.Linear(8, 8).requires_grad_(False).to(device)

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled(device))
        return x * (t.to(x) / 1000).sqrt()[:, None] + 0.1 * torch.tanh(linear(x).to(x.dtype))

    seen: list[bool] = []
    run = functools.partial(paradiff.sample, network, TABLES["ddpm"], Keyed((8,)), METHODS[name](), check="off")
    with torch.autocast(device, torch.bfloat16):
        found = run()
    assert all(seen)
    half = linear
    linear = lambda x: half(x.bfloat16().float())  # noqa: E731 - as autocast has it, up to the rounding of the product
    assert gap(found.sample.cpu(), run().sample.cpu()) < 2 * torch.finfo(torch.bfloat16).eps


def test_networks_are_compiled_for_four_shapes() -> None:
    shapes: list[Any] = []

    def counting(graph: Any, inputs: list[Tensor]) -> Any:
        shapes.append([tuple(x.shape) for x in inputs])
        return graph.forward

    torch._dynamo.reset()
    net = Net().to("pseudo")
    evaluator = Evaluator(torch.compile(net, backend=counting, dynamic=False), device="pseudo", pad=True)
    wanted = paradiff.sample(Net(), TABLES["ddim"], NOISE, METHODS["quasi_newton"]())
    for _ in range(2):
        found = paradiff.sample(evaluator, TABLES["ddim"], NOISE, METHODS["quasi_newton"]())
        assert gap(found.sample.cpu(), wanted.sample) < ROUNDING
        assert len(shapes) <= 4


def test_runs_in_threads_do_not_disturb_each_other() -> None:
    case, found = CASES["ddim"], list[Any]()
    wanted = [case.run(case.make(), num_inference_steps=8), paradiff.sample(Net(), TABLES["ddpm"], NOISE, FINE).sample]
    pipes, net = [case.make().to("pseudo") for _ in range(2)], Net().to("pseudo")

    def call(pipe: Any) -> None:
        with paradiff.parallelize(pipe, paradiff.quasi_newton(window=3, tolerance=0.0)) as run:
            picture = case.run(pipe, num_inference_steps=8).cpu()
        found.append((run.report.executor, gap(picture, wanted[0]) < ROUNDING))

    def sample() -> None:
        own = paradiff.sample(net, TABLES["ddpm"], NOISE, FINE).sample.cpu()
        found.append(("vector", gap(own, wanted[1]) < ROUNDING))

    threads = [threading.Thread(target=call, args=(pipe,)) for pipe in pipes] + [threading.Thread(target=sample) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [("vector", True)] * 4


def test_seeds_are_generated_on_devices(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    line = ("generate", tiny, "--seeds", "0-3", "--sampler", "ddim", "--steps", 8, "--shard", 2, "--noise", "keyed")
    for device in ("cpu", "all"):
        result = cli(*line, "--format", "png", "--device", device, "--out", tmp_path / device)
        assert (result.code, result.err) == (0, "")
    pictures: list[dict[str, bytes]] = [{}, {}]
    for found, device in zip(pictures, ("cpu", "all"), strict=True):
        for shard in sorted((tmp_path / device).glob("shard-*.tar")):
            with tarfile.open(shard) as tar:
                members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
                found |= {member.name: data.read() for member, data in members if data and member.name.endswith(".png")}
    assert pictures[0] == pictures[1]
    assert sorted(pictures[0]) == [f"seed-{seed}.png" for seed in range(4)]


# Loops and pipelines.


def function(numbered: bool) -> Callable[..., Tensor]:
    unet = Denoiser(seed=1)
    scheduler: Any = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)

    def plainly(x: Tensor, generator: torch.Generator) -> Tensor:
        unet.to(x.device)
        scheduler.set_timesteps(30, device=x.device)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t), t, x, generator=generator).prev_sample
        return x

    def by_number(x: Tensor, generator: torch.Generator) -> Tensor:
        unet.to(x.device)
        scheduler.set_timesteps(30)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(unet(x, t) * (1 + 0.01 * i), t, x, generator=generator).prev_sample
        return x

    return by_number if numbered else plainly


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("drawn", ["cpu", "pseudo"])
def test_functions_with_generators_of_both_devices(drawn: str, numbered: bool) -> None:
    loop, x = function(numbered), torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(3)).to("pseudo")
    with torch.no_grad():
        wanted = loop(x, torch.Generator(drawn).manual_seed(2)).cpu()
        for method in (FINE, paradiff.auto(tolerance=1e-4)):
            run = paradiff.parallelize(loop, method)
            found = run(x, torch.Generator(drawn).manual_seed(2)).cpu()
            assert gap(found, wanted) < CLOSE
            assert run.report.executor in (("lanes" if numbered else "vector"), "sequential")
            assert run.report.executor != "sequential" or method is not FINE


@pytest.mark.parametrize("kind", [QueuedPolicy, MaskedPolicy])
def test_policies(kind: Any) -> None:
    seen = torch.randn(1, 3, generator=torch.Generator().manual_seed(4))

    def act(policy: Any, seen: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if kind is QueuedPolicy:
            return policy.select_action(seen, generator).cpu()
        return policy.predict_action(seen, generator)["action"].cpu()

    with torch.no_grad():
        wanted, policy = act(kind(), seen), kind().to("pseudo")
        with paradiff.parallelize(policy, FINE) as run:
            found = act(policy, seen.to("pseudo"))
    assert run.report.executor == "vector"
    assert gap(found, wanted) < CLOSE


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_call_begins_from_that_of_another_prompt(executor: Any) -> None:
    def call(pipe: Any, prompt: str) -> Tensor:
        size = {"num_inference_steps": 20, "height": 8, "width": 8, "output_type": "latent"}
        return pipe([prompt], generator=torch.Generator().manual_seed(3), **size).images.cpu()

    case, method = CASES["sd"], paradiff.quasi_newton(tolerance=1e-4)
    wanted, pipe = call(case.make(), "b"), case.make().to("pseudo")
    run = paradiff.parallelize(pipe, method, executor=executor, keep_trajectory=True)
    call(run, "a")
    with double.counting() as counts:
        warm = paradiff.parallelize(pipe, method, executor=executor, start=run.report)
        assert gap(call(warm, "b"), wanted) < CLOSE
    assert warm.report.executor == executor
    assert counts.of("wait: blocking upload", under="methods/") == 0, str(counts)


def test_memory_that_runs_out_in_lanes() -> None:
    case = CASES["sd3"]
    wanted, pipe, widths = case.run(case.make(), num_inference_steps=6), case.make().to("pseudo"), list[int]()
    own = pipe.transformer.forward

    def hungry(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.empty(len(hidden_states), 10**6, dtype=torch.uint8, device=hidden_states.device)  # what a large network needs
        widths.append(len(hidden_states))
        return own(hidden_states, *args, **kwargs)

    pipe.transformer.forward = hungry
    rows = 2 * len(wanted)
    with (
        double.limited(int((2 * rows + 1.5) * 1e6)),
        paradiff.parallelize(pipe, paradiff.quasi_newton(4, tolerance=0.0)) as run,
    ):
        found = case.run(pipe, num_inference_steps=6).cpu()
    assert run.report.executor == "lanes"
    assert gap(found, wanted) < ROUNDING
    assert max(widths) == 2 * rows


def test_embeddings_and_latents_on_the_device() -> None:
    pipe = CASES["sd"].make().to("pseudo")
    prompt, negative = pipe.encode_prompt("a", "pseudo", 1, True)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to("pseudo")
    call = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "height": 8, "width": 8, "output_type": "latent"}
    wanted = pipe(**call, latents=latents, num_inference_steps=8).images.cpu()
    for executor in ("vector", "lanes"):
        with paradiff.parallelize(pipe, FINE, executor=executor) as run:
            found = pipe(**call, latents=latents, num_inference_steps=8).images.cpu()
        assert run.report.executor == executor
        assert gap(found, wanted) < CLOSE
    assert paradiff.explain(pipe, FINE, call={**call, "num_inference_steps": 8}).executor == "vector"


def test_the_devices_own_generator_is_drawn_from_as_in_the_plain_call() -> None:
    """In a process that has probed no scheduler yet."""
    pipe, found = CASES["ddpm"].make().to("pseudo"), list[Tensor]()
    parallel = paradiff.parallelize(pipe, paradiff.quasi_newton(window=3, tolerance=0.0))
    for call in (pipe, parallel):
        probe_module._probe.cache_clear()
        torch.manual_seed(7)
        found += [torch.as_tensor(call(num_inference_steps=8, output_type="np").images), torch.randn(4, device="pseudo").cpu()]
    assert parallel.report.executor == "vector"
    assert gap(found[2], found[0]) < CLOSE
    assert torch.equal(found[3], found[1])
