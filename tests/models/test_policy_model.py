# SPDX-License-Identifier: Apache-2.0
"""The bundled diffusion policy: its files, its network, and the plane in which it acts."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from paradiff import from_scheduler, models
from paradiff.models import Plane, PolicyModel, load_policy
from paradiff.models.files import BUNDLED
from paradiff.models.plane import DISCS, OBSERVED, PULL, RADIUS, clearance

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
FOLDER = BUNDLED / "points-policy"


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return load_policy("points-policy")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the bundled folder, to be damaged."""
    return Path(shutil.copytree(FOLDER, tmp_path / "policy"))


def test_the_bundled_policy_is_ready_to_plan(policy: PolicyModel) -> None:
    assert (policy.name, policy.shape, policy.observed) == ("points-policy", (16, 2), OBSERVED)
    assert not policy.unet.training
    assert not any(p.requires_grad for p in policy.unet.parameters())
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 2e6
    x, t, seen = torch.randn(3, 16, 2), torch.tensor([10, 50, 99]), torch.randn(3, OBSERVED)
    rows = torch.cat([policy(x[k : k + 1], t[k : k + 1], seen[k : k + 1]) for k in range(3)])
    # Float32; a batch of another size is summed in another order.
    torch.testing.assert_close(policy(x, t, seen), rows, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(policy(x, t, seen), policy(x, t, seen.flip(0)), atol=1e-3)


def test_its_table_is_that_of_its_scheduler(policy: PolicyModel) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    scheduler.set_timesteps(100)
    read, own = from_scheduler(scheduler), policy.table("ddpm", 100)
    for name in ("t", "alpha", "sigma", "a", "b", "c"):
        torch.testing.assert_close(getattr(own, name), getattr(read, name), rtol=1e-4, atol=1e-6)
    assert own.clip == read.clip


def test_a_policy_shows_itself_and_pickles(policy: PolicyModel) -> None:
    assert repr(policy).startswith(
        "PolicyModel 'points-policy': plans of shape (16, 2), observations of 6 numbers, 0.481 million"
    )
    for other in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert other != policy
        x, t, seen = torch.zeros(1, 16, 2), torch.tensor([3]), torch.zeros(1, OBSERVED)
        torch.testing.assert_close(other(x, t, seen), policy(x, t, seen))  # memory lies otherwise


def test_a_folder_is_loaded_as_the_bundled_policy_is(policy: PolicyModel, copied: Path) -> None:
    other = load_policy(copied, dtype=torch.bfloat16)
    assert other.config == policy.config
    assert other.unet.dtype == torch.bfloat16


def test_other_loaders_say_what_it_is_and_it_takes_no_other() -> None:
    with pytest.raises(ValueError, match=r"'points-policy' is a policy, .* load it by paradiff\.models\.load_policy"):
        models.load_pipeline("points-policy")
    with pytest.raises(ValueError, match="'points-policy' holds a DiffusionPolicy"):
        models.load("points-policy")
    with pytest.raises(ValueError, match="'digits' holds a DDPMPipeline, and no DiffusionPolicy"):
        load_policy("digits")


def test_a_damaged_folder_is_refused(copied: Path) -> None:
    config = json.loads((copied / "unet/config.json").read_text())
    (copied / "unet/config.json").write_text(json.dumps(config | {"observation_size": 7}))
    with pytest.raises(ValueError, match=r"the weights in unet/ .* do not fit its PolicyUNet"):
        load_policy(copied)
    (copied / "unet/config.json").write_text(json.dumps(config | {"horizon": "many"}))
    with pytest.raises(ValueError, match="horizon"):
        load_policy(copied)
    (copied / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors weights in unet/"):
        load_policy(copied)


# -- the plane ---------------------------------------------------------------------------------------------------------


def test_a_mass_is_drawn_to_its_action_and_pushed() -> None:
    plane = Plane.drawn(0, 2)
    action, push = plane.place + 0.1, torch.tensor([[0.01, 0.0], [0.0, 0.0]])
    after = plane.after(action, push)
    torch.testing.assert_close(after.velocity, torch.full((2, 2), 0.1 * PULL) + push)
    torch.testing.assert_close(after.place, plane.place + after.velocity)
    torch.testing.assert_close(after.after(after.place + after.velocity).velocity, after.velocity)
    assert after.observation.shape == (2, OBSERVED)


def test_a_hit_stays_and_a_goal_counts_without_one() -> None:
    plane = Plane.drawn(0, 1)
    there = Plane(plane.goal, torch.zeros(1, 2), plane.goal, plane.hit)
    within = Plane(torch.tensor([DISCS[0]]), torch.zeros(1, 2), plane.goal, plane.hit)
    assert bool(there.reached)
    assert float(clearance(within.place)) == pytest.approx(-RADIUS)
    hit = within.after(within.place)
    for _ in range(20):
        hit = hit.after(plane.goal)
    assert bool(hit.hit)
    assert float(hit.distance) < 0.01
    assert not bool(hit.reached)


def test_planes_are_the_same_for_any_number_of_them() -> None:
    assert torch.equal(Plane.drawn(5, 3).observation, Plane.drawn(5, 40).observation[:3])
    assert bool((clearance(Plane.drawn(5, 40).place) > 0).all())


@pytest.mark.parametrize("action", [torch.zeros(3, 2), None, [0.0, 0.0]])
def test_an_action_for_other_masses_is_refused(action: object) -> None:
    with pytest.raises(ValueError, match=r"the action is .*; give a tensor \[2, 2\], a place for each mass"):
        Plane.drawn(0, 2).after(action)  # pyright: ignore[reportArgumentType]
