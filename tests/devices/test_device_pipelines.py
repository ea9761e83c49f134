# SPDX-License-Identifier: Apache-2.0
"""Pipelines on a device that is not the CPU: parallel in both executors, with the sample of the plain call on the CPU, at most
two waits for the device a round, and no copy to it that blocks.

With tolerance 0 a parallel call takes the plain one's steps, so what is left is rounding, through a few steps of networks with
random weights. It depends on the processor's kernels. It is bounded relative to the largest value, as the audit of loops does.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import double
import pytest
import torch
from problems import gap
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff.models.pipeline import load_pipeline
from paradiff.pipelines.executors.lanes import Lockstep
from paradiff.pipelines.loop.audit import granted
from paradiff.pipelines.settings import Executor
from paradiff.solver.protocol import Round

EXACTLY = paradiff.quasi_newton(window=3, tolerance=0.0)
STEPS = 4
ROUNDING = granted(torch.finfo(torch.float32).eps)
EXECUTORS: list[Executor] = ["vector", "lanes"]
COPIES = 16
"""Copies between host and device that a round may make, for any window."""

# Those whose loops read their step number, or mix a window's states.
LANES_ONLY = {
    *(
        "shapes-flow",
        "z_image_truncated",
        "sd_inpaint4",
        "sd_inpaint9",
        "sd_controlnet",
        "sd3",
        "z_image",
        "wan",
        "wan22",
        "wan22_expand_timesteps",
    ),
    *("cogvideox", "ltx_image_to_video"),
}
# Other schedulers and settings of pipelines that are run.
LEFT_OUT = {
    *("ddim_eta1", "sd_dpmpp_2m_karras", "sd_deis", "sd_heun", "sd_ddim_eta1"),
    *("sd_rescale", "sd_controlnet_half", "sd3_without_t5", "sd3_skip_layers", "flux_short_text", "wan_euler"),
    *("cogvideox_dynamic_cfg", "hunyuan_true_cfg"),
}
NAMES = [name for name in CASES if name not in LEFT_OUT]


def parallel(
    executor: Executor, pipe: Any, call: Callable[..., Tensor], method: Any = EXACTLY, **options: Any
) -> tuple[Tensor, paradiff.pipelines.Report]:
    """The output of a parallel call, on the CPU, and its report; the executor is seen to be the one asked for."""
    with paradiff.parallelize(pipe, method, executor=executor, **options) as run:
        found = call(pipe)
    assert run.report.executor == executor
    return found.cpu(), run.report


def short(name: str, **overrides: Any) -> Callable[[Any], Tensor]:
    return lambda pipe: CASES[name].run(pipe, num_inference_steps=STEPS, **overrides)


def test_thirty_pipelines_are_run() -> None:
    assert len(set(NAMES) - LANES_ONLY) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_tiny_pipelines_are_parallel(name: str) -> None:
    pipe, call = CASES[name].make(), short(name)
    wanted = call(pipe)
    pipe.to("pseudo")
    for executor in EXECUTORS[name in LANES_ONLY :]:
        assert gap(parallel(executor, pipe, call)[0], wanted) < ROUNDING


def prompted(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
    return torch.as_tensor(pipe("a red circle left of a blue square", **call).images)


def unprompted(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.as_tensor(pipe(batch_size=2, num_inference_steps=STEPS, generator=generator, output_type="np").images)


@pytest.mark.parametrize(("model", "call"), [("shapes", prompted), ("shapes-flow", prompted), ("digits", unprompted)])
def test_bundled_pipelines_are_parallel(model: str, call: Callable[[Any], Tensor]) -> None:
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    wanted = call(pipe)
    pipe.to("pseudo")
    for executor in EXECUTORS[model in LANES_ONLY :]:
        assert gap(parallel(executor, pipe, call)[0], wanted) < ROUNDING


# Waits and copies.


def rounds_of(executor: Executor, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[double.Counts, int]]:
    """What was counted in each round, and the number of lanes that started in it."""
    started: list[int] = [0]
    new = Lockstep._new

    def noted(self: Lockstep) -> Any:
        started[-1] += 1
        return new(self)

    monkeypatch.setattr(Lockstep, "_new", noted)
    marks: list[Counter[tuple[str, str]]] = [Counter()]

    def mark(round: Round) -> None:
        marks.append(Counter(counts.lines))
        started.append(0)

    pipe = CASES[name].make().to("pseudo")
    with double.counting() as counts:
        parallel(executor, pipe, CASES[name].run, paradiff.quasi_newton(window=4), observer=mark)
    found: list[tuple[double.Counts, int]] = []
    for before, after, new_lanes in zip(marks, marks[1:], started, strict=False):
        counts = double.Counts()
        counts.lines = after - before
        found.append((counts, new_lanes))
    return found


def within_budget(counts: double.Counts) -> None:
    """The budget of a round: two waits, no copy that blocks, and few others."""
    assert counts.waits <= 2, str(counts)
    assert counts.blocking == 0, str(counts)
    assert counts.copies <= COPIES, str(counts)
    assert counts.of("wait", under="pipelines/network/") == 0, str(counts)


def within_budget_of_a_first_window(counts: double.Counts, networks: int) -> None:
    """The budget of the first round with a window, however large the networks are: for each network, its memory, its rows, and
    in lanes its arguments are compared, and the walk through the loop is judged. Copies of a network's own are not counted."""
    reads = "wait: to the host", "wait: item"
    assert counts.of(*reads, under="pipelines/network/") <= 2 * networks, str(counts)
    assert counts.of("wait", under="pipelines/executors/coalesce.py") <= networks, str(counts)
    assert counts.of("wait: to the host", under="pipelines/executors/dry_walk.py") <= 1, str(counts)


@pytest.mark.parametrize("name", ["ddim", "dit", "sd_euler_ancestral", "flux"])
def test_a_round_of_the_vector_executor_waits_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first, *rounds = [counts for counts, _ in rounds_of("vector", name, monkeypatch)]
    assert len(rounds) > 3
    within_budget_of_a_first_window(first, 1)
    for counts in rounds:
        within_budget(counts)


@pytest.mark.parametrize(
    ("name", "networks"), [("ddim", 1), ("sd_euler_ancestral", 1), ("sd_inpaint4", 1), ("sd_controlnet", 2), ("z_image", 1)]
)
def test_a_round_of_lanes_waits_twice(name: str, networks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not a lane starts in it: what a lane's start compares is read with the numbers of the round."""
    _, _, first, *rounds = rounds_of("lanes", name, monkeypatch)
    within_budget_of_a_first_window(first[0], networks)
    assert sum(new for _, new in rounds) > 1
    assert any(new == 0 for _, new in rounds)
    for counts, _ in rounds:
        within_budget(counts)


def test_nothing_waits_while_a_network_call_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a check, not in the first rounds either."""
    pipe = CASES["sd"].make().to("pseudo")
    with double.counting() as counts:
        parallel("vector", pipe, CASES["sd"].run, check="off")
    assert counts.of("wait", under="pipelines/network/") == 0, str(counts)


# Other ways to call.


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["ddpm", "sd_euler_ancestral"])
def test_generators_of_the_device(name: str, executor: Executor) -> None:
    pipe = CASES[name].make().to("pseudo")

    def call(pipe: Any) -> Tensor:
        generators.append(torch.Generator("pseudo").manual_seed(2))
        return short(name, generator=generators[-1])(pipe)

    generators: list[torch.Generator] = []
    wanted = call(pipe).cpu()
    found, _ = parallel(executor, pipe, call)
    assert gap(found, wanted) < ROUNDING
    assert torch.equal(generators[1].get_state(), generators[0].get_state())
    assert gap(short(name)(pipe).cpu(), wanted) > 0.1  # a CPU's generator draws others


@pytest.mark.parametrize("executor", EXECUTORS)
def test_torchs_own_generators_of_devices_end_as_after_the_plain_call(executor: Executor) -> None:
    pipe, call = CASES["sd_euler_ancestral"].make().to("pseudo"), short("sd_euler_ancestral", generator=None)
    ends: list[list[Tensor]] = []
    for run in (lambda: call(pipe).cpu(), lambda: parallel(executor, pipe, call)[0]):
        torch.manual_seed(5)
        ends.append([run(), torch.pseudo.get_rng_state(), torch.get_rng_state()])
    assert gap(ends[1][0], ends[0][0]) < ROUNDING
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, executor: Executor) -> None:
    pipe, call = CASES["sd"].make().to("pseudo", dtype), short("sd")
    wanted = call(pipe).float().cpu()
    found = parallel(executor, pipe, call)[0].float()
    assert gap(found, wanted) < granted(torch.finfo(dtype).eps)  # calls of other sizes round otherwise, in each layer and step


@pytest.mark.parametrize("executor", EXECUTORS)
def test_autocast(executor: Executor) -> None:
    pipe, call = CASES["sd"].make().to("pseudo"), short("sd")
    exact = call(pipe).cpu()
    with torch.autocast("pseudo", torch.bfloat16):
        wanted = call(pipe).float().cpu()
        found = parallel(executor, pipe, call)[0].float()
    assert gap(wanted, exact) > 1e-3
    assert gap(found, wanted) < granted(torch.finfo(torch.bfloat16).eps)  # calls of other sizes round otherwise in each layer


@pytest.mark.parametrize("executor", EXECUTORS)
def test_callbacks_are_given_the_devices_states(executor: Executor) -> None:
    told: list[list[Tensor]] = []

    def call(pipe: Any) -> Tensor:
        told.append([])

        def note(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            told[-1].append(tensors["latents"].clone())
            return {}

        return short("sd", callback_on_step_end=note)(pipe)

    pipe = CASES["sd"].make()
    call(pipe)
    parallel(executor, pipe.to("pseudo"), call)
    assert {latents.device.type for latents in told[1]} == {"pseudo"}
    assert len(told[1]) == len(told[0]) == STEPS
    assert all(gap(b.cpu(), a) < ROUNDING for a, b in zip(*told, strict=True))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_networks(offload: str, executor: Executor) -> None:
    pipe, call = CASES["sd"].make(), short("sd")
    wanted = call(pipe)
    getattr(pipe, offload)(device="pseudo")
    with double.counting() as counts:
        assert gap(parallel(executor, pipe, call)[0], wanted) < ROUNDING
    assert counts.of("wait: blocking upload", "upload", without="") > 10  # the weights came and went


GROUPS: dict[str, dict[str, Any]] = {
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaves": {"offload_type": "leaf_level"},
    "leaves, ahead": {"offload_type": "leaf_level", "use_stream": True},
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("groups", GROUPS)
def test_networks_that_are_offloaded_in_groups(groups: str, executor: Executor) -> None:
    pipe, call = CASES["sd"].make(), short("sd")
    wanted = call(pipe)
    pipe.enable_group_offload(onload_device=torch.device("pseudo"), offload_device=torch.device("cpu"), **GROUPS[groups])
    if GROUPS[groups].get("use_stream"):  # at a network's first call diffusers notes the order of its layers, and hooks it anew
        with (
            pytest.warns(RuntimeWarning, match="was called sequentially"),
            paradiff.parallelize(pipe, EXACTLY, executor=executor),
        ):
            assert gap(call(pipe).cpu(), wanted) < ROUNDING
    with double.counting() as counts:
        assert gap(parallel(executor, pipe, call)[0], wanted) < ROUNDING
    assert counts.of("wait: blocking upload", "upload", without="") > 10
    assert not any(weight.device.type == "pseudo" for weight in pipe.unet.parameters())


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "leaves", "leaves, ahead"])
def test_a_loop_that_changes_the_weights_of_offloaded_networks_is_refused(offload: str) -> None:
    """Their memory is another one after each call; what is told of the call before is the plain call's network."""

    def written(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        layer = pipe.unet.conv_out
        mapped = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
        (layer.weight if mapped is None else mapped["weight"]).data.mul_(0.99)
        return tensors

    call = short("sd", callback_on_step_end=written)
    wanted = call(CASES["sd"].make())
    pipe = CASES["sd"].make()
    if offload in GROUPS:
        pipe.enable_group_offload(onload_device=torch.device("pseudo"), offload_device=torch.device("cpu"), **GROUPS[offload])
        if GROUPS[offload].get("use_stream"):
            short("sd")(pipe)  # notes the order of its layers
    else:
        getattr(pipe, offload)(device="pseudo")
    with (
        pytest.warns(RuntimeWarning, match=r"writes to the weights unet\.conv_out\.weight"),
        paradiff.parallelize(pipe, EXACTLY),
    ):
        assert gap(call(pipe).cpu(), wanted) < ROUNDING


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("check", ["off", "first"])
def test_a_call_leaves_none_of_its_states_in_memory(check: Any, executor: Executor) -> None:
    """Neither for ever nor until cycles are collected, which may be after the device's memory is full."""
    pipe, call = CASES["sd_euler_ancestral"].make().to("pseudo"), short("sd_euler_ancestral")
    parallel(executor, pipe, call, check=check)
    gc.collect()
    gc.disable()
    try:
        before = torch.pseudo.memory_allocated()
        for _ in range(2):
            found, _ = parallel(executor, pipe, call, check=check)
        kept = torch.pseudo.memory_allocated() - before
    finally:
        gc.enable()
    assert kept < found.numel() * found.element_size()  # tables of a scheduler, less than a state


def test_a_window_that_does_not_fit_is_called_in_parts() -> None:
    pipe, call = CASES["ddim"].make(), short("ddim")
    wanted = call(pipe)
    pipe.to("pseudo")
    own, widths = pipe.unet.forward, []

    def hungry(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.empty(len(sample), 10**6, dtype=torch.uint8, device=sample.device)  # what a large network needs for a row
        widths.append(len(sample))
        return own(sample, *args, **kwargs)

    pipe.unet.forward = hungry
    rows = len(wanted)
    with double.limited(int(2.8e6 * rows)):
        found, _ = parallel("vector", pipe, call)
    assert gap(found, wanted) < ROUNDING
    assert max(widths) == 2 * rows  # of three that the window has
