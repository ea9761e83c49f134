# SPDX-License-Identifier: Apache-2.0
"""Chains that fold by their own rule, for the bundled `molecules` denoiser: each atom's kind says how the chain goes on there.

A chain is a string of helices (H), strands (S) and turns (T). Consecutive atoms are 3.8 apart. The angle at each atom and the
dihedral of each bond are those of its kind, in degrees,

    kind      angle      dihedral
    helix       91          50
    strand     124         190
    turn        95        -100

with normal deviations of 3 (turns: 6). So a string has one structure but for these deviations, its pose, and nothing else: the
mirror image is another string's. Chains that come closer to themselves than 3.4 are not used. Lengths are in angstrom.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paradiff.models.folding import NAMES as KINDS

BOND = 3.8
ANGLES = np.array([91.0, 124.0, 95.0])
DIHEDRALS = np.array([50.0, 190.0, -100.0])
DEVIATIONS = np.array([3.0, 3.0, 6.0])
NEAREST = 3.4
SEGMENTS = {"H": (7, 15), "S": (4, 9), "T": (2, 4)}
"""Atoms of a segment: from, and up to but not with."""


def string(random: np.random.Generator, atoms: int) -> str:
    """A chain's kinds: helices and strands, with turns between them."""
    found = ""
    while len(found) < atoms:
        kind = "HS"[random.integers(2)]
        found += kind * int(random.integers(*SEGMENTS[kind])) + "T" * int(random.integers(*SEGMENTS["T"]))
    return found[:atoms]


def folded(kinds: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """`[B, A, 3]` chains of kinds `[B, A]`, 0 to 2, without their means; without deviations if no generator is given."""
    count, atoms = kinds.shape
    spread = 0.0 if random is None else DEVIATIONS[kinds][..., None] * random.standard_normal((count, atoms, 2))
    angles, dihedrals = np.moveaxis(np.radians(np.stack([ANGLES[kinds], DIHEDRALS[kinds]], -1) + spread), -1, 0)
    x = np.zeros((count, atoms, 3))
    x[:, 1, 0] = BOND
    x[:, 2] = x[:, 1] + BOND * np.stack([-np.cos(angles[:, 1]), np.sin(angles[:, 1]), np.zeros(count)], -1)
    for i in range(3, atoms):
        before, last = x[:, i - 2] - x[:, i - 3], (x[:, i - 1] - x[:, i - 2]) / BOND
        normal = np.cross(before, last)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        bend, turn = angles[:, i - 1, None], dihedrals[:, i - 1, None]
        x[:, i] = x[:, i - 1] + BOND * (
            -np.cos(bend) * last + np.sin(bend) * (np.cos(turn) * np.cross(normal, last) + np.sin(turn) * normal)
        )
    return x - x.mean(1, keepdims=True)


def apart(x: np.ndarray) -> np.ndarray:
    """`[B]` whether a chain keeps its distance to itself."""
    near = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1) + 100 * np.eye(x.shape[1])
    return near.min((1, 2)) > NEAREST


def drawn(random: np.random.Generator, count: int, atoms: int) -> tuple[Tensor, Tensor]:
    """Kinds `[count, atoms]`, 0 to 2, and positions `[count, atoms, 3]` of chains that keep their distance."""
    kinds, placed = [], []
    while sum(map(len, kinds)) < count:
        own = np.array([[KINDS.index(k) for k in string(random, atoms)] for _ in range(count)])
        x = folded(own, random)
        keep = apart(x)
        kinds.append(own[keep])
        placed.append(x[keep])
    return torch.from_numpy(np.concatenate(kinds)[:count]), torch.from_numpy(np.concatenate(placed)[:count]).float()
