# SPDX-License-Identifier: Apache-2.0
"""The executors that a pipeline's loop allows, decided from its source (reader.py).

In the vector executor a pass of the loop is a round, so the counter of `enumerate(timesteps)` is no step number. A loop may run
so if it uses the counter for nothing but a progress bar, a callback or a log.
"""

from __future__ import annotations

from collections.abc import Sequence

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.consumer import Pull, consuming
from paradiff.pipelines.loop.ledger import frames
from paradiff.pipelines.loop.reader import LoopSource, collected, has_source, loop_at, read_loops
from paradiff.solver.protocol import Method


def reads_index(pipeline: type) -> list[str] | None:
    """The lines in which a pipeline class's loop uses its step number; None if there is no readable loop.

    Progress bars, callbacks, logs and XLA's marks do not count.
    """
    loops = read_loops(pipeline)
    return [line for loop in loops for line in loop.index_reads] if loops else None


def obstacles(pipeline: type) -> list[str]:
    """The reasons, as clauses, why a pipeline class's loop has no parallel form."""
    found: list[str] = []
    for loop in read_loops(pipeline):
        found += ["its scheduler steps several times in a pass"] if loop.inner_steps else []
        found += [f"its loop computes gradients: {line}" for line in loop.gradients[:1]]
        found += [f"its loop leaves torch for numpy: {line}" for line in loop.numpy[:1]]
        found += [f"its loop draws random numbers: {line}" for line in loop.random[:1]]
        found += handing_on(loop)
    return list(dict.fromkeys([*found, *collected(pipeline)]))


def handing_on(loop: LoopSource) -> list[str]:
    """The reasons, as clauses, that lie in what a loop's passes leave in variables."""
    coupled = [name for name in loop.carried if name != "latents"]
    found = [f"its passes leave {', '.join(coupled)} to the next one"] if coupled else []
    found += [f"its passes write their states into {', '.join(loop.arrays)}, one by one"] if loop.arrays else []
    found += [f"its passes add to {', '.join(loop.gathered)}, which is read after the loop"] if loop.gathered else []
    found += [f"its passes add to {', '.join(loop.outliving)}, which outlives its call"] if loop.outliving else []
    found += [f"one of its passes leaves {', '.join(loop.left)} to what follows the loop"] if loop.left else []
    return found


def refuse_what_is_handed_on(pipeline: type, method: Method, pulls: Sequence[Pull] = ()) -> None:
    """Reads the loop that runs where the class's methods do not show it: another name of the scheduler, another function; and
    who is given what its passes make.

    Args:
        pipeline: The class.
        method: The method.
        pulls: The frames that asked for the loop's first time.

    Raises:
        Unsupported: If its passes leave something in variables that later passes, or what follows the loop, read; or if there
            is no source to read.
    """
    for line, loop in consuming(list(frames()), pulls):
        if loop is None:
            raise Unsupported(f"its passes hand their states on, one by one, to what keeps them: {line}")
        _refuse(loop, method)
    unread = ""
    # The loop of a modular pipeline's block steps in a function of another block, so that it was not read before.
    known = set[str]() if hasattr(pipeline, "loop_step") else {loop.line for loop in read_loops(pipeline)}
    asked = {id(pull.frame) for pull in pulls}
    within = any(id(frame) in asked for frame in frames())  # a pass may have loops of its own, as over the parts of its network
    for frame in frames():
        within &= id(frame) not in asked
        loop = loop_at(pipeline, frame.f_code, frame.f_lineno)
        if loop is None:
            unread = unread or ("" if has_source(frame.f_code) else frame.f_code.co_name)
            continue
        told = [name for name in loop.told if callable(frame.f_locals.get(name))]
        if told:
            raise Unsupported(
                f"its passes call {told[0]}, one of its arguments, for what it does, and a parallel run makes other passes, "
                "and more of them"
            )
        if loop.line in known:
            return
        _refuse(loop, method)
        if not within:
            return
    if unread:
        raise Unsupported(
            f"the source of {unread}, where its loop may be, cannot be read, so that what passes leave in variables is not "
            "known: define it in a file"
        )


def _refuse(loop: LoopSource, method: Method) -> None:
    """Raises Unsupported if a loop's passes leave something in variables that is read later."""
    found = handing_on(loop)
    clause = handed_on(loop.kept, method)
    if found or clause is not None:
        raise Unsupported(found[0] if found else str(clause))


def kept(pipeline: type) -> list[str]:
    """The names of what a pass of a pipeline class's loop sets, other than the state, and what follows the loop reads."""
    return list(dict.fromkeys(name for loop in read_loops(pipeline) for name in loop.kept))


def handed_on(names: list[str], method: Method) -> str | None:
    """A clause against a method that does not keep the state after every step, for a loop whose last pass is read later.

    Args:
        names: What the last pass leaves to what follows the loop.
        method: The method.
    """
    if method.dense_output or not names:
        return None
    return (
        f"its last pass leaves {', '.join(names)} to what follows the loop, and {method.name} does not keep the state after "
        "every step"
    )


def outer_loops(pipeline: type) -> list[str]:
    """The lines that open loops around a pipeline class's loop; its call then solves several chains."""
    return list(dict.fromkeys(line for loop in read_loops(pipeline) for line in loop.outer))
