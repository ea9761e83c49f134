# SPDX-License-Identifier: Apache-2.0
"""What a tiny pipeline is: how it is built, how it is called and how many steps its loop makes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline of random weights with an ordinary call.

    Attributes:
        name: Its key in `CASES`.
        make: Builds the pipeline: seeded weights, eval mode, float32, CPU, no progress bar.
        call: `call(pipe, generator=..., **overrides)` is the pipeline's `__call__` with small sizes; its output is one tensor.
        steps: The number of `scheduler.step` calls that `call` makes.
        other: Overrides that change what the sample is conditioned on; empty for an unconditional pipeline.
    """

    name: str
    make: Callable[[], Any]
    call: Callable[..., Tensor]
    steps: int = 10
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, pipe: Any, seed: int = 0, **overrides: Any) -> Tensor:
        """The pipeline's output for a seed, with some arguments of its `__call__` replaced."""
        return self.call(pipe, **{"generator": torch.Generator("cpu").manual_seed(seed)} | overrides)


def calling(**arguments: Any) -> Callable[..., Tensor]:
    """A `Case.call` with these arguments."""

    def call(pipe: Any, **overrides: Any) -> Tensor:
        with deprecations():
            # Lists are copied since some pipelines write into the prompt that they are given.
            merged = {name: list(v) if isinstance(v, list) else v for name, v in (arguments | overrides).items()}
            return tensor(pipe(**merged)[0])

    return call


def tensor(output: Any) -> Tensor:
    """A pipeline's first output as one tensor."""
    if isinstance(output, list):
        return torch.stack([tensor(item) for item in output])
    return torch.as_tensor(output)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Seeded normal weights of a size that keeps activations O(1).

    Layers that diffusers initialises with zeros (the last ones of a network, the modulations of a transformer) would make the
    output a constant; here every layer matters.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            values = torch.randn(parameter.shape, generator=generator)
            if isinstance(layer, nn.Embedding):
                scaled = values
            elif parameter.ndim == 1 and name == "weight":
                scaled = 1 + 0.1 * values
            elif parameter.ndim == 1:
                scaled = 0.1 * values
            elif name == "weight":
                scaled = values * gain * (parameter.shape[0] / parameter.numel()) ** 0.5
            else:
                scaled = 0.5 * values
            parameter.data.copy_(scaled)


@contextlib.contextmanager
def deprecations() -> Iterator[None]:
    """Silences what diffusers 0.42 itself does with other libraries in a deprecated way."""
    with warnings.catch_warnings():
        # Schedulers that hand tensors to NumPy, and autoencoders that normalize their weights.
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        warnings.filterwarnings("ignore", r".*torch\.nn\.utils\.weight_norm", FutureWarning)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what diffusers and transformers say while a pipeline is built, in warnings and in their logs."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with deprecations():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def assemble(kind: Callable[..., Any], *, gains: Mapping[str, float] | None = None, **components: Any) -> Any:
    """A pipeline of these components with seeded weights.

    Args:
        kind: The pipeline class.
        gains: The gain of a component's weights where 1 makes states too large or conditions too weak.
        components: The arguments of the class.
    """
    with quiet():
        pipe = kind(**components)
    for seed, (name, component) in enumerate(sorted(pipe.components.items())):
        if isinstance(component, nn.Module):
            randomize(component, seed, (gains or {}).get(name, 1.0))
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
