"""Parallel-in-time sampling for diffusion and flow models."""

from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.noise import Keyed, Noise, Recorded
from paradiff.chain.slope import freeze_clean_data, freeze_epsilon, identity, shifted, zero
from paradiff.chain.table import Table
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.parareal.method import PararealMethod
from paradiff.methods.piadm import piadm_ode, piadm_sde
from paradiff.methods.presets import collocation, jacobi, paradigms, parasolver, quasi_newton, sequential, srds
from paradiff.methods.window.blocks import Blocks
from paradiff.methods.window.corrector import Corrector, underdamped_langevin
from paradiff.methods.window.method import WindowMethod
from paradiff.pipelines import explain, parallelize
from paradiff.planning.theory import Theory
from paradiff.samplers.exploding import euler, euler_ancestral, heun
from paradiff.samplers.exponential import exponential_integrator
from paradiff.samplers.flow import flow_euler
from paradiff.samplers.grid import Grid, log_snr_grid, paper_grid, uniform_grid
from paradiff.samplers.preserving import ddim, ddpm, dpmpp_2m
from paradiff.samplers.process import Process, ornstein_uhlenbeck, rectified_flow, variance_exploding, variance_preserving
from paradiff.samplers.schedule import Schedule
from paradiff.samplers.scheduler.probe import from_scheduler
from paradiff.solver.evaluator import Batch, Denoiser, Evaluator
from paradiff.solver.loop import sample, solve
from paradiff.solver.solution import CollocationRecord, ErrorEstimate, PararealRecord, Solution, WindowRecord

__all__ = [
    "Batch",
    "Blocks",
    "Clip",
    "CollocationMethod",
    "CollocationRecord",
    "Corrector",
    "Denoiser",
    "DynamicThreshold",
    "ErrorEstimate",
    "Evaluator",
    "Grid",
    "Keyed",
    "Noise",
    "PararealMethod",
    "PararealRecord",
    "Process",
    "Recorded",
    "Schedule",
    "Solution",
    "Table",
    "Theory",
    "WindowMethod",
    "WindowRecord",
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
    "from_scheduler",
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
