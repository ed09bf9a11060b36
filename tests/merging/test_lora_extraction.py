"""LoRAs out of differences, and of other ranks: the best there are, and honest about what they leave."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.cli import read
from finetuning.families.lora_files import DIFFUSERS_NAME, KOHYA_NAME, Layer, adaptable, read_lora, write_diffusers
from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source
from finetuning.merging.lora_extraction import (
    ExtractArgs,
    ResizeArgs,
    extract,
    resize,
    smallest_rank,
    truncated,
    truncated_layer,
)
from finetuning.merging.lora_tools import FuseArgs, fuse, skeletons
from finetuning.merging.recipe import read_recipe
from finetuning.rng import torch_generator

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K, PROJ_IN = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "unet.down_blocks.0.attentions.0.proj_in"
CONV = "unet.down_blocks.1.resnets.0.conv1"  # [16, 8, 3, 3]
CONV_IN = "unet.conv_in"
FC1 = "text_encoder.encoder.layers.0.mlp.fc1"  # [32, 16]
EMBEDDING = "text_encoder.embeddings.token_embedding.weight"
NORM, BIAS = "unet.conv_norm_out.weight", "unet.conv_out.bias"
SHAPES = [(6, 10), (10, 6), (7, 7), (8, 5, 1, 1), (4, 3, 3, 3), (30, 2, 3, 3)]


def draw(*shape, name="matrix"):
    return torch.randn(shape, generator=torch_generator(0, name), dtype=torch.float64)


def low_rank(shape, rank, name):
    """A matrix of that rank in a weight's shape, float64."""
    sides = shape[0], int(np.prod(shape[1:]))
    return (draw(sides[0], rank, name=f"{name} up") @ draw(rank, sides[1], name=f"{name} down")).reshape(shape) / 20


def energy(value):
    return value.double().square().sum().item()


def random_layer(shape, rank, alpha, name="layer"):
    out, inside, *kernel = shape
    up, down = draw(out, rank, *(1 for _ in kernel), name=f"{name} up"), draw(rank, inside, *kernel, name=name)
    return Layer(down.float(), up.float(), alpha)


# -- the decomposition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_truncation_is_numpys(shape, rank):
    matrix = draw(*shape)
    left, values, right = np.linalg.svd(matrix.flatten(1).numpy(), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    layer, kept = truncated(matrix, rank)
    np.testing.assert_allclose(layer.delta().flatten(1).numpy(), best, rtol=0, atol=2e-6)
    assert kept == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum(), rel=1e-12)
    assert layer.rank == layer.alpha == min(rank, len(values)) and layer.delta().shape == shape
    balance = layer.up.flatten(1).norm(dim=0) / layer.down.flatten(1).norm(dim=1)
    torch.testing.assert_close(balance, torch.ones_like(balance))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_of_low_rank_is_kept_whole_and_a_spare_rank_is_no_harm(shape):
    matrix = low_rank(shape, 2, "low")
    for rank in (2, 4):
        layer, kept = truncated(matrix, rank)
        assert kept == pytest.approx(1, abs=1e-12)
        assert energy(matrix - layer.delta()) < 1e-12 * energy(matrix)


def test_zeros_beside_the_matrix_give_no_nan():
    matrix = torch.zeros(5, 4)
    matrix[1, 2] = 3.0
    layer, kept = truncated(matrix, 4)
    assert kept == pytest.approx(1) and torch.allclose(layer.delta(), matrix, atol=1e-6)


@pytest.mark.parametrize(
    ("keep", "rank", "expected"), [(None, 3, 3), (None, 9, 4), (0.4, 9, 1), (0.41, 9, 2), (0.71, 2, 2), (1.0, 9, 4)]
)
def test_the_smallest_rank_that_keeps_the_share(keep, rank, expected):
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert smallest_rank(energies, energies.sum(), rank, keep) == expected


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.999])
def test_keep_energy_takes_no_more_ranks_than_it_needs(keep):
    matrix = draw(12, 4, 3, 3)
    layer, kept = truncated(matrix, 100, keep)
    assert kept >= keep and truncated(matrix, layer.rank - 1)[1] < keep
    again, kept_again = truncated_layer(layer.with_alpha(1.0), None, keep)
    assert kept_again >= keep and (again.rank == 1 or truncated_layer(layer, again.rank - 1)[1] < keep)


@pytest.mark.parametrize("alpha", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("shape", [(16, 12), (12, 4, 3, 3), (6, 9, 1, 1)], ids=str)
def test_a_layer_is_cut_as_its_dense_matrix_would_be(shape, alpha):
    layer = random_layer(shape, 5, alpha)
    for rank in (1, 3, 5, 9):
        small, kept = truncated_layer(layer, rank)
        dense, kept_dense = truncated(layer.delta(), rank)
        torch.testing.assert_close(small.delta(), dense.delta(), rtol=1e-4, atol=1e-4)
        assert kept == pytest.approx(kept_dense, abs=1e-6) and small.alpha == small.rank == min(rank, 5)


def test_a_rank_above_the_layers_sides_comes_down():
    layer = random_layer((3, 4), 8, 8.0)
    small, kept = truncated_layer(layer, 6)
    assert small.rank == 3 and kept == pytest.approx(1)
    torch.testing.assert_close(small.delta(), layer.delta(), rtol=1e-4, atol=1e-4)


# -- extract ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tiny_model, tmp_path):
    """A function: a copy of the model in which some tensors are others, {canonical name: function of the tensor}."""

    def make(changes, name="tuned"):
        folder = tmp_path / name
        shutil.copytree(tiny_model, folder)
        for part, file, prefix in (("unet", "diffusion_pytorch_model", ""), ("text_encoder", "model", "text_model.")):
            path = folder / part / f"{file}.safetensors"
            tensors = load_file(path)
            for full, change in changes.items():
                if full.startswith(f"{part}."):
                    key = prefix + full.partition(".")[2]
                    tensors[key] = change(tensors[key])
            save_file({key: value for key, value in tensors.items() if value is not None}, path, {"format": "pt"})
        return folder

    return make


def add(shape, rank, name):
    return {f"{name}.weight": lambda weight: (weight.double() + low_rank(shape, rank, name)).float()}


LOW = {
    **add((8, 8), 2, TO_Q), **add((8, 16), 1, TO_K), **add((8, 8, 1, 1), 2, PROJ_IN), **add((16, 8, 3, 3), 2, CONV),
    **add((32, 16), 2, FC1),
}  # fmt: skip


@pytest.fixture
def extracting(tiny_model, tmp_path):
    """A function: (lines, LoRA's folder, report) of extract."""

    def run(tuned, base=tiny_model, **flags):
        target = tmp_path / f"lora-{len(list(tmp_path.iterdir()))}"
        args = ExtractArgs(base=str(base), tuned=str(tuned), output_dir=str(target), **flags)
        assert not list(args.problems())
        lines = extract(args)
        return SimpleNamespace(lines=lines, folder=target, report=read_recipe(target)["run"]["report"])

    return run


def layers_of(folder, model):
    return read_lora(folder, skeletons(str(model))).layers


def test_a_difference_of_rank_2_comes_back_and_leads_to_the_tuned_model(tiny_model, changed, extracting, tmp_path):
    tuned = changed(LOW)
    done = extracting(tuned, rank=2)
    assert {f"{name}.weight" for name in layers_of(done.folder, tiny_model)} == LOW.keys()
    assert done.report["kept_energy"] == pytest.approx(1, abs=1e-9) and done.report["outside"] == {}
    fuse(FuseArgs(base=str(tiny_model), lora=[str(done.folder)], output_dir=str(tmp_path / "again")))
    expected, found = (open_source(str(place)).tensors for place in (tuned, tmp_path / "again"))
    for part, own in expected.items():
        for key, stored in own.items():
            torch.testing.assert_close(found[part][key].read(), stored.read(), rtol=0, atol=1e-6)


def test_the_report_counts_what_is_kept_left_and_unchanged(tiny_model, changed, extracting):
    outside = {NORM: 0.3, BIAS: 0.2, EMBEDDING: 0.01, f"{CONV_IN}.weight": 0.1}
    tuned = changed({**LOW, **{name: lambda old, step=step: old + step for name, step in outside.items()}})
    done = extracting(tuned, rank=1)
    base, after = (open_source(str(place)).tensors for place in (tiny_model, tuned))

    def difference(name):
        part, _, key = name.partition(".")
        return after[part][key].read().double() - base[part][key].read().double()

    energies = {name: energy(difference(name)) for name in (*LOW, *outside)}
    kept = 0
    for name in LOW:
        values = np.linalg.svd(difference(name).flatten(1).numpy(), compute_uv=False) ** 2
        told = done.report["ranks"][name.removesuffix(".weight")]
        assert told["kept_energy"] == pytest.approx(values[0] / values.sum(), rel=1e-9) and told["rank"] == 1
        kept += values[0]
    assert done.report["kept_energy"] == pytest.approx(kept / sum(energies[name] for name in LOW), rel=1e-9)
    groups = {"norms": NORM, "biases": BIAS, "embeddings": EMBEDDING}
    groups["layers outside --lora_target_modules"] = f"{CONV_IN}.weight"
    expected = {group: energies[name] / sum(energies.values()) for group, name in groups.items()}
    assert done.report["outside"] == pytest.approx(expected, rel=1e-9)
    assert done.report["not_compared"] == ["vae"]
    targets = {n for n in adaptable(skeletons(str(tiny_model))) if n not in (CONV_IN, "unet.conv_out")}
    assert set(done.report["unchanged"]) == targets - done.report["ranks"].keys()
    assert any(f"{len(done.report['unchanged'])} are unchanged" in line for line in done.lines)


def test_flags_choose_layers_components_and_ranks(tiny_model, changed, extracting):
    tuned = changed(LOW)
    chosen = extracting(tuned, rank=2, lora_target_modules=["attention"], components=["unet"])
    assert layers_of(chosen.folder, tiny_model).keys() == {TO_Q, TO_K}
    assert chosen.report["not_compared"] == ["text_encoder", "vae"]
    ranks = {
        name: layer.rank for name, layer in layers_of(extracting(tuned, rank=2, conv_rank=1).folder, tiny_model).items()
    }
    assert ranks == {TO_Q: 2, TO_K: 2, PROJ_IN: 2, CONV: 1, FC1: 2}
    saved = extracting(tuned, rank=8, keep_energy=0.999999, save_kohya=True, dtype="fp16")
    ranks = {name: layer.rank for name, layer in layers_of(saved.folder / KOHYA_NAME, tiny_model).items()}
    assert ranks == {TO_Q: 2, TO_K: 1, PROJ_IN: 2, CONV: 2, FC1: 2}
    assert {value.dtype for value in load_file(saved.folder / DIFFUSERS_NAME).values()} == {torch.float16}


def test_weights_that_only_the_files_precision_tells_apart_are_unchanged(changed, extracting, tmp_path):
    tuned = changed(add((8, 8), 2, TO_Q))
    halves = {f"unet.{key}": torch.Tensor.half for key in load_file(tuned / "unet/diffusion_pytorch_model.safetensors")}
    done = extracting(tuned, base=changed(halves, "half"), rank=2)
    assert done.report["ranks"].keys() == {TO_Q} and done.report["outside"] == {}


def test_equal_models_have_nothing_to_extract(tiny_model, tmp_path):
    args = ExtractArgs(base=str(tiny_model), tuned=str(tiny_model), rank=2, output_dir=str(tmp_path / "new"))
    with pytest.raises(ModelError, match="the same weights in all"):
        extract(args)


@pytest.mark.parametrize(("changes", "told"), [
    ({f"{TO_Q}.weight": lambda _: None}, rf"lacks 1 tensor\(s\) of the unet: {TO_Q.removeprefix('unet.')}.weight"),
    ({f"{CONV_IN}.weight": lambda old: torch.cat([old, old], 1)}, r"shapes differ .*\[8, 4, 3, 3\] and \[8, 8, 3"),
], ids=["missing", "other shape"])  # fmt: skip
def test_models_that_do_not_fit_are_refused_by_name(tiny_model, changed, extracting, changes, told):
    tuned = changed(changes) / "unet"
    (tuned / "config.json").unlink()  # with it, it would not be what that says
    with pytest.raises(ModelError, match=told):
        extracting(tuned / "diffusion_pytorch_model.safetensors", rank=2)


def test_a_target_that_matches_nothing_is_named(tiny_model, changed, extracting):
    with pytest.raises(ModelError, match="--lora_target_modules to_nothing matches no layer"):
        extracting(changed(LOW), rank=2, lora_target_modules=["attention", "to_nothing"])


# -- resize ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def resized(tiny_model, tmp_path):
    """A function: the folder that resize has written for these layers."""

    def run(layers, **flags):
        write_diffusers(tmp_path / "large.safetensors", layers, {"base_model": "some/base"})
        target = tmp_path / "small"
        args = ResizeArgs(
            base=str(tiny_model), lora=str(tmp_path / "large.safetensors"), output_dir=str(target), **flags
        )
        assert not list(args.problems())
        return resize(args), target

    return run


@pytest.fixture
def large():
    sizes = {TO_Q: ((8, 8), 6, 3.0), CONV: ((16, 8, 3, 3), 4, 8.0), FC1: ((32, 16), 2, 2.0)}
    return {name: random_layer(*size, name=name) for name, size in sizes.items()}


def test_a_smaller_rank_is_the_best_of_its_rank_and_as_strong(tiny_model, large, resized):
    lines, folder = resized(large, rank=3)
    found, report = layers_of(folder, tiny_model), read_recipe(folder)["run"]["report"]
    assert {name: layer.rank for name, layer in found.items()} == {TO_Q: 3, CONV: 3, FC1: 2}
    kept = 0
    for name, layer in large.items():
        left = energy(layer.delta() - found[name].delta())
        told = report["ranks"][name]["kept_energy"]
        values = np.linalg.svd(layer.delta().flatten(1).double().numpy(), compute_uv=False) ** 2
        assert told == pytest.approx(values[:3].sum() / values.sum(), abs=1e-6)
        assert left == pytest.approx((1 - told) * values.sum(), abs=1e-6 * values.sum())
        kept += told * values.sum()
    assert report["kept_energy"] == pytest.approx(kept / sum(energy(layer.delta()) for layer in large.values()))
    assert lines[0].startswith("rank 2 to 6 -> 2 to 3")


def test_a_layer_that_adds_nothing_is_left_out_and_counted(tiny_model, large, resized):
    lines, folder = resized({**large, TO_K: Layer(torch.ones(2, 16), torch.zeros(8, 2), 2.0)}, keep_energy=1.0)
    assert layers_of(folder, tiny_model).keys() == large.keys()
    assert "1 layers add nothing and are left out" in lines


def test_a_dora_is_refused(large, resized):
    with pytest.raises(ModelError, match="DoRA has magnitudes"):
        resized({TO_Q: Layer(large[TO_Q].down, large[TO_Q].up, 3.0, torch.ones(8))}, rank=2)


# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "words", "named"), [
    (ExtractArgs, "--rank 0", "--rank"), (ExtractArgs, "--rank 2 --conv_rank 0", "--conv_rank"),
    (ExtractArgs, "--rank 2 --keep_energy 1.5", "--keep_energy"),
    (ExtractArgs, "--rank 2 --components unet,vae", "--components vae"),
    (ResizeArgs, "--keep_energy 0", "--keep_energy"), (ResizeArgs, "", "resize needs --rank"),
])  # fmt: skip
def test_flags_that_cannot_work_are_named(kind, words, named):
    source = "--tuned" if kind is ExtractArgs else "--lora"
    (problem,) = read(kind, "", ["--base", "b", source, "t", "--output_dir", "new", *words.split()])[1]
    assert problem.startswith(named)


@pytest.mark.parametrize("words", [["unet,text_encoder"], ["unet", "text_encoder"]])
def test_components_may_be_separated_by_commas_and_stay_as_they_were_given(tiny_model, changed, extracting, words):
    done = extracting(changed(LOW), rank=2, components=words)
    assert {f"{name}.weight" for name in layers_of(done.folder, tiny_model)} == LOW.keys()
    assert read_recipe(done.folder)["components"] == words


def test_quantised_models_are_refused_by_name(tiny_model, changed, extracting):
    quantised = changed({NORM: lambda old: old, f"{TO_Q}.weight": lambda old: old.to(torch.int8)})
    with pytest.raises(ModelError, match=rf"{quantised}/unet/.* is quantised"):
        extracting(quantised, rank=2)
