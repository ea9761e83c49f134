# SPDX-License-Identifier: Apache-2.0
"""Networks on several ranks: weights that one rank reads and sends, and weights that are not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
import transformers
from pipelines import hollow
from processes import on_ranks
from tiny import CASES
from tiny.case import quiet
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from paradiff.errors import NotHere
from paradiff.models.absent import Absent, is_absent
from paradiff.models.pipeline import load_pipeline
from paradiff.models.pixel import load
from paradiff.models.shared import is_denoiser
from paradiff.solver import Ranks
from paradiff.solver.machine import Machine

CHUNK = 100


def weights(seed: int) -> list[Tensor]:
    """Tensors of every kind, some of them longer than a chunk, none and a single number among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (1000,), (), (0, 4), (7, 2, 2)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*drawn, drawn[1].bfloat16(), drawn[1] > 0, drawn[4].double(), torch.complex(drawn[4], drawn[4])]


def spread(mesh: DeviceMesh, machines: list[str]) -> tuple[list[Tensor], list[int], bool]:
    """What a rank has after its machine's first one has sent, and the bytes of each broadcast."""
    sizes: list[int] = []
    own = dist.broadcast

    def counted(data: Tensor, *given: Any, **more: Any) -> Any:
        sizes.append(data.nbytes)
        return own(data, *given, **more)

    dist.broadcast = counted
    os.environ["GROUP_RANK"] = machines[mesh.get_rank()]
    machine = Machine(Ranks(mesh))
    tensors = weights(mesh.get_rank())
    machine.spread(tensors, chunk=CHUNK)
    return tensors, sizes, machine.first


@pytest.mark.parametrize(("machines", "readers"), [(["0", "0", "0"], [0, 0, 0]), (["0", "1", "1"], [0, 1, 1])])
def test_one_rank_of_a_machine_sends_its_weights_in_pieces(machines: list[str], readers: list[int]) -> None:
    total = sum(tensor.nbytes for tensor in weights(0))
    for rank, one in enumerate(on_ranks(3, spread, machines)):
        assert one.error == ""
        found, sizes, first = one.value
        wanted = weights(readers[rank])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))
        assert first == (readers[rank] == rank)
        assert max(sizes, default=0) <= CHUNK
        assert sum(sizes) == (total if machines.count(machines[rank]) > 1 else 0)


def loaded(
    mesh: DeviceMesh, folders: list[str], pixels: str
) -> tuple[dict[str, Any], dict[str, tuple[int, int]], list[Tensor]]:
    """The tensors of a pipeline's networks that a rank has in half precision, the bytes that each network holds and those that
    it lacks, and a pixel model's tensors."""
    own = folders[mesh.get_rank()]
    machine = Machine(Ranks(mesh))
    pipe = load_pipeline(f"{own}/sd", dtype=torch.bfloat16, machine=machine)
    found: dict[str, Any] = {}
    held: dict[str, tuple[int, int]] = {}
    for name in ("unet", "vae", "text_encoder"):
        network = getattr(pipe, name)
        here = {key: one for key, one in named(network).items() if not isinstance(one, Absent)}
        found |= {f"{name}.{key}": one for key, one in here.items()}
        storage = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in here.values()}
        held[name] = sum(storage.values()), sum(one.nbytes for one in network.parameters() if isinstance(one, Absent))
        assert (network.device.type, network.dtype, network.training) == ("cpu", torch.bfloat16, False)
    return found, held, list(named(load(f"{own}/{pixels}", machine=machine).unet).values())


def named(network: Any) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def test_one_rank_reads_weights_and_encoders_are_on_the_first_alone(tmp_path: Path, tiny: Path) -> None:
    with quiet():
        CASES["sd"].make().save_pretrained(tmp_path / "whole" / "sd")
    shutil.copytree(tiny, tmp_path / "whole" / "tiny")
    for name in ("sd", "tiny"):
        hollow(tmp_path / "whole" / name, tmp_path / "hollow" / name)
    folders = [str(tmp_path / "whole"), str(tmp_path / "hollow")]
    first, second = on_ranks(2, loaded, folders, "tiny")
    assert (first.error, second.error) == ("", "")
    pipe: Any = load_pipeline(f"{folders[0]}/sd", dtype=torch.bfloat16)
    wanted = {
        f"{name}.{key}": one for name in ("unet", "vae", "text_encoder") for key, one in named(getattr(pipe, name)).items()
    }
    assert first.value[0].keys() == wanted.keys()
    for rank in (first, second):
        assert all(torch.equal(one, wanted[key]) and one.dtype == wanted[key].dtype for key, one in rank.value[0].items())
        assert all(torch.equal(a, b) for a, b in zip(rank.value[2], named(load(tiny).unet).values(), strict=True))
    for name, (here, absent) in first.value[1].items():
        own = second.value[1][name]
        assert absent == 0
        if name == "unet":
            assert own == (here, 0)
        else:
            assert own[0] < here / 50  # buffers
            assert own[0] + own[1] >= here


def test_absent_weights_are_moved_and_cast_but_not_computed_with() -> None:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(Absent.of((4, 3), torch.float32, torch.device("cpu")), requires_grad=False)
    assert is_absent(layer)
    assert not is_absent(nn.Linear(1, 1))
    layer.to(torch.bfloat16)
    assert (layer.weight.dtype, layer.weight.shape, is_absent(layer)) == (torch.bfloat16, (4, 3), True)
    layer.to("meta")
    assert layer.weight.device.type == "meta"
    for compute in (lambda: layer(torch.zeros(1, 3)), lambda: layer.weight.sum(), lambda: layer.weight[0]):
        with pytest.raises(NotHere, match="which rank 0 alone holds; call it from Python"):
            compute()


@pytest.mark.parametrize(
    ("kind", "everywhere"),
    [
        (diffusers.UNet2DModel, True),
        (diffusers.FluxTransformer2DModel, True),
        (diffusers.ControlNetModel, True),
        (diffusers.AutoencoderKL, False),
        (diffusers.AutoencoderKLWan, False),
        (diffusers.VQModel, False),
        (transformers.CLIPTextModel, False),
        (transformers.T5EncoderModel, False),
    ],
)
def test_denoisers_are_everywhere_and_encoders_on_one_rank(kind: type[nn.Module], everywhere: bool) -> None:
    assert is_denoiser(kind) == everywhere
