# SPDX-License-Identifier: Apache-2.0
"""Network calls for all states of a window: their rows batched, their outputs split again."""
