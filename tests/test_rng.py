"""Every draw is a function of its position alone."""

import random
from types import SimpleNamespace

import pytest
import torch

from finetuning.rng import gaussian, python_random, sent, torch_generator, uniform

POSITIONS = [
    (0, "noise", 1, 23),
    (1, "noise", 1, 23),  # another seed
    (0, "crop", 1, 23),  # another purpose
    (0, "noise", 2, 23),  # another step
    (0, "noise", 1, 24),  # another row
    (0, "noise", 12, 3),  # the same digits, cut elsewhere
    (0, "noise", 1),
]


@pytest.mark.parametrize(
    "draw",
    [
        lambda *position: python_random(*position).random(),
        lambda *position: torch.rand((), generator=torch_generator(*position)).item(),
    ],
    ids=["python", "torch"],
)
def test_draws_repeat_at_their_place_and_differ_everywhere_else(draw):
    numbers = [draw(*position) for position in POSITIONS]
    assert numbers == [draw(*position) for position in POSITIONS]
    assert len(set(numbers)) == len(POSITIONS)


def test_generator_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert torch_generator(0, "noise").device.type == "cpu"


def test_noise_of_a_row_does_not_depend_on_its_companions():
    together = gaussian(3, "noise", 5, [4, 9, 2], (4, 2, 2))
    assert together.shape == (3, 4, 2, 2)
    assert together.dtype == torch.float32
    for place, row in enumerate([4, 9, 2]):
        assert torch.equal(together[place], gaussian(3, "noise", 5, [row], (4, 2, 2))[0])


def test_uniform_of_a_row_does_not_depend_on_its_companions():
    together = uniform(3, "timestep", 5, [4, 9, 2])
    assert together.dtype == torch.float64
    assert together.tolist() == [uniform(3, "timestep", 5, [row]).item() for row in (4, 9, 2)]


def test_rows_steps_and_purposes_are_not_correlated():
    one = gaussian(0, "noise", 0, range(16), (256,)).flatten()
    others = [
        gaussian(1, "noise", 0, range(16), (256,)),
        gaussian(0, "offset", 0, range(16), (256,)),
        gaussian(0, "noise", 1, range(16), (256,)),
        gaussian(0, "noise", 0, range(1, 17), (256,)),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([one, other.flatten()]))[0, 1].item()
        assert abs(correlation) < 0.08  # five standard errors of 4096 independent pairs


def test_gaussian_has_mean_0_and_deviation_1():
    noise = gaussian(0, "noise", 0, range(100), (100,))
    assert noise.mean().item() == pytest.approx(0, abs=0.04)
    assert noise.std().item() == pytest.approx(1, abs=0.03)


def test_uniform_fills_0_to_1_evenly():
    numbers = uniform(0, "timestep", 0, range(4000))
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    quarters = torch.histc(numbers, bins=4, min=0, max=1)
    assert quarters.tolist() == pytest.approx([1000] * 4, abs=140)  # five deviations of a binomial


def test_global_generators_are_left_alone():
    before = random.getstate(), torch.get_rng_state()
    python_random(0, "crop", 1).random()
    gaussian(0, "noise", 0, [0, 1], (8,))
    uniform(0, "timestep", 0, [0, 1])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_numbers_stay_the_same_from_version_to_version():
    """Checkpoints of an earlier version go on with the same draws only as long as these hold."""
    assert python_random(0, "order", 1).random() == 0.7689023377892621
    assert torch.randperm(8, generator=torch_generator(0, "order", 1)).tolist() == [6, 2, 3, 4, 7, 0, 1, 5]


def test_what_is_sent_to_a_gpu_comes_out_of_pinned_memory_and_is_not_waited_for():
    class Tensor:
        def pin_memory(self):
            return SimpleNamespace(to=lambda device, non_blocking: ("pinned", device.type, non_blocking))

        def to(self, device):
            return ("as it is", device.type)

    assert sent(Tensor(), torch.device("cuda")) == ("pinned", "cuda", True)
    assert sent(Tensor(), torch.device("cpu")) == ("as it is", "cpu")
