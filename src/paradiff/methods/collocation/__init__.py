# SPDX-License-Identifier: Apache-2.0
"""Evaluations at a few mesh points, interpolated in between: collocation."""
