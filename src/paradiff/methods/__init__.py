# SPDX-License-Identifier: Apache-2.0
"""How a chain is solved: the published methods as presets, and a folder for each family of solvers."""

from paradiff.methods import presets
from paradiff.methods.chords.method import ChordsMethod
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.deer.forward import ForwardProbes
from paradiff.methods.deer.method import DeerMethod
from paradiff.methods.parareal.method import PararealMethod
from paradiff.methods.window.blocks import Blocks
from paradiff.methods.window.corrector import Corrector, underdamped_langevin
from paradiff.methods.window.method import WindowMethod

__all__ = [
    "Blocks",
    "ChordsMethod",
    "CollocationMethod",
    "Corrector",
    "DeerMethod",
    "ForwardProbes",
    "PararealMethod",
    "WindowMethod",
    "presets",
    "underdamped_langevin",
]
