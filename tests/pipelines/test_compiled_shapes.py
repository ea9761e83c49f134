# SPDX-License-Identifier: Apache-2.0
"""A compiled network in a padded pipeline meets the plain call's inputs at four widths: three graphs more than the plain call,
and none in a second call.

`torch.compile` takes seconds for each graph (test_buffers.py), so a stand-in counts what its guards tell apart: shapes, strides
and dtypes of tensors, and other arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CASES
from torch import Tensor
from torch.utils import _pytree

import paradiff
from paradiff.pipelines.executors import coalesce
from paradiff.pipelines.network import batched_call

STEPS, WINDOW = 6, 5
FURTHER = 3
"""Widths beside that of a single state."""
NAMES = [
    *("ddim", "dit", "sd", "sd_controlnet", "sd3", "flux", "pixart", "sana", "wan", "ltx", "cogvideox", "hunyuan", "z_image"),
]


def denoiser(pipe: Any) -> Any:
    return pipe.unet if getattr(pipe, "transformer", None) is None else pipe.transformer


def form(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


def counted(pipe: Any) -> set[Any]:
    """The forms of the calls that a network gets, which stands in for a compiled one."""
    network, forms = denoiser(pipe), set[Any]()

    def compiled(*args: Any, **kwargs: Any) -> Any:
        leaves, shape = _pytree.tree_flatten((args, kwargs))
        forms.add((str(shape), *map(form, leaves)))
        return network._call_impl(*args, **kwargs)

    network.__dict__["_compiled_call_impl"] = compiled
    return forms


def graphs_of(name: str, count: Callable[[Any], Any]) -> tuple[int, int, int]:
    """The graphs of a plain call, of a parallel one, and how many a second parallel call adds."""

    def call(pipe: Any) -> None:
        CASES[name].run(pipe, num_inference_steps=STEPS)

    plain, pipe = CASES[name].make(), CASES[name].make()
    plainly, graphs = count(plain), count(pipe)
    call(plain)
    with paradiff.parallelize(pipe, paradiff.quasi_newton(window=WINDOW), pad=True) as run:
        call(pipe)
        first = len(graphs)
        call(pipe)
    assert run.report.executor != "sequential"
    return len(plainly), first, len(graphs) - first


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_pipeline_has_three_graphs_more_than_the_plain_call(name: str) -> None:
    plain, parallel, again = graphs_of(name, counted)
    assert 1 <= plain < parallel <= plain + FURTHER
    assert again == 0


@pytest.mark.parametrize(("name", "module", "function"), [("dit", batched_call, "copied"), ("sd3", coalesce, "stacked")])
def test_a_call_of_one_state_in_another_form_is_found(name: str, module: Any, function: str, monkeypatch: Any) -> None:
    """These hand their networks an expanded time, whose stride 0 is a form of its own."""
    monkeypatch.setattr(module, function, torch.clone if function == "copied" else torch.stack)
    plain, parallel, _ = graphs_of(name, counted)
    monkeypatch.undo()
    assert graphs_of(name, counted) == (plain, parallel - 1, 0)
