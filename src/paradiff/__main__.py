# SPDX-License-Identifier: Apache-2.0
"""`python -m paradiff` is the command `paradiff`, and `torchrun ... -m paradiff` is it on several ranks."""

from paradiff.app import main

if __name__ == "__main__":
    main()
