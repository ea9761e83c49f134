# SPDX-License-Identifier: Apache-2.0
"""A block of a modular pipeline that is a loop, as a host: its scheduler and networks are those of the pipeline around it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.pipelines.host.host import Host
from paradiff.pipelines.host.modular_host import ModularHost, quiet
from paradiff.pipelines.loop.switch import Switch

TIMES = "timesteps"
"""The name of a loop's times in the state of its pipeline."""


class BlockHost(ModularHost):
    """A block that is a loop. See `Host`.

    Each call of a try has a copy of the pipeline, in which a proxy stands for the scheduler, and a state of its own, whose
    times are the proxy's.

    Args:
        owner: The block.
        kind: Its class.
        pipeline: The pipeline around it, `components` among the arguments of its call; None where it is not called yet.
    """

    def __init__(self, owner: Any, kind: Any, pipeline: Any = None) -> None:
        super().__init__(owner, kind)
        self._around = None if pipeline is None else Host(pipeline, type(pipeline))
        self.call = self._called

    def of(self, arguments: Mapping[str, Any]) -> BlockHost:
        return BlockHost(self.owner, self.kind, arguments["components"])

    @property
    def pipeline(self) -> Host:
        """The pipeline around the block.

        Raises:
            ValueError: If the block is not called yet.
        """
        if self._around is None:
            raise ValueError(f"the {self.name} has its scheduler from the pipeline that it is a block of; call that")
        return self._around

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def switch(self) -> Switch | None:
        return self.pipeline.switch

    @property
    def networks(self) -> dict[str, nn.Module]:
        return self.pipeline.networks

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def loops(self) -> list[Any]:
        return [self.owner]

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        with quiet(), self.pipeline.trying():
            yield

    def present(self, owner: Any, proxy: Any) -> Any:
        return proxy

    def copied(self, proxy: Any) -> Any:
        owner = copy.copy(self.owner)
        vars(owner)["scheduler"] = proxy
        owner.sub_blocks = type(owner.sub_blocks)((name, copy.copy(part)) for name, part in owner.sub_blocks.items())
        return owner

    def _called(self, owner: Any, components: Any, state: Any) -> Any:
        """A call of the block, or of a copy of it in a try."""
        proxy = vars(owner).get("scheduler")
        if proxy is None:
            return self.kind.__call__(owner, components, state)
        own = copy.copy(state)
        own.values = {name: value.clone() if type(value) is Tensor else value for name, value in state.values.items()}
        times = own.values.get(TIMES)
        if isinstance(times, Tensor) and torch.equal(times, torch.as_tensor(self.scheduler.timesteps)):
            own.values[TIMES] = proxy.timesteps
        return self.kind.__call__(owner, self.pipeline.copied(proxy), own)
