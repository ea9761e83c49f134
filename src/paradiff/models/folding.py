# SPDX-License-Identifier: Apache-2.0
"""A network that denoises point clouds and turns with them: positions x `[A, 3]` at the noise level sigma to clean ones.

It is preconditioned as Karras et al. (arXiv 2206.00364, eq. 7) do, about the mean m of the atoms, with s the data's deviation,

    D(x) = m + s^2/(sigma^2 + s^2) (x - m) + sigma s/sqrt(sigma^2 + s^2) F((x - m)/sqrt(sigma^2 + s^2), log(sigma)/4)

F holds features h `[A, H]` and several clouds X^k `[A, 3]`, all of them the input at first. Each layer makes features p[i,j] of
every pair from the distances |X^k[i] - X^k[j]|, the features of both atoms and their places in the chain, and moves atoms,

    X^k[i] <- sum_l M[k,l] X^l[i] + sum_j w^k[i,j] (X^k[j] - X^k[i])

(after Satorras et al. 2021, arXiv 2102.09844). Beside distances, an atom's features see the volume that three bonds about it
span. So D turns and shifts with its input, and tells a chain from its mirror image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from paradiff.chain.home import made_at_home
from paradiff.errors import shown

MOLECULES = Path(__file__).parent / "bundled/molecules"
"""The network that training/molecules.py trained."""

NAMES = "HST"
"""Kinds of its atoms: of helices, strands and turns."""

FAR = 24
"""Places apart in the chain from which on pairs are told from each other by distance alone."""


class Layer(nn.Module):
    """One update of features and clouds.

    Args:
        width: H, of an atom's features.
        pairs: Of a pair's features.
        clouds: K, the number of clouds.
        heads: Of the attention by which an atom collects its pairs' features.
    """

    def __init__(self, width: int, pairs: int, clouds: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.level = nn.Linear(width, 2 * width)
        self.ends = nn.Linear(width + clouds, 2 * pairs)
        self.distances = nn.Linear(3 * clouds, pairs, bias=False)
        self.places = nn.Embedding(2 * FAR + 1, pairs)
        self.pairs = nn.Linear(pairs, pairs)
        self.weights = nn.Linear(pairs, heads + 2 * clouds)
        self.values = nn.Linear(width, width)
        self.update = nn.Sequential(nn.Linear(2 * width + pairs + clouds, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.mixed = nn.Parameter(torch.eye(clouds) + 0.02 * torch.randn(clouds, clouds))

    def forward(self, h: Tensor, x: Tensor, level: Tensor, places: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[R, A, H]` and clouds `[R, A, K, 3]` after the layer.

        Args:
            h: `[R, A, H]`.
            x: `[R, A, K, 3]`.
            level: `[R, H]` of the noise level.
            places: `[A, A]` which places apart, from 0.
            atoms: `[R, A]` 1 for atoms.
        """
        shift, scale = self.level(level)[:, None].chunk(2, -1)
        own = torch.cat([self.norm(h) * (1 + scale) + shift, volumes(x, atoms)], -1)
        square = x.square().sum(-1)
        gram = torch.einsum("rikc,rjkc->rijk", x, x)
        distance = (square[:, :, None] + square[:, None] - 2 * gram).clamp(min=0).add(1e-5).sqrt()
        seen = torch.cat([distance, torch.exp(-2 * distance), torch.exp(-8 * distance)], -1)
        one, other = self.ends(own).chunk(2, -1)
        pair = silu(self.distances(seen) + one[:, :, None] + other[:, None] + self.places(places))
        pair = silu(self.pairs(pair))
        found = self.weights(pair).masked_fill(atoms[:, None, :, None] == 0, 0.0)
        clouds = x.shape[2]
        logits, sizes = found[..., :-clouds], found[..., -clouds:]
        share = logits.masked_fill(atoms[:, None, :, None] == 0, -1e4).softmax(2)
        pull = share[..., self.heads :] * sizes
        moved = torch.einsum("rijk,rjkc->rikc", pull, x) - pull.sum(2)[..., None] * x
        x = torch.einsum("kl,rilc->rikc", self.mixed, x) + moved
        by_head = pair.unflatten(-1, (self.heads, -1))
        value = self.values(own[..., : h.shape[-1]]).unflatten(-1, (self.heads, -1))
        told = torch.einsum("rijh,rijhp->rihp", share[..., : self.heads], by_head).flatten(2)
        heard = torch.einsum("rijh,rjhp->rihp", share[..., : self.heads], value).flatten(2)
        return h + self.update(torch.cat([own, told, heard], -1)), x * atoms[..., None, None]


def volumes(x: Tensor, atoms: Tensor) -> Tensor:
    """`[R, A, K]` what the bonds before an atom, at it and after it span, between -1 and 1; 0 where there are not three."""
    bonds = x.diff(dim=1)
    first, second, third = bonds[:, :-2], bonds[:, 1:-1], bonds[:, 2:]
    spanned = (torch.linalg.cross(first, second) * third).sum(-1)
    size = (first.square().sum(-1) * second.square().sum(-1) * third.square().sum(-1) + 1e-8).sqrt()
    return nn.functional.pad(spanned / size * atoms[:, 3:, None], (0, 0, 1, 2))


class Folding(nn.Module):
    """D of the module's equation. Networks are compared by identity.

    Args:
        kinds: How many kinds of atoms there are.
        width: H.
        pairs: Of a pair's features.
        clouds: K.
        heads: Of the attention.
        layers: Their number.
        deviation: s, the data's, per coordinate.
    """

    def __init__(
        self,
        kinds: int = 3,
        width: int = 64,
        pairs: int = 32,
        clouds: int = 4,
        heads: int = 8,
        layers: int = 6,
        deviation: float = 16.0,
    ) -> None:
        super().__init__()
        self.config = {
            "kinds": kinds,
            "width": width,
            "pairs": pairs,
            "clouds": clouds,
            "heads": heads,
            "layers": layers,
            "deviation": deviation,
        }
        self.deviation, self.clouds = deviation, clouds
        self.kinds = nn.Embedding(kinds + 1, width)
        self.around = nn.Conv1d(width, width, 9, padding=4)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Layer(width, pairs, clouds, heads) for _ in range(layers))
        self.out = nn.Linear(width, clouds)

    @classmethod
    @made_at_home
    def bundled(cls) -> Folding:
        """The bundled network of chains of 16 to 64 atoms, in evaluation mode."""
        config = json.loads((MOLECULES / "config.json").read_text(encoding="utf-8"))
        network = cls(**config)
        network.load_state_dict(load_file(MOLECULES / "model.safetensors"))
        return network.eval().requires_grad_(False)

    @staticmethod
    @made_at_home
    def kinds_of(chains: Sequence[str]) -> Tensor:
        """`[B, A]` the kinds of chains that are spelled by `H`, `S` and `T` for atoms of helices, strands and turns; 0 beyond
        the end of chains that are shorter than the longest.

        Raises:
            ValueError: If there is no chain, or one is empty or has another letter.
        """
        spelled = isinstance(chains, Sequence) and not isinstance(chains, str) and all(isinstance(c, str) for c in chains)
        if not spelled or not chains or not all(c and set(c) <= set(NAMES) for c in chains):
            raise ValueError(f"the chains are {shown(chains)}; give a list of texts made of H, S and T, such as ['HHHHTTSSSS']")
        found = torch.zeros(len(chains), max(map(len, chains)), dtype=torch.int64)
        for k, chain in enumerate(chains):
            found[k, : len(chain)] = torch.tensor([NAMES.index(letter) + 1 for letter in chain])
        return found

    def forward(self, x: Tensor, sigma: Tensor, kinds: Tensor) -> Tensor:
        """Clean positions `[R, A, 3]`; zeros where there is no atom.

        Args:
            x: `[R, A, 3]` noisy positions.
            sigma: `[R]` their noise levels.
            kinds: `[R, A]` each atom's kind, from 1; 0 where there is no atom.
        """
        atoms = (kinds > 0).to(x.dtype)
        sigma = sigma.to(x.dtype).view(-1, 1, 1)
        mean = (x * atoms[..., None]).sum(1, keepdim=True) / atoms.sum(1)[:, None, None].clamp(min=1)
        centred = (x - mean) * atoms[..., None]
        size = (sigma**2 + self.deviation**2).sqrt()
        level = (sigma / self.deviation).log()[:, 0] / 4
        waves = level * 2.0 ** torch.arange(8, device=x.device, dtype=x.dtype)
        told = self.level(torch.cat([waves.sin(), waves.cos()], -1))
        h = self.kinds(kinds) * atoms[..., None]
        h = h + silu(self.around(h.mT).mT)
        clouds = (centred / size)[:, :, None].expand(-1, -1, self.clouds, -1)
        index = torch.arange(x.shape[1], device=x.device)
        places = (index[None] - index[:, None]).clamp(-FAR, FAR) + FAR
        for layer in self.layers:
            h, clouds = layer(h, clouds, told, places, atoms)
        found = torch.einsum("rik,rikc->ric", self.out(h), clouds)
        found = found - (found * atoms[..., None]).sum(1, keepdim=True) / atoms.sum(1)[:, None, None].clamp(min=1)
        share = self.deviation**2 / size**2
        return (mean + share * centred + sigma * self.deviation / size * found) * atoms[..., None]
