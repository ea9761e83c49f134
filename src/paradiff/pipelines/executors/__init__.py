# SPDX-License-Identifier: Apache-2.0
"""Ways of running a loop for all states of a window: with windowed tensors, or in lanes."""
