"""Parallel-in-time sampling for diffusion and flow models."""

from paradiff.blocks import Blocks
from paradiff.clipping import Clip, DynamicThreshold
from paradiff.collocation import Collocation
from paradiff.corrector import Corrector, underdamped_langevin
from paradiff.evaluate import Batch, Denoiser, Evaluator
from paradiff.exponential import exponential_integrator
from paradiff.grid import Grid, log_snr_grid, paper_grid, uniform_grid
from paradiff.method import Method
from paradiff.methods import collocation, jacobi, paradigms, parasolver, quasi_newton, sequential, srds
from paradiff.noise import Keyed, Noise, Recorded
from paradiff.parareal import Parareal
from paradiff.piadm import piadm_ode, piadm_sde
from paradiff.pipelines import explain, parallelize
from paradiff.process import Process, ornstein_uhlenbeck, rectified_flow, variance_exploding, variance_preserving
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun
from paradiff.schedule import Schedule
from paradiff.slope import freeze_clean_data, freeze_epsilon, identity, shifted, zero
from paradiff.solution import Certificate, Solution, Sweep, Visit, Wave
from paradiff.solve import sample, solve
from paradiff.table import Table
from paradiff.theory import Theory

__all__ = [
    "Batch",
    "Blocks",
    "Certificate",
    "Clip",
    "Collocation",
    "Corrector",
    "Denoiser",
    "DynamicThreshold",
    "Evaluator",
    "Grid",
    "Keyed",
    "Method",
    "Noise",
    "Parareal",
    "Process",
    "Recorded",
    "Schedule",
    "Solution",
    "Sweep",
    "Table",
    "Theory",
    "Visit",
    "Wave",
    "collocation",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "explain",
    "exponential_integrator",
    "flow_euler",
    "freeze_clean_data",
    "freeze_epsilon",
    "heun",
    "identity",
    "jacobi",
    "log_snr_grid",
    "ornstein_uhlenbeck",
    "paper_grid",
    "paradigms",
    "parallelize",
    "parasolver",
    "piadm_ode",
    "piadm_sde",
    "quasi_newton",
    "rectified_flow",
    "sample",
    "sequential",
    "shifted",
    "solve",
    "srds",
    "underdamped_langevin",
    "uniform_grid",
    "variance_exploding",
    "variance_preserving",
    "zero",
]
