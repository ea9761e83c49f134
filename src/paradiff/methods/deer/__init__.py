# SPDX-License-Identifier: Apache-2.0
"""quasi-DEER: Newton sweeps with a diagonal Jacobian from random probes."""
