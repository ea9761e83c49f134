"""Memory: where earlier samples of one model needed their nodes, as a few numbers on disk.

When a sample is at rest, what each interval leaves out of it is known by estimate (defect.py). n intervals in place of one
would leave out n^-1.5 as much, so that the fewest which leave out w together are

    n[g] = sqrt(e[g]) ( sum sqrt(e) / w^2 )^(1/3),                                                                 (1)

where e[g] is what interval g leaves out. These numbers, summed over 12 equal parts of the chain's range of
log(alpha^2/sigma^2), are what is remembered: their geometric mean over the samples, among which the monitor that mesh.py begins
with counts as 4 of them. After 24 samples they are left as they are. Later samples begin with so many intervals, so placed, and
with the data's variance that was found.

A file is for one model; in it each table has numbers of its own. It is never needed: without it, samples begin as the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paradiff.chain.table import Table
from paradiff.methods.collocation.control import CollocationControl

FORMAT = "paradiff nodes 1"


@dataclass(frozen=True)
class StoredMesh:
    """What a file holds for one table.

    Attributes:
        nodes: `[bins]` numbers of nodes, of a sample at the default tolerance.
        variance: The data's variance that samples ended with.
        samples: How many samples these come from.
    """

    nodes: tuple[float, ...]
    variance: float
    samples: int


class MeshStore:
    """The numbers of one model and table.

    Args:
        path: The file; made when the first samples are found.
        table: The sampler.
        control: How samples count.
        kind: What else they depend on: the interpolation's order, the target.

    Attributes:
        found: What the file holds; None if that is nothing yet.

    Raises:
        ValueError: If the file is something else, or cannot be made where it shall be.
    """

    def __init__(self, path: Path, table: Table, control: CollocationControl, *kind: Any) -> None:
        self._path, self._key = path, _key(table, kind)
        self._control, self._bins = control.store, control.mesh.bins
        self._about = {"chain": table.name, "steps": table.steps}
        self._read()  # now, so that a file that is something else is told before anything is computed
        held = self._read().get(self._key)
        self.found = None if held is None else self._remembered(held)
        self._noted: list[tuple[list[float], float]] = []

    def note(self, nodes: Sequence[float], variance: float) -> None:
        """Takes the numbers of nodes that one sample needed in each part, at the default tolerance, and its data's variance."""
        self._noted.append(([*nodes], variance))

    def keep(self, prior: Sequence[float]) -> None:
        """Writes what was noted; warns where that cannot be done, since the samples are found all the same.

        Args:
            prior: The numbers of nodes that mesh.py begins with.
        """
        before, control = self.found, self._control
        if not self._noted or (before is not None and before.samples >= control.most_samples):
            return
        old = 0 if before is None else before.samples
        nodes, samples = (prior if before is None else before.nodes), old + len(self._noted)
        share = [n / sum(nodes) * (old + control.prior_weight) for n in nodes]
        total = math.log(sum(nodes)) * (old + 1)
        for found, _ in self._noted:
            share = [s + n / sum(found) for s, n in zip(share, found, strict=True)]
            total += math.log(min(max(sum(found), control.least_share * sum(prior)), control.outlier * sum(nodes)))
        count = math.exp(total / (samples + 1)) / (samples + control.prior_weight)
        new = StoredMesh(tuple(max(s * count, control.fewest) for s in share), self._noted[-1][1], samples)
        entry = self._about | {
            "samples": new.samples,
            "variance": new.variance,
            "nodes": [float(f"{n:.4g}") for n in new.nodes],
        }
        try:
            _write(self._path, {"format": FORMAT, "tables": self._read() | {self._key: entry}})
        except OSError as error:
            warnings.warn(f"where nodes lay was not remembered in {self._path}: {error}", stacklevel=2)

    def _read(self) -> dict[str, Any]:
        """The entries of the file, by table."""
        if not self._path.parent.is_dir():
            raise ValueError(f"the memory is {str(self._path)!r}, whose folder does not exist; make it, or give another path")
        try:
            held = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(self._strange(str(error))) from error
        if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("tables"), dict):
            raise ValueError(self._strange(f"it does not say {FORMAT!r}"))
        return held["tables"]

    def _remembered(self, held: Any) -> StoredMesh:
        try:
            found = StoredMesh(tuple(map(float, held["nodes"])), float(held["variance"]), int(held["samples"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(self._strange(f"the entry {self._key} lacks {error}")) from error
        numbers = (*found.nodes, found.variance, found.samples)
        if len(found.nodes) != self._bins or not all(0 < n < math.inf for n in numbers):
            raise ValueError(
                self._strange(f"the entry {self._key} has {len(found.nodes)} numbers of nodes: {list(found.nodes)}")
            )
        return found

    def _strange(self, why: str) -> str:
        return f"the memory {str(self._path)!r} is no file of remembered nodes ({why}); delete it, or give another path"


def needed(shares: Sequence[float], wanted: float) -> list[float]:
    """Equation (1)."""
    roots = [math.sqrt(e) for e in shares]
    factor = (sum(roots) / wanted**2) ** (1 / 3)
    return [factor * root for root in roots]


def _key(table: Table, kind: tuple[Any, ...]) -> str:
    """A name for a table's coefficients."""
    digest = hashlib.sha256(repr(kind).encode())
    for values in (table.t, table.alpha, table.sigma, table.a, table.b, table.c, table.p, table.q):
        digest.update(values.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes beside the file and moves it into place."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        Path(scratch).chmod(0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
