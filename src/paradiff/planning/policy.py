# SPDX-License-Identifier: Apache-2.0
"""A diffusion policy at a control rate: at each step the whole chain's sample, begun from the plan of the step before.

The policy's chain is solved for each observation with keyed noise, so that a plan is a function of observation and noise, and
that of the sequential chain. Where the noise of an episode is held, or moves along with the plan, that function changes as
little as the observation does, and a run that begins from the last trajectory takes few rounds (docs/warm_starts.md). Of
held noise two trajectories are known after two steps, and a run begins from where a straight line through both leads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paradiff.chain.noise import Keyed, Noise
from paradiff.chain.slope import shifted
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, require_kind, require_one_of, require_whole, shown
from paradiff.methods.presets import collocation, quasi_newton
from paradiff.planning.plan_noise import PlanNoise
from paradiff.solver import loop
from paradiff.solver.arguments import device_of, require_begins, require_method, require_warm
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.location import location_of
from paradiff.solver.protocol import Method
from paradiff.solver.row_check import Check
from paradiff.solver.solution import ErrorEstimate, Solution
from paradiff.solver.trajectory import Trajectory, joined

VARIANCE = 0.003
"""Of the plans that go with one observation, of numbers in -1 ... 1: that of the methods' slopes."""


@dataclass(frozen=True)
class ControlStep:
    """What one call of `Policy.act` took.

    Attributes:
        warm: `[B]` whether each environment's plan was begun from its last one.
        rounds: `[B]` rounds in which it took part.
        evaluations: Rows of all environments.
        estimated_errors: `[B]` estimates of the root mean square difference to the sequential chain's plan.
        seconds: The whole clock of the call.
    """

    warm: tuple[bool, ...]
    rounds: tuple[int, ...]
    evaluations: int
    estimated_errors: tuple[float, ...]
    seconds: float


class Policy:
    """Plans of a diffusion policy for B environments, one after the other. Calls from several threads wait for each other.
    Policies are compared by identity.

    Args:
        model: The network as a function `(x, t, observation) -> m` of rows, or with the names of the observation's parts.
        table: The chain, such as that of 100 DDPM steps.
        shape: Shape of a plan: H steps, and what an action is made of.
        seed: One seed for all environments, or a sequence of one for each. They key the noise, with the environment's place
            and the number of its episode.
        executed: Actions that are executed between two calls of `act`, 0 ... H.
        noise: Whether an episode's noise is `held`: the same for each of its plans; or `shifted`: it belongs to the episode's
            steps, and moves along with the plan by the actions executed. The sequential chain has the same.
        first: The method for plans that nothing is known of; by default `quasi_newton` over the whole chain, with the slope of
            data of variance `VARIANCE`.
        method: The method for all others, which has to be one that begins from a trajectory; by default `collocation` over the
            whole chain, with the same variance.
        check: Which rounds have rows evaluated again and compared, as `sample` has it.

    Attributes:
        report: What the last call of `act` took; None before.

    Raises:
        ValueError: If an argument is of another kind or out of range, or a method keeps no trajectory, or begins from none.
    """

    def __init__(
        self,
        model: Denoiser,
        table: Table,
        shape: Sequence[int],
        *,
        seed: int | Sequence[int] = 0,
        executed: int = 1,
        noise: Literal["held", "shifted"] = "held",
        first: Method | None = None,
        method: Method | None = None,
        check: Check = "first",
    ) -> None:
        require_kind("the table", table, Table)
        require_one_of("noise", noise, ("held", "shifted"))
        if not callable(model):
            raise ValueError(f"the model is {shown(model)}; give a function (x, t, observation) -> m of rows")
        self._shape = Keyed(shape, seed).shape
        require_whole("executed", executed, 0, f", one of the plan's {self._shape[0]} steps", most=self._shape[0])
        self._model, self._table, self._seed, self._executed, self._noise = model, table, seed, executed, noise
        self._first = quasi_newton(tolerance=2e-2, slope=shifted(VARIANCE)) if first is None else first
        self._method = collocation(tolerance=1e-3, shift=VARIANCE, secants=6) if method is None else method
        for name, chosen in (("method for first plans", self._first), ("method", self._method)):
            require_method(name, chosen)
            require_warm(chosen, None, True)
        require_begins(self._method)
        self._check: Check = check
        self._forms: dict[str, tuple[int, ...]] | None = None
        self._episodes: list[int] = []
        self._firsts: list[int] = []
        self._last: list[Trajectory | None] = []
        self._before: list[Trajectory | None] = []
        self._moved: int | None = None
        self._keyed = Keyed(shape, seed)
        self._turn, self._caller = threading.Lock(), 0
        self.report: ControlStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock of its calls."""
        return {name: value for name, value in vars(self).items() if name != "_turn"} | {"_caller": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of another policy, with a lock of its own."""
        vars(self).update(state)
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        warm = sum(part is not None for part in self._last)
        return (
            f"Policy of plans {self._shape} by {self._table.steps} steps of {self._table.name!r}, {self._noise} noise: "
            f"{len(self._last)} environments, {warm} with a plan"
        )

    @property
    def noise(self) -> Noise:
        """The noise of the last plans: `sample(..., policy.noise, sequential())` has the sequential chain's.

        Raises:
            ValueError: If `act` was not called.
        """
        if self.report is None:
            raise ValueError("there is no plan, and so no noise of one; call act() first")
        return self._noises(self._firsts)

    def reset(self, environments: Sequence[int] | None = None) -> None:
        """Begins another episode, with noise of its own.

        Args:
            environments: The numbers of those in which one begins; None for all.

        Raises:
            ValueError: If there is no such environment, or the model calls it within `act`.
        """
        with self._taken("reset"):
            self._reset(environments)

    def _reset(self, environments: Sequence[int] | None) -> None:
        count = len(self._last)
        chosen = range(count) if environments is None else environments
        if environments is not None and (not are_whole(environments) or any(not 0 <= k < count for k in environments)):
            raise ValueError(
                f"environments are {shown(environments)}; give a sequence of numbers in 0 ... {count - 1}, or None"
            )
        for k in {*chosen}:
            self._episodes[k] += 1
            self._firsts[k] = 0
            self._last[k] = self._before[k] = None

    def act(self, observation: Tensor | Mapping[str, Tensor], *, executed: int | None = None) -> Tensor:
        """The plans for an observation.

        Args:
            observation: `[B, ...]` what is observed in each environment, which the model is given by the name `observation`; or
                several such tensors by their names.
            executed: Actions of the last plan that were executed, where it is another number than the usual one.

        Returns:
            `[B, H, ...]` the plans, the sequential chain's within the method's tolerance.

        Raises:
            ValueError: If an observation is no tensor, not finite, or has another shape than at the call before, or the model
                calls it.
        """
        with self._taken("act"):
            return self._act(observation, executed)

    @contextlib.contextmanager
    def _taken(self, name: str) -> Iterator[None]:
        """Makes the calls of other threads wait until the end of the block.

        Raises:
            ValueError: If this thread is within such a block.
        """
        if self._caller == threading.get_ident():
            raise ValueError(f"{name}() was called by the policy's own model, within act(); call it between two calls of act()")
        with self._turn:
            self._caller = threading.get_ident()
            try:
                yield
            finally:
                self._caller = 0

    def _act(self, observation: Tensor | Mapping[str, Tensor], executed: int | None) -> Tensor:
        begin = time.perf_counter()
        given = self._given(observation)
        moved = self._executed if executed is None else executed
        require_whole("executed", moved, 0, f", one of the plan's {self._shape[0]} steps", most=self._shape[0])
        warm = [last is not None for last in self._last]
        steps = moved if self._noise == "shifted" else 0
        firsts = [first + steps * known for first, known in zip(self._firsts, warm, strict=True)]
        found: dict[int, tuple[Tensor, Trajectory, ErrorEstimate]] = {}
        evaluations = 0
        for kind in (True, False):
            chosen = [k for k, known in enumerate(warm) if known == kind]
            if chosen:
                run = self._solved(given, chosen, moved, self._noises(firsts))
                evaluations += run.evaluations
                assert run.trajectory is not None
                for place, k in enumerate(chosen):
                    found[k] = run.sample[place], run.trajectory.only(place), run.error_estimates[place]
        plans, lasts, estimates = zip(*(found[k] for k in range(len(warm))), strict=True)
        # Nothing is kept of a call that failed.
        self._before, self._last, self._firsts, self._moved = self._last, list(lasts), firsts, moved
        self._forms = {name: tuple(value.shape) for name, value in given.items()}
        rounds, errors = [e.rounds for e in estimates], [e.estimated_error for e in estimates]
        seconds = time.perf_counter() - begin
        self.report = ControlStep(tuple(warm), tuple(rounds), evaluations, tuple(errors), seconds)
        return torch.stack(plans)

    def _solved(self, given: Mapping[str, Tensor], chosen: Sequence[int], moved: int, noise: PlanNoise) -> Solution:
        """A run of some environments, all of which have a last plan, or none."""
        every = len(chosen) == len(self._last)
        device = device_of(location_of(self._model))
        rows = {name: (value if every else value[list(chosen)]).to(device) for name, value in given.items()}
        lasts = [last for last in (self._begun(k, moved) for k in chosen) if last is not None]
        return loop.sample(
            Evaluator(self._model, conditioning=rows, device=device),
            self._table,
            noise if every else noise.only(chosen),
            self._method if lasts else self._first,
            check=self._check,
            trajectory=joined(lasts) if lasts else None,
            keep_trajectory=True,
        )

    def _begun(self, environment: int, moved: int) -> Trajectory | None:
        """What the plan of an environment is begun from; None where nothing is known."""
        last, before = self._last[environment], self._before[environment]
        if last is None:
            return None
        if self._noise == "shifted":
            return last.map(lambda x: later(x, moved)) if moved else last
        return last if before is None or moved != self._moved else foretold(before, last)

    def _noises(self, firsts: Sequence[int]) -> PlanNoise:
        return PlanNoise(self._keyed, self._table.steps, tuple(self._episodes), tuple(firsts))

    def _given(self, observation: Any) -> dict[str, Tensor]:
        """The observation's parts by name.

        Raises:
            ValueError: If it is no observation of these environments.
        """
        parts = dict(observation) if isinstance(observation, Mapping) else {"observation": observation}
        if not parts:
            raise ValueError(
                "the observation is empty; give a tensor with a row for each environment, or several by their names"
            )
        for name, value in parts.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or not len(value):
                raise ValueError(f"the observation's {name!r} is {shown(value)}; give a tensor with a row for each environment")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"the observation's {name!r} has numbers that are not finite; give finite ones")
        forms = {name: tuple(value.shape) for name, value in parts.items()}
        counts = {form[0] for form in forms.values()}
        if len(counts) > 1:
            raise ValueError(f"the observation's parts have {sorted(counts)} rows; give each a row for each environment")
        if self._forms is None:  # no plan was made yet
            self._begin(counts.pop())
        elif forms != self._forms:
            raise ValueError(
                f"the observation has the shapes {forms}, and had {self._forms} before; give those, or make another Policy"
            )
        return parts

    def _begin(self, count: int) -> None:
        """Makes room for so many environments.

        Raises:
            ValueError: If there are other seeds than environments.
        """
        if is_whole(self._seed):
            self._keyed = Keyed(self._shape, int(self._seed), count)
        elif self._keyed.samples != count:
            raise ValueError(
                f"there are {self._keyed.samples} seeds, and {count} environments, as many as the observation has rows; give "
                "one seed, or one for each environment"
            )
        self._episodes, self._firsts, self._last = [0] * count, [0] * count, [None] * count
        self._before = [None] * count


def foretold(before: Trajectory, last: Trajectory) -> Trajectory:
    """The trajectory after two of one sample, on a straight line; the last one, unless both have all nodes."""
    (old,), (new,) = before.parts, last.parts
    whole = all(part.points is None and part.base is None for part in (old, new)) and torch.equal(old.nodes, new.nodes)
    return last.extrapolated(before) if whole else last


def later(plans: Tensor, moved: int) -> Tensor:
    """Plans `[K, H, ...]` without their first steps; the last one stays in place of those that are missing."""
    return torch.cat([plans[:, moved:], plans[:, -1:].expand(-1, moved, *plans.shape[2:])], 1)
