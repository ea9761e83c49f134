# SPDX-License-Identifier: Apache-2.0
"""Reading a pipeline's loop finds what uses its step number, and what else a run in parallel may not allow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest

from paradiff.pipelines.loop.reader import other_form, read_loops
from paradiff.pipelines.loop.source import kept, obstacles, outer_loops, reads_index


def pipeline(call: Callable[..., Any]) -> type:
    return type("Toy", (), {"__call__": call})


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionImg2ImgPipeline",
        "FluxPipeline",
        "PixArtSigmaPipeline",
        "DDIMPipeline",
        "DiTPipeline",
        "AnimateDiffPipeline",
        "LTXPipeline",
        "SanaPipeline",
        "QwenImagePipeline",
    ],
)
def test_loops_that_only_count_are_found_to(name: str) -> None:
    assert reads_index(getattr(diffusers, name)) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("StableDiffusionControlNetPipeline", "controlnet_keep[i]"),
        ("FluxControlNetPipeline", "controlnet_keep[i]"),
        ("StableDiffusion3Pipeline", "skip_layer_guidance_start"),
        ("StableDiffusionInpaintPipeline", "noise_timestep = timesteps[i + 1]"),
        ("CogVideoXPipeline", "timesteps[i - 1] if i > 0 else None"),
        ("StableDiffusionLatentUpscalePipeline", "sigma = self.scheduler.sigmas[i]"),
    ],
)
def test_loops_that_use_their_number_are_found_with_the_line(name: str, line: str) -> None:
    reads = reads_index(getattr(diffusers, name))
    assert reads is not None
    assert any(line in read for read in reads)


def test_parents_loop_is_read_for_a_child() -> None:
    child = type("Child", (diffusers.StableDiffusionControlNetPipeline,), {})  # pyright: ignore[reportPrivateImportUsage]
    assert reads_index(child) == reads_index(diffusers.StableDiffusionControlNetPipeline)
    assert reads_index(child)


def test_a_wrapped_call_is_read_through_its_wrapper() -> None:
    class Inner(diffusers.StableDiffusionControlNetPipeline):
        @functools.wraps(diffusers.StableDiffusionControlNetPipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return None

    assert reads_index(Inner)


def test_a_pipeline_without_a_loop_has_none() -> None:
    def call(self: Any) -> Any:
        return self.unet(1)

    assert reads_index(pipeline(call)) is None
    assert reads_index(type("Built", (), {"__call__": eval("lambda self: None")})) is None
    assert reads_index(int) is None


def test_progress_callbacks_and_logs_do_not_count() -> None:
    def call(self: Any, timesteps: Any, callback_on_step_end: Any, logger: Any, order: int, latents: Any, callback: Any) -> Any:
        with self.progress_bar() as progress_bar:
            for i, t in enumerate(timesteps):
                latents = self.scheduler.step(self.unet(latents, t), t, latents)
                logger.info(f"{i}")
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {}).pop("latents", latents)
                if i == len(timesteps) - 1 or (i + 1) % order == 0:
                    progress_bar.update()
                    if callback is not None and i % order == 0:
                        step = i // order
                        callback(step, t, latents)
        return latents

    assert reads_index(pipeline(call)) == []
    assert obstacles(pipeline(call)) == []


def test_a_use_beside_a_progress_bar_counts() -> None:
    def call(self: Any, timesteps: Any, latents: Any) -> Any:
        for i, t in enumerate(timesteps):
            latents = self.scheduler.step(self.unet(latents, t), t, latents)
            if i == 3:
                latents = latents * 2
                self.progress_bar.update()
        return latents

    assert reads_index(pipeline(call)) == ["if i == 3:"]


def test_a_number_handed_to_a_helper_counts() -> None:
    def call(self: Any, timesteps: Any, latents: Any) -> Any:
        for i, t in enumerate(timesteps):
            latents = self.scheduler.step(self.guided(latents, i), t, latents)
        return latents

    assert reads_index(pipeline(call)) == ["latents = self.scheduler.step(self.guided(latents, i), t, latents)"]


def test_zipped_values_ranges_and_counters_are_step_numbers() -> None:
    def zipped(self: Any, timesteps: Any, sigmas: Any, latents: Any) -> Any:
        for t, sigma in zip(timesteps, sigmas, strict=True):
            latents = self.scheduler.step(self.unet(latents * sigma, t), t, latents)

    def ranged(self: Any, timesteps: Any, latents: Any) -> Any:
        for j in self.progress_bar(range(len(timesteps))):
            latents = self.scheduler.step(self.unet(latents), timesteps[j], latents)

    def counted(self: Any, timesteps: Any, latents: Any) -> Any:
        k = 0
        for t in timesteps:
            latents = self.scheduler.step(self.unet(latents, t, k), t, latents)
            k += 1  # noqa: SIM113

    def only_counted(self: Any, timesteps: Any, latents: Any) -> Any:
        k = 0
        for t in timesteps:
            latents = self.scheduler.step(self.unet(latents, t), t, latents)
            k += 1  # noqa: SIM113

    for call in (zipped, ranged, counted):
        reads = reads_index(pipeline(call))
        assert reads is not None
        assert len(reads) == 1
        assert "self.scheduler.step" in reads[0]
    assert reads_index(pipeline(only_counted)) == []


def test_a_comprehensions_own_name_is_no_step_number() -> None:
    def call(self: Any, timesteps: Any, latents: Any) -> Any:
        for i, t in enumerate(timesteps):
            parts = [self.unet(latents[i], t) for i in range(2)]
            latents = self.scheduler.step(parts, t, latents)

    assert reads_index(pipeline(call)) == []


def test_a_loop_in_a_helper_is_found() -> None:
    def call(self: Any, latents: Any) -> Any:
        return self.denoise(latents)

    def denoise(self: Any, latents: Any) -> Any:
        for i, t in enumerate(self.scheduler.timesteps):
            latents = self.scheduler.step(self.unet(latents, t, self.weights[i]), t, latents)
        return latents

    reads = reads_index(type("Toy", (), {"__call__": call, "denoise": denoise}))
    assert reads == ["latents = self.scheduler.step(self.unet(latents, t, self.weights[i]), t, latents)"]


def test_loops_for_other_ends_are_not_taken_for_the_chain() -> None:
    def call(self: Any, timesteps: Any, latents: Any) -> Any:
        keeps = []
        for i in range(len(timesteps)):
            keeps.append(i / 2)
        for _, t in enumerate(timesteps):
            latents = self.scheduler.step(self.unet(latents, t), t, latents)

    assert [loop.line for loop in read_loops(pipeline(call))] == ["for _, t in enumerate(timesteps):"]
    assert reads_index(pipeline(call)) == []


def test_what_else_stands_in_the_way_is_named() -> None:
    def call(self: Any, timesteps: Any, latents: Any, torch: Any, np: Any, momentum: Any) -> Any:
        for _ in range(2):
            for t in timesteps:
                with torch.enable_grad():
                    noise = torch.randn_like(latents)
                momentum = momentum + np.mean(noise)
                for _ in range(2):
                    latents = self.scheduler.step(self.unet(latents, t), t, latents)
        for t in timesteps:
            latents = self.scheduler.step(self.unet(latents, t), t, latents)

    assert obstacles(pipeline(call)) == [
        "its scheduler steps several times in a pass",
        "its loop computes gradients: with torch.enable_grad():",
        "its loop leaves torch for numpy: momentum = momentum + np.mean(noise)",
        "its loop draws random numbers: noise = torch.randn_like(latents)",
        "its passes leave momentum to the next one",
    ]
    assert outer_loops(pipeline(call)) == ["for _ in range(2):"]


def test_obstacles_of_real_pipelines() -> None:
    assert obstacles(diffusers.StableDiffusionPipeline) == []
    assert outer_loops(diffusers.AnimateDiffPipeline) == ["for free_init_iter in range(num_free_init_iters):"]
    assert len(outer_loops(diffusers.HunyuanVideoFramepackPipeline)) == 1
    assert any("computes gradients" in found for found in obstacles(diffusers.StableDiffusionAttendAndExcitePipeline))
    assert obstacles(diffusers.LTXImageToVideoPipeline) == []  # only its state goes from one pass to the next
    assert any("edit_momentum" in found for found in obstacles(diffusers.SemanticStableDiffusionPipeline))


def test_most_loops_of_diffusers_can_be_read() -> None:
    """A change of idioms in diffusers would show here first. Version 0.42.1: 278 of 293 read, 96 use their number."""
    kinds = [kind for name in dir(diffusers) if name.endswith("Pipeline") and inspect.isclass(kind := getattr(diffusers, name))]
    kinds = [kind for kind in kinds if "__call__" in dir(kind) and kind.__module__.startswith("diffusers.pipelines.")]
    reads = [reads_index(kind) for kind in kinds]
    assert len(kinds) > 200
    assert sum(read is None for read in reads) < len(reads) / 10
    assert len(reads) / 5 < sum(bool(read) for read in reads) < len(reads) / 2


def test_loops_that_do_not_walk_over_their_times_are_told_by_their_form() -> None:
    def whiles(self: Any, latents: Any) -> Any:
        i = 0
        while i < len(self.scheduler.timesteps):
            latents = self.scheduler.step(self.unet(latents), self.scheduler.timesteps[i], latents)
            i += 1

    def copied(self: Any, latents: Any) -> Any:
        for t in sorted(self.scheduler.timesteps):
            latents = self.scheduler.step(self.unet(latents), t, latents)

    class Recursive:
        def __call__(self, latents: Any) -> Any:
            return self.again(latents, 0)

        def again(self, latents: Any, i: int) -> Any:
            one: Any = self
            return self.again(one.scheduler.step(latents, i, latents), i + 1)

    assert "the loop is a `while`" in str(other_form(pipeline(whiles)))
    assert "something else than scheduler.timesteps: for t in sorted(" in str(other_form(pipeline(copied)))
    assert other_form(Recursive) == "the loop's calls of the scheduler are in a recursion, of again"
    assert other_form(object) is None


def test_what_passes_gather_for_the_code_after_the_loop_is_an_obstacle() -> None:
    def counted(self: Any, latents: Any, timesteps: Any) -> Any:
        n = 0
        for t in timesteps:
            latents = self.scheduler.step(self.unet(latents), t, latents)
            n += 1
        return latents * n

    def told(self: Any, latents: Any, timesteps: Any) -> Any:
        n = 0
        for t in timesteps:
            latents = self.scheduler.step(self.unet(latents), t, latents)
            n += 1
        self.logger.info(n)
        return latents

    def stored(self: Any, states: Any, timesteps: Any) -> Any:
        for i, t in enumerate(timesteps):
            states[i + 1] = self.scheduler.step(self.unet(states[i]), t, states[i])
        return states[-1]

    def one_place(self: Any, box: Any, timesteps: Any) -> Any:
        for t in timesteps:
            box["latents"] = self.scheduler.step(self.unet(box["latents"]), t, box["latents"])
        return box["latents"]

    def left(self: Any, latents: Any, noise_pred: Any, timesteps: Any) -> Any:
        for t in timesteps:
            noise_pred = self.unet(latents, t)
            latents = self.scheduler.step(noise_pred, t, latents)
        return latents - noise_pred

    assert obstacles(pipeline(counted)) == ["its passes add to n, which is read after the loop"]
    assert obstacles(pipeline(told)) == []
    assert obstacles(pipeline(stored)) == ["its passes write their states into states, one by one"]
    assert obstacles(pipeline(one_place)) == []
    assert kept(pipeline(left)) == ["noise_pred"]
    assert kept(pipeline(told)) == []


def test_a_class_whose_loop_is_replaced_is_read_anew() -> None:
    def plain(self: Any, latents: Any, timesteps: Any) -> Any:
        for t in timesteps:
            latents = self.scheduler.step(self.unet(latents, t), t, latents)
        return latents

    def counting(self: Any, latents: Any, timesteps: Any) -> Any:
        for i, t in enumerate(timesteps):
            latents = self.scheduler.step(i * self.unet(latents, t), t, latents)
        return latents

    kind: Any = pipeline(plain)
    assert reads_index(kind) == []
    kind.__call__ = counting
    assert reads_index(kind) == ["latents = self.scheduler.step(i * self.unet(latents, t), t, latents)"]
    counting.__code__ = plain.__code__
    assert reads_index(kind) == []
