# SPDX-License-Identifier: Apache-2.0
"""A block for modular pipelines that is put in place of one that is a loop, and makes its passes in parallel over time.

blocks = ZImageAutoBlocks()
paradiff.pipelines.parallel_blocks(blocks, paradiff.parasolver(window=16))
pipe = blocks.init_pipeline()
"""

from __future__ import annotations

from typing import Any

from paradiff.pipelines.host.block_host import BlockHost
from paradiff.pipelines.run import Run
from paradiff.pipelines.settings import Settings
from paradiff.planning.auto import auto
from paradiff.solver.protocol import Method


def parallel_block(block: Any, method: Method | None = None, **options: Any) -> Any:
    """A block that does what a loop's block does, in parallel over time.

    Args:
        block: A block that is a loop, a `LoopSequentialPipelineBlocks` of diffusers.
        method: The method, as for `parallelize`.
        options: Further settings: `executor`, `max_rows`, `pad`, `check`, `dtype`, `observer`, as for `parallelize`.

    Returns:
        A block with the same inputs, outputs and components. Its `run` is the `Run` with the report of each call.

    Raises:
        ValueError: If the block is no loop, or an option is unknown.
    """
    if not hasattr(block, "loop_step") or isinstance(block, _ParallelBlock):
        raise ValueError(
            f"parallel_block was given a {type(block).__name__}; it takes a block that is a loop, a "
            "LoopSequentialPipelineBlocks that is not parallel yet"
        )
    known = {"executor", "max_rows", "pad", "check", "dtype", "observer"}
    if unknown := options.keys() - known:
        raise ValueError(f"{', '.join(sorted(unknown))} is no option of a block; it takes {', '.join(sorted(known))}")
    kind = type(block)
    run = Run(BlockHost(block, kind), Settings(method=auto() if method is None else method, **options))
    own = object.__new__(type(kind.__name__, (_ParallelBlock, kind), {"__module__": kind.__module__}))
    vars(own).update(vars(block), run=run)
    return own


def parallel_blocks(blocks: Any, method: Method | None = None, **options: Any) -> list[Any]:
    """Puts a parallel block in place of each loop within some blocks.

    Args:
        blocks: The blocks of a pipeline. They are changed.
        method: The method, as for `parallelize`.
        options: As for `parallel_block`.

    Returns:
        The parallel blocks, in order.

    Raises:
        ValueError: If there is no loop within the blocks.
    """
    made = list(_replaced(blocks, method, options))
    if not made:
        raise ValueError(
            f"there is no loop within the {type(blocks).__name__}, whose blocks are {', '.join(blocks.sub_blocks)}"
        )
    return made


def _replaced(blocks: Any, method: Method | None, options: dict[str, Any]) -> Any:
    for name, part in list((getattr(blocks, "sub_blocks", None) or {}).items()):
        if hasattr(part, "loop_step"):
            blocks.sub_blocks[name] = parallel_block(part, method, **options)
            yield blocks.sub_blocks[name]
        else:
            yield from _replaced(part, method, options)


class _ParallelBlock:
    """The base of parallel blocks."""

    run: Run

    def __call__(self, components: Any, state: Any) -> Any:
        _, own = self.run(components=components, state=state)
        state.values.update(own.values)
        return components, state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The block itself: its run, and the reports in it, are those that the user holds."""
        return self
