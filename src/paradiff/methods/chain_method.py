# SPDX-License-Identifier: Apache-2.0
"""What methods have in common that do not sweep over all states of the chain."""

from __future__ import annotations

from paradiff.methods.window.method import WindowMethod


class ChainMethod:
    """The answers of a method that seeks the chain's own sample by way of some of its states."""

    @property
    def dense_output(self) -> bool:
        """Whether all states become known: only some do."""
        return False

    @property
    def solves_chain(self) -> bool:
        """Whether the sample sought is the chain's own: it is."""
        return True

    @property
    def follows_edits(self) -> bool:
        """Whether states may be changed between steps: what is derived from them could not follow that."""
        return False

    def reference(self) -> WindowMethod:
        """The plain chain."""
        return WindowMethod("jacobi").reference()
