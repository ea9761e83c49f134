"""Parallel-in-time sampling for diffusion and flow models."""

from paradiff.clipping import Clip, DynamicThreshold
from paradiff.evaluate import Batch, Denoiser, Evaluator
from paradiff.method import Method
from paradiff.methods import jacobi, paradigms, parasolver, sequential, srds
from paradiff.noise import Keyed, Noise, Recorded
from paradiff.parareal import Parareal
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun
from paradiff.schedule import Schedule
from paradiff.slope import freeze_clean_data, freeze_epsilon, identity, shifted, zero
from paradiff.solution import Certificate, Solution, Sweep, Wave
from paradiff.solve import sample, solve
from paradiff.table import Table

__all__ = [
    "Batch",
    "Certificate",
    "Clip",
    "Denoiser",
    "DynamicThreshold",
    "Evaluator",
    "Keyed",
    "Method",
    "Noise",
    "Parareal",
    "Recorded",
    "Schedule",
    "Solution",
    "Sweep",
    "Table",
    "Wave",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "freeze_clean_data",
    "freeze_epsilon",
    "heun",
    "identity",
    "jacobi",
    "paradigms",
    "parasolver",
    "sample",
    "sequential",
    "shifted",
    "solve",
    "srds",
    "zero",
]
