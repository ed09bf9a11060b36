"""A run without accelerate."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch


class FakeRun(SimpleNamespace):
    """A run without accelerate, that keeps what it is given to say, to log and to show."""

    def __init__(self, output_dir=None, device="cpu", dtype=torch.float32, is_main=True):
        super().__init__(
            output_dir=output_dir, device=torch.device(device), weights_dtype=dtype, is_main=is_main, scaler=None,
            accelerator=SimpleNamespace(mixed_precision="no", num_processes=1), autocast=nullcontext, any=bool,
            said=[], logged={}, shown=[], processes=1, is_sharded=False, zero_stage=0, gathered=list,
            forward_passes=nullcontext,
        )  # fmt: skip
        self.say = self.said.append

    def log(self, values, step):
        self.logged[step] = values

    def log_images(self, name, images, step):
        self.shown.append((name, len(images), step))

    def shared(self, items, compute):
        return compute(items)

    def wait_for_everyone(self):
        """There is nobody else."""


@pytest.fixture(scope="session")
def fake_run():
    """FakeRun."""
    return FakeRun
