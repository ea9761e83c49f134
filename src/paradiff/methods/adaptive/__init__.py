# SPDX-License-Identifier: Apache-2.0
"""A window that is chosen while it runs, by the clock of its own rounds."""
