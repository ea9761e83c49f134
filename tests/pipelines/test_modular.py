# SPDX-License-Identifier: Apache-2.0
"""diffusers' modular pipelines: each family gives its plain call's result in parallel, or is called as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as D
import numpy as np
import pytest
import torch
from packaging.version import Version
from tiny import films, flows, images
from tiny.case import noise, quiet
from torch import Tensor

import paradiff
from paradiff import parallelize, quasi_newton

if Version(D.__version__) < Version("0.42"):
    pytest.skip("these blocks are those of the newest diffusers", allow_module_level=True)
from diffusers.modular_pipelines.z_image.denoise import ZImageDenoiseStep

STEPS = 14
SIZE = {"height": 32, "width": 32, "num_inference_steps": STEPS}


@dataclass(frozen=True)
class Family:
    """A family of modular pipelines.

    Attributes:
        blocks: The module and the class of its blocks, below `diffusers.modular_pipelines`.
        tiny: Builds the ordinary pipeline whose components it takes.
        arguments: Those of its call.
        left: Blocks that are taken out.
        output: The name of what is compared.
    """

    blocks: str
    tiny: Callable[[], Any]
    arguments: dict[str, Any]
    left: tuple[str, ...] = ()
    output: str = "images"

    def make(self) -> Any:
        module, name = self.blocks.split(":")
        blocks: Any = getattr(__import__(f"diffusers.modular_pipelines.{module}", fromlist=[name]), name)()
        for name in self.left:
            del blocks.sub_blocks[name]
        with quiet():
            tiny = self.tiny()
            pipe = blocks.init_pipeline()
            known = pipe.components.keys()
            pipe.update_components(**{name: part for name, part in tiny.components.items() if name in known})
        for block in blocks_of(pipe._blocks):
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, seed: int = 0, **overrides: Any) -> Tensor:
        given = {"output": self.output, "output_type": "np", "generator": torch.Generator().manual_seed(seed)}
        return torch.as_tensor(np.asarray(pipe(**given | self.arguments | overrides)))


def blocks_of(block: Any) -> list[Any]:
    return [block, *(one for part in block.sub_blocks.values() for one in blocks_of(part))]


TEXT = {"prompt": "a small house"}
FAMILIES = {
    "z_image": Family("z_image:ZImageAutoBlocks", images.z_image, SIZE | TEXT | {"max_sequence_length": 16}),
    "qwen": Family("qwenimage:QwenImageAutoBlocks", images.qwen, SIZE | TEXT | {"max_sequence_length": 16}),
    "flux": Family("flux:FluxAutoBlocks", images.flux, SIZE | TEXT | {"max_sequence_length": 16}),
    "sd3": Family("stable_diffusion_3:StableDiffusion3AutoBlocks", images.sd3, SIZE | TEXT | {"max_sequence_length": 16}),
    "sdxl": Family("stable_diffusion_xl:StableDiffusionXLAutoBlocks", images.sdxl, SIZE | TEXT),
    "wan": Family(
        "wan:WanBlocks",
        lambda: films.film(D.WanPipeline, D.WanTransformer3DModel(**films.WAN), films.wan_vae(), films.euler()),
        SIZE
        | {
            "num_frames": 5,
            "prompt_embeds": noise(1, 16, 8, seed=1),
            "negative_prompt_embeds": noise(1, 16, 8, seed=2),
        },
        ("text_encoder",),
        "videos",
    ),
    "flux2": Family(
        "flux2:Flux2AutoBlocks",
        lambda: flows.flux2(D.Flux2Pipeline, text_encoder=None, tokenizer=None),
        SIZE | {"prompt_embeds": noise(1, 4, 16, seed=1)},
        ("text_encoder",),
    ),
}
METHODS = {"fine": quasi_newton(window=7, tolerance=1e-4), "coarse": quasi_newton(window=7, tolerance=1e-2)}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_parallel_and_gives_the_plain_result(name: str, caplog: pytest.LogCaptureFixture) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    plain = family.call(pipe)
    for method in METHODS.values():
        with parallelize(pipe, method) as run, caplog.at_level(logging.ERROR):
            found = family.call(pipe)
        assert run.report.executor == "lanes"
        assert not run.report.warnings
        assert run.report.steps == STEPS
        assert float((plain - found).square().mean().sqrt()) < 2 * method.tolerance
    assert run.report.rounds <= STEPS - 2
    assert not caplog.records


def with_block(block: Any, output: str = "latents") -> tuple[Family, Any]:
    """The z_image family with a further block at the end of its loop's passes."""
    family = FAMILIES["z_image"]
    pipe = family.make()
    for loop in (one for one in blocks_of(pipe._blocks) if hasattr(one, "loop_step")):
        loop.sub_blocks["last"] = block
    return Family(family.blocks, family.tiny, family.arguments | {"output_type": "pt"}, output=output), pipe


class Plain(D.ModularPipelineBlocks):
    """Sees each pass, and changes nothing."""

    model_name = "z-image"
    inputs = expected_components = ()  # type: ignore[assignment]
    intermediate_outputs = ()  # type: ignore[assignment]
    description = "last"

    def __call__(self, components: Any, state: Any, i: int, t: Tensor) -> Any:
        return components, state


class Counting(Plain):
    """Counts its calls, and scales the latents by that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, components: Any, state: Any, i: int, t: Tensor) -> Any:
        self.calls += 1
        state.latents = state.latents * (1 + 0.001 * self.calls)
        return components, state


class Numbering(Plain):
    """Scales the latents by the number of the step."""

    def __call__(self, components: Any, state: Any, i: int, t: Tensor) -> Any:
        state.latents = state.latents * (1 + 0.001 * i)
        return components, state


class Leaving(Plain):
    """Leaves the network's last output to what follows the loop."""

    intermediate_outputs = (D.modular_pipelines.OutputParam("noise_pred", type_hint=Tensor),)  # type: ignore[assignment]


def test_a_block_that_edits_by_the_step_is_followed() -> None:
    family, pipe = with_block(Numbering())
    plain = family.call(pipe)
    run = parallelize(pipe, METHODS["fine"])
    assert float((plain - family.call(run)).square().mean().sqrt()) < 2e-4 * float(plain.std())
    assert run.report.executor == "lanes"


def test_a_block_that_counts_is_found_and_called_in_order(caplog: pytest.LogCaptureFixture) -> None:
    family, pipe = with_block(Counting())
    block = next(one for one in blocks_of(pipe._blocks) if isinstance(one, Counting))
    plain = family.call(pipe)
    block.calls = 0
    run = parallelize(pipe, METHODS["coarse"])
    with pytest.warns(RuntimeWarning, match="keeps something from one pass to the next"), caplog.at_level(logging.ERROR):
        found = family.call(run)
    assert torch.equal(plain, found)
    assert run.report.executor == "sequential"
    assert block.calls == STEPS
    assert not caplog.records  # of the blocks through which the refusal passed


def test_what_a_block_leaves_is_that_of_the_last_pass() -> None:
    family, pipe = with_block(Leaving(), output="noise_pred")
    plain = family.call(pipe)
    run = parallelize(pipe, METHODS["fine"])
    assert float((plain - family.call(run)).square().mean().sqrt()) < 1e-3 * float(plain.std())
    sparse = parallelize(pipe, paradiff.collocation(window=4))
    with pytest.warns(RuntimeWarning, match="leaves noise_pred to what follows the loop, and collocation does not keep"):
        found = family.call(sparse)
    assert torch.equal(plain, found)


def test_a_state_that_is_given_is_left_alone() -> None:
    family = FAMILIES["z_image"]
    pipe = family.make()
    state = pipe(**family.arguments, generator=torch.Generator().manual_seed(0), output_type="np")
    before = state.get("latents").clone()
    run = parallelize(pipe, METHODS["fine"])
    again = run(state=state, generator=torch.Generator().manual_seed(0), latents=None, **TEXT)
    assert torch.equal(state.get("latents"), before)
    assert float((again.get("latents") - before).square().mean().sqrt()) < 1e-3


def test_modular_pipelines_are_switched_and_refused_as_others() -> None:
    family = FAMILIES["z_image"]
    pipe = family.make()
    run = paradiff.enable_parallel_in_time(pipe, paradiff.ParallelInTimeConfig(method=METHODS["coarse"]))
    family.call(pipe)
    assert run.report.executor == "lanes"
    assert paradiff.is_parallel_in_time_enabled(pipe)
    paradiff.disable_parallel_in_time(pipe)
    assert type(pipe).__name__ == "ZImageModularPipeline"
    with pytest.raises(ValueError, match="scheduler was given beside a ZImageModularPipeline, whose"):
        parallelize(pipe, scheduler=pipe.scheduler)
    pipe.update_components(scheduler=None)
    with pytest.raises(ValueError, match="the ZImageModularPipeline has no scheduler"):
        parallelize(pipe)


def test_a_loop_is_replaced_by_a_parallel_block() -> None:
    family = FAMILIES["sdxl"]
    plain = family.call(family.make())
    pipe = family.make()
    made = paradiff.pipelines.parallel_blocks(pipe._blocks, METHODS["fine"])
    found = family.call(pipe)
    used = [block.run for block in made if block.run.reports]
    assert len(used) == 1
    assert used[0].report.executor == "lanes"
    assert used[0].report.rounds < STEPS
    assert float((plain - found).square().mean().sqrt()) < 2e-4
    with pytest.raises(ValueError, match="there is no loop within the"):
        paradiff.pipelines.parallel_blocks(pipe._blocks.sub_blocks["decode"])
    with pytest.raises(ValueError, match="it takes a block that is a loop"):
        paradiff.pipelines.parallel_block(made[0])
    with pytest.raises(ValueError, match="window is no option of a block"):
        paradiff.pipelines.parallel_blocks(FAMILIES["sdxl"].make()._blocks, window=3)


def test_a_block_that_counts_within_a_parallel_block_is_called_in_order() -> None:
    family, pipe = with_block(Counting())
    block = next(one for one in blocks_of(pipe._blocks) if isinstance(one, Counting))
    plain = family.call(pipe)
    block.calls = 0
    paradiff.pipelines.parallel_blocks(pipe._blocks, METHODS["coarse"])
    with pytest.warns(RuntimeWarning, match="keeps something from one pass to the next"):
        found = family.call(pipe)
    assert torch.equal(plain, found)
    assert block.calls == STEPS


class Averaging(ZImageDenoiseStep):
    """A loop whose sample is the mean of all its states; its step is in a block within a loop over blocks."""

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        own, total = self.get_block_state(state), 0.0
        for i, t in enumerate(own.timesteps):
            components, own = self.loop_step(components, own, i=i, t=t)
            total = total + own.latents
        own.latents = total / len(own.timesteps)
        self.set_block_state(state, own)
        return components, state


class Between(ZImageDenoiseStep):
    """A loop whose sample is the mean of its last two states."""

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        own = self.get_block_state(state)
        for i, t in enumerate(own.timesteps):
            before = own.latents
            components, own = self.loop_step(components, own, i=i, t=t)
        own.latents = (before + own.latents) / 2
        self.set_block_state(state, own)
        return components, state


def with_loop(loop: Any) -> Any:
    """The z_image pipeline with another loop."""
    pipe = FAMILIES["z_image"].make()
    for block in blocks_of(pipe._blocks):
        for name, part in list(block.sub_blocks.items()):
            if hasattr(part, "loop_step"):
                block.sub_blocks[name] = loop()
    return pipe


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("loop", "method", "said"),
    [
        (Averaging, METHODS["coarse"], "its passes leave total to the next one"),
        (Between, paradiff.collocation(window=4), "its last pass leaves before to what follows the loop, and collocation"),
    ],
)
def test_a_loop_of_ones_own_that_keeps_more_than_its_last_state_is_found(
    loop: Any, method: Any, said: str, whole: bool
) -> None:
    family = FAMILIES["z_image"]
    plain, pipe = family.call(with_loop(loop)), with_loop(loop)
    if whole:
        call = parallelize(pipe, method)
    else:
        paradiff.pipelines.parallel_blocks(pipe._blocks, method)
        call = pipe
    with pytest.warns(RuntimeWarning, match=said):
        assert torch.equal(family.call(call), plain)
