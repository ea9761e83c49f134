"""One thread: the tests' tensors are small, and sums over several threads could differ between runs."""

import torch

torch.set_num_threads(1)
