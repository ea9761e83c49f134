# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for the states of a whole window.

Importing any module of this package registers the rules (rules.py), so that no windowed tensor is made without them.
"""

from paradiff.pipelines.tensor import rules as rules
