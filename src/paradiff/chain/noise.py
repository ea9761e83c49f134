# SPDX-License-Identifier: Apache-2.0
"""The noise of a chain: x[0] and z[0] ... z[N-1], fixed before the first sweep.

A parallel solver visits nodes out of order and more than once, so the noise of a node may not depend on when it is asked
for. Two sources:

- `Keyed`: z is a pure function of (seed, sample, node), by the counter-based generator Philox (Salmon et al. 2011), and is
  regenerated on demand. The same on every device.
- `Recorded`: the exact draws that a sequential diffusers run makes with the same `torch.Generator`, one for the start and
  one a step, or what the scheduler of the table draws (draws.py), replayed from saved generator states.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from paradiff.chain.draws import Draws
from paradiff.chain.plain import is_plain, plain
from paradiff.errors import are_whole, is_whole, require_whole, shown


class Noise(Protocol):
    """A source of standard normal noise.

    Attributes:
        shape: Shape of one sample.
        samples: Number of samples B.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def samples(self) -> int: ...

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0] of a sample, of shape `shape`."""
        ...

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes of a sample, `[len(nodes), *shape]`."""
        ...


MOST_SAMPLES = 10**6
"""Samples that one source of noise may have."""


def _shape(shape: object) -> tuple[int, ...]:
    """The shape of a sample, of Python's whole numbers.

    Raises:
        ValueError: If it is none.
    """
    if not are_whole(shape) or not shape or min(shape) < 1:
        raise ValueError(
            f"the shape of a sample is {shown(shape)}; it must be a sequence of whole numbers, one at least, each at least 1"
        )
    return tuple(map(int, shape))


def _check_samples(samples: object) -> None:
    """Refuses what is no number of samples; numbers below 1 are left to the caller."""
    if not is_whole(samples) or samples > MOST_SAMPLES:
        require_whole("samples", samples, 1, most=MOST_SAMPLES)


class Keyed:
    """Noise as a pure function of (seed, sample, node).

    The key of the Philox generator is (seed, sample); the node selects a block of 2^128 counters, block 0 being the start.
    Draws are made on the CPU in float32.

    Args:
        shape: Shape of one sample.
        seed: One seed, whose samples 0 ... `samples` - 1 are drawn, or a sequence of seeds, of each of which sample 0 is drawn.
        samples: Number of samples, with one seed only.

    Attributes:
        keys: `[B]` seed and sample that each one's draws are keyed by.

    Raises:
        ValueError: If the shape is none, a seed is not in 0 ... 2^64 - 1, or `samples` is given beside several seeds, is below
            1 or above a million.
    """

    def __init__(self, shape: Sequence[int], seed: int | Sequence[int] = 0, samples: int | None = None) -> None:
        self.shape = _shape(shape)
        if samples is not None:
            _check_samples(samples)
        seeds = seed.tolist() if isinstance(seed, np.ndarray) else seed
        if is_whole(seeds):
            count = 1 if samples is None else samples
            self.keys = [(int(seeds), k) for k in range(count)]
        elif not are_whole(seeds):
            raise ValueError(f"the seed is {shown(seed)}; it must be a whole number in 0 ... 2^64 - 1, or a sequence of them")
        elif samples is not None:
            raise ValueError(f"got {len(seeds)} seeds and samples = {samples}; give several seeds or a count, not both")
        else:
            self.keys = [(int(s), 0) for s in seeds]
        if not self.keys:
            raise ValueError("no sample was asked for; give at least one seed and a count of at least 1")
        for s, _ in self.keys:
            if not 0 <= s < 2**64:
                raise ValueError(f"the seed is {shown(s)}; it must be in 0 ... 2^64 - 1")

    @property
    def samples(self) -> int:
        """Number of samples B."""
        return len(self.keys)

    def __repr__(self) -> str:
        seeds = sorted({seed for seed, _ in self.keys})
        named = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}"
        return f"Keyed noise: {self.samples} of shape {self.shape}, {named}"

    def __eq__(self, other: object) -> bool:
        """Whether all draws are equal: the same shape, seeds and samples."""
        return (self.shape, self.keys) == (other.shape, other.keys) if isinstance(other, Keyed) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.shape, tuple(self.keys)))

    def _blocks(self, sample: int, blocks: Sequence[int]) -> Tensor:
        """The draws of some blocks of counters, `[len(blocks), *shape]`. A generator is moved from block to block, in less than
        half the time of making one for each."""
        bits = np.random.Philox(key=np.array(self.keys[sample], dtype=np.uint64))
        generator, state = np.random.Generator(bits), bits.state
        found = np.empty((len(blocks), math.prod(self.shape)), dtype=np.float32)
        for row, block in zip(found, blocks, strict=True):
            state["state"]["counter"][:] = (0, 0, block, 0)
            bits.state = state
            generator.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(found).view(len(blocks), *self.shape)

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0], of shape `shape`."""
        return self._blocks(sample, [0])[0]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, `[len(nodes), *shape]`."""
        return self._blocks(sample, range(nodes.start + 1, nodes.stop + 1))


@functools.cache
def draws_together(count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether so many draws of a shape are, bit for bit, those of one call for all, which takes less than half the time: so it
    is on a CPU where the entries of one fill its vectors. It is tried there."""
    if device.type != "cpu":
        return False
    one, other = (torch.Generator(device).manual_seed(0) for _ in range(2))
    apart = torch.stack([torch.randn(shape, generator=one, device=device, dtype=dtype) for _ in range(count)])
    together = torch.randn((count, *shape), generator=other, device=device, dtype=dtype)
    return torch.equal(apart, together) and torch.equal(one.get_state(), other.get_state())


class Recorded:
    """The draws of a sequential diffusers run: `randn_tensor` once for the latents and once in every step.

    With a table that was read off a scheduler (`from_scheduler`), the draws are those that its own loop makes, whether it draws
    in every step or in some, and wherever they enter (`along`).

    Generator states are saved every `SPACING` nodes, so that any node can be drawn again; a few drawn stretches are kept.
    The user's generator is not advanced.

    Args:
        shape: Shape of one sample.
        generator: One generator for the whole batch, or a sequence of one generator for each sample, as diffusers takes
            them.
        samples: Number of samples that one generator draws together.
        dtype: Dtype in which the run draws (the pipeline's); it matters, since draws of another precision use other bits. Steps
            that draw in one of their own (`Draws.dtypes`) are followed.

    Raises:
        ValueError: If the shape is none, there is no generator, `samples` is given beside a sequence, is below 1 or above a
            million, or the dtype is none of real numbers.
    """

    SPACING = 4
    STRETCHES = 64

    def __init__(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator],
        samples: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape = _shape(shape)
        shared = isinstance(generator, torch.Generator)
        several = isinstance(generator, Sequence) and all(isinstance(g, torch.Generator) for g in generator)
        if not shared and not (several and not isinstance(generator, str | bytes)):
            raise ValueError(f"the generator is {shown(generator)}; it must be a torch.Generator, or a sequence of them")
        if samples is not None:
            _check_samples(samples)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"the dtype is {shown(dtype)}; it must be one of real numbers, such as torch.float32")
        if not shared and samples is not None:
            raise ValueError(f"got {len(generator)} generators and samples = {samples}; give one of the two")
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        self.samples = (1 if samples is None else samples) if shared else len(generators)
        if self.samples < 1:
            raise ValueError("no sample was asked for; give at least one generator and a count of at least 1")
        self._dtype = self._step_dtype = dtype
        self._of_torch = shared and generator is torch.default_generator
        self._group = self.samples if shared else 1
        self._generators = [torch.Generator(device=g.device) for g in generators]
        self._starts: list[Tensor] = []
        self._states: list[list[Tensor]] = []
        for own, given in zip(self._generators, generators, strict=True):
            own.set_state(given.get_state())
            self._starts.append(self._randn(own, 1, dtype)[0])
            self._states.append([own.get_state()])
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._next: dict[int, int] = {}  # the stretch that each generator draws next, as its state is

    def __repr__(self) -> str:
        count, device = len(self._generators), self._generators[0].device
        source = "one generator" if count == 1 else f"{count} generators"
        return f"Recorded noise: {self.samples} of shape {self.shape}, {self._dtype}, from {source} on {device}"

    def __eq__(self, other: object) -> bool:
        """Whether all draws are equal: the same shape and dtype, from generators in the same states."""
        if not isinstance(other, Recorded):
            return NotImplemented
        return self._origin == other._origin

    def __hash__(self) -> int:
        return hash(self._origin)

    @property
    def _origin(self) -> tuple[object, ...]:
        """What determines the draws."""
        states = tuple((g.device.type, bytes(s[0].tolist())) for g, s in zip(self._generators, self._states, strict=True))
        return self.shape, self.samples, self._dtype, self._step_dtype, states

    def along(self, draws: Draws | None) -> Noise:
        """The noises of a chain that makes such draws.

        Raises:
            ValueError: If the scheduler draws with another generator than the one it is given.
        """
        if draws is None:
            return self
        if draws.source == "own":
            raise ValueError(
                f"{draws.scheduler} draws its noise with generators of its own (a Brownian tree), which a recorded generator "
                "cannot repeat; give Keyed noise, or run the pipeline by paradiff.parallelize"
            )
        if draws.source == "torch" and not self._of_torch:
            raise ValueError(
                f"{draws.scheduler} draws its noise with torch's own generator, whichever it is given; give "
                "Recorded(shape, torch.default_generator), or Keyed noise"
            )
        own = dict(draws.dtypes).get(self._dtype)
        return RecordedAlong(self if own is None else self._drawing_in(own), draws)

    def _drawing_in(self, dtype: torch.dtype) -> Recorded:
        """The same with steps that draw in a dtype of their own."""
        found = copy.copy(self)
        found._step_dtype, found._states = dtype, [states[:1] for states in self._states]
        found._generators = [torch.Generator(device=g.device) for g in self._generators]
        found._kept, found._next = OrderedDict(), {}
        return found

    def __getstate__(self) -> dict[str, object]:
        """The generators by their devices: their states are saved beside them. Drawn stretches are drawn again."""
        return {**self.__dict__, "_generators": [g.device for g in self._generators], "_kept": OrderedDict(), "_next": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _generators=[torch.Generator(device=d) for d in state["_generators"]])

    def _randn(self, generator: torch.Generator, count: int, dtype: torch.dtype) -> Tensor:
        """Consecutive draws, `[count, group, *shape]`."""
        shape, device = (self._group, *self.shape), generator.device
        if count == 1 or draws_together(count, shape, device, dtype):
            return torch.randn((count, *shape), generator=generator, device=device, dtype=dtype)
        return torch.stack([torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(count)])

    def _stretch(self, source: int, index: int) -> Tensor:
        """Draws of nodes `index * SPACING` and on, `[SPACING, group, *shape]`."""
        key = (source, index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        states, generator = self._states[source], self._generators[source]
        if self._next.get(source) != index:
            generator.set_state(states[min(index, len(states) - 1)])
        for _ in range(len(states) - 1, index):  # stretches that nobody has asked for yet
            self._randn(generator, self.SPACING, self._step_dtype)
            states.append(generator.get_state())
        drawn = self._randn(generator, self.SPACING, self._step_dtype)
        if len(states) == index + 1:
            states.append(generator.get_state())
        self._next[source] = index + 1
        self._kept[key] = drawn
        if len(self._kept) > self.STRETCHES * len(self._generators):
            self._kept.popitem(last=False)
        return drawn

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0], of shape `shape`."""
        source, place = (0, sample) if len(self._generators) == 1 else (sample, 0)
        return self._starts[source][place]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, `[len(nodes), *shape]`."""
        source, place = (0, sample) if len(self._generators) == 1 else (sample, 0)
        if nodes.step != 1 or not nodes:
            return torch.stack([self._stretch(source, n // self.SPACING)[n % self.SPACING, place] for n in nodes])
        parts = []
        for index in range(nodes.start // self.SPACING, (nodes.stop - 1) // self.SPACING + 1):
            first = index * self.SPACING
            parts.append(self._stretch(source, index)[max(nodes.start - first, 0) : nodes.stop - first, place])
        return torch.cat(parts)


class RecordedAlong:
    """Recorded draws as the noises of a chain, equation (1) of draws.py.

    Args:
        recorded: The draws.
        draws: Which of them make each step's noise.
    """

    def __init__(self, recorded: Recorded, draws: Draws) -> None:
        self._recorded, self._draws = recorded, draws
        self.shape, self.samples = recorded.shape, recorded.samples
        self._after = draws.before + sum(draws.counts)

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0], of shape `shape`."""
        own = self._recorded.start(sample)
        if self._draws.start is None:
            return own
        weight, terms = self._draws.start
        return weight * own + sum(part * self._drawn(sample, k) for k, part in terms)

    def _drawn(self, sample: int, k: int) -> Tensor:
        """d[k] of draws.py."""
        return self._recorded.start(sample) if k < 0 else self._recorded.draw(sample, range(k, k + 1))[0]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, `[len(nodes), *shape]`; 0 where a step adds no noise, and after the last step the draws that
        follow those of the chain."""
        found = []
        for node in nodes:
            after = node - len(self._draws.terms)
            terms = self._draws.terms[node] if after < 0 else ((self._after + after, 1.0),)
            drawn = [weight * self._drawn(sample, k) for k, weight in terms]
            found.append(torch.stack(drawn).sum(0) if drawn else torch.zeros_like(self.start(sample)))
        return torch.stack(found)


class Maker(Protocol):
    """What makes other draws of a source's."""

    def start(self, sample: int) -> Tensor: ...

    def draw(self, sample: int, nodes: range) -> Tensor: ...


class Seen:
    """A source of noise as something sees it that turns, masks or scales its draws.

    Args:
        by: What makes the draws, as `Noise` has them.
        noise: The source, whose samples they have.
        shape: Theirs; that of the source by default.

    Attributes:
        source: The noise as given.
    """

    def __init__(self, by: Maker, noise: Noise, shape: Sequence[int] | None = None) -> None:
        self._by, self.shape, self.samples = by, tuple(noise.shape if shape is None else shape), noise.samples
        self.source = noise

    def __repr__(self) -> str:
        return f"Noise of {self._by!r}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and self._by is other._by

    def __hash__(self) -> int:
        return hash(id(self._by))

    def start(self, sample: int) -> Tensor:
        """The draw behind x[0], of shape `shape`."""
        return self._by.start(sample)

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, `[len(nodes), *shape]`."""
        return self._by.draw(sample, nodes)


class Later:
    """The noise of a chain from one of its nodes on.

    Args:
        noise: That of the whole chain.
        first: The node.
    """

    def __init__(self, noise: Noise, first: int) -> None:
        self._noise, self._first = noise, first
        self.shape, self.samples = noise.shape, noise.samples

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0] of the whole chain, of shape `shape`."""
        return self._noise.start(sample)

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, counted from the first one, `[len(nodes), *shape]`."""
        return self._noise.draw(sample, range(nodes.start + self._first, nodes.stop + self._first))


@runtime_checkable
class Mapped(Protocol):
    """Noise whose draws are those of a source, each mapped by itself and linearly (correlated.py).

    Attributes:
        source: The source.
    """

    source: Noise

    def over(self, noise: Noise) -> Noise:
        """The same map of another source's draws."""
        ...


def noise_along(noise: Noise, draws: Draws | None, first: int) -> Noise:
    """The noises of a chain's steps, from a node on.

    Args:
        noise: A source of noise.
        draws: Which recorded draws make each step's noise; None for one a step.
        first: The node.

    Raises:
        ValueError: If a scheduler draws with another generator than a recorded one.
    """
    if isinstance(noise, Recorded) and draws is not None:
        return noise.along(draws)
    if isinstance(noise, Seen | RecordedAlong):
        return noise  # made for these steps
    if not isinstance(noise, Keyed | Recorded):
        if isinstance(noise, Mapped):
            return noise.over(noise_along(noise.source, draws, first))
        noise = Copies(noise)
    return Later(noise, first) if first else noise


class Copies:
    """The draws of a source of noise of one's own, copied: it may return the same memory at every call.

    Args:
        noise: The source.

    Attributes:
        source: As given.
        shape: Shape of one sample.
        samples: Number of samples.
    """

    def __init__(self, noise: Noise) -> None:
        self.source, self.shape, self.samples = noise, noise.shape, noise.samples

    def start(self, sample: int) -> Tensor:
        """As `Noise.start`.

        Raises:
            ValueError: If the source returns something else than real numbers of this shape.
        """
        return _copied(f"`start` of sample {sample}", self.source.start(sample), tuple(self.shape))

    def draw(self, sample: int, nodes: range) -> Tensor:
        """As `Noise.draw`.

        Raises:
            ValueError: If the source returns something else than real numbers of this shape for each node.
        """
        return _copied(f"`draw` of sample {sample}", self.source.draw(sample, nodes), (len(nodes), *self.shape))


def _copied(name: str, drawn: object, shape: tuple[int, ...]) -> Tensor:
    """A copy of draws, of torch's own class.

    Raises:
        ValueError: If they are no dense tensor of real numbers, or of another shape.
    """
    if not is_plain(drawn) or tuple(drawn.shape) != shape:
        raise ValueError(
            f"{name} of the noise returned {shown(drawn)}; it must return a dense torch tensor of real numbers of shape {shape}"
        )
    return plain(drawn).clone()


def origin(noise: Noise) -> Noise:
    """The source of the draws of noise that turns, masks, scales or maps them; the noise itself, where it is none of these."""
    while isinstance(noise, Seen | Mapped):
        noise = noise.source
    return noise


def keys_of(noise: Noise, seed: int | None) -> list[tuple[int, int]]:
    """`[B]` seed and sample that random numbers of each sample are keyed by, beside the chain's noise.

    Args:
        noise: The chain's.
        seed: One for all samples; by default that of each sample's keyed noise, and 0 for other noise.
    """
    source = origin(noise)
    if seed is None and isinstance(source, Keyed):
        return source.keys
    return [(seed or 0, k) for k in range(noise.samples)]
