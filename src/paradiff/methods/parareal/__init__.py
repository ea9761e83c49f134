# SPDX-License-Identifier: Apache-2.0
"""Parareal over blocks of the chain: SRDS."""
