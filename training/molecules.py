# SPDX-License-Identifier: Apache-2.0
"""Train the bundled `molecules` denoiser on chains of 16 to 64 atoms that chains.py folds.

Loss (Karras et al. 2022, arXiv 2206.00364, section 5), over the atoms of chains x0 with kinds k,

    L = E (sigma^2 + s^2)/(sigma s)^2 || D(x0 + sigma eps, sigma, k) - x0 ||^2,     log(sigma/s) ~ N(-1.2, 1.5^2)

with s = 16 angstrom, the levels of AlphaFold 3 (Abramson et al. 2024, supplement 3.7), stratified over the batch. Each chain is
of a string of its own: none is seen twice. A batch holds chains of like sizes, filled up to its longest.

    python training/molecules.py               # resumes from training/checkpoints/molecules.pt if it is there
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chains import KINDS, drawn
from fit import fit, options, replace_folder, write_record
from safetensors.torch import save_file
from torch import Tensor, nn

from paradiff.models.folding import Folding

POOL = 256
"""Chains that are drawn at once."""


class Pool:
    """Chains of each size, drawn in blocks.

    Args:
        seed: Of the strings and of their deviations.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._left: dict[int, tuple[Tensor, Tensor]] = {}

    def one(self, atoms: int) -> tuple[Tensor, Tensor]:
        """Kinds `[atoms]`, from 1, and positions `[atoms, 3]` of a chain that was not drawn before."""
        kinds, x = self._left.get(atoms, (torch.zeros(0), torch.zeros(0)))
        if not len(kinds):
            kinds, x = drawn(self._random, POOL, atoms)
        self._left[atoms] = kinds[1:], x[1:]
        return kinds[0] + 1, x[0]

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Kinds `[count, A]`, 0 where there is no atom, and positions `[count, A, 3]`."""
        base = int(self._random.integers(16, 61))
        found = [self.one(int(self._random.integers(base, base + 5))) for _ in range(count)]
        longest = max(len(kinds) for kinds, _ in found)
        kinds, x = torch.zeros(count, longest, dtype=torch.int64), torch.zeros(count, longest, 3)
        for k, (own, placed) in enumerate(found):
            kinds[k, : len(own)], x[k, : len(own)] = own, placed
        return kinds, x


def main() -> None:
    arguments = options(__doc__, "molecules", steps=40_000, minutes=60.0, batch=16, rate=2e-3)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    pool = Pool(arguments.seed)

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        network = parts["network"]
        assert isinstance(network, Folding)
        s = network.deviation
        kinds, x0 = pool.batch(batch)
        level = torch.special.ndtri(((torch.arange(batch) + torch.rand(batch)) / batch).clamp(1e-4, 1 - 1e-4))
        sigma = s * torch.exp(-1.2 + 1.5 * level)
        atoms = (kinds > 0).float()[..., None]
        found = network(x0 + sigma.view(-1, 1, 1) * torch.randn_like(x0), sigma, kinds)
        own = ((found - x0).square() * atoms).sum((1, 2)) / (3 * atoms.sum((1, 2)))
        return ((sigma**2 + s**2) / (sigma * s) ** 2 * own).mean()

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        def write(folder: Path) -> None:
            network = parts["network"]
            assert isinstance(network, Folding)
            (folder / "config.json").write_text(json.dumps(network.config, indent=2) + "\n")
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")
            write_record(folder, "training/molecules.py", record)

        replace_folder(arguments.out, write)

    fit({"network": Folding(len(KINDS))}, loss, arguments, export, decay=0.999)


if __name__ == "__main__":
    main()
