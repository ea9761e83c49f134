# SPDX-License-Identifier: Apache-2.0
"""The table of any diffusers scheduler, read off its own step."""
