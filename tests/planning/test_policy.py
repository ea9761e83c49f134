# SPDX-License-Identifier: Apache-2.0
"""Plans at a control rate: those of the sequential chain, whatever they are begun from, in fewer rounds from the last plan."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Policy, Schedule, Table, quasi_newton, sample, samplers, sequential, srds
from paradiff.chain import Clip
from paradiff.chain.slope import shifted
from paradiff.models import Plane, load_policy
from paradiff.planning.plan_noise import PlanNoise
from paradiff.planning.policy import VARIANCE
from paradiff.solver.evaluator import Evaluator

SHAPE = (8, 2)
TABLE = samplers.ddpm(Schedule.cosine(), 40, clip=Clip(1.5))
COLD, LEVEL = 5e-3, 2e-3  # the first is a quarter of the tolerance, the second a thousandth of the range of plans


def ways(observation: Tensor) -> Tensor:
    """`[R, 2, 8, 2]` plans that turn left or right."""
    ahead = torch.linspace(0.1, 0.8, 8).to(observation)
    aside = torch.tensor([-0.3, 0.3]).to(observation)[:, None] * (ahead * 3).sin()
    plans = torch.stack([aside, ahead.expand_as(aside)], 2)
    return observation[:, None, None] + plans


def network(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
    """The noise in a plan by one of two ways, with deviations of 0.1."""
    nodes = {float(v): n for n, v in enumerate(TABLE.t[:-1].tolist())}
    at = torch.tensor([nodes[float(v)] for v in t])
    alpha, sigma = (v[at][:, None, None, None] for v in (TABLE.alpha, TABLE.sigma))
    means, total = ways(observation.double()), alpha**2 * 0.01 + sigma**2
    off = x.double()[:, None] - alpha * means
    share = torch.softmax(-(off.square() / (2 * total)).sum((2, 3)), 1)[:, :, None, None]
    clean = (share * (means + alpha * 0.01 / total * off)).sum(1)
    return ((x - alpha[:, 0] * clean) / sigma[:, 0]).to(x.dtype)


def plain(policy: Policy, observation: Tensor, table: Table = TABLE, model: Callable[..., Tensor] = network) -> Tensor:
    """The sequential chain's plans, with the policy's own noise."""
    evaluator = Evaluator(model, conditioning={"observation": observation})
    return sample(evaluator, table, policy.noise, sequential(), check="off").sample


def moved(observation: Tensor) -> Tensor:
    """What is observed a step later."""
    return observation + torch.tensor([0.01, 0.03])


@pytest.mark.parametrize("noise", ["held", "shifted"])
def test_each_plan_is_the_sequential_one_and_a_warm_one_takes_fewer_rounds(noise: Any) -> None:
    policy, seen = Policy(network, TABLE, SHAPE, seed=3, noise=noise), torch.tensor([[0.0, -0.5], [0.3, 0.2], [-0.2, 0.0]])
    cold = policy.act(seen)
    first = policy.report
    assert first is not None
    assert first.warm == (False, False, False)
    assert float((cold - plain(policy, seen)).square().mean((1, 2)).sqrt().max()) < COLD
    for _ in range(3):
        seen = moved(seen)
        found, report = policy.act(seen), policy.report
        assert report is not None
        assert report.warm == (True, True, True)
        assert sum(report.rounds) < sum(first.rounds)
        assert float((found - plain(policy, seen)).square().mean((1, 2)).sqrt().max()) < LEVEL


def test_a_plan_does_not_depend_on_what_it_is_begun_from() -> None:
    seen = torch.tensor([[0.1, 0.0]])
    found = []
    for before in ([[0.1, -0.03]], [[-0.4, 0.4]]):
        policy = Policy(network, TABLE, SHAPE, seed=5)
        policy.act(torch.tensor(before))
        found.append(policy.act(seen))
    assert float((found[0] - found[1]).square().mean().sqrt()) < LEVEL


def test_an_environment_has_the_plan_that_it_has_alone() -> None:
    seen = torch.tensor([[0.0, -0.5], [0.3, 0.2]])
    together, alone = Policy(network, TABLE, SHAPE, seed=[7, 8]), Policy(network, TABLE, SHAPE, seed=[8])
    for _ in range(2):
        one, other = together.act(seen), alone.act(seen[1:])
        # Float32; a batch of another size is summed in another order.
        torch.testing.assert_close(one[1:], other, atol=1e-4, rtol=0)
        seen = moved(seen)


def test_an_environment_is_reset_by_itself_and_has_another_noise_then() -> None:
    policy, seen = Policy(network, TABLE, SHAPE, seed=1), torch.tensor([[0.0, -0.5], [0.3, 0.2]])
    before = policy.act(seen)
    policy.reset([1])
    after, report = policy.act(seen), policy.report
    assert report is not None
    assert report.warm == (True, False)
    assert float((after[0] - before[0]).abs().max()) < 2 * LEVEL
    assert float((after[1] - before[1]).abs().max()) > 0.05
    assert float((after - plain(policy, seen)).square().mean((1, 2)).sqrt().max()) < LEVEL
    policy.reset()
    policy.act(seen)
    assert policy.report is not None
    assert policy.report.warm == (False, False)


def test_an_observation_may_have_several_parts() -> None:
    def model(x: Tensor, t: Tensor, across: Tensor, along: Tensor) -> Tensor:
        return network(x, t, torch.stack([across, along], 1))

    one = Policy(network, TABLE, SHAPE).act(torch.tensor([[0.1, 0.2]]))
    other = Policy(model, TABLE, SHAPE).act({"across": torch.tensor([0.1]), "along": torch.tensor([0.2])})
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("executed", [0, 3, 8])
def test_shifted_noise_moves_along_with_the_actions_executed(executed: int) -> None:
    policy = Policy(network, TABLE, SHAPE, noise="shifted")
    policy.act(torch.zeros(1, 2))
    before = torch.cat([policy.noise.start(0)[None], policy.noise.draw(0, range(4))])
    policy.act(torch.zeros(1, 2), executed=executed)
    after = torch.cat([policy.noise.start(0)[None], policy.noise.draw(0, range(4))])
    assert torch.equal(after[:, : 8 - executed], before[:, executed:])
    fresh = after[:, 8 - executed :]
    assert not torch.isin(fresh, before).any()


def test_held_noise_stays_and_every_draw_is_another() -> None:
    keyed = Keyed(SHAPE, 0, 2)
    own = PlanNoise(keyed, 40, [0, 0], [0, 0])
    assert torch.equal(own.start(1), keyed.start(1))
    assert torch.equal(own.draw(1, range(3, 9)), keyed.draw(1, range(3, 9)))
    kinds = [(0, 0), (0, 3), (1, 0)]
    drawn = {kind: PlanNoise(keyed, 40, [kind[0]] * 2, [kind[1]] * 2).draw(1, range(-1, 40)) for kind in kinds}
    assert len(drawn[0, 0].unique()) > 0.99 * drawn[0, 0].numel()
    assert not torch.isin(drawn[1, 0], drawn[0, 0]).any()
    assert torch.equal(drawn[0, 3][:, :5], drawn[0, 0][:, 3:])
    policy = Policy(network, TABLE, SHAPE)
    policy.act(torch.zeros(1, 2))
    before = policy.noise.draw(0, range(4))
    policy.act(torch.zeros(1, 2))
    assert torch.equal(policy.noise.draw(0, range(4)), before)


@pytest.mark.parametrize("noise", ["held", "shifted"])
@pytest.mark.parametrize("steps", [10, 20, 30])
@pytest.mark.parametrize("method", [None, quasi_newton(tolerance=2e-2, slope=shifted(VARIANCE))], ids=["default", "own"])
def test_plans_on_a_chain_that_ends_amid_the_noise_keep_to_their_estimates(method: Any, steps: int, noise: Any) -> None:
    table = TABLE[:steps]
    for seed in range(4):
        policy = Policy(network, table, SHAPE, seed=seed, noise=noise, executed=2, method=method)
        seen = torch.tensor([[0.0, -0.5], [0.3, 0.2], [-0.2, 0.0]])
        for _ in range(3):
            off = (policy.act(seen) - plain(policy, seen, table)).square().mean((1, 2)).sqrt()
            assert policy.report is not None
            told = torch.tensor(policy.report.estimated_errors)
            assert (off <= 2 * told + 1e-6).all()  # the last is rounding
            seen = moved(seen)


def acted(*observations: Any, **options: Any) -> Policy:
    policy = Policy(network, TABLE, SHAPE, **options)
    for observation in observations:
        policy.act(observation)
    return policy


def test_a_call_that_failed_leaves_all_as_it_was() -> None:
    fails = [False]

    def model(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("no power")
        return network(x, t, observation)

    one, other = (Policy(made, TABLE, SHAPE, noise="shifted") for made in (model, network))
    seen = torch.tensor([[0.1, 0.2]])
    for policy in (one, other):
        policy.act(seen)
    fails[0] = True
    with pytest.raises(RuntimeError, match="no power"):
        one.act(moved(seen))
    fails[0] = False
    torch.testing.assert_close(one.act(moved(seen)), other.act(moved(seen)), atol=1e-5, rtol=0)


def test_a_first_call_that_failed_leaves_no_environments_behind() -> None:
    fails = [True]

    def model(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("no power")
        return network(x, t, observation)

    policy, seen = Policy(model, TABLE, SHAPE), torch.tensor([[0.1, 0.2]])
    with pytest.raises(RuntimeError, match="no power"):
        policy.act(seen.expand(3, 2))
    fails[0] = False
    assert torch.equal(policy.act(seen), Policy(network, TABLE, SHAPE).act(seen))


def test_calls_of_several_threads_wait_for_each_other() -> None:
    began, go = threading.Event(), threading.Event()

    def model(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        began.set()
        go.wait(10)
        return network(x, t, observation)

    policy, other = (Policy(made, TABLE, SHAPE, noise="shifted") for made in (model, network))
    seen, found = torch.tensor([[0.1, 0.2]]), list[Tensor]()
    threads = [threading.Thread(target=lambda: found.append(policy.act(seen))) for _ in range(2)]
    for thread in threads:
        thread.start()
        began.wait(10)
    go.set()
    for thread in threads:
        thread.join()
    assert policy.report is not None
    assert policy.report.warm == (True,)
    assert all(torch.equal(one, other.act(seen)) for one in found)
    assert torch.equal(policy.noise.start(0), other.noise.start(0))


def test_an_environment_that_is_named_twice_is_reset_once() -> None:
    once, twice = acted(torch.zeros(2, 2)), acted(torch.zeros(2, 2))
    once.reset([1])
    twice.reset([1, 1])
    assert torch.equal(once.noise.start(1), twice.noise.start(1))


def test_a_copy_goes_on_as_the_policy_does() -> None:
    policy = acted(torch.zeros(1, 2), noise="shifted")
    copied, seen = copy.deepcopy(policy), torch.full((1, 2), 0.1)
    assert torch.equal(policy.act(seen), copied.act(seen))
    assert torch.equal(policy.act(seen), copied.act(seen))


def test_a_chain_of_one_step_has_plans() -> None:
    table, seen = samplers.ddim(Schedule.cosine(), 1), torch.tensor([[0.1, 0.2]])

    def model(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        return 0.3 * x + observation[:, None]

    policy = Policy(model, table, SHAPE)
    for _ in range(2):
        torch.testing.assert_close(policy.act(seen), plain(policy, seen, table, model), atol=1e-6, rtol=0)


def within(call: Callable[[Policy], Any]) -> None:
    """A policy whose model calls it."""

    def model(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        call(policy)
        return network(x, t, observation)

    policy = Policy(model, TABLE, SHAPE)
    policy.act(torch.zeros(1, 2))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "model": (lambda: Policy(None, TABLE, SHAPE), r"the model is None; give a function \(x, t, observation\)"),  # pyright: ignore[reportArgumentType]
    "table": (lambda: Policy(network, "ddpm", SHAPE), r"the table is 'ddpm'"),  # pyright: ignore[reportArgumentType]
    "noise": (lambda: Policy(network, TABLE, SHAPE, noise="fresh"), r"noise is 'fresh'; .*held.*shifted"),  # pyright: ignore[reportArgumentType]
    "shape": (lambda: Policy(network, TABLE, (8.5, 2)), r"shape"),  # pyright: ignore[reportArgumentType]
    "executed": (lambda: Policy(network, TABLE, SHAPE, executed=9), r"executed is 9; .*one of the plan's 8 steps"),
    "executed later": (lambda: acted().act(torch.zeros(1, 2), executed=-1), r"executed is -1"),
    "seeds": (lambda: acted(torch.zeros(3, 2), seed=[1, 2]), r"there are 2 seeds, and 3 environments"),
    "no tensor": (lambda: acted([0.0, 0.1]), r"the observation's 'observation' is .*; give a tensor with a row for each"),
    "a number": (lambda: acted(torch.tensor(1.0)), r"give a tensor with a row for each environment"),
    "no environment": (lambda: acted(torch.zeros(0, 2)), r"give a tensor with a row for each environment"),
    "not finite": (lambda: acted(torch.tensor([[0.0, float("nan")]])), r"numbers that are not finite"),
    "empty": (lambda: acted({}), r"the observation is empty"),
    "rows": (lambda: acted({"a": torch.zeros(1), "b": torch.zeros(2)}), r"parts have \[1, 2\] rows"),
    "another number": (lambda: acted(torch.zeros(1, 2), torch.zeros(2, 2)), r"has the shapes .* and had .* before"),
    "environment": (
        lambda: acted(torch.zeros(1, 2)).reset([1]),
        r"environments are \[1\]; give a sequence of numbers in 0 ... 0",
    ),
    "noise of none": (lambda: acted().noise, r"call act\(\) first"),
    "method": (lambda: Policy(network, TABLE, SHAPE, method=sequential()), r"sequential cannot begin from a trajectory"),
    "first": (lambda: Policy(network, TABLE, SHAPE, first=srds()), r"srds keeps no trajectory"),
    "no method": (lambda: Policy(network, TABLE, SHAPE, first="srds"), r"the method for first plans is 'srds'; give one of"),  # pyright: ignore[reportArgumentType]
    "a name": (lambda: acted({3: torch.zeros(1, 2)}), r"has the name 3; give the name of the model's argument"),
    "its own model": (lambda: within(lambda policy: policy.act(torch.zeros(1, 2))), r"act\(\) was called by the policy's own"),
    "its own reset": (lambda: within(Policy.reset), r"reset\(\) was called by the policy's own model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_policy_or_observation_is_refused(case: str) -> None:
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()


def test_the_bundled_policy_plans_in_few_rounds() -> None:
    model, plane = load_policy("points-policy"), Plane.drawn(11, 2)
    table = model.table("ddpm", 100)
    policy = Policy(model, table, model.shape, seed=2)
    rounds: list[int] = []
    for _ in range(4):
        plans = policy.act(plane.observation)
        assert policy.report is not None
        rounds.append(max(policy.report.rounds))
        wanted = plain(policy, plane.observation, table, model)
        assert float((plans - wanted).square().mean((1, 2)).sqrt().max()) < LEVEL
        plane = plane.after(plans[:, 0])
    assert rounds[0] <= 10  # they depend on rounding
    assert sum(rounds[1:]) <= 5 * 3
    assert not bool(plane.hit.any())
