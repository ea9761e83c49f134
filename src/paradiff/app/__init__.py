# SPDX-License-Identifier: Apache-2.0
"""The command line: options, pictures, files, runs."""

from paradiff.errors import MissingPackage
from paradiff.lazy import naming_the_extra


def main() -> None:
    """The command `paradiff`; where a package that it needs is not installed, one sentence and exit code 1."""
    try:
        with naming_the_extra("the command paradiff"):
            from paradiff.app import cli

            cli.main()
    except MissingPackage as missing:
        raise SystemExit(f"error: {missing}") from None
