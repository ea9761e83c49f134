# SPDX-License-Identifier: Apache-2.0
"""A network call for all states of a window: the window's axis becomes part of the batch axis.

A network called with windowed tensors is called with plain ones, of K * W rows for K rows and W states, the window fastest:

    row k * W + w  =  row k of state w.

So a network that cuts its batch into two or three parts, for guidance, cuts it at the same rows as for one state. A plain
input of K rows is repeated in this order; frames of K videos, K * F rows, become (k, w, f). Inputs without rows (positions,
rotary embeddings, numbers) stay. Outputs are split into states again.

A number in a tensor of the CPU goes with any device, and pipelines of pixels keep their times so. A window's numbers are rows,
and are moved to the device of the main input.

The rule by which inputs have rows may be wrong for a network, and a network's rows may influence each other. So at a network's
first call with a window the middle state is evaluated again by itself, as in the sequential loop, and compared. It is evaluated
before that call and after it, and what the network keeps from one call to the next (memory.py) is compared, too. Where the rule
fails (an input of K numbers that are no rows, a stack of embeddings with its rows on the second axis), other layouts are tried:
one with which every state is that of a call of its own is used from there on.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import NeedsOrder, RanksFailed, Unsupported
from paradiff.pipelines.loop.random_state import Snapshot, drawn_by
from paradiff.pipelines.network.batching import Batching, refuse_transforms
from paradiff.pipelines.network.holder import holds_tensors
from paradiff.pipelines.network.memory import Memory
from paradiff.pipelines.network.tree import each, windowed_inputs
from paradiff.pipelines.tensor.windowed import HERE, Windowed, beside, common_run, copied, first_line
from paradiff.solver.accelerator import read

MAIN_INPUTS = ("sample", "hidden_states", "x", "latent_model_input")
POSITIONS = {"img_ids", "txt_ids", "image_ids", "text_ids", "latent_ids", "latent_image_ids"}
ROW_LISTS = {"img_shapes", "txt_seq_lens"}
LAYOUTS = 12
"""Most layouts tried for a network whose inputs are not laid out by the rule."""

Layout = dict[int, int | None]
"""The axis of the rows of some inputs, None for no rows, by their place among the call's tensors; others follow the rule."""


def batched_call(
    batching: Batching, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The network's outputs for all states of a window, as windowed tensors.

    Args:
        batching: The run's bound, padding, check and counters.
        name: The network's name in messages.
        forward: The network.
        args: Its arguments; at least one tensor in them or in `kwargs` is windowed.
        kwargs: Its named arguments.

    Raises:
        Unsupported: If the network fails or returns something without the rows it was given, or a check fails.
        torch.OutOfMemoryError: If one state alone does not fit.
    """
    refuse_transforms()
    batching.home(forward, args, kwargs)
    try:
        with batching.timed():
            return _WindowCall(batching, name, forward, args, kwargs).laid_out()
    except (Unsupported, RanksFailed, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(
            f"{name} could not be called with the states of a window as further rows ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error


class _Differs(Unsupported):
    """A batched call gave other outputs than single ones."""


class _WindowCall:
    """One call of a network with a window."""

    def __init__(
        self, batching: Batching, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.batching, self.name, self.forward, self.args, self.kwargs = batching, name, forward, args, kwargs
        self.leaves = windowed_inputs(args, kwargs)
        self.run, self.states = common_run(self.leaves), self.leaves[0].width
        main = self._main()
        first = main[0] if isinstance(main, list) else main
        self.device: torch.device = first.device
        self.listed = isinstance(main, list)
        shape: list[int] = [] if isinstance(main, list) else list(main.shape)
        self.rows = len(main) if isinstance(main, list) else shape[0] if shape else None
        self.frames = {size for size in shape[1:3] if size > 1} if len(shape) == 5 else set()
        self.layout: Layout = {}
        self._place = 0
        self._before: dict[int, Tensor] = {}  # the windows before the call, by their leaf
        self._single: list[Tensor] = []  # copies of the inputs that are one row in memory
        self._filled: list[tuple[Tensor, Tensor]] = []  # windows, and copies of them with states to fill the call
        self._may_be_single = True

    def _main(self) -> Any:
        """The input whose rows are the batch: a tensor, or a list with one tensor a row."""
        named = [self.kwargs.get(key) for key in MAIN_INPUTS]
        for value in (*self.args, *named, *self.leaves):
            if isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor)):
                return value
        raise Unsupported(f"{self.name} was called without a tensor")

    def laid_out(self) -> Any:
        """The outputs with the rule's layout of the inputs, or with another one that the check finds right."""
        signature = (self.name, self.forward, tuple(self.kwargs), tuple([leaf.window.shape[1:] for leaf in self.leaves]))
        self.layout = self.batching.layouts.get(signature, {})
        try:
            return self.outputs(self.batching.wants(signature, self.states))
        except Exception as error:
            if isinstance(error, RanksFailed | torch.OutOfMemoryError) or (
                isinstance(error, Unsupported) and type(error) is not _Differs
            ):
                raise
            for layout in self._layouts():
                self.layout = layout
                try:
                    outputs = self.outputs(list(range(self.states)))
                except RanksFailed:
                    raise
                except Exception:
                    continue  # what the rule's own layout met is what is told
                self.batching.layouts[signature] = layout
                return outputs
            raise

    def _layouts(self) -> list[Layout]:
        """Layouts that differ from the rule's in one input or two."""
        others: list[tuple[int, int | None]] = []
        for place, (leaf, name) in enumerate(self._plain()):
            ruled = self._axis(leaf, name)
            possible = [1] if leaf.dim() > 1 and leaf.shape[1] == self.rows else []
            possible += [0] if leaf.dim() > 0 and leaf.shape[0] == self.rows else []
            others += [(place, axis) for axis in (*possible, None) if axis != ruled]
        pairs = [pair for pair in itertools.combinations(others, 2) if pair[0][0] != pair[1][0]]
        return [dict(chosen) for chosen in itertools.islice([*[(one,) for one in others], *pairs], LAYOUTS)]

    def outputs(self, suspects: list[int]) -> Any:
        """The outputs; the states `suspects` are compared with calls of their own."""
        states, rows = self.states, self.rows
        before = Snapshot({}) if suspects else None
        self._before = {id(leaf): copied(leaf.window) for leaf in self.leaves} if suspects else {}
        earlier = self._remembered(suspects[0]) if suspects and self.batching.first(self.forward) else None
        if rows is None:  # A number as the main input: nothing says which axis of the output is the batch.
            parts, suspects = self._parts((1,)), []
        else:
            self.batching.first_window(self.name, self.forward, states, self._part, self._repeated_bytes)
            parts = self._parts(self.batching.widths(states, rows))
        structure = parts[0][0]
        pieces = [[found[n] for _, found in parts] for n in range(len(parts[0][1]))]
        windows = [torch.cat(piece)[:states] if len(piece) > 1 else piece[0][:states] for piece in pieces]
        if before is not None and self._any_rank(not before.same):
            raise NeedsOrder(drawn_by(self.name))
        eps = self._eps(windows)
        self.batching.eps = max(self.batching.eps, eps)
        self._compare(suspects, windows, earlier, eps)
        rest = iter(windows)
        return each(lambda leaf, _: Windowed.wrap(next(rest), self.run) if leaf is HERE else leaf, structure)

    def _parts(self, widths: Sequence[int] | None) -> list[tuple[Any, list[Tensor]]]:
        """The outputs of all states, in parts of one network call each, or in one part on several ranks."""
        signed = repr([leaf for leaf in _pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, bool | int | str)])
        forms = tuple((tuple(leaf.window.shape[1:]), leaf.window.dtype) for leaf in self.leaves)
        return self.batching.bound.parts(
            self.states,
            lambda part: copy.copy(self)._part(part),  # in threads of their own, parts have lists of their own
            self.device,
            rows=self.rows or 1,
            widths=widths,
            inputs=[leaf.window for leaf in self.leaves],
            key=(self.name, forms, tuple(self.kwargs), signed, tuple(self.layout.items())),
            made=self._count,
        )

    def _count(self, states: int, filling: int) -> None:
        """Counts a network call on some states, of which the last ones fill it."""
        rows = self.rows or 1
        self.batching.count(states * rows, filled=filling * rows)

    def _any_rank(self, this: bool) -> bool:
        """Whether something is so on any rank."""
        return this if self.batching.ranks is None else self.batching.ranks.any(this)

    # Inputs.

    def _state(self, value: Any, w: int, *, check: bool = False) -> Any:
        """An argument of the call for state w alone; for a check a copy of it as it was before the network saw it."""

        def state(leaf: Any, _: str) -> Any:
            if not isinstance(leaf, Windowed):
                return leaf
            return copied(self._before[id(leaf)][w]) if check else leaf.window[w]

        return each(state, value)

    def _alone(self, w: int, *, check: bool = False) -> Any:
        """The network's output for state w alone, called as in the sequential loop."""
        args, kwargs = self._state(self.args, w, check=check), self._state(self.kwargs, w, check=check)
        output = self.batching.here(self.forward, args, kwargs)
        if check:
            self.batching.count(self.rows or 1, check=True)
        return output

    def _part(self, part: slice) -> tuple[Any, list[Tensor]]:
        """The network's output for some of the states, split into its structure and its tensors.

        A network that writes into an input of one row for all states, or fails with it, is called again with copies of it.
        """
        count = part.stop - part.start
        if count == 1:
            return self._taken(self._alone(part.start), 1)
        output, single, failed = None, self.forward not in self.batching.copies, False
        versions = [_version(leaf.window) for leaf in self.leaves]
        try:
            output = self._called(part.start, count, single=single)
        except (RuntimeError, ValueError, AssertionError) as error:
            failed = type(error) in (RuntimeError, ValueError, AssertionError)
            if not self._single or not failed:
                raise
        if failed or any(map(_version, self._single)):
            if versions != [_version(leaf.window) for leaf in self.leaves]:
                raise Unsupported(f"{self.name} writes into its state, and needs copies of its other inputs")
            output = self._called(part.start, count, single=False)
            self.batching.copies.add(self.forward)
        for own, filled in self._filled:
            if _version(filled) > 0:
                own.copy_(filled[: len(own)])  # The network writes into its state, and the loop may read that.
        return self._taken(output, count)

    def _called(self, start: int, count: int, *, single: bool) -> Any:
        """The network's output for `count` states from `start` on; `single`: an input of one row may stay one row in memory."""
        self._place, self._single, self._filled, self._may_be_single = 0, [], [], single
        args = [self._batched(value, name, start, count) for value, name in zip(self.args, self._names(), strict=True)]
        kwargs = {name: self._batched(value, name, start, count) for name, value in self.kwargs.items()}
        return self.batching.here(self.forward, args, kwargs)

    def _names(self) -> list[str]:
        """The names of the positional arguments."""
        try:
            parameters = list(inspect.signature(self.forward).parameters.values()) if len(self.args) > 1 else []
        except (TypeError, ValueError):
            parameters = []
        names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
        return (names + [""] * len(self.args))[: len(self.args)]

    def _batched(self, value: Any, name: str, start: int, count: int) -> Any:
        """An argument for `count` states from `start` on; states beyond the window's end are copies of its last one."""

        def tensor(leaf: Any, name: str) -> Any:
            if isinstance(leaf, Windowed):
                return self._batched_window(leaf.window, start, count)
            if not isinstance(leaf, Tensor):
                return leaf
            place, self._place = self._place, self._place + 1
            axis = self.layout.get(place, self._axis(leaf, name))
            return leaf if axis is None else self._repeated(leaf, axis, count)

        def whole_list(value: list[Any], name: str) -> list[Any] | None:
            if not self._has_rows(value, name):
                return None
            states = [min(start + n, self.states - 1) for n in range(count)]
            return [self._state(part, w) for part in value for w in states]

        return each(tensor, value, name, whole_list)

    def _has_rows(self, value: list[Any], name: str) -> bool:
        """Whether a list has an item for each row."""
        return len(value) == self.rows and (self.listed or name in ROW_LISTS) and not _stays(name)

    def _batched_window(self, window: Tensor, start: int, count: int) -> Tensor:
        rows = self.rows
        assert rows is not None
        window = window[start : start + count]
        if len(window) < count:
            own, window = window, torch.cat([window, window[-1:].expand(count - len(window), *window.shape[1:])])
            self._filled.append((own, window))
        if window.dim() == 1:
            return beside(window, self.device).repeat(rows)
        if window.shape[1] == 1:
            window = window.expand(count, rows, *window.shape[2:])
        if window.shape[1] % rows:
            raise Unsupported(f"{self.name} was given {window.shape[1]} rows of a window beside an input of {rows} rows")
        return window.unflatten(1, (rows, -1)).transpose(0, 1).flatten(0, 2)

    def _axis(self, leaf: Tensor, name: str) -> int | None:
        """The axis of an input's rows by the rule; None for an input without rows."""
        rows = self.rows
        assert rows is not None
        if leaf.dim() == 0 or _stays(name, leaf):
            return None
        return 0 if leaf.shape[0] == rows or any(leaf.shape[0] == rows * frames for frames in self.frames) else None

    def _repeated_bytes(self) -> int:
        """Bytes of the inputs of one state that are repeated for each further one."""
        found = 0
        for place, (leaf, name) in enumerate(self._plain()):
            axis = self.layout.get(place, self._axis(leaf, name))
            single = axis is not None and leaf.shape[axis] == 1 and self.forward not in self.batching.copies
            found += 0 if axis is None or single else leaf.numel() * leaf.element_size()
        return found

    def _repeated(self, leaf: Tensor, axis: int, count: int) -> Tensor:
        rows = self.rows
        assert rows is not None
        if leaf.shape[axis] == 1 and self._may_be_single:
            one = leaf.clone()
            if not one.is_inference():  # of which torch counts no changes
                self._single.append(one)
                return one.expand(*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
        return self.batching.repeated(
            leaf,
            (rows, count, axis),
            lambda: leaf.unflatten(axis, (rows, -1)).repeat_interleave(count, axis).flatten(axis, axis + 1),
        )

    # Outputs.

    def _taken(self, value: Any, count: int) -> tuple[Any, list[Tensor]]:
        """The structure of an output for `count` states, and its tensors `[count, K, ...]`, which are copies: a network may
        return the same memory at every call."""
        found: list[Tensor] = []
        rows = self.rows or 1

        def tensor(leaf: Any, name: str) -> Any:
            if not isinstance(leaf, Tensor):
                if holds_tensors(leaf):
                    raise Unsupported(
                        f"{self.name} returns tensors within an object of class {type(leaf).__name__}, whose rows are not "
                        "seen: have it return a tensor, or tensors in lists, tuples, dicts or diffusers' outputs"
                    )
                return leaf
            if isinstance(leaf, Windowed):
                raise Unsupported(f"{self.name} was given states of a window within an argument that is no list, tuple or dict")
            if count == 1:
                found.append(leaf[None].clone())
            elif leaf.dim() == 0 or leaf.shape[0] % (rows * count):
                raise _Differs(
                    f"{self.name} returned a tensor of shape {tuple(leaf.shape)} for {rows * count} rows; an output must have "
                    "a row for each"
                )
            else:
                moved = leaf.unflatten(0, (rows, count, -1)).transpose(0, 1).flatten(1, 2).contiguous()
                found.append(moved.clone() if moved.data_ptr() == leaf.data_ptr() else moved)
            return HERE

        def whole_list(value: list[Any], name: str) -> list[Any] | None:
            if not self.listed or count == 1 or len(value) != rows * count:
                return None
            found.extend(torch.stack(value[k * count : (k + 1) * count]) for k in range(rows))
            return [HERE] * rows

        return each(tensor, value, "", whole_list), found

    # Check.

    def _remembered(self, w: int) -> list[Tensor]:
        """The network's output for state w alone, by a call that is seen to leave the network as it was.

        What a network sets up at its first call of a kind is no memory, so after a change a call for another state decides.
        """
        change = None if self.batching.hooks is None else self.batching.hooks.influence()
        output: list[Tensor] | None = None
        for state in () if change is not None else (w, (w + 1) % self.states):
            memory = Memory([(self.name, self.forward)], readers=self.batching.readers)
            found = self._taken(self._alone(state, check=True), 1)[1]
            output = found if output is None else output
            change = memory.influence()
            if change is None:
                return output
        assert change is not None
        raise NeedsOrder(
            f"a call of {self.name} changes {change.path}, on which later calls may depend, so they need their order; if it is "
            "harmless, leave the check out with check='off'"
        )

    def _eps(self, windows: list[Tensor]) -> float:
        """The eps of the coarsest dtype involved; on CUDA at least that of TF32, 2^-10, in which convolutions are computed."""
        digits = [torch.finfo(leaf.dtype).eps for leaf in [*windows, *self._tensors()] if leaf.is_floating_point()]
        if self.device.type == "cuda":
            digits.append(2.0**-10)
        if torch.is_autocast_enabled(self.device.type):
            digits.append(torch.finfo(torch.get_autocast_dtype(self.device.type)).eps)
        return max(digits, default=0.0)

    def _compare(self, suspects: list[int], windows: list[Tensor], earlier: list[Tensor] | None, eps: float) -> None:
        """Compares states of the batched call, and an earlier call of the first one's own if there was one, with calls of their
        own. Waits for the device once.

        The two may differ by sqrt(eps) relative to the output's norm, with eps of the coarsest dtype involved, since rounding
        depends on the size of a batch and grows through a deep network.
        """
        granted = eps**0.5
        first, others = list[Tensor](), list[Tensor]()
        for w in suspects:
            _, alone = self._taken(self._alone(w, check=True), 1)
            if w == suspects[0] and earlier is not None:
                first = [_difference(before[0], own[0]) for before, own in zip(earlier, alone, strict=True)]
            for window, own in zip(windows, alone, strict=True):
                if window[w].shape != own[0].shape:
                    raise _Differs(
                        f"{self.name} returned shape {tuple(window[w].shape)} for a state of shape {tuple(own[0].shape)}"
                    )
                others.append(_difference(window[w], own[0]))
        for place, difference in enumerate(read([*first, *others])):
            if not difference <= granted and place < len(first):
                raise NeedsOrder(
                    f"{self.name} gave one state two values (relative difference {difference:.2g}, where rounding explains "
                    f"{granted:.2g}): its calls depend on those before, so they need their order"
                )
            if not difference <= granted:
                raise _Differs(
                    f"{self.name} gave a state other values among {self.states} states than by itself (relative difference "
                    f"{difference:.2g}, where rounding explains {granted:.2g}): its rows influence each other, or its "
                    "conditioning is in another order"
                )

    def _plain(self) -> list[tuple[Tensor, str]]:
        """The inputs that are no windows, with their names, in the order of `_batched`."""
        found: list[tuple[Tensor, str]] = []

        def note(leaf: Any, name: str) -> None:
            if isinstance(leaf, Tensor) and not isinstance(leaf, Windowed):
                found.append((leaf, name))

        for value, name in [*zip(self.args, self._names(), strict=True), *[(v, k) for k, v in self.kwargs.items()]]:
            each(note, value, name, lambda part, name: part if self._has_rows(part, name) else None)
        return found

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        each(
            lambda leaf, _: (
                found.append(leaf.window if isinstance(leaf, Windowed) else leaf) if isinstance(leaf, Tensor) else None
            ),
            (self.args, self.kwargs),
        )
        return found


def _difference(found: Tensor, own: Tensor) -> Tensor:
    """`[]` the norm of the difference relative to that of `own`; NaN equals NaN."""
    found, own = found.to(torch.float64), own.to(torch.float64)
    same = (found == own) | (found.isnan() & own.isnan())
    size = torch.where(own.isfinite(), own, 0.0).norm().clamp_min(1e-300)
    return torch.where(same, 0.0, found - own).norm() / size


def _version(value: Tensor) -> int:
    """The number of changes of a tensor in place; -1 for inference tensors, of which torch counts none."""
    return -1 if value.is_inference() else value._version


def _stays(name: str, leaf: Tensor | None = None) -> bool:
    """Whether an input of this name has no rows of the batch."""
    if leaf is not None and name in POSITIONS:
        return leaf.dim() < 3
    if leaf is not None and leaf.dim() == 1 and len(leaf) == 1 and ("timestep" in name or "scale" in name):
        return True
    return name.startswith("freqs") or "rotary" in name or "rope" in name or name == "padding_mask"
