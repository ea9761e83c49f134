# SPDX-License-Identifier: Apache-2.0
"""The tolerance: one meaning and one default value for all methods.

The **tolerance** is the root mean square error that a sample may have by estimate, beside the sample of the sequential chain
with the same noises, in the data's units. The estimates of all methods are scaled so that at least 95 of 100 samples err by
less than their estimate; benchmarks/tolerance.py measures it. Only the published stop rules (`change`, `sample`, `image`)
compare their tolerance with something else.
"""

DEFAULT_TOLERANCE = 4e-3
"""Half a grey level of data in -1 ... 1."""
