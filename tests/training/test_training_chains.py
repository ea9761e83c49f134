# SPDX-License-Identifier: Apache-2.0
"""The chains that the molecules network is trained on: bonds, angles and handedness are those of their kinds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[2] / "training/chains.py"
spec = importlib.util.spec_from_file_location("chains", FILE)
assert spec is not None
assert spec.loader is not None
chains = importlib.util.module_from_spec(spec)
sys.modules["chains"] = chains
spec.loader.exec_module(chains)


def test_chains_keep_their_bonds_and_their_distance() -> None:
    kinds, x = chains.drawn(np.random.default_rng(0), 8, 40)
    assert kinds.shape == (8, 40)
    bonds = x.diff(dim=1).norm(dim=2)
    assert float((bonds - chains.BOND).abs().max()) < 1e-4
    assert chains.apart(x.numpy()).all()


def test_helices_are_right_handed_and_strands_are_straight() -> None:
    helix, strand = (chains.folded(np.full((1, 30), kind), None)[0] for kind in (0, 1))
    a, b, c = (np.diff(helix, axis=0)[k : 27 + k] for k in range(3))
    assert ((np.cross(a, b) * c).sum(1) > 0).all()
    assert np.linalg.norm(strand[-1] - strand[0]) > 2 * np.linalg.norm(helix[-1] - helix[0])
