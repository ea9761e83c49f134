# SPDX-License-Identifier: Apache-2.0
"""A pipeline's denoising loop under a solver: its scheduler, its steps, its source, its callback, its random state."""
