"""The evaluator: rows in, network outputs out. The only object that knows devices exist.

A solver yields a `Batch` of rows, states [R, ...] at times [R] of samples [R], and receives the outputs [R, ...]. The
evaluator moves dtypes, indexes the conditioning of each row, keeps to a row bound, and counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[..., Tensor]
"""`denoiser(x, t, **conditioning) -> m`: x `[R, ...]` states as the network sees them, t `[R]` times, conditioning `[R, ...]`
rows; m `[R, ...]` of the shape of x. Rows must not influence each other."""


@dataclass(frozen=True)
class Batch:
    """Rows to be evaluated in one round.

    Attributes:
        x: `[R, ...]` states, already scaled as the network expects them.
        t: `[R]` times, on the CPU; int64 where all times of the table are whole numbers, else float64.
        nodes: `[R]` nodes, on the CPU.
        samples: `[R]` samples, on the CPU.
    """

    x: Tensor
    t: Tensor
    nodes: Tensor
    samples: Tensor


class Evaluator:
    """Evaluates rows with one network on one device, in chunks of at most `max_rows`.

    On an accelerator that runs out of memory the chunk is halved and the rows are evaluated again; the smaller chunk is
    kept. Nothing here waits for the device.

    Args:
        denoiser: The network behind its calling convention (see `Denoiser`).
        conditioning: Tensors `[B, ...]`, handed to the denoiser by name, one row for each row of the batch.
        max_rows: Largest number of rows in one network call; None for no bound. A round of more rows takes several calls
            and still counts as one round.
        device: Where the network lives; states are kept there too.
        dtype: The network's dtype; states are cast to it, outputs back. None leaves states as they are.

    Attributes:
        rounds: Rounds so far.
        evaluations: Rows so far.
        seconds: Time spent in network calls, as seen from the host: on an asynchronous device only their launch.

    Raises:
        ValueError: If `max_rows` is below 1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; a network call needs at least 1 row, or None for no bound")
        self.denoiser = denoiser
        self.conditioning = dict(conditioning or {})
        self.max_rows = max_rows
        self.device = torch.device(device)
        self.dtype = dtype
        self.rounds = 0
        self.evaluations = 0
        self.seconds = 0.0

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Outputs `[R, ...]` in the dtype of the states.

        Raises:
            ValueError: If the network returns something else than one floating-point tensor of the shape of its input.
        """
        begin = time.perf_counter()
        rows = len(batch.x)
        bound = rows if self.max_rows is None else min(self.max_rows, rows)
        outputs: list[Tensor] = []
        first = 0
        while first < rows:
            try:
                outputs.append(self._call(batch, slice(first, first + bound)))
            except torch.OutOfMemoryError:
                if bound == 1:
                    raise
                bound = self.max_rows = (bound + 1) // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            first += bound
        self.rounds += 1
        self.evaluations += rows
        self.seconds += time.perf_counter() - begin
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _call(self, batch: Batch, part: slice) -> Tensor:
        x = batch.x[part].to(device=self.device, dtype=self.dtype)
        t = batch.t[part].to(self.device, non_blocking=True)
        rows = {name: value[batch.samples[part].to(value.device)] for name, value in self.conditioning.items()}
        m = self.denoiser(x, t, **rows)
        if not isinstance(m, Tensor):
            raise ValueError(
                f"the model returned a {type(m).__name__}; it must return one tensor (for a diffusers network, its `.sample`)"
            )
        if m.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(m.shape)} for rows of shape {tuple(x.shape)}; it must return one output "
                "of the shape of its input (a network that also predicts a variance needs those channels removed)"
            )
        if m.dtype != x.dtype:
            raise ValueError(
                f"the model returned dtype {m.dtype} for rows of dtype {x.dtype}; give the evaluator the network's own "
                f"dtype, dtype={m.dtype}, or have the model return its input's"
            )
        return m.to(batch.x.dtype)
