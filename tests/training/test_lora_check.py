"""The comparison of a LoRA file with what was trained: what it folds into the weights it takes out again."""

import copy

import pytest
import torch

from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    Layer,
    adaptable,
    adaptable_components,
    write_diffusers_for_all,
)
from finetuning.families.pipelines import open_pipeline
from finetuning.training.lora_check import _folded, check_files


class Fresh:
    """A model opened afresh, as far as the check asks for it."""

    def __init__(self, pipeline):
        self.own = pipeline

    def pipeline(self):
        return self

    def __enter__(self):
        return self.own

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def opened(tiny_model):
    return open_pipeline(str(tiny_model))


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def layers(request, opened):
    """An adapter far from nothing on a linear layer and on a convolution."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name in ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.resnets.0.conv1"):
        out, *inputs = adaptable(adaptable_components(opened))[name].weight.shape
        draw = lambda *shape: torch.randn(shape, generator=generator)
        up = draw(out, 2, *(1 for _ in inputs[1:]))
        found[name] = Layer(draw(2, *inputs), up, 2.0, 1 + draw(out).abs() if request.param else None)
    return found


def weights(pipeline):
    return {name: module.weight.detach().clone() for name, module in adaptable(adaptable_components(pipeline)).items()}


def test_what_was_folded_in_comes_out_again(opened, layers):
    before = weights(opened)
    with _folded(opened, layers):
        within = weights(opened)
    after = weights(opened)
    for name, weight in before.items():
        if name in layers:
            assert torch.allclose(within[name], layers[name].fused(weight), atol=1e-6)
            assert not torch.allclose(within[name], weight, atol=1e-2)
        else:
            assert torch.equal(within[name], weight)
        assert torch.allclose(after[name], weight, atol=1e-5)


def test_two_files_are_compared_one_after_the_other(opened, layers, tmp_path):
    pipeline = copy.deepcopy(opened)
    before = weights(pipeline)
    write_diffusers_for_all(tmp_path / DIFFUSERS_NAME, layers, {})
    check_files(tmp_path, {DIFFUSERS_NAME: layers}, Fresh(pipeline))
    assert all(torch.allclose(value, before[name], atol=1e-5) for name, value in weights(pipeline).items())
    check_files(tmp_path, {DIFFUSERS_NAME: layers}, Fresh(pipeline))
