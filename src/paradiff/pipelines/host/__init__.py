# SPDX-License-Identifier: Apache-2.0
"""What owns a chain: a diffusers pipeline, another object whose method walks over a scheduler's times, or a function."""
