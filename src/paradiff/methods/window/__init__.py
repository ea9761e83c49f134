# SPDX-License-Identifier: Apache-2.0
"""Newton sweeps over a sliding window of nodes: Jacobi, ParaDiGMS, ParaSolver, PIADM, quasi-Newton."""
