# SPDX-License-Identifier: Apache-2.0
"""diffusers' `apply_*` functions: caches across steps are refused by the name of their hook, all others run in parallel.

The functions are found by name, so that one that a later diffusers adds is missed here until it has an entry.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import hooks
from tiny import CASES

from paradiff import explain, parallelize, parasolver
from paradiff.pipelines.network.hooks import stateful_hooks

METHOD = parasolver(tolerance=1e-4)
CASE = CASES["flux"]
SHORT = {"num_inference_steps": 6}
Apply = Callable[[Any], None]


def pyramid(network: Any) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(network, config)


def faster(network: Any) -> None:
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        tensor_format="BCHW",
        is_guidance_distilled=True,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_faster_cache(network, config)


def magnitude(network: Any) -> None:
    config = hooks.MagCacheConfig(threshold=0.5, num_inference_steps=6, retention_ratio=0.1, mag_ratios=torch.ones(6))
    hooks.apply_mag_cache(network, config)


STATEFUL: dict[str, tuple[Apply, str]] = {
    "apply_faster_cache": (faster, "FasterCacheBlockHook"),
    "apply_first_block_cache": (
        lambda network: hooks.apply_first_block_cache(network, hooks.FirstBlockCacheConfig(threshold=0.5)),
        "FBCHeadBlockHook",
    ),
    "apply_mag_cache": (magnitude, "MagCacheHeadHook"),
    "apply_pyramid_attention_broadcast": (pyramid, "PyramidAttentionBroadcastHook"),
    "apply_sea_cache": (lambda network: hooks.apply_sea_cache(network, hooks.SeaCacheConfig()), "SeaCacheRootHook"),
    "apply_taylorseer_cache": (
        lambda network: hooks.apply_taylorseer_cache(
            network, hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2)
        ),
        "TaylorSeerCacheHook",
    ),
    "apply_text_kv_cache": (
        lambda network: hooks.apply_text_kv_cache(network, hooks.TextKVCacheConfig()),
        "TextKVCacheTransformerHook",
    ),
}
"""Functions whose hooks keep values across steps, and a hook of each."""

HARMLESS: dict[str, Apply] = {
    "apply_group_offloading": lambda network: hooks.apply_group_offloading(
        network, torch.device("cpu"), torch.device("cpu"), "leaf_level"
    ),
    "apply_layer_skip": lambda network: hooks.apply_layer_skip(
        network, hooks.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    ),
    "apply_layerwise_casting": lambda network: hooks.apply_layerwise_casting(network, torch.bfloat16, torch.float32),
    "apply_layerwise_casting_hook": lambda network: hooks.apply_layerwise_casting_hook(
        network.proj_out, torch.bfloat16, torch.float32, False
    ),
}
SEVERAL_DEVICES = {"apply_context_parallel", "apply_tensor_parallel"}
"""Functions that need several processes or devices."""


def test_every_function_of_the_installed_diffusers_has_an_entry() -> None:
    found = {name for name in dir(hooks) if name.startswith("apply_")}
    assert found <= {*STATEFUL, *HARMLESS, *SEVERAL_DEVICES}


def having(name: str) -> Any:
    if not hasattr(hooks, name):
        pytest.skip(f"this diffusers has no {name}")
    return CASE.make()


@pytest.mark.parametrize("name", STATEFUL)
def test_a_cache_across_steps_is_refused_before_a_try_and_named(name: str) -> None:
    apply, hook = STATEFUL[name]
    pipe = having(name)
    apply(pipe.transformer)
    run = parallelize(pipe, METHOD)
    other = CASE.make()
    apply(other.transformer)
    if name == "apply_faster_cache":  # its plain call fails on this network
        assert hook in run.cached()[0]
        for call in (other, run):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that the call is sequential
                with pytest.raises(TypeError, match="not subscriptable"):
                    CASE.run(call, 3, **SHORT)
        kept, wanted = pipe.transformer.state_dict(), other.transformer.state_dict()
        assert kept.keys() == wanted.keys()
        assert all(torch.equal(kept[key], wanted[key]) for key in kept)
        assert stateful_hooks(pipe.transformer) == stateful_hooks(other.transformer)
        assert vars(pipe.transformer).keys() == vars(other.transformer).keys()
        return
    wanted = CASE.run(other, 3, **SHORT)
    with pytest.warns(RuntimeWarning, match=f"transformer keeps values across steps in a hook .*{hook}.*in order"):
        found = CASE.run(run, 3, **SHORT)
    assert torch.equal(found, wanted)
    assert run.report.executor == "sequential"
    assert run.report.refused_calls == 0


def test_explain_names_the_hook() -> None:
    pipe = CASE.make()
    STATEFUL["apply_first_block_cache"][0](pipe.transformer)
    assert "FBCHeadBlockHook" in str(explain(pipe, num_inference_steps=6))


def test_a_cache_that_was_taken_off_again_is_none() -> None:
    pipe = CASE.make()
    pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.5))
    run = parallelize(pipe, METHOD)
    assert len(run.cached()) == 1
    pipe.transformer.disable_cache()
    assert run.cached() == []
    run.enable().disable()


@pytest.mark.parametrize("name", HARMLESS)
def test_hooks_without_memory_run_in_parallel(name: str) -> None:
    pipe, other = having(name), CASE.make()
    HARMLESS[name](other.transformer)
    wanted = CASE.run(other, 3, **SHORT)
    HARMLESS[name](pipe.transformer)
    run = parallelize(pipe, METHOD)
    found = CASE.run(run, 3, **SHORT)
    assert run.report.executor == "vector"
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
