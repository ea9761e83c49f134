# SPDX-License-Identifier: Apache-2.0
"""The mesh store: a file of where earlier samples of one model needed their nodes, which warm-starts later samples.

When a sample has converged, the error e[g] of each interval g is estimated (error.py). n intervals in place of one leave n^-1.5
of its error, so that the fewest that leave w together are

    n[g] = sqrt(e[g]) ( sum sqrt(e) / w^2 )^(1/3).                                                                 (1)

These node counts are summed over equal parts of the chain's range of log(alpha^2/sigma^2). What is stored is their shares of
the total and its geometric mean over the samples, the default mesh (mesh.py) counting as some of them; and the data's variance.
After enough samples an entry is left unchanged (`StoreControl`). Later samples start from a mesh of the stored counts, and from
the stored variance.

A file is for one model, and has an entry for each table. It is never needed: without it, samples start from the default mesh.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paradiff.chain.table import Table
from paradiff.lock import locked
from paradiff.methods.collocation.control import CollocationControl

FORMAT = "paradiff nodes 1"
MOST_BYTES = 2**24  # of a file: an entry has about a thousand
PATIENCE = 10.0  # seconds that a file is waited for which another process writes


@dataclass(frozen=True)
class StoredMesh:
    """The entry of a file for one table.

    Attributes:
        nodes: `[bins]` node counts of a sample at the reference tolerance.
        variance: The data's variance that the last samples ended with.
        samples: Number of samples that they come from.
    """

    nodes: tuple[float, ...]
    variance: float
    samples: int


class MeshStore:
    """The entry of one model and table.

    Args:
        path: The file; made when the first samples are found.
        table: The sampler.
        control: The tuned numbers.
        kind: What else the entry depends on: the interpolation's order and the target.

    Attributes:
        stored: The entry of the file; None if there is none yet.

    Raises:
        ValueError: If the file is no mesh store, or its folder does not exist.
    """

    def __init__(self, path: Path, table: Table, control: CollocationControl, *kind: Any) -> None:
        self._path, self._key = path, _key(table, kind)
        self._control, self._bins = control.store, control.mesh.bins
        self._about = {"chain": table.name, "steps": table.steps}
        entry = read_entries(path).get(self._key)  # now, so that another file is refused before anything is computed
        self.stored = None if entry is None else self._parsed(entry)
        self._recorded: list[tuple[list[float], float]] = []

    def record(self, nodes: Sequence[float], variance: float) -> None:
        """Takes the node counts `[bins]` of one sample at the reference tolerance, and its data's variance."""
        self._recorded.append(([*nodes], variance))

    def save(self, prior: Sequence[float]) -> None:
        """Writes what was recorded, beside what other runs have written meanwhile. It warns where the file cannot be written,
        since the samples are found all the same.

        Args:
            prior: `[bins]` node counts of the default mesh.
        """
        before, most = self.stored, self._control.most_samples
        if not self._recorded or (before is not None and before.samples >= most):
            return
        try:
            with locked(self._path.with_name(f".{self._path.name}.lock"), PATIENCE):
                entries = read_entries(self._path)
                entry = entries.get(self._key)
                before = None if entry is None else self._parsed(entry)
                if before is None or before.samples < most:
                    entries[self._key] = self._about | self._after(before, prior)
                    _write(self._path, {"format": FORMAT, "tables": entries})
        except (OSError, ValueError) as error:  # ValueError: somebody else has put another file there meanwhile
            warnings.warn(f"where samples needed nodes was not saved to {self._path}: {error}", stacklevel=2)

    def _after(self, before: StoredMesh | None, prior: Sequence[float]) -> dict[str, Any]:
        """What an entry is after the samples that were recorded.

        Args:
            before: What it was.
            prior: As of `save`.
        """
        control, old = self._control, 0 if before is None else before.samples
        nodes, samples = (prior if before is None else before.nodes), old + len(self._recorded)
        share = [n / sum(nodes) * (old + control.prior_weight) for n in nodes]
        total = math.log(sum(nodes)) * (old + 1)
        for found, _ in self._recorded:
            share = [s + n / sum(found) for s, n in zip(share, found, strict=True)]
            total += math.log(min(max(sum(found), control.least_share * sum(prior)), control.outlier * sum(nodes)))
        count = math.exp(total / (samples + 1)) / (samples + control.prior_weight)
        found = [float(f"{max(s * count, control.fewest):.4g}") for s in share]
        return {"samples": samples, "variance": self._recorded[-1][1], "nodes": found}

    def _parsed(self, entry: Any) -> StoredMesh:
        found = _parsed(self._path, self._key, entry)
        if len(found.nodes) != self._bins:
            raise ValueError(
                _refusal(self._path, f"the entry {self._key} has {len(found.nodes)} node counts, not {self._bins}")
            )
        return found


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a file, by table; none where there is no file yet.

    Raises:
        ValueError: If the file is no mesh store, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"warm_start is {str(path)!r}, whose folder does not exist; make it, or give another path")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(_refusal(path, "it is no regular file"))
        if found.st_size > MOST_BYTES:
            raise ValueError(_refusal(path, f"it has {found.st_size} bytes"))
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(_refusal(path, str(error))) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("tables"), dict):
        raise ValueError(_refusal(path, f"it does not say {FORMAT!r}"))
    return content["tables"]


def require_store(path: Path) -> None:
    """Refuses a file that is no mesh store, whatever the table.

    Raises:
        ValueError: Then, or if its folder does not exist.
    """
    for key, entry in read_entries(path).items():
        _parsed(path, key, entry)


def _parsed(path: Path, key: str, entry: Any) -> StoredMesh:
    try:
        found = StoredMesh(tuple(map(float, entry["nodes"])), float(entry["variance"]), int(entry["samples"]))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(_refusal(path, f"the entry {key} lacks {error}")) from error
    if not found.nodes or not all(0 < n < math.inf for n in (*found.nodes, found.variance, found.samples)):
        raise ValueError(_refusal(path, f"the entry {key} has {len(found.nodes)} node counts: {list(found.nodes)}"))
    return found


def _refusal(path: Path, why: str) -> str:
    return f"warm_start is {str(path)!r}, which is no mesh store ({why}); delete it, or give another path"


def node_counts(shares: Sequence[float], wanted: float) -> list[float]:
    """Equation (1): the fewest intervals in place of each, of the errors `shares`, that leave `wanted` together."""
    roots = [math.sqrt(e) for e in shares]
    factor = (sum(roots) / wanted**2) ** (1 / 3)
    return [factor * root for root in roots]


def _key(table: Table, kind: tuple[Any, ...]) -> str:
    """A digest of a table's coefficients and `kind`."""
    digest = hashlib.sha256(repr(kind).encode())
    for values in (table.t, table.alpha, table.sigma, table.a, table.b, table.c, table.p, table.q):
        digest.update(values.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes a scratch file and moves it into place."""
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
