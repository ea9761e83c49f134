# SPDX-License-Identifier: Apache-2.0
"""Noise is a function of its place, and recorded noise is the noise of a sequential run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from paradiff import Keyed, Recorded
from paradiff.chain import Noise

SHAPE = (2, 3)
NODES = 100


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def recorded(kind: str, dtype: torch.dtype = torch.float32) -> Recorded:
    if kind == "shared":
        return Recorded(SHAPE, generators(3)[0], samples=3, dtype=dtype)
    return Recorded(SHAPE, generators(3, 4, 5), dtype=dtype)


def sequential_draws(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What a pipeline draws: the latents, then one noise a step, each for the whole batch."""
    generator = generators(3)[0] if kind == "shared" else generators(3, 4, 5)
    return [randn_tensor((3, *SHAPE), generator=generator, dtype=dtype) for _ in range(NODES + 1)]


SOURCES = {
    "keyed": lambda: Keyed(SHAPE, 7, samples=3),
    "keyed by seeds": lambda: Keyed(SHAPE, [7, 0, 2**64 - 1]),
    "recorded, one generator": lambda: recorded("shared"),
    "recorded, a generator each": lambda: recorded("each"),
}
each_source = pytest.mark.parametrize("source", SOURCES)


@each_source
def test_a_draw_depends_on_its_place_and_not_on_the_order_of_visits(source: str) -> None:
    noise: Noise = SOURCES[source]()
    straight = [noise.draw(k, range(NODES)) for k in range(3)]
    starts = [noise.start(k) for k in range(3)]
    again, order = SOURCES[source](), random.Random(0)
    for _ in range(300):
        k, first = order.randrange(3), order.randrange(NODES)
        nodes = range(first, min(first + order.randrange(1, 40), NODES))
        assert torch.equal(again.draw(k, nodes), straight[k][nodes.start : nodes.stop])
        assert torch.equal(again.start(k), starts[k])


@each_source
def test_draws_are_standard_normal_and_independent(source: str) -> None:
    noise = SOURCES[source]()
    draws = torch.stack([torch.cat([noise.start(k)[None], noise.draw(k, range(NODES))]) for k in range(noise.samples)])
    assert draws.shape == (3, NODES + 1, *SHAPE)
    assert draws.dtype == torch.float32
    # 1818 numbers: mean and variance are off by 1/sqrt(1818) = 0.023 and 0.033; four of these.
    assert draws.mean().abs() < 0.1
    assert abs(draws.var() - 1) < 0.14
    rows = draws.reshape(-1, 6).double()
    # No draw stands in two places: of 45 thousand pairs of 6 numbers the nearest are still well apart.
    distances = torch.cdist(rows, rows) + 10 * torch.eye(len(rows))
    assert distances.min() > 0.1


def test_a_keyed_sample_is_the_same_in_every_batch() -> None:
    alone, together = Keyed(SHAPE, 5), Keyed(SHAPE, [9, 5])
    assert torch.equal(alone.draw(0, range(9)), together.draw(1, range(9)))
    assert torch.equal(alone.start(0), together.start(1))
    assert torch.equal(Keyed(SHAPE, 5, samples=1).start(0), Keyed(SHAPE, 5, samples=4).start(0))


def test_a_keyed_draw_is_philox_at_the_stated_counter() -> None:
    bits = np.random.Philox(key=[5, 2], counter=[0, 0, 8, 0])
    wanted = np.random.Generator(bits).standard_normal(6, dtype=np.float32).reshape(SHAPE)
    assert np.array_equal(Keyed(SHAPE, 5, samples=3).draw(2, range(7, 8))[0], wanted)
    bits = np.random.Philox(key=[5, 2], counter=[0, 0, 0, 0])
    wanted = np.random.Generator(bits).standard_normal(6, dtype=np.float32).reshape(SHAPE)
    assert np.array_equal(Keyed(SHAPE, 5, samples=3).start(2), wanted)


@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_recorded_draws_are_those_of_a_sequential_run(kind: str, dtype: torch.dtype) -> None:
    noise, wanted = recorded(kind, dtype), sequential_draws(kind, dtype)
    for k in range(3):
        assert torch.equal(noise.start(k), wanted[0][k])
        backwards = [noise.draw(k, range(node, node + 1))[0] for node in reversed(range(NODES))]
        assert torch.equal(torch.stack(backwards[::-1]), torch.stack([step[k] for step in wanted[1:]]))
        assert backwards[0].dtype == dtype


@pytest.mark.parametrize("shape", [(3, 8, 8), (8,), (2, 2), (3,), (9,), (17,), (5, 5)])
@pytest.mark.parametrize("seed", [4, 11])
def test_large_latents_are_drawn_as_a_run_draws_them(seed: int, shape: tuple[int, ...]) -> None:
    # From 16 numbers on, torch fills by another routine, 16 at a time.
    generator = torch.Generator().manual_seed(seed)
    noise = Recorded(shape, generator, samples=2)
    wanted = [randn_tensor((2, *shape), generator=generator) for _ in range(40)]
    for node in (38, 0, 17, 16, 15):
        assert torch.equal(noise.draw(1, range(node, node + 1))[0], wanted[node + 1][1])


def test_recording_leaves_the_users_generator_alone() -> None:
    generator = generators(1)[0]
    before = generator.get_state()
    Recorded(SHAPE, generator).draw(0, range(50))
    assert torch.equal(generator.get_state(), before)


def test_recording_starts_where_the_users_generator_stands() -> None:
    generator, twin = generators(1, 1)
    torch.randn(5, generator=generator)
    torch.randn(5, generator=twin)
    noise = Recorded(SHAPE, generator)
    assert torch.equal(noise.start(0), torch.randn(1, *SHAPE, generator=twin)[0])


@pytest.mark.parametrize("kind", ["shared", "each"])
def test_recorded_memory_is_bounded(kind: str) -> None:
    noise = recorded(kind)
    for first in (0, 3000, 1000, 2000, 0):
        for k in range(3):
            noise.draw(k, range(first, first + 1000))
    sources = 1 if kind == "shared" else 3
    assert len(noise._kept) <= noise.STRETCHES * sources
    # One generator state for every 16 nodes seen.
    assert max(len(states) for states in noise._states) <= 4000 / noise.SPACING + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Keyed(SHAPE, -1), r"the seed is -1; it must be in 0 \.\.\. 2\^64 - 1"),
        (lambda: Keyed(SHAPE, [0, 2**64]), r"the seed is 18446744073709551616; it must be in"),
        (lambda: Keyed(SHAPE, [1, 2], samples=2), "got 2 seeds and samples = 2; give several seeds or a count, not both"),
        (lambda: Keyed(SHAPE, []), "no sample was asked for; give at least one seed and a count of at least 1"),
        (lambda: Keyed(SHAPE, 0, samples=0), "no sample was asked for; give at least one seed and a count of at least 1"),
        (lambda: Recorded(SHAPE, generators(1, 2), samples=2), "got 2 generators and samples = 2; give one of the two"),
        (lambda: Recorded(SHAPE, []), "no sample was asked for; give at least one generator and a count of at least 1"),
        (lambda: Recorded(SHAPE, generators(1)[0], samples=0), "no sample was asked for; give at least one generator"),
        (lambda: Recorded(SHAPE, generators(1)[0], samples=-2), "no sample was asked for; give at least one generator"),
        *[
            (lambda make=make, shape=shape: make(shape), "the shape of a sample is .*; it must be a sequence of whole numbers")
            for make in (Keyed, lambda shape: Recorded(shape, generators(1)[0]))
            for shape in (5, (), "23", b"23", (2.5,), (2, 0), (-1,), None, (True,), torch.ones(2), np.ones(2, int))
        ],
        *[
            (
                lambda seed=seed: Keyed(SHAPE, seed),
                r"the seed is .*; it must be a whole number in 0 \.\.\. 2\^64 - 1, or a sequence",
            )
            for seed in (2.5, True, "a", None, b"1", [0.5], ["1"], torch.ones(2), np.ones(2), {1: 2})
        ],
        *[
            (
                lambda make=make, samples=samples: make(samples),
                "samples is .*; it must be a whole number, at least 1 and at most",
            )
            for make in (
                lambda samples: Keyed(SHAPE, 0, samples),
                lambda samples: Recorded(SHAPE, generators(1)[0], samples),
            )
            for samples in (2.5, True, "a", 10**30, [2])
        ],
        *[
            (lambda source=source: Recorded(SHAPE, source), "the generator is .*; it must be a torch.Generator, or a sequence")
            for source in (5, None, "a", [5], np.random.default_rng(0))
        ],
        *[
            (
                lambda dtype=dtype: Recorded(SHAPE, generators(1)[0], dtype=dtype),
                "the dtype is .*; it must be one of real numbers, such as torch.float32",
            )
            for dtype in (torch.int32, torch.complex64, "float32", None)
        ],
    ],
)
def test_bad_sources_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_are_seeds_shapes_and_counts() -> None:
    assert Keyed((np.int64(2), 3), np.int64(7), np.int32(2)) == Keyed(SHAPE, 7, 2)
    assert Keyed(torch.Size(SHAPE), np.array([3, 5])) == Keyed(list(SHAPE), range(3, 6, 2))


def test_a_node_far_ahead_is_drawn_at_once() -> None:
    """Where nobody asked for the nodes before it: a corrector's first draw on a long deterministic chain."""
    source, other = (Recorded((2,), torch.Generator().manual_seed(3)) for _ in range(2))
    far = source.draw(0, range(20_000, 20_003))
    assert torch.equal(torch.cat([other.draw(0, range(n, n + 1)) for n in range(20_003)])[-3:], far)
    assert torch.equal(source.draw(0, range(1, 9)), other.draw(0, range(1, 9)))
