"""Models mixed in memory: exact ends, what merge_checkpoints.py would write in between, and clear refusals."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import open_pipeline
from finetuning.merging.merged_pipeline import MergedPipeline
from finetuning.merging.methods import weighted_sum
from finetuning.merging.sweep import SweepArgs

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"


def rewrite(path, change, names=None):
    """Change the tensors of a file, or those of the names."""
    tensors = load_file(path)
    tensors |= {name: change(value) for name, value in tensors.items() if names is None or name in names}
    save_file(tensors, path, metadata={"format": "pt"})


def moved(value):
    return value + 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))


@pytest.fixture
def tuned(tiny_model, tmp_path):
    """tiny_model with another UNet and another text encoder, all but its embeddings."""
    folder = shutil.copytree(tiny_model, tmp_path / "tuned")
    rewrite(folder / UNET, moved)
    names = [name for name in load_file(folder / TEXT) if "embeddings" not in name]
    rewrite(folder / TEXT, moved, names)
    return folder


@pytest.fixture
def blend(tiny_model, tuned):
    def make(base=tiny_model, others=(tuned,), dtype=torch.float32, **flags):
        args = SweepArgs(base=str(base), tuned=list(map(str, others)), output_dir="unused", **flags)
        return MergedPipeline(args, args.open_models(args.origin), "dpm++", dtype=dtype)

    return make


def weights(pipeline):
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, value in getattr(pipeline, part).state_dict().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("method", "dtype"), [("weighted_sum", torch.bfloat16), ("slerp", torch.float32)])
def test_the_ends_are_the_models_to_the_last_bit(method, dtype, blend, tiny_model, tuned):
    mixed = blend(dtype=dtype, method=method)
    for ratio in (0.0, 0.4, 1.0, 0.0):  # there and back
        mixed.set(ratio)
        if ratio in (0.0, 1.0):
            expected = weights(open_pipeline(str(tuned if ratio else tiny_model), dtype=dtype))
            assert same(weights(mixed.pipeline), expected), ratio


def test_an_sdxl_is_mixed_with_both_of_its_text_encoders(blend, tiny_sdxl, tmp_path):
    tuned = shutil.copytree(tiny_sdxl, tmp_path / "xl")
    for path in (UNET, TEXT, "text_encoder_2/model.safetensors"):
        rewrite(tuned / path, moved)
    mixed = blend(base=tiny_sdxl, others=[tuned])
    mixed.set(1.0)
    found, expected = mixed.pipeline, open_pipeline(str(tuned))
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        assert same(getattr(found, part).state_dict(), getattr(expected, part).state_dict()), part


def test_an_autoencoder_that_the_pipeline_has_moved_meanwhile_is_mixed_like_any_other(blend, tiny_sdxl, tmp_path):
    """That of an SDXL in fp16 goes to fp32 and back with each image that is decoded."""
    tuned = shutil.copytree(tiny_sdxl, tmp_path / "xl")
    rewrite(tuned / VAE, moved)
    mixed = blend(base=tiny_sdxl, others=[tuned], dtype=torch.float16, components=["vae"])
    for ratio in (0.5, 1.0):
        mixed.set(ratio)
        mixed.pipeline.vae.float().half()
    expected = open_pipeline(str(tuned), dtype=torch.float16)
    assert same(mixed.pipeline.vae.state_dict(), expected.vae.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_between_them_all_is_mixed_in_fp32_and_rounded_once(dtype, blend, tiny_model, tuned):
    mixed = blend(dtype=dtype)
    mixed.set(0.3)
    base, other = load_file(tiny_model / UNET), load_file(tuned / UNET)
    state = mixed.pipeline.unet.state_dict()
    for name, value in base.items():
        assert torch.equal(state[name], weighted_sum(value, other[name], ratio=0.3).to(dtype)), name


def test_only_what_differs_is_kept_in_memory(blend, tiny_model):
    names = [one.name for one, _ in blend().mixed]
    assert "unet.conv_in.weight" in names and "text_encoder.final_layer_norm.bias" in names
    assert not [name for name in names if name.startswith("vae.") or "embeddings" in name]
    assert blend(others=[tiny_model]).mixed == []


def test_parts_and_blocks_have_ratios_of_their_own(blend, tiny_model, tuned):
    mixed = blend(components=["unet"], block_ratios=["unet.mid_block.*=0", "unet.conv_in.*=1"])
    mixed.set(0.5)
    base, other = (weights(open_pipeline(str(folder))) for folder in (tiny_model, tuned))
    found = weights(mixed.pipeline)
    for name, value in found.items():
        if name.startswith(("unet.mid_block", "text_encoder", "vae")):
            assert torch.equal(value, base[name]), name
        elif name.startswith("unet.conv_in"):
            assert torch.equal(value, other[name]), name
    assert not torch.equal(found["unet.conv_out.weight"], base["unet.conv_out.weight"])


def test_several_tuned_models_go_the_same_way(blend, tiny_model, tuned):
    mixed = blend(others=[tuned, tiny_model], method="soup")
    mixed.set(1.0)
    name = "conv_out.weight"
    mean = (load_file(tiny_model / UNET)[name].double() + load_file(tuned / UNET)[name].double()) / 2
    torch.testing.assert_close(mixed.pipeline.unet.state_dict()[name].double(), mean, rtol=1e-6, atol=1e-8)


def test_a_bare_unet_needs_a_pipeline_around_it(blend, tiny_model, tuned):
    with pytest.raises(ModelError, match="--layout_from"):
        blend(base=tuned / UNET, others=[tiny_model / UNET])
    mixed = blend(base=tuned / UNET, others=[tiny_model / UNET], layout_from=str(tiny_model))
    for ratio, folder in ((0.0, tuned), (1.0, tiny_model)):
        mixed.set(ratio)
        assert same(dict(mixed.pipeline.unet.state_dict()), load_file(folder / UNET))
    assert same(dict(mixed.pipeline.vae.state_dict()), load_file(tiny_model / VAE))


def test_all_tensors_that_are_not_finite_are_named_or_taken_from_one_side(blend, tiny_model, tuned):
    broken = ("conv_in.bias", "conv_out.bias")
    rewrite(tuned / UNET, lambda value: torch.full_like(value, torch.nan), broken)
    with pytest.raises(ModelError, match=r"unet\.conv_in\.bias of .*, unet\.conv_out\.bias of .*--on_mismatch"):
        blend()
    mixed = blend(on_mismatch="base")
    mixed.set(1.0)
    base = load_file(tiny_model / UNET)
    assert all(torch.equal(mixed.targets[f"unet.{name}"], base[name]) for name in broken)
    assert [note for note in mixed.warnings if "unet.conv_out.bias" in note]
    with pytest.raises(ModelError, match=r"unet\.conv_in\.bias"):
        blend(on_mismatch="tuned")


def test_what_overflows_is_named_with_its_ratio(blend, tuned):
    rewrite(tuned / UNET, lambda value: value + 1e5, ["conv_in.bias"])
    mixed = blend(dtype=torch.float16)
    mixed.set(0.0)
    with pytest.raises(ModelError, match=r"ratio 0.9 .*float16.*unet.conv_in.bias"):
        mixed.set(0.9)
    blend().set(0.9)


def test_a_base_of_another_layout_than_the_pipeline_put_around_it_is_refused(blend, tiny_model, tmp_path):
    odd = tmp_path / "odd.safetensors"
    shutil.copyfile(tiny_model / UNET, odd)
    rewrite(odd, lambda value: torch.cat([value, value]), ["conv_out.bias"])
    with pytest.raises(ModelError, match=r"odd.safetensors.* another shape: conv_out.bias"):
        blend(base=odd, others=[odd], layout_from=str(tiny_model))
