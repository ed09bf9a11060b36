"""Several LoRAs as one: PEFT's arithmetic, layer by layer, for LoRAs of any ranks and layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel

from finetuning.cli import read
from finetuning.families.lora_files import KOHYA_NAME, Layer, read_lora, write_diffusers
from finetuning.families.model_args import ModelError
from finetuning.merging import lora_combination
from finetuning.merging.lora_combination import METHODS, CombineArgs, combine, combined
from finetuning.merging.lora_tools import skeletons
from finetuning.merging.recipe import read_recipe
from finetuning.rng import torch_generator

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # [8, 8]
PROJ_IN = "unet.down_blocks.0.attentions.0.proj_in"  # [8, 8, 1, 1]
CONV = "unet.down_blocks.1.resnets.0.conv1"  # [16, 8, 3, 3]
FC1 = "text_encoder.encoder.layers.0.mlp.fc1"  # [32, 16]
SHAPES = {TO_Q: (8, 8), PROJ_IN: (8, 8, 1, 1), CONV: (16, 8, 3, 3), FC1: (32, 16)}


def random_layer(shape, rank=3, alpha=2.0, seed=0):
    out, inside, *kernel = shape
    draw = torch_generator(seed, str(shape))
    up = torch.randn((out, rank, *(1 for _ in kernel)), generator=draw)
    return Layer(torch.randn((rank, inside, *kernel), generator=draw), up, alpha)


def weighted_sum(layers, scales):
    """In float64 by NumPy."""
    total = 0
    for layer, scale in zip(layers, scales, strict=True):
        up, down = (np.asarray(value, dtype=np.float64) for value in (layer.up, layer.down))
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        total = total + (scale * layer.alpha / layer.rank * product).reshape(len(up), *down.shape[1:])
    return total


def close(one, other, tolerance=1e-5):
    one, other = (np.asarray(value, dtype=np.float64) for value in (one, other))
    return np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_cat_is_the_sum_whatever_ranks_alphas_and_signs(shape):
    layers = [random_layer(shape, 2, 1.0, 1), random_layer(shape, 5, 7.0, 2), random_layer(shape, 1, 1.0, 3)]
    found = combined(layers, [0.5, -1.5, 2.0])
    assert found.rank == found.alpha == 8
    assert close(found.delta(), weighted_sum(layers, [0.5, -1.5, 2.0]), 1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_svd_is_the_best_of_its_rank(shape):
    layers, scales = [random_layer(shape, 2, 1.0, 1), random_layer(shape, 3, 2.0, 2)], [1.0, -0.5]
    matrix = weighted_sum(layers, scales).reshape(shape[0], -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    for rank, expected in ((None, 3), (1, 1), (5, 5)):
        found = combined(layers, scales, "svd", rank)
        assert found.rank == expected and found.delta().shape == shape
        assert close(found.delta().flatten(1), (left[:, :expected] * values[:expected]) @ right[:expected])


def test_a_rank_above_the_layers_sides_comes_down():
    layers = [random_layer((4, 6), 2, 2.0, 1), random_layer((4, 6), 2, 2.0, 2)]
    found = combined(layers, [1, 1], "svd", 9)
    assert found.rank == 4 and close(found.delta(), weighted_sum(layers, [1, 1]))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_does_what_peft_does_on_a_whole_model(method):
    """Two LoRAs of one rank, as a user of PEFT would combine them; the second lacks a layer."""
    names, density = {"one": (8, 6), "conv": (6, 4, 3, 3), "alone": (5, 7)}, None if method in ("cat", "svd") else 0.4
    loras = [{name: random_layer(shape, 2, 3.0, seed) for name, shape in names.items()} for seed in (1, 2)]
    del loras[1]["alone"]
    model = torch.nn.ModuleDict(
        {"one": torch.nn.Linear(6, 8), "conv": torch.nn.Conv2d(4, 6, 3), "alone": torch.nn.Linear(7, 5)}
    )
    peft = None
    for adapter, layers in zip("ab", loras, strict=True):
        config = LoraConfig(r=2, lora_alpha=3, target_modules=list(layers))
        if peft is None:
            peft = LoraModel(model, config, adapter)
        else:
            peft.peft_config[adapter] = config
            peft.inject_adapter(model, adapter)
        for name, layer in layers.items():
            model[name].lora_A[adapter].weight.data = layer.down
            model[name].lora_B[adapter].weight.data = layer.up
    torch.manual_seed(5)
    peft.add_weighted_adapter(["a", "b"], [0.7, 0.5], "sum", method, svd_rank=2, density=density)
    for name in names:
        ours = combined([lora.get(name) for lora in loras], [0.7, 0.5], method, None, density, (0, name))
        theirs = model[name].get_delta_weight("sum").detach()
        if method.startswith("dare"):  # which numbers are dropped depends on the draw
            assert ours.delta().shape == theirs.shape and ours.rank == 2
        else:
            assert close(ours.delta(), theirs), name


def test_what_dare_drops_depends_on_seed_and_layer_and_on_no_other_draw():
    layers = [random_layer((8, 8), 2, 2.0, seed) for seed in (1, 2)]

    def drawn(seed, name):
        return combined(layers, [1, 1], "dare_linear_svd", 4, 0.5, (seed, name)).delta()

    state = torch.get_rng_state()
    first = drawn(0, "a")
    assert torch.equal(torch.get_rng_state(), state)  # nor does it move the draws of others
    torch.rand(3)
    assert torch.equal(drawn(0, "a"), first)
    assert not close(drawn(1, "a"), first) and not close(drawn(0, "b"), first)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_layer_that_one_lora_alone_has_is_only_scaled(method):
    layer = random_layer((8, 8), 2, 3.0)
    for layers, scales in (([None, layer, None], [9.0, -0.5, 9.0]), ([layer, None], [-0.5, 9.0])):
        found = combined(layers, scales, method)
        assert found.rank == 2 and close(found.delta(), weighted_sum([layer], [-0.5]))


LORAS = ({TO_Q: (2, 1.0), CONV: (3, 3.0), FC1: (2, 4.0)}, {TO_Q: (4, 2.0), CONV: (1, 5.0), PROJ_IN: (3, 3.0)})


@pytest.fixture
def made():
    """[{layer name: Layer}, ...] of two LoRAs of different layers, ranks and alphas."""
    return [
        {name: random_layer(SHAPES[name], *size, seed) for name, size in sizes.items()}
        for seed, sizes in enumerate(LORAS)
    ]


@pytest.fixture
def combining(tiny_model, tmp_path, made):
    """A function: (lines, folder) of combine on these two; `dora` gives the second magnitudes."""

    def run(dora=False, **flags):
        paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
        for number, (path, layers) in enumerate(zip(paths, made, strict=True)):
            if dora and number:
                layers = {name: replace(layer, magnitude=torch.ones(len(layer.up))) for name, layer in layers.items()}
            write_diffusers(path, layers, {"base_model": "some/base", "base_model_hash": f"hash {number}"})
        target = tmp_path / f"combined-{len(list(tmp_path.iterdir()))}"
        args = CombineArgs(base=str(tiny_model), lora=[str(path) for path in paths], output_dir=str(target), **flags)
        assert not list(args.problems())
        return combine(args), target

    return run


def test_the_written_lora_is_the_weighted_sum(tiny_model, made, combining):
    lines, folder = combining(scale=[0.8, -0.6], save_kohya=True)
    parts = skeletons(str(tiny_model))
    for path in (folder, folder / KOHYA_NAME):
        found = read_lora(path, parts)
        assert {name: layer.rank for name, layer in found.layers.items()} == {TO_Q: 6, CONV: 4, FC1: 2, PROJ_IN: 3}
        for name, layer in found.layers.items():
            pairs = [(lora[name], scale) for lora, scale in zip(made, [0.8, -0.6], strict=True) if name in lora]
            assert close(layer.delta(), weighted_sum(*zip(*pairs, strict=True)), 1e-6), name
        assert found.metadata["base_model"] == "some/base" and "base_model_hash" not in found.metadata
    assert found.metadata["ss_network_dim"] == "Dynamic"
    assert read_recipe(folder)["run"]["report"]["distance"] < 1e-6
    assert any(line.startswith("cat:") for line in lines)


def test_the_report_tells_how_far_a_method_is_from_the_sum(tiny_model, made, combining):
    _, folder = combining(method="ties_svd", density=0.5, rank=2)
    report = read_recipe(folder)["run"]["report"]
    found = read_lora(folder, skeletons(str(tiny_model))).layers
    off = whole = 0
    for name, layer in found.items():
        meant = weighted_sum(*zip(*[(lora[name], 1.0) for lora in made if name in lora], strict=True))
        distance, norm = np.linalg.norm(layer.delta().double().numpy() - meant), np.linalg.norm(meant)
        assert report["ranks"][name] == {"rank": 2, "distance": pytest.approx(distance / norm, rel=1e-4)}
        off, whole = off + distance**2, whole + norm**2
    assert 0.1 < report["distance"] == pytest.approx((off / whole) ** 0.5, rel=1e-4)


def test_a_sum_that_is_none_is_refused(monkeypatch, combining, tmp_path):
    right = lora_combination.combined

    def wrong(*args):
        layer = right(*args)
        return replace(layer, up=1.001 * layer.up)

    monkeypatch.setattr(lora_combination, "combined", wrong)
    with pytest.raises(ModelError, match="PEFT's sum is off"):
        combining()
    assert not list(tmp_path.glob("combined*"))


def test_a_dora_is_refused_by_name(combining):
    with pytest.raises(ModelError, match=r"^--lora .*1\.safetensors: DoRA gives outputs another length"):
        combining(dora=True)


@pytest.mark.parametrize(("words", "named"), [
    ("--lora x", "--lora"), ("--scale 1", "--scale"), ("--rank 0 --method svd", "--rank"), ("--rank 4", "--rank"),
    ("--density 0.5", "--density"),
    ("--method dare_ties_svd", "--method dare_ties_svd needs --density"),
    ("--method ties_svd --density 1.5", "--density 1.5"), ("--method ties_svd --density 0.5 --scale 1 -1", "--scale"),
    ("--output_dir y/new", "--output_dir y/new"),
])  # fmt: skip
def test_flags_that_cannot_work_are_named(tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y").mkdir()
    usual = {"--base": "b", "--lora": "x y", "--output_dir": "new"}
    words += "".join(f" {name} {value}" for name, value in usual.items() if name not in words)
    (problem,) = read(CombineArgs, "", words.split())[1]
    assert problem.startswith(named)
