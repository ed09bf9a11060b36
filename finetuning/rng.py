"""Randomness as a function of position, not of history (docs/architecture.md, decision 1).

Nothing here has a state that a checkpoint would have to keep: every draw is named by the seed of the run, what it is
for, and where it stands. A resumed run, another number of processes or another micro-batch repeats the same draws.
"""

import hashlib
import random

import torch


def key(seed: int, purpose: str, *position: int):
    """A seed of 63 bits for (seed, purpose, position)."""
    digest = hashlib.blake2b(repr((seed, purpose, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits (and its CPU generator uses 32 of them)


def python_random(seed: int, purpose: str, *position: int):
    """A `random.Random` of its own for (seed, purpose, position)."""
    return random.Random(key(seed, purpose, *position))


def torch_generator(seed: int, purpose: str, *position: int, device="cpu"):
    """A `torch.Generator` of its own for (seed, purpose, position).

    On the CPU the noise of a sample is the same on every device and for every batch size. Another `device` is for draws
    as many as the weights.
    """
    return torch.Generator(device).manual_seed(key(seed, purpose, *position))


def gaussian(seed: int, purpose: str, step: int, rows, shape):
    """Standard normal noise [len(rows), *shape], fp32 on the CPU: one independent draw for each row of the batch."""
    return torch.stack([torch.randn(shape, generator=torch_generator(seed, purpose, step, row)) for row in rows])


def uniform(seed: int, purpose: str, step: int, rows):
    """Uniform numbers [len(rows)] in [0, 1), float64 on the CPU: one independent draw for each row of the batch."""
    return torch.tensor([python_random(seed, purpose, step, row).random() for row in rows], dtype=torch.float64)


def queues(device):
    """Whether what is asked of a device is queued, and its memory known: a GPU's, but for Apple's."""
    return device.type not in ("cpu", "mps")


def sent(tensor, device):
    """The tensor of the CPU on `device`. To a GPU out of pinned memory: from any other, the copy would wait until the
    GPU has done all that is queued."""
    return tensor.pin_memory().to(device, non_blocking=True) if queues(device) else tensor.to(device)
