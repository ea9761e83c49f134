# SPDX-License-Identifier: Apache-2.0
"""Where tables come from: published samplers on noise schedules, exponential integrators, diffusers schedulers."""

from paradiff.samplers.churn import alphafold3, edm
from paradiff.samplers.exploding import euler, euler_ancestral, heun
from paradiff.samplers.exponential import exponential_integrator
from paradiff.samplers.flow import flow_euler
from paradiff.samplers.grid import Grid, log_snr_grid, paper_grid, uniform_grid
from paradiff.samplers.jumps import repaint, with_jumps
from paradiff.samplers.preserving import ddim, ddpm, dpmpp_2m
from paradiff.samplers.process import Process, ornstein_uhlenbeck, rectified_flow, variance_exploding, variance_preserving
from paradiff.samplers.schedule import Schedule
from paradiff.samplers.scheduler.probe import from_scheduler
from paradiff.samplers.temperature import with_noise_scale
from paradiff.samplers.two_stage import dpmpp_2s

__all__ = [
    "Grid",
    "Process",
    "Schedule",
    "alphafold3",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2s",
    "edm",
    "euler",
    "euler_ancestral",
    "exponential_integrator",
    "flow_euler",
    "from_scheduler",
    "heun",
    "log_snr_grid",
    "ornstein_uhlenbeck",
    "paper_grid",
    "rectified_flow",
    "repaint",
    "uniform_grid",
    "variance_exploding",
    "variance_preserving",
    "with_jumps",
    "with_noise_scale",
]
