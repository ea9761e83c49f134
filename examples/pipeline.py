# %% [markdown]
# # A pipeline with a prompt
#
# Any diffusers pipeline object will do. `shapes` is bundled: Stable Diffusion's pipeline with small networks, and DDIM.

# %%
import time

import matplotlib.pyplot as plt
import torch

import paradiff
from paradiff.app import plots
from paradiff.models import load_pipeline

pipe = load_pipeline("shapes")
pipe.set_progress_bar_config(disable=True)
call = {"prompt": "a red circle left of a blue square", "guidance_scale": 4.0, "num_inference_steps": 100}

# %% [markdown]
# What would be fastest here? The plan measures the seconds of a network call by its rows.

# %%
plan = paradiff.plan(pipe, call, pilots=0, seconds=0.5)
print(plan)

# %% [markdown]
# The plain call, and the parallel one by the plan's method: the same arguments, the same seed.

# %%
run = paradiff.parallelize(pipe, plan.method)
pictures, seconds = [], []
for pipeline in (pipe, run):
    begin = time.perf_counter()
    pictures += pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    seconds.append(time.perf_counter() - begin)
report = run.report
print(report.message)
print(f"{report.rounds} rounds for {call['num_inference_steps']} steps, {seconds[0] / seconds[1]:.1f} times as fast")
print(f"largest difference: {float((pictures[0] - pictures[1]).abs().max()) * 255:.2f} grey levels")

# %% [markdown]
# Both pictures.

# %%
figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for axis, picture, title in zip(axes, pictures, ("plain", "parallel"), strict=True):
    axis.imshow(picture.permute(1, 2, 0))
    axis.set_title(title)
    axis.set_axis_off()
figure.savefig("pipeline.png", dpi=100)

# %% [markdown]
# And what the solver did in each round, where the call ran in parallel. On a machine where no method pays the plan says so, the
# call is the plain one, and there is nothing to draw.

# %%
if report.history:
    passed = sum(record.passed for record in report.history)
    trace = plots.draw(report.history, passed, f"{report.scheduler}, {report.steps} steps, {report.method}")
    trace.savefig("pipeline_trace.png", dpi=100)
