"""The comparison of a LoRA file with what was trained: what it fuses into the weights it takes out again."""

from dataclasses import replace

import pytest
import torch

from finetuning.families.lora_files import DIFFUSERS_NAME, Layer, adaptable, write_diffusers_for_all
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.training.lora_check import _fused, check_files


@pytest.fixture
def fresh(tiny_model):
    return load_model(ModelArgs(str(tiny_model)))


def components(model):
    return {name: model.components[name] for name in ("unet", "text_encoder")}


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def layers(request, fresh):
    """An adapter far from nothing on a linear layer and on a convolution."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name in ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.resnets.0.conv1"):
        out, *inputs = adaptable(components(fresh))[name].weight.shape
        normal = lambda *shape: torch.randn(shape, generator=generator)
        up = normal(out, 2, *(1 for _ in inputs[1:]))
        found[name] = Layer(normal(2, *inputs), up, 2.0, 1 + normal(out).abs() if request.param else None)
    return found


def weights(model):
    return {name: module.weight.detach().clone() for name, module in adaptable(components(model)).items()}


def test_what_was_fused_comes_out_again(fresh, layers):
    before = weights(fresh)
    with _fused(components(fresh), layers):
        within = weights(fresh)
    after = weights(fresh)
    for name, weight in before.items():
        if name in layers:
            assert torch.allclose(within[name], layers[name].fused(weight), atol=1e-6)
            assert not torch.allclose(within[name], weight, atol=1e-2)
        else:
            assert torch.equal(within[name], weight)
        assert torch.allclose(after[name], weight, atol=1e-5)


def test_files_are_compared_one_after_the_other_and_a_wrong_one_is_named(fresh, layers, tmp_path):
    before = weights(fresh)
    for name, wrong in ((DIFFUSERS_NAME, 1.0), ("other.safetensors", 1.01)):
        changed = {key: replace(layer, alpha=wrong * layer.alpha) for key, layer in layers.items()}
        write_diffusers_for_all(tmp_path / name, changed, {})
    for _ in range(2):
        check_files(tmp_path, {DIFFUSERS_NAME: layers}, fresh)
        assert all(torch.allclose(value, before[name], atol=1e-5) for name, value in weights(fresh).items())
    with pytest.raises(ModelError, match=r"^other\.safetensors "):
        check_files(tmp_path, {DIFFUSERS_NAME: layers, "other.safetensors": layers}, fresh)
