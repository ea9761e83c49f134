# %% [markdown]
# # A control loop
#
# A robot's policy samples a plan of actions from what it observes, executes a few of them, and samples again. Here a point mass
# goes to its goal past two discs; the bundled policy `points-policy` plans 16 places by a chain of 100 DDPM steps.

# %%
import matplotlib.pyplot as plt
import torch

import paradiff
from paradiff.models import Plane, load_policy
from paradiff.models.plane import DISCS, RADIUS

model = load_policy("points-policy")
table = model.table("ddpm", 100)
policy = paradiff.Policy(model, table, model.shape, executed=4, seed=0)

# %% [markdown]
# The first plan is cold: nothing is known of it. `plane` holds two masses, each with a plan of its own.

# %%
plane = Plane.drawn(seed=2, samples=2)
paths, plans, rounds = [plane.place], [], []
for _ in range(10):
    seen = plane.observation
    plan = policy.act(seen)  # [2, 16, 2]
    plans.append(plan)
    rounds.append(max(policy.report.rounds))
    for action in plan[:, :4].unbind(1):
        plane = plane.after(action)
        paths.append(plane.place)
print(f"{table.steps} steps in turn; the cold plan took {rounds[0]} rounds, the others {sum(rounds[1:]) / len(rounds[1:]):.1f}")
print(plane)

# %% [markdown]
# The last plan is the sequential chain's with the same noise, up to the tolerance:

# %%
evaluator = paradiff.Evaluator(model, conditioning={"observation": seen})
plain = paradiff.sample(evaluator, table, policy.noise, paradiff.sequential()).sample
print(f"largest difference: {float((plans[-1] - plain).abs().max()):.1e} of a range of 2")

# %% [markdown]
# Left: the paths of both masses, and every second plan. Right: the rounds of each control step.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for middle in DISCS:
    left.add_patch(plt.Circle(middle, RADIUS, color="0.85"))
for mass, color in enumerate(("tab:blue", "tab:orange")):
    for made in plans[::2]:
        left.plot(*made[mass].T, color=color, alpha=0.35, linewidth=1)
    left.plot(*torch.stack(paths)[:, mass].T, color=color, linewidth=2)
    left.plot(*plane.goal[mass], "*", color=color, markersize=12)
left.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", title="paths, and plans on the way")
right.bar(range(len(rounds)), rounds)
right.axhline(table.steps, color="0.6", linestyle="--")
right.set(yscale="log", xlabel="control step", ylabel="rounds", title="rounds; dashed: the chain in turn")
figure.savefig("control_loop.png", dpi=100)
