"""Adapters on a frozen base: how they begin, what trains, what is saved, and what loads it again."""

import copy
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetuning.data.buckets import BucketArgs
from finetuning.data.training_set import DataArgs
from finetuning.diffusion.objective import NoiseArgs
from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    KOHYA_NAME,
    RAW_NAME,
    read_lora,
    weights_hash,
)
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.rng import gaussian
from finetuning.training.adapters import add_adapters
from finetuning.training.ema import AveragedWeights
from finetuning.training.lora_layout import LoraArgs
from finetuning.training.optim import OptimArgs, build_optimizer
from finetuning.training.run import RunArgs

TARGETS = ["attn2.to_k", "to_v", "ff.net.2", "proj_in", "conv1", "conv_in", "linear_1"]  # some of every shape
EVERYWHERE = {"train_text_encoder": True, "lora_target_modules": TARGETS}
PATTERNS = {"lora_rank_pattern": ["attn2.to_k=6", "conv1=2"], "lora_alpha_pattern": ["to_v=2.5", "q_proj=7"]}
FACTS = {"steps": 30, "images": 11, "dataset_hash": "abc", "dataset": "shapes", "caption_prefix": "a photo of"}
KINDS = {
    "plain": {},
    "odd alpha": {"rank": 7, "lora_alpha": 3.3},
    "rslora": {"rank": 6, "lora_alpha": 5.0, "use_rslora": True},
    "dora": {"use_dora": True, "lora_alpha": 3.0},
    "everywhere": {**EVERYWHERE, "text_encoder_rank": 3},
    "everywhere, dora, patterns": {**EVERYWHERE, **PATTERNS, "rank": 3, "lora_alpha": 1.1, "use_dora": True},
}


@dataclass
class Args(RunArgs, OptimArgs, NoiseArgs, BucketArgs, DataArgs, LoraArgs, ModelArgs):
    """The flags that adapters and their files know of."""

    seed: int = 0
    output_dir: str = "runs/chalk"
    resolution: str = "32"


def save(adapted, folder, average=None):
    """The finished files of adapters as they are now."""
    adapted.save_lora(folder, adapted.trained_parameters(), average, FACTS)


@pytest.fixture(scope="module")
def base(tiny_model):
    """The model as it comes: read once for the same flags, and copied."""
    opened = {}

    def make(variant=None, gradient_checkpointing=False, train_text_encoder=False, **_others):
        flags = (variant, gradient_checkpointing, train_text_encoder)
        if flags not in opened:
            names = ("variant", "gradient_checkpointing", "train_text_encoder")
            args = ModelArgs(str(tiny_model), **dict(zip(names, flags, strict=True)))
            opened[flags] = load_model(args)
        return replace(opened[flags], components=copy.deepcopy(opened[flags].components))

    return make


@pytest.fixture(scope="module")
def adapt(tiny_model, base, fake_run):
    """Adapters with these flags, on few layers unless they name some; `said` is what the run was told."""

    def make(dtype=torch.float32, **flags):
        flags = {"lora_target_modules": ["to_v", "attn2.to_k"], **flags}
        args, run = Args(pretrained_model_name_or_path=str(tiny_model), **flags), fake_run(dtype=dtype)
        adapted = add_adapters(args, base(**flags), run)
        adapted.said = run.said
        return adapted

    return make


@pytest.fixture(scope="module")
def train(adapt):
    """The same after training: every adapter has moved to random places."""

    def make(**flags):
        return scramble(adapt(**flags))

    return make


@pytest.fixture(scope="module")
def base_prediction(base):
    return prediction(base())


@pytest.fixture(scope="module")
def by_diffusers(base):
    """The prediction of a fresh pipeline that has loaded a LoRA by diffusers' own loader."""

    @cache
    def predict(folder, name=DIFFUSERS_NAME):
        fresh = base()
        with fresh.pipeline() as pipeline:
            pipeline.load_lora_weights(str(folder), weight_name=name)
            return prediction(fresh)

    return predict


@torch.no_grad()
def scramble(adapted, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.trained_parameters().values():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted


def forward(model, rows=(0, 1, 2, 3)):
    """The prediction for these rows, each of which has its own noise, timestep and caption."""
    rows = list(rows)
    noisy, tokens = gaussian(0, "noisy", 0, rows, (4, 4, 4)), torch.arange(64).reshape(4, 16)
    batch = SimpleNamespace(tokens={"text_encoder": tokens[rows]})
    return model.denoiser(noisy, torch.tensor([100, 300, 500, 900])[rows], **model.condition(batch, noisy)[1])


@torch.no_grad()
def prediction(model, dtype=torch.float32):
    was_training = model.denoiser.training
    model.denoiser.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        predicted = forward(model).float()
    model.denoiser.train(was_training)
    return predicted


def distance(one, other):
    """Relative to the second."""
    return ((one - other).norm() / other.norm()).item()


def values(adapted):
    return {name: parameter.detach().clone() for name, parameter in adapted.trained_parameters().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def frozen(adapted):
    modules = [adapted.components[name] for name in ("unet", "text_encoder")]
    return [parameter for module in modules for parameter in module.parameters() if not parameter.requires_grad]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# -- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [{}, EVERYWHERE, {"use_rslora": True, "rank": 7, "lora_alpha": 3.0}, {"lora_dropout": 0.5}],
    ids=["plain", "everywhere", "rslora", "dropout"],
)
def test_the_first_prediction_is_the_bases_to_the_last_bit(flags, adapt, base_prediction):
    assert torch.equal(prediction(adapt(**flags)), base_prediction)


def test_the_first_prediction_of_a_dora_is_the_bases(adapt, base_prediction):
    assert distance(prediction(adapt(**EVERYWHERE, use_dora=True)), base_prediction) < 1e-6


def test_adapters_add_alpha_over_rank_up_down(train, base, base_prediction):
    adapted, plain = train(rank=3, lora_alpha=4.5, lora_target_modules=["to_v"]), base()
    with torch.no_grad():
        for name, module in plain.denoiser.denoiser.named_modules():
            if name.endswith("to_v"):
                own = adapted.adapters[f"unet.{name}"]
                module.weight += 1.5 * own.lora_B["default"].weight @ own.lora_A["default"].weight
    changed = prediction(plain)
    assert distance(prediction(adapted), changed) < 1e-5 < distance(changed, base_prediction)


@pytest.mark.parametrize("flags", [{}, EVERYWHERE, {"use_dora": True}], ids=["unet", "everywhere", "dora"])
def test_only_adapters_are_trained(flags, adapt, base):
    everything = lambda model: {
        f"{part}.{name}": parameter
        for part in ("unet", "text_encoder")
        for name, parameter in model.components[part].named_parameters()
    }
    adapted, plain = adapt(learning_rate=0.1, **flags), everything(base())
    optimizer = build_optimizer(adapted.args, adapted, 1)
    for _ in range(2):  # down has no gradient as long as up is 0
        forward(adapted).square().mean().backward()
        optimizer.step()
    named = everything(adapted)
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = values(adapt(**flags))
    assert not any(torch.equal(value, before[name]) for name, value in values(adapted).items())
    still = {name.replace(".base_layer", ""): named[name] for name in named.keys() - trained}
    assert equal(still, plain)


def test_the_same_seed_makes_the_same_adapters_and_another_seed_others(adapt):
    torch.manual_seed(1)
    first = values(adapt(train_text_encoder=True))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert equal(values(adapt(train_text_encoder=True)), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = values(adapt(train_text_encoder=True, seed=1))
    downs = [name for name in first if "lora_A" in name]
    assert len(downs) == 16 and not any(torch.equal(first[name], other[name]) for name in downs)


def test_the_unets_adapters_are_the_same_with_and_without_those_of_the_text_encoder(adapt):
    alone, both = values(adapt()), values(adapt(train_text_encoder=True))
    assert equal(alone, {name: value for name, value in both.items() if name.startswith("unet.")})


def test_down_is_normal_with_a_deviation_of_one_over_rank_and_up_is_nothing(adapt):
    now = values(adapt(rank=8))
    downs = torch.cat([value.flatten() for name, value in now.items() if "lora_A" in name])
    assert downs.std().item() == pytest.approx(1 / 8, rel=0.05) and abs(downs.mean().item()) < 0.01
    assert not any(value.any() for name, value in now.items() if "lora_B" in name)


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"train_text_encoder": True, "use_dora": True}], ids=["unet", "both"])
def test_adapters_are_fp32_and_the_base_is_as_the_activations(flags, adapt, base_prediction):
    adapted = adapt(torch.bfloat16, **flags)
    assert {parameter.dtype for parameter in adapted.trained_parameters().values()} == {torch.float32}
    assert {parameter.dtype for parameter in frozen(adapted)} == {adapted.components["vae"].dtype} == {torch.bfloat16}
    predicted = prediction(adapted, torch.bfloat16)
    assert 0 < distance(predicted, base_prediction) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("precision", "kind", "off"), [("int8", bnb.nn.Linear8bitLt, 0.02), ("nf4", bnb.nn.Linear4bit, 0.1)]
)
def test_int8_and_nf4_quantize_the_linear_layers_of_the_transformers(
    precision, kind, off, dtype, adapt, base, base_prediction
):
    adapted = adapt(dtype, base_precision=precision)
    modules = {name.replace(".base_layer", ""): module for name, module in adapted.denoiser.denoiser.named_modules()}
    small = {name for name, module in modules.items() if isinstance(module, kind)}
    inside = {
        name: module for name, module in base().denoiser.denoiser.named_modules()
        if ".transformer_blocks." in name and isinstance(module, torch.nn.Linear)
    }  # fmt: skip
    assert small == inside.keys() and len(small) == 40
    for name, module in inside.items():
        weight = modules[name].weight
        assert weight.dtype in (torch.int8, torch.uint8) and not weight.requires_grad
        assert weight.numel() == module.weight.numel() / (2 if precision == "nf4" else 1)
    assert {parameter.dtype for parameter in frozen(adapted) if parameter.is_floating_point()} == {dtype}
    assert 0 < distance(prediction(adapted, dtype), base_prediction) < off


@pytest.mark.parametrize(("precision", "dora"), [("int8", False), ("nf4", False), ("nf4", True)])
def test_adapters_on_a_quantized_base_are_trained_and_saved(precision, dora, adapt, tmp_path, by_diffusers):
    adapted = adapt(base_precision=precision, use_dora=dora)
    forward(adapted).square().mean().backward()
    ups = [parameter for name, parameter in adapted.trained_parameters().items() if "lora_B" in name]
    assert all(up.dtype == torch.float32 and up.grad.any() for up in ups)
    save(scramble(adapted), tmp_path)
    assert distance(by_diffusers(tmp_path), prediction(adapted)) < 0.15


def test_a_prediction_for_images_changes_nothing_of_a_quantized_base(adapt):
    """bitsandbytes repacks 4-bit weights on some CPUs when they are used in evaluation mode."""
    adapted = adapt(base_precision="nf4")
    before = forward(adapted)
    prediction(adapted)
    assert torch.equal(forward(adapted), before)


@pytest.mark.parametrize(
    ("precision", "dtype", "now"),
    [("fp16", torch.float32, "fp32"), ("fp16", torch.bfloat16, "bf16"), ("bf16", torch.float16, "fp16")],
)
def test_a_half_precision_base_needs_activations_of_the_same(precision, dtype, now, adapt):
    with pytest.raises(ModelError) as problem:
        adapt(dtype, base_precision=precision)
    (line,) = str(problem.value).splitlines()
    assert line.startswith(f"--base_precision {precision} ") and f"has {now}:" in line


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float16)]
)
def test_precisions_that_go_together_are_taken(precision, dtype, adapt):
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert {parameter.dtype for parameter in frozen(adapt(dtype, base_precision=precision))} == {expected}


def test_dora_on_int8_is_refused_on_the_cpu(adapt):
    with pytest.raises(ModelError, match=r"^--base_precision int8 with --use_dora"):
        adapt(base_precision="int8", use_dora=True)


# -- dropout ---------------------------------------------------------------------------------------------------------


def gradients(adapted):
    torch.manual_seed(7)  # as a Session does for each step
    forward(adapted).square().sum().backward()
    return {name: parameter.grad for name, parameter in adapted.trained_parameters().items()}


@pytest.mark.parametrize("flags", [{}, {**EVERYWHERE, "use_dora": True}], ids=["plain", "everywhere, dora"])
def test_gradient_checkpointing_drops_the_same_again(flags, train):
    checkpointed = train(lora_dropout=0.5, gradient_checkpointing=True, **flags)
    assert checkpointed.denoiser.denoiser.is_gradient_checkpointing
    ours, plain = gradients(checkpointed), gradients(train(lora_dropout=0.5, **flags))
    assert ours.keys() == plain.keys() and all(distance(ours[name], plain[name]) < 1e-4 for name in ours)


def test_dropout_drops_its_share_of_every_layers_inputs_and_only_in_training(train):
    dropping, plain = train(lora_dropout=0.25), train()
    dropouts = [module.lora_dropout["default"] for module in dropping.adapters.values()]
    assert len(dropouts) == 12 and {(type(one), one.p) for one in dropouts} == {(torch.nn.Dropout, 0.25)}
    assert torch.equal(prediction(dropping), prediction(plain))
    torch.manual_seed(1)
    first = forward(dropping)
    torch.manual_seed(1)
    assert torch.equal(forward(dropping), first)
    assert distance(forward(dropping), first) > 1e-3 and distance(first, forward(plain)) > 1e-3


# -- going on from a LoRA --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(train, tmp_path_factory):
    """The folder of a run's finished files, in diffusers' and kohya's layout; written once for the same flags."""
    folders = {}

    def make(**flags):
        if (key := repr(flags)) not in folders:
            folders[key] = tmp_path_factory.mktemp("old")
            save(train(save_kohya="use_dora" not in flags, **flags), folders[key])
        return folders[key]

    return make


DORA = {**EVERYWHERE, "use_dora": True, "rank": 3}
PLAIN = {"rank": 4, "lora_alpha": 2.5}


@pytest.mark.parametrize(
    ("before", "name", "now"),
    [
        (PLAIN, DIFFUSERS_NAME, {}),
        (PLAIN, KOHYA_NAME, {"lora_alpha": 3.0}),
        (PLAIN, KOHYA_NAME, {"rank": 8, "lora_alpha": 5.0}),
        (
            PLAIN, DIFFUSERS_NAME,
            {"rank": 6, "use_rslora": True, "lora_rank_pattern": ["attn2.to_k=7"], "lora_alpha_pattern": ["to_v=3"]},
        ),
        (PLAIN, KOHYA_NAME, {"lora_target_modules": ["all-linear", "conv"], "train_text_encoder": True}),
        (
            {**EVERYWHERE, "rank": 4, "lora_rank_pattern": ["conv1=2", "q_proj=3"]}, DIFFUSERS_NAME,
            {**EVERYWHERE, "rank": 4, "lora_alpha": 3.0},
        ),
        (DORA, DIFFUSERS_NAME, DORA),
        (DORA, DIFFUSERS_NAME, {**DORA, "rank": 4, "lora_alpha": 5.0}),
    ],
    ids=["same", "alpha", "rank", "rslora, patterns", "more layers", "everywhere", "dora", "dora, rank and alpha"],
)  # fmt: skip
def test_a_run_begins_as_the_lora_that_it_starts_from(before, name, now, old, adapt, base_prediction, by_diffusers):
    folder = old(**before)
    adapted = adapt(init_lora=str(folder / name), **now)
    expected = by_diffusers(folder, name)
    assert distance(prediction(adapted), expected) < 1e-5
    assert distance(expected, base_prediction) > 0.05


def test_rows_that_a_larger_rank_brings_are_drawn_and_have_nothing_behind_them(old, adapt):
    folder = old(rank=2)
    grown, drawn = values(adapt(rank=5, init_lora=str(folder))), values(adapt(rank=5))
    for name, value in grown.items():
        if "lora_A" in name:
            assert torch.equal(value[2:], drawn[name][2:]) and not torch.equal(value[:2], drawn[name][:2])
        else:
            assert not value[:, 2:].any() and value[:, :2].any()


def test_a_lora_that_was_made_for_other_weights_is_noted(old, adapt, base):
    folder = old(variant="non_ema")
    (said,) = adapt(init_lora=str(folder)).said
    there, here = (weights_hash(base(**flags).denoiser.denoiser)[:12] for flags in ({"variant": "non_ema"}, {}))
    assert said.startswith(f"--init_lora {folder / DIFFUSERS_NAME} was made for ") and "it fits, but" in said
    assert f"(weights {there})" in said and f"has other weights ({here})" in said
    assert adapt(init_lora=str(folder), variant="non_ema").said == []


def test_a_lora_that_does_not_fit_is_refused_with_every_reason(old, adapt):
    folder = old(rank=4, lora_target_modules=["to_q", "to_k"])
    with pytest.raises(ModelError) as problem:
        adapt(rank=2, lora_target_modules=["to_q"], use_dora=True, init_lora=str(folder))
    layers, ranks, dora = str(problem.value).splitlines()
    assert "has 8 layers that get no adapter here" in layers
    assert "has rank 4 at" in ranks and "ask for 2 (8 such layers)" in ranks
    assert dora.endswith("is no DoRA: leave out --use_dora")


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def kind(request, train, tmp_path_factory):
    """One of KINDS after training: `flags`, the `folder` of a checkpoint with an `average`, and what it hands over."""
    flags = KINDS[request.param]
    adapted = train(save_kohya=not flags.get("use_dora"), **flags)
    average = {name: value + 0.1 for name, value in values(adapted).items()}
    folder, finished = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("finished")
    adapted.save_trained(folder, adapted.trained_parameters())
    adapted.save_trained(folder, average, "_ema")
    save(adapted, finished)
    return SimpleNamespace(
        flags=flags, folder=folder, average=average, finished=finished, values=values(adapted),
        prediction=prediction(adapted), said=adapted.said,
    )  # fmt: skip


def test_a_checkpoint_gives_the_adapters_back_to_the_last_bit(kind, adapt):
    loaded = adapt(**kind.flags, seed=5)
    assert equal(loaded.load_trained(kind.folder, ema=True), kind.average)
    assert equal(values(loaded), kind.values)
    assert torch.equal(prediction(loaded), kind.prediction)
    assert loaded.load_trained(kind.folder, ema=False) is None


def test_diffusers_loads_the_adapters_of_a_checkpoint(kind, base_prediction, by_diffusers):
    assert sorted(path.name for path in kind.folder.iterdir()) == ["lora", "lora_ema"]
    assert [path.name for path in (kind.folder / "lora").iterdir()] == [DIFFUSERS_NAME]
    assert distance(by_diffusers(kind.folder / "lora"), kind.prediction) < 1e-5
    assert distance(kind.prediction, base_prediction) > 0.05


def test_every_finished_file_does_what_the_run_did(kind, by_diffusers):
    """But for a kohya file that has to leave layers out, which the run said."""
    for path in kind.finished.iterdir():
        if path.name == KOHYA_NAME and kind.said:
            continue
        assert distance(by_diffusers(kind.finished, path.name), kind.prediction) < 1e-5


@pytest.fixture(scope="module")
def plain_checkpoint(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    adapted = train()
    adapted.save_trained(folder, adapted.trained_parameters())
    return folder


@pytest.mark.parametrize(
    "now",
    [{"rank": 6}, {"lora_target_modules": ["to_q"]}, {"lora_rank_pattern": ["to_v=2"]}, {"use_dora": True},
     {"train_text_encoder": True}],
    ids=lambda now: next(iter(now)),
)  # fmt: skip
def test_a_checkpoint_of_other_adapters_is_refused_with_the_flags(now, plain_checkpoint, adapt):
    adapted = adapt(**now)
    before = values(adapted)
    with pytest.raises(ModelError) as problem:
        adapted.load_trained(plain_checkpoint, ema=False)
    assert f"--{next(iter(now))}" in str(problem.value) and f"--init_lora {plain_checkpoint}" in str(problem.value)
    assert equal(values(adapted), before)


def test_a_checkpoint_of_a_model_trained_whole_is_refused(base, adapt, tmp_path):
    base().save_trained(tmp_path, {})
    with pytest.raises(ModelError, match=f"^{tmp_path} holds no adapters"):
        adapt().load_trained(tmp_path, ema=False)


# -- the finished files ----------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_exported_and_the_raw_ones_lie_beside_them(train, tmp_path, by_diffusers):
    adapted = train(save_kohya=True)
    average = AveragedWeights(adapted.trained_parameters(), 0.5, "warm")
    scramble(adapted, seed=2)
    average.update()
    save(adapted, tmp_path, average.shadow)
    raw = prediction(adapted)
    with average.averaged_weights():
        averaged = prediction(adapted)
    assert distance(raw, averaged) > 0.05
    for name, expected in ((DIFFUSERS_NAME, averaged), (KOHYA_NAME, averaged), (RAW_NAME, raw)):
        assert distance(by_diffusers(tmp_path, name), expected) < 1e-5


def test_files_for_all_readers_have_an_alpha_that_is_the_rank(train, base, tmp_path):
    save(train(rank=4, lora_alpha=3.0, lora_rank_pattern=["attn2.to_v=2"], save_kohya=True), tmp_path)
    layers = read_lora(tmp_path / DIFFUSERS_NAME, {"unet": base().denoiser.denoiser}).layers
    assert all(layer.alpha == layer.rank == (2 if name.endswith("attn2.to_v") else 4) for name, layer in layers.items())
    alphas = [value.item() for name, value in load_file(tmp_path / KOHYA_NAME).items() if name.endswith(".alpha")]
    assert alphas == [3.0] * 12


@pytest.mark.parametrize("precision", [None, "nf4"])
def test_the_file_says_what_it_was_made_of(precision, train, base, tiny_model, tmp_path):
    adapted = train(rank=4, lora_alpha=3.0, lora_target_modules=["to_q", "to_k"], base_precision=precision)
    save(adapted, tmp_path)
    told = metadata(tmp_path / DIFFUSERS_NAME)
    expected = {
        "format": "pt", "base_model": str(tiny_model), "base_model_hash": weights_hash(base().denoiser.denoiser),
        "rank": "4", "alpha": "3", "target_modules": "to_q to_k", "parts": "unet", "use_dora": "False",
        "use_rslora": "False", "steps": "30", "images": "11", "dataset_hash": "abc", "dataset": "shapes",
        "caption_prefix": "a photo of",
    }  # fmt: skip
    assert {name: told.get(name) for name in expected} == expected
    assert not any(name.startswith(("ss_", "modelspec.")) for name in told)


# -- the optimizer ---------------------------------------------------------------------------------------------------


def test_parameter_groups_are_lists_so_that_clipping_sees_what_is_trained(adapt):
    adapted = adapt(train_text_encoder=True)
    groups = adapted.parameter_groups(1e-3, [2e-4])
    assert [(type(group["params"]), group["lr"]) for group in groups] == [(list, 1e-3), (list, 2e-4)]
    grouped = [[id(parameter) for parameter in group["params"]] for group in groups]
    for part, own in zip(("unet", "text_encoder"), grouped, strict=True):
        assert own == [id(p) for name, p in adapted.trained_parameters().items() if name.startswith(f"{part}.")]
    optimizer = build_optimizer(adapted.args, adapted, 1)
    forward(adapted).square().sum().backward()
    for group in optimizer.param_groups:
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], 1e-3).item() for _ in range(2)]
        assert norms[0] > 2e-3 and norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_parameters_are_named_as_in_the_files(train, tmp_path):
    adapted = train(train_text_encoder=True)
    adapted.save_trained(tmp_path, adapted.trained_parameters())
    names = {name.replace("text_encoder.", "text_encoder.text_model.") for name in adapted.trained_parameters()}
    assert names == load_file(tmp_path / "lora" / DIFFUSERS_NAME).keys()
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.lora_B.weight" in names
