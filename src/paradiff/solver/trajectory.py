# SPDX-License-Identifier: Apache-2.0
"""The trajectory of a run: at which states its network was evaluated, and what the clean data were found to be there.

A later run of the same chain whose prompt, guidance or noise is another begins from it (`start=`): its forcings, or remainders
of the clean-data estimate, are those of the trajectory until they are evaluated anew, and its own noise moves the states.

A run keeps its trajectory where it is asked to (`keep_trajectory=True`): as many states as the method evaluates nodes. A file
is one of safetensors, whose metadata say of which chain and model it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.errors import require_real, shown
from paradiff.lazy import naming_the_extra
from paradiff.whole_file import put_whole

FORMAT = "paradiff trajectory 1"
KEY = "paradiff"
PARTS = ("nodes", "states", "clean")
CHANGES = ("dx", "dclean")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Part:
    """The trajectory of one sample.

    Attributes:
        nodes: `[K]` fine nodes in order, on the CPU.
        states: `[K, ...]` states at which the network was evaluated there last, not scaled.
        clean: `[K, ...]` the clean-data estimates there.
        points: The mesh points, where the nodes are those of a mesh.
        base: The whole chain from which a mesh's forcings were taken on, where there is one.
        dx: `[K, k, ...]` changes of the states between evaluations, the newest last, zero where there were fewer; None for
            none.
        dclean: `[K, k, ...]` the changes of the estimates.
    """

    nodes: Tensor
    states: Tensor
    clean: Tensor
    points: tuple[int, ...] | None = None
    base: Part | None = None
    dx: Tensor | None = None
    dclean: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Part:
        """With states and estimates changed."""
        base = None if self.base is None else self.base.changed(change)
        found = dataclasses.replace(self, states=change(self.states), clean=change(self.clean), base=base)
        if self.dx is None or self.dclean is None:
            return found
        dx, dclean = (change(v.flatten(0, 1)).view_as(v) for v in (self.dx, self.dclean))
        return dataclasses.replace(found, dx=dx, dclean=dclean)

    def gone_on(self, before: Part, share: float) -> Part:
        """With states and estimates changed on by a share of their change since another part of the same nodes."""
        states, clean = (
            torch.lerp(other.to(own), own, 1 + share)
            for own, other in ((self.states, before.states), (self.clean, before.clean))
        )
        return dataclasses.replace(self, states=states, clean=clean)


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory:
    """The trajectories of all samples of a run, as `Solution.trajectory` is. Trajectories are compared by identity.

    Attributes:
        table: The name of the table.
        digest: A digest of its coefficients.
        steps: Its steps.
        shape: Shape of one sample.
        parts: One a sample.
        model: What the model is called; empty where nobody said.
    """

    table: str
    digest: str
    steps: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    model: str = ""

    def __repr__(self) -> str:
        nodes = ", ".join(sorted({str(len(part.nodes)) for part in self.parts}))
        return f"Trajectory of {len(self.parts)} x {self.shape}: {nodes} nodes of table {self.table!r}, {self.steps} steps"

    @property
    def samples(self) -> int:
        """Number of samples B."""
        return len(self.parts)

    def only(self, sample: int) -> Trajectory:
        """The trajectory of one sample."""
        return dataclasses.replace(self, parts=self.parts[sample : sample + 1])

    def map(self, change: Callable[[Tensor], Tensor]) -> Trajectory:
        """The trajectory with its states and clean-data estimates changed, as a plan is that is shifted by a step.

        Args:
            change: A linear function of states `[K, ...]` that keeps their shape: `lambda x: torch.roll(x, -1, dims=-1)`.

        Raises:
            ValueError: If it changes shape or dtype.
        """
        for part in self.parts:
            found = change(part.states)
            if not isinstance(found, Tensor) or found.shape != part.states.shape or found.dtype != part.states.dtype:
                raise ValueError(
                    f"the trajectory's states were changed to {shown(found)}; keep their shape {tuple(part.states.shape)} and "
                    f"{part.states.dtype}"
                )
        return dataclasses.replace(self, parts=tuple(part.changed(change) for part in self.parts))

    def extrapolated(self, before: Trajectory, share: float = 1.0) -> Trajectory:
        """The trajectory of the run after this one, if it changes on as this one did from that before: states and clean-data
        estimates are x + share (x - x before). For a value that is moved step by step, such as a guidance scale or the place
        of a control loop; of noise that is drawn anew nothing can be foretold.

        Args:
            before: The trajectory of the run before.
            share: How far the next step goes, as a multiple of the last one.

        Raises:
            ValueError: If that is of another table, shape or number of samples, or was evaluated at other nodes; or the share
                is no number of at least 0.
        """
        require_real("the share", share)
        mine, theirs = (self.digest, self.steps, self.shape), (before.digest, before.steps, before.shape)
        if mine != theirs or self.samples != before.samples:
            raise ValueError(f"{before} was given to go on from, and this is {self}; give two of one chain, shape and batch")
        for k, (part, other) in enumerate(zip(self.parts, before.parts, strict=True)):
            if not torch.equal(part.nodes, other.nodes):
                raise ValueError(
                    f"sample {k} was evaluated at {len(other.nodes)} nodes before and at {len(part.nodes)} others then; keep "
                    "the trajectories of runs at the same nodes, such as quasi_newton's, which are all"
                )
        pairs = zip(self.parts, before.parts, strict=True)
        return dataclasses.replace(self, parts=tuple(part.gone_on(other, share) for part, other in pairs))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            ValueError: If it cannot be written, or is there and no regular file, which it would replace.
        """
        with naming_the_extra("Trajectory.save"):
            from safetensors.torch import save
        tensors: dict[str, Tensor] = {}
        for k, part in enumerate(self.parts):
            tensors |= _tensors(f"{k}", part)
        about = {"format": FORMAT} | {f: getattr(self, f) for f in ("table", "digest", "steps", "shape", "samples", "model")}
        content = save(tensors, metadata={KEY: json.dumps(about)})
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            raise ValueError(f"the trajectory cannot be written to {str(path)!r}, which is no regular file; name another one")
        try:
            put_whole(path, content)
        except OSError as error:
            raise ValueError(f"the trajectory cannot be written to {str(path)!r}: {error.strerror or error}") from error

    @staticmethod
    def load(path: str | Path) -> Trajectory:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: If there is none, it is cut short or damaged, or holds something else.
        """
        with naming_the_extra("Trajectory.load"):
            from safetensors import SafetensorError, safe_open
        path = Path(path)
        try:
            missing = None if path.is_file() else "no file" if path.exists() else "not there"
        except OSError as error:  # such as a name that is too long
            raise ValueError(f"the trajectory {shown(str(path))} cannot be read ({error.strerror}); give its file") from error
        if missing is not None:
            raise ValueError(f"the trajectory {str(path)!r} is {missing}; give its file")
        try:
            with safe_open(path, "pt") as file:
                about = (file.metadata() or {}).get(KEY)
                names = file.keys() if about else []
                # Copies, since a tensor may be a view of the file, which is overwritten later.
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"the trajectory {str(path)!r} cannot be read as safetensors, since it was cut short or is another kind of "
                f"file ({_line(error)}); save it again"
            ) from error
        return _parsed(path, about, tensors)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _tensors(name: str, part: Part) -> dict[str, Tensor]:
    """A part's tensors by name, each with memory of its own: files of shared ones are refused by safetensors."""
    names = [one for one in (*PARTS, *CHANGES) if getattr(part, one) is not None]
    found = {f"{name}/{one}": getattr(part, one).detach().cpu().clone(memory_format=torch.contiguous_format) for one in names}
    if part.points is not None:
        found[f"{name}/points"] = torch.tensor(part.points)
    return found | ({} if part.base is None else _tensors(f"{name}/base", part.base))


UNORDERED = "its mesh points are not in order from node 0 to the end, node {}"


def _parsed(path: Path, about: Any, tensors: Mapping[str, Tensor]) -> Trajectory:
    """The trajectory of a file.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        told = json.loads(about) if about else {}
        if told["format"] != FORMAT:
            raise KeyError("format")
        shape = tuple(int(n) for n in told["shape"])
        steps, samples = int(told["steps"]), int(told["samples"])
        parts = tuple(_part(f"{k}", tensors, shape, steps) for k in range(samples))
        if not parts:
            raise KeyError("0/nodes")
        return Trajectory(str(told["table"]), str(told["digest"]), steps, shape, parts, str(told["model"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else _line(error)
        raise ValueError(f"{str(path)!r} is no stored trajectory ({why}); give a file that Trajectory.save wrote") from error


def _part(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], steps: int) -> Part:
    nodes, states, clean = (tensors[f"{name}/{one}"] for one in PARTS)
    changes = [tensors.get(f"{name}/{one}") for one in CHANGES]
    points = tensors.get(f"{name}/points")
    if points is not None and (points.dtype != torch.int64 or points.ndim != 1):
        raise ValueError(UNORDERED.format(steps))
    base = _part(f"{name}/base", tensors, shape, steps) if f"{name}/base/nodes" in tensors else None
    found = Part(nodes, states, clean, None if points is None else tuple(points.tolist()), base, *changes)
    _require_part(found, shape, steps)
    return found


def _require_part(part: Part, shape: tuple[int, ...], steps: int) -> None:
    """Refuses what no run keeps of a sample. Waits for the device.

    Raises:
        ValueError: With a clause that begins with `it` or `its`.
    """
    given = {name: getattr(part, name, None) for name in (*PARTS, *CHANGES)}
    for name, value in given.items():
        if not isinstance(value, Tensor) and (name in PARTS or value is not None):
            raise ValueError(f"its {name} are {shown(value)}, no tensor")
    nodes, states, clean = part.nodes, part.states, part.clean
    wanted = (len(nodes) if nodes.ndim else 0, *shape)
    if states.dtype not in DTYPES or clean.dtype != states.dtype:
        raise ValueError(f"its states are {states.dtype} and its estimates {clean.dtype}, not real numbers of one dtype")
    if nodes.dtype != torch.int64 or nodes.ndim != 1 or not len(nodes) or tuple(states.shape) != wanted != ():
        raise ValueError(f"its nodes and states have the shapes {tuple(nodes.shape)} and {tuple(states.shape)}")
    if any(value.is_meta for value in (nodes, states, clean)):
        raise ValueError("it lies on the meta device, which holds no numbers")
    if states.shape != clean.shape or bool((nodes.diff() <= 0).any()) or not 0 <= int(nodes[0]) <= int(nodes[-1]) < steps:
        raise ValueError(f"its nodes are not in order among the {steps} of the chain, or its estimates not one a node")
    changes = [value for value in (part.dx, part.dclean) if value is not None]
    for change in changes:
        if change.shape[:1] + change.shape[2:] != states.shape or change.dtype != states.dtype:
            raise ValueError(f"its changes have shape {tuple(change.shape)} and {change.dtype}")
    if len(changes) == 1 or (changes and changes[0].shape != changes[1].shape):
        raise ValueError("its changes of states and of estimates are not as many")
    if not all(bool(torch.isfinite(value).all()) for value in (states, clean, *changes)):
        raise ValueError("it holds NaN or infinity")
    points = None if part.points is None else [*part.points]
    if points is not None and ([points[:1], points[-1:]] != [[0], [steps]] or sorted(set(points)) != points):
        raise ValueError(UNORDERED.format(steps))
    if part.base is not None:
        if part.base.base is not None:
            raise ValueError("its base has a base of its own, which no run keeps")
        _require_part(part.base, shape, steps)


def joined(several: Sequence[Trajectory]) -> Trajectory:
    """The trajectories of several runs on a chain as one, of all their samples."""
    return dataclasses.replace(several[0], parts=tuple(part for one in several for part in one.parts))


def digest_of(table: Table) -> str:
    """A digest of the coefficients that the states of a chain depend on, and of the limit on its clean data."""
    found = hashlib.sha256(f"{table.first} {table.clip!r}".encode())
    for values in (table.t, table.alpha, table.sigma, table.a, table.b, table.c, table.p, table.q):
        found.update(values.to(torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def trajectory_of(table: Table, shape: Sequence[int], parts: Sequence[Part]) -> Trajectory:
    """The trajectory of a run on a table."""
    return Trajectory(table.name, digest_of(table), table.steps, tuple(shape), tuple(parts))


def require_trajectory(found: Trajectory, table: Table, samples: int, shape: Sequence[int]) -> None:
    """Refuses a trajectory that does not fit a problem.

    Args:
        found: The trajectory.
        table: The problem's table.
        samples: Its samples.
        shape: Shape of one.

    Raises:
        ValueError: If it is of another table, shape or number of samples, or of nodes, states or estimates that no run keeps.
    """
    if (found.steps, found.digest) != (table.steps, digest_of(table)):
        raise ValueError(
            f"start is a trajectory of table {found.table!r} with {found.steps} steps, and the chain is another one, "
            f"{table.name!r} with {table.steps} steps; begin from a trajectory of the same chain"
        )
    if found.shape != tuple(shape) or found.samples != samples:
        raise ValueError(
            f"start is a trajectory of {found.samples} samples of shape {found.shape}, and {samples} of shape {tuple(shape)} "
            "are sought; begin from a trajectory of the same shape"
        )
    for k, part in enumerate(found.parts):
        try:
            _require_part(part, tuple(shape), table.steps)
        except ValueError as error:
            raise ValueError(f"start is a trajectory whose sample {k} is none: {error}; give one as a run kept it") from error


def require_model(found: Trajectory, model: str) -> None:
    """Refuses a trajectory of another model, where both say what they are of.

    Raises:
        ValueError: Then.
    """
    if found.model and model and found.model != model:
        raise ValueError(
            f"start is a trajectory of the model {found.model!r}, and this one is {model!r}; begin from a trajectory of the "
            "same model"
        )
