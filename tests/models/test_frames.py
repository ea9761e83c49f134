# SPDX-License-Identifier: Apache-2.0
"""Rotated and shifted chains: the structures of AlphaFold 3's published loop, whatever the method, in fewer rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Method, Recorded, Solution, Table, collocation, parasolver, quasi_newton, sample, sequential
from paradiff.chain import Noise
from paradiff.models import Frames
from paradiff.samplers import alphafold3, ddim, ddpm, heun
from paradiff.samplers.schedule import Schedule, karras_ratios

ATOMS = 12
METHODS: dict[str, Callable[[], Method]] = {
    "sequential": sequential,
    "parasolver": lambda: parasolver(window=8, tolerance=0.0),
    "quasi_newton": lambda: quasi_newton(window=16, tolerance=0.0),
    "collocation": lambda: collocation(tolerance=1e-9),
}


def cloud(seed: int = 0, count: int = 3, atoms: int = ATOMS) -> Tensor:
    """`[count, atoms, 3]` structures that differ in more than their pose, of deviation 16."""
    found = torch.randn(count, atoms, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1)
    found = found - found.mean(1, keepdim=True)
    return 16 * found / found.square().mean((1, 2), keepdim=True).sqrt()


def denoiser(shapes: Tensor, bias: float = 0.05) -> Callable[[Tensor, Tensor], Tensor]:
    """About the mean of structures in every pose, given noisy positions, and a part that does not turn with them.

    A pose's posterior is a matrix Fisher distribution; about each of its axes the angle's is taken to be von Mises.
    """

    def sharpness(k: Tensor) -> Tensor:
        return torch.special.i1e(k) / torch.special.i0e(k)

    def clean(x: Tensor, sigma: Tensor) -> Tensor:
        middle = x.mean(1, keepdim=True)
        s, s0 = sigma.to(x).view(-1, 1, 1), shapes.to(x)
        u, size, vt = torch.linalg.svd(torch.einsum("rai,kaj->rkij", x - middle, s0))
        sign = torch.ones_like(size)
        sign[..., 2] = torch.linalg.det(u @ vt)
        strength = size * sign / (s**2 + 1)
        pair = sharpness((strength.sum(-1, keepdim=True) - strength).clamp(min=0))
        mean = pair[..., [1, 0, 0]] * pair[..., [2, 2, 1]] * sign
        posed = torch.einsum("rkij,kaj->rkai", u * mean[..., None, :] @ vt, s0)
        weights = torch.softmax(strength.sum(-1), 1)
        found = middle + torch.einsum("rk,rkai->rai", weights, posed)
        return found + bias * torch.sin(x / 7) * s / (s + 16)

    return clean


def published(net: Callable[[Tensor, Tensor], Tensor], steps: int, frames: Frames, shifts: Tensor, own: Tensor) -> Tensor:
    """Algorithm 18 with its augmentation, written out, with a generator's draws."""
    generator = torch.Generator().manual_seed(9)
    levels = [*(16 * karras_ratios(4e-4, 160.0, steps + 1, 7.0)).tolist()]
    x = levels[0] * torch.randn(1, ATOMS, 3, generator=generator, dtype=torch.float64)
    for i in range(steps):
        x = (x - x.mean(1, keepdim=True)) @ own[:, i].mT + shifts[:, i, None]
        gamma = 0.8 if levels[i + 1] > 1.0 else 0.0
        raised = levels[i] * (1 + gamma)
        if gamma:
            added = 1.003 * math.sqrt(raised**2 - levels[i] ** 2)
            x = x + added * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = x + 1.5 * (levels[i + 1] - raised) * (x - net(x, torch.tensor([raised], dtype=torch.float64))) / raised
    return x - x.mean(1, keepdim=True)


def rotations(frames: Frames) -> Tensor:
    """R of each node, from the products."""
    before = torch.cat([torch.eye(3).double().expand(len(frames.turned), 1, 3, 3), frames.turned[:, :-1]], 1)
    return frames.turned @ before.mT


@pytest.mark.parametrize("method", METHODS)
def test_the_structure_is_that_of_the_published_loop(method: str) -> None:
    table, net = alphafold3(20), denoiser(cloud())
    noise = Recorded((ATOMS, 3), torch.Generator().manual_seed(9), samples=1, dtype=torch.float64)
    drawn = Frames.drawn(table, noise, seed=2)
    shifts = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frames = Frames(table, noise, rotations(drawn), shifts)
    found = sample(frames.model(net), table, frames.moving(), METHODS[method](), dtype=torch.float64)
    expected = published(net, 20, frames, shifts, rotations(drawn))
    assert float(expected.square().mean().sqrt()) > 10
    assert float((frames.placed(found.sample) - expected).abs().max()) < 2e-4  # noises are handed over in float32


def test_a_model_that_turns_along_is_not_changed_by_frames() -> None:
    table, noise = alphafold3(20), Keyed((ATOMS, 3), seed=3, samples=2)
    net = denoiser(cloud(), bias=0.0)
    found = []
    for seed in (0, 1):
        frames = Frames.drawn(table, noise, seed=seed)
        model = frames.model(net, equivariant=True)
        found.append(frames.placed(sample(model, table, frames.moving(), sequential(), dtype=torch.float64).sample))
    inner = [torch.cdist(one, one) for one in found]
    assert float((inner[0] - inner[1]).abs().max()) > 1e-3  # of the noise's direction, which does not turn
    still = Frames(table, noise, torch.eye(3).expand(2, 20, 3, 3))
    plain = sample(net_centred(net), table, noise, sequential(), dtype=torch.float64).sample
    same = sample(still.model(net), table, still.moving(), sequential(), dtype=torch.float64).sample
    assert float((torch.cdist(same, same) - torch.cdist(plain, plain)).abs().max()) < 1e-3


def net_centred(net: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: net(x - x.mean(1, keepdim=True), t)


def per_atom(found: Solution, plain: Solution) -> float:
    """The largest error of an atom, beside the structure's deviation."""
    return float((found.sample - plain.sample).square().sum(2).sqrt().max() / 16)


def test_two_hundred_steps_in_every_frame_keep_their_errors_and_are_faster_for_the_known_turns() -> None:
    table, noise = alphafold3(200), Keyed((64, 3), seed=[40, 41])
    frames = Frames.drawn(table, noise)
    model, moving = frames.model(denoiser(cloud(5, count=1, atoms=64))), frames.moving()
    plain = sample(model, table, moving, sequential())
    method = quasi_newton(window=16, tolerance=0.064)  # 4e-3 of the structure's deviation
    found = sample(model, table, moving, method)
    assert per_atom(found, plain) < 1e-2
    errors = (found.sample - plain.sample).square().mean((1, 2)).sqrt().tolist()
    assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))
    model.symmetry = None
    without = sample(model, table, moving, method)
    assert per_atom(without, plain) < 1e-2
    assert found.rounds < 0.95 * without.rounds


def test_random_frames_are_rotations_and_a_samples_own() -> None:
    table = alphafold3(8)
    both, alone = Keyed((ATOMS, 3), seed=[4, 7]), Keyed((ATOMS, 3), seed=7)
    two, one = Frames.drawn(table, both), Frames.drawn(table, alone)
    assert torch.equal(two.turned[1], one.turned[0])
    assert not torch.equal(two.turned[0], one.turned[0])
    many = rotations(Frames.drawn(alphafold3(2000), alone))[0]
    assert float(many.mean(0).abs().max()) < 0.1  # uniform: no direction is preferred
    assert float((torch.linalg.det(many) - 1).abs().max()) < 1e-9


def test_places_that_fill_a_sample_up_take_no_part() -> None:
    table, net = alphafold3(20), denoiser(cloud())
    mask = torch.ones(ATOMS, dtype=torch.bool)
    noise = Keyed((ATOMS, 3), seed=3)

    class Wide:
        """The same noise, and noise at four places more."""

        shape, samples = (ATOMS + 4, 3), 1

        def start(self, sample: int) -> Tensor:
            return torch.cat([noise.start(sample), torch.ones(4, 3)])

        def draw(self, sample: int, nodes: range) -> Tensor:
            return torch.cat([noise.draw(sample, nodes), torch.ones(len(nodes), 4, 3)], 1)

    def wide(x: Tensor, t: Tensor) -> Tensor:
        assert not x[:, ATOMS:].any()
        return torch.cat([net(x[:, :ATOMS], t), torch.full((len(x), 4, 3), 7.0)], 1)

    turned = rotations(Frames.drawn(table, noise))
    small = Frames(table, noise, turned)
    large: Noise = Wide()
    big = Frames(table, large, turned, mask=torch.cat([mask, ~mask[:4]]))
    method = parasolver(window=8)
    one, two = (sample(f.model(m), table, f.moving(), method, check="off") for f, m in ((small, net), (big, wide)))
    assert not two.sample[:, ATOMS:].any()
    torch.testing.assert_close(big.placed(two.sample)[:, :ATOMS], small.placed(one.sample), rtol=0, atol=1e-3)
    told = (one.error_estimates[0].estimated_error, two.error_estimates[0].estimated_error)
    assert told[1] == pytest.approx(told[0], rel=1e-2)


def reflected(table: Table) -> Tensor:
    found = torch.eye(3).expand(1, table.steps, 3, 3).clone()
    found[0, 2, 0, 0] = -1
    return found


def test_what_is_no_frame_is_refused() -> None:
    table, noise = alphafold3(5), Keyed((ATOMS, 3))
    still = torch.eye(3).expand(1, 5, 3, 3)
    for call, what in (
        (lambda: Frames(table, noise, reflected(table)), "frame of sample 0 at node 2 is no rotation.*det R = -1"),
        (lambda: Frames(table, noise, 2 * still), "frame of sample 0 at node 0 is no rotation: R R.T is 3 from"),
        (lambda: Frames(table, noise, still * math.nan), "is no rotation"),
        (lambda: Frames(table, noise, still[:, :4]), r"give a tensor \[1, 5, 3, 3\]"),
        (lambda: Frames(table, noise, still, torch.zeros(3)), r"give a tensor \[1, 5, 3\], or None"),
        (lambda: Frames(table, Keyed((4, 2)), still), r"shape \(4, 2\); those that are rotated have \[atoms, 3\]"),
        (lambda: Frames(heun(Schedule.linear(), 3), noise, still), "reads one step back and limits nothing"),
        (lambda: Frames(table, noise, still, mask=torch.zeros(ATOMS).bool()), "mask of sample 0 has no atom"),
        (lambda: Frames(table, noise, still, mask=torch.zeros(ATOMS)), "give a tensor of truth values"),
        (lambda: Frames.drawn(table, noise, deviation=-1.0), "deviation of the shifts is -1.0"),
        (lambda: Frames(table, noise, still).placed(torch.zeros(2, 3)), "give those of the run, of shape"),
        (lambda: Frames(table, noise, still).model(torch.sin, equivariant=1), "equivariant is 1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=what):
            call()


@pytest.mark.parametrize("table", [ddim(Schedule.linear(), 10), ddpm(Schedule.linear(), 10)], ids=["ddim", "ddpm"])
def test_epsilon_chains_turn_too(table: Table) -> None:
    noise = Keyed((ATOMS, 3), seed=1)
    frames = Frames.drawn(table, noise)
    model = frames.model(lambda x, t: torch.sin(x))
    plain, found = (sample(model, table, frames.moving(), m) for m in (sequential(), parasolver(tolerance=0.0)))
    torch.testing.assert_close(found.sample, plain.sample, rtol=0, atol=1e-5)
    x, own = noise.start(0) * table.start_scale, rotations(frames)[0].float()
    shifts = frames.shifts[0].float()
    for i in range(10):
        x = (x - x.mean(0)) @ own[i].T + shifts[i]
        if i:
            x = x + table.c[i - 1].float() * noise.draw(0, range(i - 1, i))[0]
        x = table.a[i, 0].float() * x + table.b[i, 0].float() * torch.sin(x * table.scale[i].float())
    torch.testing.assert_close(frames.placed(plain.sample)[0], x - x.mean(0), rtol=0, atol=1e-4)


def test_the_noise_that_the_first_node_adds_is_turned_and_the_start_is_not() -> None:
    table, generator = alphafold3(20), torch.Generator().manual_seed(9)
    noise = Recorded((ATOMS, 3), torch.Generator().manual_seed(9), samples=1, dtype=torch.float64)
    frames = Frames.drawn(table, noise, seed=2)
    own, added = (torch.randn(1, ATOMS, 3, generator=generator, dtype=torch.float64)[0] for _ in range(2))
    assert table.draws is not None
    assert table.draws.start is not None
    weight, ((_, share),) = table.draws.start
    expected = weight * own + share * added @ frames.turned[0, 0]
    torch.testing.assert_close(frames.moving().start(0), expected - expected.mean(0), rtol=0, atol=1e-9)
