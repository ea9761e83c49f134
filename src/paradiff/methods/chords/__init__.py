# SPDX-License-Identifier: Apache-2.0
"""CHORDS: solvers that start along the chain, each corrected by the slower one behind it."""
