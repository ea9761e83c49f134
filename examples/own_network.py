# %% [markdown]
# # A network of your own
#
# Any function of states and times is a model. This one learns two moons in the plane, in a few seconds.

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import paradiff
from paradiff.planning import LatencyCurve

schedule = paradiff.Schedule.linear()  # 1000 times
levels = (1 - schedule.betas).cumprod(0).float()


def moons(count: int, generator: torch.Generator) -> Tensor:
    """`[count, 2]` points of two half circles."""
    angle, upper = math.pi * torch.rand(count, generator=generator), torch.rand(count, generator=generator) < 0.5
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(upper[:, None], circle - torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25]) - circle)
    return points + 0.05 * torch.randn(count, 2, generator=generator)


class Denoiser(nn.Module):
    """The noise in points `[R, 2]` at times `[R]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output, for any whole times 0 ... 999."""
        phase = t[:, None].to(x.dtype) / 1000 * torch.tensor([1.0, 3.0, 9.0])
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


torch.manual_seed(0)
network, generator = Denoiser(), torch.Generator().manual_seed(0)
optimizer = torch.optim.Adam(network.parameters(), 2e-3)
for _ in range(400):
    clean, t = moons(256, generator), torch.randint(1000, (256,), generator=generator)
    noise, level = torch.randn(256, 2, generator=generator), levels[t, None]
    loss = (network(level.sqrt() * clean + (1 - level).sqrt() * noise, t) - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
network.requires_grad_(False)
print(f"the loss of the last batch: {loss.item():.2f}")

# %% [markdown]
# The chain is a table. `compare` runs methods side by side, each against the sequential samples of the same noise, beside a
# shorter chain; gains are those on a device of which the curve says what a call of so many rows takes.

# %%
table = paradiff.samplers.ddim(schedule, 50)
draws = paradiff.Keyed((2,), seed=1, samples=4)
methods = {
    "parasolver": paradiff.parasolver(window=16),
    "quasi_newton": paradiff.quasi_newton(window=16),
    "collocation": paradiff.collocation(window=16),
}
rivals = {"15 steps of dpmpp_2m": paradiff.samplers.dpmpp_2m(schedule, 15)}
found = paradiff.compare(network, table, draws, methods, rivals=rivals, curve=LatencyCurve({1: 1.0, 2: 1.0, 4096: 1.5}))
print(found)
found.plot("own_network_compared.png")

# %% [markdown]
# The fastest that stays below an error takes sixty samples.

# %%
best = found.best(4e-3)
print(best.label)
many = paradiff.Keyed((2,), seed=2, samples=60)
samples = paradiff.sample(network, table, many, methods.get(best.label, paradiff.sequential())).sample

figure, axes = plt.subplots(figsize=(4, 3.2), layout="constrained")
axes.scatter(*moons(60, generator).T, s=4, color="0.7", label="data")
axes.scatter(*samples.T, s=4, label="samples")
axes.legend()
axes.set_aspect("equal")
figure.savefig("own_network.png", dpi=100)
