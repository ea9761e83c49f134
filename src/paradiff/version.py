# SPDX-License-Identifier: Apache-2.0
"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("paradiff")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"
