# SPDX-License-Identifier: Apache-2.0
"""What one call of `paradiff generate` was asked for, and the shards that follow from it.

The seeds are cut into shards, and a shard into batches, in the order in which they were given. All but the last few are sampled
by the sequential chain, a batch in step; the last few by the method, in parallel over time. Which seed lies in which shard and
batch follows from the request alone, so that the bytes of a shard do not depend on who computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paradiff.app.options import parse_seeds
from paradiff.app.request import Request
from paradiff.errors import refuse_unknown, require_whole

Mode = Literal["batched", "parallel"]

FORMATS = {"safetensors": "safetensors", "png": "tar"}
"""Formats of shards, and the ends of their files' names."""

SHARD = 256
"""Samples of a shard, by default."""

NOT_BYTES = ("out", "overwrite", "compare", "trace", "timeout", "deadline", "objective", "previews", "trust_remote_code")
NOT_BYTES += ("start", "save_trajectory")
"""Options that decide on no byte of a shard."""


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """The options of `paradiff generate`, each as it was typed.

    Attributes:
        request: Those that `paradiff sample` has too.
        shard: Samples of a shard.
        batch: Samples of a batch; None for the model's own default.
        last: Seeds at the end that are sampled in parallel over time; None for those that fill no batch.
        format: One of FORMATS.

    Raises:
        ValueError: If a number is below its least, or the format is unknown.
    """

    request: Request
    shard: int
    batch: int | None
    last: int | None
    format: str

    def __post_init__(self) -> None:
        require_whole("--shard", self.shard, 1)
        if self.batch is not None:
            require_whole("--batch", self.batch, 1)
        if self.last is not None:
            count = len(parse_seeds(self.request.seeds))
            require_whole("--last", self.last, 0, f", since --seeds names {count}", most=count)
        refuse_unknown("format", self.format, list(FORMATS))

    def with_request(self, request: Request) -> Bulk:
        """The same with other options in `request`."""
        return dataclasses.replace(self, request=request)

    def to_json(self) -> dict[str, Any]:
        """The options that decide on the bytes of the shards, by name."""
        given = {name: value for name, value in self.request.to_json().items() if name not in NOT_BYTES}
        return {**given, "shard": self.shard, "batch": self.batch, "last": self.last, "format": self.format}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of samples.

    Attributes:
        name: Its name.
        mode: `batched` or `parallel`.
        seeds: In order.
        batch: Seeds that are sampled together.
    """

    name: str
    mode: Mode
    seeds: tuple[int, ...]
    batch: int

    @property
    def batches(self) -> list[tuple[int, ...]]:
        """The seeds of each batch."""
        return [self.seeds[k : k + self.batch] for k in range(0, len(self.seeds), self.batch)]


def shards_of(seeds: Sequence[int], *, shard: int, batch: int, last: int, together: int, format: str) -> list[Shard]:
    """The shards of a request, in order.

    Args:
        seeds: All seeds.
        shard: Samples of a batched shard.
        batch: Samples of a batch.
        last: Seeds at the end that are sampled in parallel over time.
        together: Of these the seeds of a shard, which are solved together.
        format: One of FORMATS.
    """
    edge = len(seeds) - last
    digits = max(5, len(str(-(-edge // shard) + -(-last // together))))
    cuts = [(k, min(k + shard, edge)) for k in range(0, edge, shard)]
    tail = [(k, min(k + together, len(seeds))) for k in range(edge, len(seeds), together)]

    def made(number: int, cut: tuple[int, int], mode: Mode, size: int) -> Shard:
        name = f"shard-{number:0{digits}}.{FORMATS[format]}"
        return Shard(name=name, mode=mode, seeds=tuple(seeds[slice(*cut)]), batch=size)

    found = [made(number, cut, "batched", batch) for number, cut in enumerate(cuts)]
    return found + [made(number, cut, "parallel", together) for number, cut in enumerate(tail, start=len(cuts))]


def in_turn(shards: Sequence[Shard], rank: int, size: int) -> list[Shard]:
    """Shards in the order in which a rank tries them: its own share, then those of the next ranks."""
    return [shard for k in range(size) for shard in shards[(rank + k) % size :: size]]


def differing(asked: dict[str, Any], begun: dict[str, Any]) -> str | None:
    """The first entry in which two requests differ; None for none."""
    return next((name for name in {**asked, **begun} if asked.get(name) != begun.get(name)), None)
