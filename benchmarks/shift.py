# SPDX-License-Identifier: Apache-2.0
"""The shift of `collocation`: would more than one data variance make the forcing flatter, so that fewer nodes suffice?

Claim measured: more than one variance does not pay. What is interpolated is the forcing, equation (1) of
methods/collocation/interval.py; it depends on the variance v of the data, 1/4 by default. In an orthogonal basis the chain's
noises remain white, so every coordinate may have a variance of its own. Kinds:

- 1/4: the default; and other numbers.
- variance, channel, frequency: that of sequential samples, as one number, for every channel, for every frequency of the
  channels' cosine transforms.
- power law: proportional to 1/(1 + k^2) at frequency k, the mean that of `variance`.
- axes: along the principal axes of the data that the digits network was trained on.
- secant, secant channel, secant frequency: the one whose g, over the levels `LEVELS`, is nearest to the least squares slope of
  the clean-data estimate against perturbations of the chain's states, half as large as the change over an interval.
- secant level: one number for every level, with which g is that slope.
- fitted, fitted channel, fitted frequency: the one with the least interpolation error on the intervals of sequential chains.

Variances are estimated from other seeds than those measured; of guided networks, where the prompt decides the mean, from the
scatter about the mean of each prompt. They are rounded to powers of 2^(1/2), but for those of a level; only with a constant one
is the forcing free of drift, whatever the state. All kinds have the same mesh and the same fine nodes. The guided networks have
too few samples for axes, and digits have one channel.

Measured is the fixed point: the sample of the collocation system (methods/collocation/system.py), swept from the forcing of the
sequential chain until it converged, minus the sequential chain's sample; root mean square, in units of the sequential samples'
standard deviation. `median_beside` is the median over seeds of the ratio to 1/4, `worst_beside` the ratio of the worst; `rest`
the last change of the worst seed's sample. Before all that, with as many nodes as steps, the error must be rounding.

    python benchmarks/shift.py --quick
    python benchmarks/shift.py --json benchmarks/results/shift.json
    python benchmarks/shift.py --only 'shapes-flow *' --json FILE              (rows of other chains in the file stay)
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from harness import Results, Row, console, options, show
from pipelines import GUIDANCE, PROMPTS, SCHEDULERS
from pipelines import load as load_bundled
from scipy.fft import dct
from torch import Tensor

from paradiff import Evaluator, Recorded, Table, sample, sequential
from paradiff.methods.collocation.control import MeshControl
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.mesh import Mesh
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import from_scheduler

DEFAULT, OTHERS = 0.25, {"1/16": 0.0625, "1": 1.0, "4": 4.0}
CHAINS = (
    ("digits", "ddpm", 1000),
    ("digits", "ddim", 1000),
    ("shapes", "DDIM", 200),
    ("shapes", "DDPM", 500),
    ("shapes-flow", "flow Euler", 200),
)
QUICK = (("digits", "ddpm", 100), ("digits", "ddim", 100))
NODES = {"digits, stochastic": (56, 96), "stochastic": (56, 112), "deterministic": (24, 40)}
ORDER = {True: 0, False: 3}
SEEDS, FEWER_SEEDS = 8, 4  # the second on the chains that take longest
LONG = ("DDPM", "flow Euler")
ESTIMATES = {"digits": 64, "shapes": 32, "shapes-flow": 32}  # seeds to estimate from
FIRST_ESTIMATE = 1000
REST, MOST_SWEEPS = 1e-4, 12
MOST_PASSES, PASS_REST = 6, 1e-4  # at one node of a stochastic chain, whose averaged state depends on its own forcing
LEVELS, MOST_LEVELS = (-4.0, 2.0), 12  # of log(alpha^2/sigma^2)
GRID = [2 ** (k / 2) for k in range(-20, 13)]
CHECK_STEPS, ROUNDING = 60, 1e-5
COLUMNS = ("model", "chain", "steps", "nodes", "kind", "seeds", "variances", "least", "greatest", "error_median", "error_max")
COLUMNS += ("median_beside", "worst_beside", "rest")

Call = Callable[..., Tensor]


@dataclass
class Run:
    """Sequential chains of B seeds; all `[.., B, d]`, float64.

    Attributes:
        states: `[N, B, d]`.
        clean: `[N, B, d]` the network's estimates.
        noise: `[N, B, d]`.
        sample: `[B, d]`.
        prompts: `[B]`.
    """

    states: Tensor
    clean: Tensor
    noise: Tensor
    sample: Tensor
    prompts: list[int]


class Chain:
    """A network and a table.

    Args:
        model: A bundled model.
        sampler: Its sampler or scheduler.
        steps: Number of steps.
    """

    def __init__(self, model: str, sampler: str, steps: int) -> None:
        self.model, self.sampler, self.steps = model, sampler, steps
        self.rows: dict[str, Tensor] = {}  # the conditioning of every prompt, by name
        self.config: dict[str, Any] = {}  # of its scheduler
        self.network: Call
        if model == "digits":
            network = load(model)
            self.network, self.table, self.shape = network, network.table(sampler, steps), network.shape
        else:
            self._load_guided()
        self.size = math.prod(self.shape)
        assert self.table.band == 1
        assert self.table.clip is None

    def _load_guided(self) -> None:
        pipe = load_bundled(self.model)
        pipe.scheduler = SCHEDULERS[self.sampler][1](pipe.scheduler.config)
        pipe.scheduler.set_timesteps(self.steps)
        self.config = dict(pipe.scheduler.config)
        self.table, prompts = from_scheduler(pipe.scheduler), list(PROMPTS)
        with torch.inference_mode():
            if self.model == "shapes":
                wanted, empty = pipe.encode_prompt(prompts, "cpu", 1, True)
                self.rows = {"wanted": wanted, "empty": empty.expand_as(wanted)}
                network, size = pipe.unet, pipe.unet.config.sample_size
            else:
                wanted, empty, pooled, pooled_empty = pipe.encode_prompt(
                    prompts, prompts, prompts, device="cpu", do_classifier_free_guidance=True
                )
                self.rows = {"wanted": wanted, "empty": empty, "pooled": pooled, "pooled_empty": pooled_empty}
                network, size = pipe.transformer, pipe.transformer.config.sample_size
        self.shape = (network.config.in_channels, size, size)

        def guided(x: Tensor, t: Tensor, wanted: Tensor, empty: Tensor, **pooled: Tensor) -> Tensor:
            more = {"pooled_projections": torch.cat([pooled["pooled_empty"], pooled["pooled"]])} if pooled else {}
            out = network(
                torch.cat([x, x]),
                timestep=torch.cat([t, t]),
                encoder_hidden_states=torch.cat([empty, wanted]),
                return_dict=False,
                **more,
            )[0]
            without, within = out.chunk(2)
            return without + GUIDANCE * (within - without)

        self.network = guided

    def conditioning(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        """The conditioning of some prompts, by name, a row each."""
        return {name: value[list(prompts)] for name, value in self.rows.items()}

    def of_seeds(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """The conditioning of some seeds, which take the prompts in turn."""
        return self.conditioning([seed % len(PROMPTS) for seed in seeds])

    @torch.inference_mode()
    def clean(self, x: Tensor, node: int, prompts: Sequence[int]) -> Tensor:
        """The clean-data estimates `[B, d]` of states `[B, d]` at a fine node."""
        t = self.table.t[node].float().expand(len(x))
        m = self.network(x.float().view(-1, *self.shape), t, **self.conditioning(prompts)).double().flatten(1)
        return float(self.table.p[node]) * x + float(self.table.q[node]) * m

    def run(self, seeds: Sequence[int]) -> Run:
        """The sequential chains of some seeds, in one batch."""
        noise = Recorded(self.shape, [torch.Generator().manual_seed(seed) for seed in seeds])
        prompts = [seed % len(PROMPTS) for seed in seeds]
        seen: list[tuple[Tensor, Tensor]] = []

        def recorded(x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            m = self.network(x, t, **conditioning)
            seen.append((x.flatten(1), m.flatten(1)))
            return m

        found = sample(Evaluator(recorded, conditioning=self.conditioning(prompts)), self.table, noise, sequential()).sample
        states, outputs = (torch.stack(values).double() for values in zip(*seen, strict=True))
        clean = self.table.p[:, None, None] * states + self.table.q[:, None, None] * outputs
        drawn = torch.zeros_like(states)
        if self.table.stochastic:
            drawn = torch.stack([noise.draw(k, range(self.steps)).flatten(1) for k in range(len(seeds))], 1).double()
        return Run(states, clean, drawn, found.double().flatten(1), prompts)


# -- the collocation system ---------------------------------------------------------------------------------------------------


class Pinned(Recurrence):
    """A recurrence whose network is evaluated at the fine nodes given; without them, those of averaged states depend on the
    variance a little.

    Args:
        table: The sampler.
        variance: v, or `[N]` that of every fine node.
        nodes: Fine nodes, one in each interval that will be used.
    """

    def __init__(self, table: Table, variance: float | Tensor, nodes: Tensor) -> None:
        super().__init__(table, variance)  # pyright: ignore[reportArgumentType]  (every use of it is one at a fine node)
        elsewhere = torch.full_like(self.snr, math.inf)
        elsewhere[nodes] = self.snr[nodes]
        self.snr = elsewhere


@dataclass(eq=False)
class Kind:
    """Variances along the columns of an orthogonal matrix.

    Attributes:
        name: Of the kind.
        basis: `[d, d]`; coordinates of x are `x @ basis`.
        variances: `[d]`, or one for all.
        levels: `[N]` one for all columns, but another at every fine node, in place of these.
    """

    name: str
    basis: Tensor
    variances: Tensor
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        found = self.variances.expand(len(self.basis))
        if self.name != "1/4":
            found = 2 ** ((2 * found.clamp(GRID[0], GRID[-1]).log2()).round() / 2)
        self.variances = found


class System:
    """The collocation system, equation (1) of methods/collocation/system.py, with a variance for every coordinate.

    Args:
        chain: The network and table.
        edges: Edges of all coordinates.
        kind: The variances.
        tables: Systems by variance, filled as needed.
    """

    def __init__(self, chain: Chain, edges: list[int], kind: Kind, tables: dict[float, CollocationSystem]) -> None:
        self.chain, self.kind = chain, kind
        values, index = kind.variances.unique(return_inverse=True)
        found = [system_of(chain.table, edges, float(v), tables) for v in values]
        if kind.levels is not None:
            pinned = Pinned(chain.table, kind.levels, found[0].nodes)
            found, index = [CollocationSystem(pinned, edges, found[0].order)], torch.zeros_like(index)
        self.nodes = found[0].nodes.tolist()
        self.initial, self.influence, self.noise = (
            torch.stack(parts, -1)[..., index]
            for parts in zip(*((s.initial, s.influence, weights_of_noises(s)) for s in found), strict=True)
        )
        self.g = torch.stack([s.recurrence.g[s.nodes] for s in found], -1)[:, index]
        self.nu = torch.stack([s.recurrence.nu[s.nodes] for s in found], -1)[:, index]

    def forcing(self, k: int, x: Tensor, clean: Tensor) -> Tensor:
        """u at the k-th node, in the kind's coordinates."""
        return self.nu[k] * (clean - self.g[k] * x)

    def solve(self, run: Run) -> tuple[Tensor, Tensor, int]:
        """Samples `[B, d]`, their last change `[B]`, and the number of sweeps."""
        basis, chain = self.kind.basis, self.chain
        x0, passes = run.states[0] @ basis, MOST_PASSES if chain.table.stochastic else 1
        share = torch.zeros(len(self.initial), *x0.shape, dtype=torch.float64)
        if chain.table.stochastic:
            share = torch.einsum("knd,nbd->kbd", self.noise, run.noise @ basis)
        share += self.initial[:, None] * x0
        u = torch.stack([self.forcing(k, run.states[n] @ basis, run.clean[n] @ basis) for k, n in enumerate(self.nodes)])
        before, change, sweeps = run.sample @ basis, torch.full((len(x0),), math.inf), 0
        while sweeps < MOST_SWEEPS and float(change.max()) > REST * float(run.sample.std()):
            for k, node in enumerate(self.nodes):
                last = None
                for _ in range(passes):
                    y = share[k] + torch.einsum("jd,jbd->bd", self.influence[k], u)
                    if last is not None and float(rms(y - last).max()) < PASS_REST:
                        break
                    u[k] = self.forcing(k, y, chain.clean(y @ basis.T, node, run.prompts) @ basis)
                    last = y
            found = share[-1] + torch.einsum("jd,jbd->bd", self.influence[-1], u)
            change, before, sweeps = rms(found - before), found, sweeps + 1
        return before @ basis.T, change, sweeps


def rms(values: Tensor) -> Tensor:
    """Root mean square of every row."""
    return values.square().mean(-1).sqrt()


def system_of(table: Table, edges: list[int], variance: float, tables: dict[float, CollocationSystem]) -> CollocationSystem:
    """The system of a variance, evaluated at the nodes of the default's."""
    if DEFAULT not in tables:
        tables[DEFAULT] = CollocationSystem(Recurrence(table, DEFAULT), edges, ORDER[table.stochastic])
    if variance not in tables:
        tables[variance] = CollocationSystem(Pinned(table, variance, tables[DEFAULT].nodes), edges, ORDER[table.stochastic])
        assert torch.equal(tables[variance].nodes, tables[DEFAULT].nodes)
    return tables[variance]


def weights_of_noises(system: CollocationSystem) -> Tensor:
    """`[M+1, N]` weights of the chain's noises in n of equation (1)."""
    found = torch.zeros(len(system.initial), system.points[-1], dtype=torch.float64)
    for k, interval in enumerate(system.intervals):
        inside = slice(interval.left, interval.right)
        found[:, inside] += system.noise_weights[:, k] @ interval.noise
        if system.averaged:
            found[k, inside] += interval.state_noise
    return found


# -- the kinds ----------------------------------------------------------------------------------------------------------------


def cosines(shape: tuple[int, ...]) -> Tensor:
    """`[d, d]` the orthonormal cosine transform of the last two axes."""
    channels, height, width = shape
    rows, columns = (torch.from_numpy(dct(torch.eye(n).double().numpy(), axis=1, norm="ortho")) for n in (height, width))
    return torch.kron(torch.eye(channels, dtype=torch.float64), torch.kron(rows, columns))


def by_channel(values: Tensor, channels: int) -> Tensor:
    """`[..., d]` the mean over each channel."""
    parts = values.unflatten(-1, (channels, -1))
    return parts.mean(-1, keepdim=True).expand_as(parts).flatten(-2)


def kinds_of(chain: Chain, edges: list[int], run: Run) -> list[Kind]:
    """All kinds, from chains to estimate from."""
    eye, waves = torch.eye(chain.size, dtype=torch.float64), cosines(chain.shape)
    channels, height, width = chain.shape
    seen = run.sample @ waves
    groups = [seen[[p == prompt for p in run.prompts]] for prompt in set(run.prompts)] if chain.rows else [seen]
    scatter = torch.stack([(g - g.mean(0)).square().sum(0) for g in groups]).sum(0) / (len(seen) - len(groups))
    one = scatter.mean()
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    law = 1 / (1 + down.double() ** 2 + across**2)
    law = (law / law.mean()).flatten().repeat(channels)
    several = channels > 1
    found = [Kind(name, eye, torch.tensor(v, dtype=torch.float64)) for name, v in {"1/4": DEFAULT, **OTHERS}.items()]
    found.append(Kind("variance", eye, one))
    if several:
        found.append(Kind("channel", eye, by_channel(scatter, channels)))
    found += [Kind("frequency", waves, scatter), Kind("power law", waves, one * law)]
    if chain.model == "digits":
        data = digits().data.double().flatten(1)
        variances, axes = torch.linalg.eigh(torch.cov(data.T))
        found.append(Kind("axes", axes, variances.clamp(min=GRID[0])))
    places, slopes = secant(chain, edges, run, waves)
    near = torch.stack([(slopes - shrinkage(places, torch.tensor(v))).square().mean(0) for v in GRID])
    level = torch.from_numpy(np.interp(Recurrence(chain.table, DEFAULT).log_snr, places[:, 0], slopes.mean(1)))
    for name, costs in (("secant", near), ("fitted", fitted(chain, edges, run, waves, float(one)))):
        found.append(Kind(name, eye, best(costs.mean(1, keepdim=True))))
        if several:
            found.append(Kind(f"{name} channel", eye, best(by_channel(costs, channels))))
        found.append(Kind(f"{name} frequency", waves, best(costs)))
        if name == "secant":
            found.append(Kind("secant level", eye, torch.tensor(1.0), variance_of(chain.table, level)))
    return found


def shrinkage(place: Tensor, variance: Tensor) -> Tensor:
    """alpha g at levels log(alpha^2/sigma^2)."""
    return torch.sigmoid(place + variance.log())


def variance_of(table: Table, slopes: Tensor) -> Tensor:
    """`[N]` variances of which alpha g is `[N]`; at levels from which slopes are not, those of the nearest."""
    place = Recurrence(table, DEFAULT).log_snr
    inside = (place >= LEVELS[0]) & (place <= LEVELS[1])
    found = (torch.logit(slopes.clamp(1e-6, 1 - 1e-6)) - place).exp().clamp(GRID[0], GRID[-1])
    return torch.from_numpy(np.exp(np.interp(place, place[inside], found[inside].log())))


def best(costs: Tensor) -> Tensor:
    """The variances of `GRID` of least costs `[len(GRID), d]`."""
    return torch.tensor(GRID, dtype=torch.float64)[costs.argmin(0)]


def secant(chain: Chain, edges: list[int], run: Run, waves: Tensor) -> tuple[Tensor, Tensor]:
    """`[L, 1]` levels, and `[L, d]` alpha times the slopes there."""
    table, generator = chain.table, torch.Generator().manual_seed(0)
    place = Recurrence(table, DEFAULT).log_snr
    intervals = [(a, b) for a, b in pairwise(edges) if LEVELS[0] <= float(place[a]) <= LEVELS[1] and b < edges[-1]]
    intervals = intervals[:: math.ceil(len(intervals) / MOST_LEVELS)]
    found = []
    for left, right in intervals:
        size = float((run.states[right] - run.states[left]).square().mean().sqrt()) / 2
        moved = size * torch.randn(2, *run.states[left].shape, generator=generator, dtype=torch.float64)
        answer = torch.stack([chain.clean(run.states[left] + m, left, run.prompts) - run.clean[left] for m in moved])
        moved, answer = moved @ waves, answer @ waves
        found.append(float(table.alpha[left]) * (answer * moved).sum((0, 1)) / moved.square().sum((0, 1)))
    return place[[left for left, _ in intervals]][:, None], torch.stack(found)


def fitted(chain: Chain, edges: list[int], run: Run, waves: Tensor, variance: float) -> Tensor:
    """`[len(GRID), d]` mean squares of the interpolation error of each interval of sequential chains, carried to the sample.

    An interval begins with the chain's own state. Where states are averaged, the network is evaluated at the averaged state of
    one variance; the small differences of other variances' states are taken with the slope of data of that variance. The error
    is carried to the sample with that variance's weights."""
    table, tables = chain.table, {}
    states, noise = (values @ waves for values in (run.states, run.noise))
    clean, ends = run.clean @ waves, torch.cat([states, (run.sample @ waves)[None]])
    middle = system_of(table, edges, variance, tables)
    carried = middle.noise_weights[-1, :, 0].tolist()
    asked: list[tuple[Tensor, Tensor]] = []  # states of the nodes, and the estimates there
    for k, node in enumerate(middle.nodes.tolist()):
        asked.append((states[node], clean[node]))
        if middle.averaged:
            for _ in range(2):
                y = averaged_state(middle, k, states, noise, asked[-1])
                asked[-1] = (y, chain.clean(y @ waves.T, node, run.prompts) @ waves)
    costs = torch.zeros(len(GRID), chain.size, dtype=torch.float64)
    for row, v in enumerate(GRID):
        system = system_of(table, edges, v, tables)
        rec, forcings = system.recurrence, []
        for k, node in enumerate(system.nodes.tolist()):
            y, answer = asked[k]
            if system.averaged:
                y = averaged_state(system, k, states, noise, asked[k], float(middle.recurrence.g[node]))
                answer = answer + float(middle.recurrence.g[node]) * (y - asked[k][0])
            forcings.append(float(rec.nu[node]) * (answer - float(rec.g[node]) * y))
        u = torch.stack(forcings)
        for k, interval in enumerate(system.intervals):
            between = torch.tensordot(system.interpolation[interval.left : interval.right], u, 1)
            landed = interval.carry[0, 0] * states[interval.left] + torch.tensordot(interval.forcing[0], between, 1)
            landed += torch.tensordot(interval.noise[0], noise[interval.left : interval.right], 1)
            costs[row] += (carried[k] * (ends[interval.right] - landed)).square().mean(0)
    return costs


def averaged_state(
    system: CollocationSystem, k: int, states: Tensor, noise: Tensor, asked: tuple[Tensor, Tensor], slope: float = 0.0
) -> Tensor:
    """The averaged state `[B, d]` of an interval that begins with the chain's own state, where the network's estimate at a
    state x is D + slope (x - y), `asked` being (y, D)."""
    interval, rec = system.intervals[k], system.recurrence
    base = interval.state_carry[0] * states[interval.left] + torch.tensordot(
        interval.state_noise, noise[interval.left : interval.right], 1
    )
    weight = interval.state_forcing * float(rec.nu[interval.node])
    return (base + weight * (asked[1] - slope * asked[0])) / (1 - weight * (slope - float(rec.g[interval.node])))


# -- measuring ----------------------------------------------------------------------------------------------------------------


def measure(chain: Chain, seeds: int, estimates: int) -> Iterator[Row]:
    """The rows of one chain."""
    table = chain.table
    which = "stochastic" if table.stochastic else "deterministic"
    counts = NODES.get(f"{chain.model}, {which}", NODES[which])
    counts = counts if table.steps > 4 * counts[-1] else tuple(n for n in (table.steps // 4, table.steps // 2))
    mesh = Mesh(table, MeshControl())
    kinds = kinds_of(chain, mesh.points(counts[0]), chain.run(range(FIRST_ESTIMATE, FIRST_ESTIMATE + estimates)))
    run = chain.run(range(seeds))
    spread = float(run.sample.std())
    for count in counts:
        tables: dict[float, CollocationSystem] = {}
        for kind in kinds:
            yield measured(chain, mesh.points(count), kind, run, spread, tables)


def measured(
    chain: Chain, edges: list[int], kind: Kind, run: Run, spread: float, tables: dict[float, CollocationSystem]
) -> Row:
    """One row, but for what it is beside that of 1/4."""
    begin = time.perf_counter()
    found, change, sweeps = System(chain, edges, kind, tables).solve(run)
    variances = kind.variances if kind.levels is None else kind.levels
    errors = (rms(found - run.sample) / spread).tolist()
    return {
        "model": chain.model,
        "chain": chain.sampler,
        "steps": chain.table.steps,
        "kind": kind.name,
        "nodes": len(edges) - 1,
        "seeds": len(errors),
        "variances": len(variances.unique()),
        "least": float(variances.min()),
        "greatest": float(variances.max()),
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "rest": float(change.max()) / spread,
        "sweeps": sweeps,
        "spread": spread,
        "seconds": time.perf_counter() - begin,
        "errors": errors,
    }


def compare(rows: list[Row]) -> None:
    """Adds to the rows of one chain what they are beside 1/4."""
    default = {r["nodes"]: r for r in rows if r["kind"] == "1/4"}
    for r in rows:
        base = default[r["nodes"]]
        r["median_beside"] = statistics.median(a / b for a, b in zip(r["errors"], base["errors"], strict=True))
        r["worst_beside"] = r["error_max"] / base["error_max"]


def check() -> None:
    """With as many nodes as steps the samples are those of the chain, whatever the variances."""
    for sampler in ("ddpm", "ddim"):
        chain = Chain("digits", sampler, CHECK_STEPS)
        kind = Kind("powers", cosines(chain.shape), torch.logspace(-2, 0, chain.size, dtype=torch.float64))
        run, edges = chain.run(range(2)), list(range(CHECK_STEPS + 1))
        row = measured(chain, edges, kind, run, float(run.sample.std()), {})
        assert row["error_max"] < ROUNDING, f"{sampler}: error {row['error_max']:.2g} with every step a node"


def main() -> None:
    chains = {f"{model} {sampler}": (model, sampler, steps) for model, sampler, steps in CHAINS}
    given = options(__doc__, tuple(chains))
    if given.quick:
        chains |= {f"{model} {sampler}": (model, sampler, steps) for model, sampler, steps in QUICK}
    warnings.filterwarnings("ignore")
    check()
    results = Results(given.json, given.keep)
    for model, sampler, steps in (chains[name] for name in given.only):
        if given.quick and (model, sampler, steps) not in QUICK and not given.keep:
            continue
        results.drop(r for r in results.rows if (r["model"], r["chain"]) != (model, sampler))
        begin, mine, chain = time.perf_counter(), [], Chain(model, sampler, steps)
        seeds = min(2 if given.quick else FEWER_SEEDS if sampler in LONG else SEEDS, given.seeds)
        for row in measure(chain, seeds, 16 if given.quick else ESTIMATES[model]):
            mine.append(row)
            compare(mine)
            results.add(row)
            label = f"{model} {sampler} {steps}, {row['nodes']} nodes, {row['kind']}"
            found = f"{row['error_median']:.3g} ({row['error_max']:.3g}), rest {row['rest']:.1e}, {row['seconds']:.0f} s"
            console.print(f"{label}, {row['least']:.3g} to {row['greatest']:.3g}: {found}")
        results.save()
        console.print(f"{time.perf_counter() - begin:.0f} s in all")
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()
