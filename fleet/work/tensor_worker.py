"""The worker that does tensor work, one unit at a time, in memory for a few tensors × models."""

from __future__ import annotations

import torch

from fleet.work.scratch import Scratch
from fleet.work.unit import Worker


class TensorWorker(Worker):
    """Holds the memory that a survey's blocks are read to: fresh pages cost as much as a subtraction."""

    def __init__(self) -> None:
        # As many workers as cores, so one thread each; and a product's last bits follow the number of threads.
        torch.set_num_threads(1)
        self.scratch = Scratch()
