# SPDX-License-Identifier: Apache-2.0
"""A model that knows its rows: of each row its node, step and sample, the chain's noise there, and random numbers of its own.

The output of a row may then depend on these, too, but on no other row and on no earlier call: guidance that changes from step
to step, another rotation at each step, dropout with masks that belong to the step, a learned variance (models/variance.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from paradiff.chain.noise import Noise, keys_of, noise_along
from paradiff.chain.table import Table
from paradiff.errors import are_whole, require_truth, require_whole, shown
from paradiff.solver.arguments import require_callable, require_model
from paradiff.solver.protocol import Method

RowFunction = Callable[..., Tensor]
"""`function(x, t, rows, **conditioning) -> m`: as a `Denoiser`, with the rows beside."""


class Rows:
    """What the R rows of one network call are. They are compared by identity.

    Args:
        nodes: `[R]` their fine nodes, on the CPU.
        samples: `[R]` their samples, on the CPU.
        like: A tensor on the network's device, in its dtype.
        model: The model that is called.

    Attributes:
        nodes: `[R]` fine nodes i of equation (1), int64, on the network's device.
        steps: `[R]` steps of the sampler: the nodes, but that the stages of one step count once.
        samples: `[R]` places of the samples in the run.
    """

    def __init__(self, nodes: Tensor, samples: Tensor, like: Tensor, model: ByRow) -> None:
        self._nodes, self._samples, self._like, self._model = nodes, samples, like, model
        self._asked = 0  # random numbers that were asked for in this call: each time others

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"Rows({len(self)} at nodes {int(self._nodes.min())} to {int(self._nodes.max())})"

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self._like.device, non_blocking=True)

    @cached_property
    def nodes(self) -> Tensor:
        """`[R]` fine nodes."""
        return self._moved(self._nodes)

    @cached_property
    def samples(self) -> Tensor:
        """`[R]` places of the samples in the run."""
        return self._moved(self._samples)

    @cached_property
    def steps(self) -> Tensor:
        """`[R]` steps of the sampler."""
        return self._moved(self._model.step_of[self._nodes])

    def of(self, values: Tensor) -> Tensor:
        """A row's own of some values, shaped to multiply its state.

        Args:
            values: `[N]` or `[N+1]`, one for each node, on the CPU.

        Raises:
            ValueError: If there are not so many.
        """
        steps = self._model.table.steps
        if not isinstance(values, Tensor) or values.ndim != 1 or len(values) not in (steps, steps + 1):
            raise ValueError(f"values of nodes were asked for of {shown(values)}; give a tensor [{steps}], one for each node")
        found = self._moved(values[self._nodes].to(self._like.dtype))
        return found.view(-1, *[1] * (self._like.ndim - 1))

    def pick(self, values: Tensor) -> Tensor:
        """`[R, ...]` a row's own of values of each sample and node.

        Args:
            values: `[B, N, ...]` on the CPU.

        Raises:
            ValueError: If they have no axes of samples and nodes.
        """
        if not isinstance(values, Tensor) or values.ndim < 2 or values.shape[1] < self._model.table.steps:
            raise ValueError(
                f"a row's own was asked for of {shown(values)}; give a tensor with an axis of samples and one of "
                f"{self._model.table.steps} nodes"
            )
        return self._moved(values[self._samples, self._nodes].to(self._like.dtype))

    @property
    def noise(self) -> Tensor:
        """`[R, ...]` z[i] of equation (1) at the rows' nodes.

        Raises:
            ValueError: If the model was made without noise.
        """
        return self.drawn(self._model.chain_noise("the noise of its rows"))

    def drawn(self, noise: Noise) -> Tensor:
        """`[R, ...]` a source's draws at the rows' nodes."""
        drawn = [noise.draw(s, range(n, n + 1))[0] for s, n in self._places()]
        return self._moved(torch.stack(drawn)).to(self._like.dtype)

    def randn(self, shape: Sequence[int] | None = None) -> Tensor:
        """`[R, *shape]` standard normal numbers; a row's own, the same each time that it is evaluated.

        Args:
            shape: Of one row; that of its state by default.

        Raises:
            ValueError: If the model was made without noise, or the shape is none.
        """
        return self._random(shape, lambda generator, size: generator.standard_normal(size, dtype=np.float32))

    def rand(self, shape: Sequence[int] | None = None) -> Tensor:
        """As `randn`, numbers evenly spread in [0, 1)."""
        return self._random(shape, lambda generator, size: generator.random(size, dtype=np.float32))

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """`x` `[R, ...]` with a share p of each row's entries set to 0, and the others divided by 1 - p.

        Raises:
            ValueError: If the model was made without noise, or p is not in [0, 1).
        """
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"the share of dropout is {shown(p)}; it must be in 0 <= p < 1")
        return x * (self.rand(x.shape[1:]) >= p) / (1 - p)

    def _places(self) -> list[tuple[int, int]]:
        """Sample and node of each row."""
        return list(zip(self._samples.tolist(), self._nodes.tolist(), strict=True))

    def _random(
        self, shape: Sequence[int] | None, draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    ) -> Tensor:
        keys = self._model.keys("random numbers")
        size = tuple(self._like.shape[1:]) if shape is None else tuple(shape)
        if not are_whole(size) or min(size, default=1) < 1:
            raise ValueError(f"random numbers of shape {shown(shape)} were asked for; give whole numbers, each at least 1")
        asked, self._asked = self._asked, self._asked + 1
        first = self._model.table.first  # a slice's numbers are those of the whole chain
        found = [draw(_generator(*keys[sample], first + node, asked), size) for sample, node in self._places()]
        return self._moved(torch.from_numpy(np.stack(found))).to(self._like.dtype)


def _generator(seed: int, sample: int, node: int, asked: int) -> np.random.Generator:
    """The random numbers of a row. Their keys are hashed, and so are others than those of the chain's noise."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample, node, asked])))


class ByRow:
    """A model that knows its rows, for `sample` and `Evaluator`; see `by_row`. Models are compared by identity.

    Attributes:
        function: As given to `by_row`.
        table: Likewise.
        noise: Likewise.
        smooth: Likewise.
        symmetry: Likewise.
        renewed: Likewise.
        step_of: `[N+1]` the sampler's step of each node.
    """

    def __init__(
        self,
        function: RowFunction,
        table: Table,
        noise: Noise | None,
        seed: int | None,
        smooth: bool,
        symmetry: Callable[[Tensor], Tensor] | None,
        renewed: Tensor | None,
    ) -> None:
        self.renewed = renewed
        self.function, self.table, self.noise, self.smooth, self.symmetry = function, table, noise, smooth, symmetry
        self._seed = seed
        self._along: Noise | None = None
        first = torch.zeros(table.steps + 1, dtype=torch.int64, device="cpu")
        first[table.restarts] = 1
        self.step_of = first.cumsum(0) - 1

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"by_row({name} on {self.table.name!r}, {self.table.steps} steps)"

    def __call__(self, x: Tensor, t: Tensor, **conditioning: object) -> Tensor:
        """Refuses to be called without rows.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a model that knows its rows was called with states and times alone; give it to paradiff.sample or Evaluator, or "
            "call its `of_rows`"
        )

    def of_rows(self, x: Tensor, t: Tensor, nodes: Tensor, samples: Tensor, **conditioning: object) -> Tensor:
        """Outputs of rows.

        Args:
            x: `[R, ...]` states as the network sees them.
            t: `[R]` times.
            nodes: `[R]` fine nodes, on the CPU.
            samples: `[R]` samples, on the CPU.
            conditioning: By name.
        """
        return self.function(x, t, Rows(nodes, samples, x, self), **conditioning)

    def fits(self, table: Table, noise: Noise, method: Method) -> None:
        """Refuses another chain than that which the model was made for.

        Raises:
            ValueError: If it is another one, its noise is, or the method solves no chain.
        """
        if not method.solves_chain:
            raise ValueError(
                f"{method!r} has nodes of its own, of which the model knows nothing; give a method that solves "
                "the table's chain"
            )
        if table != self.table:
            raise ValueError(
                f"the model knows the rows of table {self.table.name!r} of {self.table.steps} steps, and the run's is "
                f"{table.name!r} of {table.steps}; make it with paradiff.by_row(function, table, ...) of the run's own table"
            )
        if self.noise is not None and noise is not self.noise and noise != self.noise:
            raise ValueError(
                f"the model knows the rows of {self.noise!r}, and the run's is {noise!r}; make it with the run's own noise"
            )

    def chain_noise(self, what: str) -> Noise:
        """The noise of the chain.

        Raises:
            ValueError: If the model was made without noise.
        """
        if self.noise is None:
            raise ValueError(
                f"the row function asked for {what}, which nobody gave; make it with "
                "paradiff.by_row(function, table, noise=noise)"
            )
        if self._along is None:
            self._along = noise_along(self.noise, self.table.draws, self.table.first)
        return self._along

    def keys(self, what: str) -> list[tuple[int, int]]:
        """What the random numbers of each sample's rows are keyed by."""
        self.chain_noise(what)
        assert self.noise is not None
        return keys_of(self.noise, self._seed)


def by_row(
    function: RowFunction,
    table: Table,
    noise: Noise | None = None,
    *,
    seed: int | None = None,
    smooth: bool | None = None,
    symmetry: Callable[[Tensor], Tensor] | None = None,
    renewed: Tensor | None = None,
) -> ByRow:
    """A model whose function knows the rows that it is called for, for `sample`; to `solve`, whose batches an `Evaluator` of it
    answers, say yourself whether it is smooth, and its symmetry.

    Args:
        function: `function(x, t, rows, **conditioning) -> m`: states `[R, ...]`, times `[R]` and their `Rows`; m like x. It may
            use of each row what `rows` says of it, and must not keep anything from call to call.
        table: The chain that the run is of.
        noise: The run's noise, for a function that uses `rows.noise` or random numbers.
        seed: What random numbers are keyed by, beside the sample's place, the node and how many were asked for before in the
            call. By default it is the seed of the sample's `Keyed` noise, and 0 for other noise.
        smooth: Whether outputs vary little from node to node for like states. If not, collocation, which interpolates
            them, leaves the chain to the window method. By default they do where no noise is given.
        symmetry: `symmetry(values)` of states or outputs `[W, ...]`: their changes `[W, g, ...]` by the g generators of a group
            under which the function answers alike, exactly or nearly, such as rotations: `quasi_newton` then knows its
            derivative in these directions. It changes the number of rounds alone.
        renewed: True, `[*shape]`, for elements of a state that each step makes of its output alone, whatever they were before:
            methods that carry changes from step to step do not carry theirs. It changes the number of rounds alone.

    Raises:
        ValueError: If an argument is of another kind.
    """
    require_model(function)
    if not isinstance(table, Table):
        raise ValueError(f"the table is {shown(table)}; give the one of the run")
    if seed is not None:
        require_whole("the seed", seed, 0, most=2**64 - 1)
    if smooth is not None:
        require_truth("smooth", smooth)
    require_callable("the symmetry", symmetry, "a function of states")
    if renewed is not None and (not isinstance(renewed, Tensor) or renewed.dtype != torch.bool):
        raise ValueError(f"renewed is {shown(renewed)}; give a tensor of truth values of one state's shape, or None")
    return ByRow(function, table, noise, seed, noise is None if smooth is None else smooth, symmetry, renewed)
