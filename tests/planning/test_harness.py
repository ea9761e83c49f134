# SPDX-License-Identifier: Apache-2.0
"""The problems by name: each has its chains, and its sequential samples are those of diffusers' own loop."""

from __future__ import annotations

import pytest
import torch

import paradiff
from paradiff.planning import compare
from paradiff.planning.harness import FAMILIES, FLOW, LENGTHS, PROMPTS, chains, contestants, family, of_scheduler
from paradiff.solver.protocol import Method

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
SEEDS = (3, 12)


@pytest.mark.parametrize("problem", FAMILIES)
def test_every_chain_of_a_family_takes_its_network(problem: str) -> None:
    own = family(problem)
    kinds = {kind for kind, _ in chains(problem)}
    assert kinds <= set(LENGTHS)
    assert (FLOW in kinds) is (problem not in ("digits", "shapes"))
    for kind in kinds:
        table = own.table(kind, 4)
        found = paradiff.sample(own.evaluator(table, SEEDS), table, own.noise(SEEDS), paradiff.sequential(), check="off")
        assert found.sample.shape == (2, *own.shape)
        assert float(found.sample.std()) > 0.05


@pytest.mark.parametrize("problem", ["shapes", "shapes-flow"])
def test_text_families_give_the_pipelines_own_latents(problem: str) -> None:
    own = family(problem)
    kind = FLOW if problem == "shapes-flow" else "ddim"
    table = own.table(kind, 6)
    found = paradiff.sample(own.evaluator(table, SEEDS), table, own.noise(SEEDS), paradiff.sequential(), check="off").sample
    pipe = paradiff.models.load_pipeline(problem)
    pipe.set_progress_bar_config(disable=True)
    if kind == "ddim":
        import diffusers

        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    for sample, seed in zip(found, SEEDS, strict=True):
        wanted = pipe(  # pyright: ignore[reportCallIssue]
            PROMPTS[seed % len(PROMPTS)],
            num_inference_steps=6,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images[0]
        assert float((sample - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the problem is 'digit'; .* did you mean 'digits'\?"):
        family("digit")
    with pytest.raises(ValueError, match=r"the chain is 'ddmp'; .* did you mean"):
        of_scheduler({}, "ddmp", 5)
    with pytest.raises(ValueError, match="the chain 'flow' is that of flow matching"):
        family("digits").table(FLOW, 5)
    with pytest.raises(ValueError, match="the chain is 'ddim'; it must be one of flow"):
        family("shapes-flow").table("ddim", 5)


@pytest.mark.parametrize(("kind", "piadm"), [("ddim", "piadm_ode"), ("ddpm", "piadm_sde")])
@pytest.mark.parametrize("window", [3, None])
def test_contestants_keep_to_the_window(kind: str, piadm: str, window: int | None) -> None:
    own = family("mixture-2")
    table = own.table(kind, 12)
    found = contestants(table, window)
    assert piadm in found
    for name, make in found.items():
        method = make(4e-3)
        assert isinstance(method, Method)
        done = compare(own.denoiser(table), table, own.noise([1]), {name: method})
        assert max(done[name].samples[0].widths) <= (window or table.steps), name


def test_a_window_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="the window is 0; it must be a whole number"):
        contestants(family("mixture-2").table(FLOW, 4), 0)
