"""Models of every kind that a merge is given come out alike, and what is none is refused by name."""

import json
import re
import shlex
import shutil
from collections import OrderedDict
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.model_args import ModelError
from finetuning.families.original import original_names, original_shape
from finetuning.merging.model_sources import open_source

UNET = "diffusion_pytorch_model.safetensors"
UNET_RAW = "diffusion_pytorch_model.non_ema.safetensors"
UNET_FP16 = "diffusion_pytorch_model.fp16.safetensors"
TEXT = "model.safetensors"
PARTS = {"unet", "text_encoder", "vae"}


def read(source, part):
    return {key: one.read() for key, one in source.components[part].items()}


def file_of(path):
    return {key.removeprefix("text_model."): value for key, value in load_file(path).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata={"format": "pt"})


def shifted(tensors, by):
    return {key: value + by if value.is_floating_point() else value for key, value in tensors.items()}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(path):
    """Two shards and an index in the place of one file, as save_pretrained writes what is too large."""
    tensors = load_file(path)
    stem, _, variant = path.name.removesuffix(".safetensors").partition(".")
    names = [f"{stem}{variant and '.'}{variant}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    where = {key: names[number % 2] for number, key in enumerate(sorted(tensors))}
    for name in names:
        write(path.with_name(name), {key: tensors[key] for key in tensors if where[key] == name})
    index = path.with_name(f"{stem}.safetensors.index{variant and '.'}{variant}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    path.unlink()
    return names


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """checkpoint-7 of a run with EMA that started from tiny_model."""
    folder = tmp_path / "run/checkpoint-7"
    unet = load_file(tiny_model / "unet" / UNET)
    for name, by in (("unet", 1), ("unet_ema", 2)):
        write(folder / name / UNET, shifted(unet, by))
        shutil.copyfile(tiny_model / "unet/config.json", folder / name / "config.json")
    args = {"pretrained_model_name_or_path": str(tiny_model), "revision": None, "variant": None, "cache_dir": None}
    (folder / "training_state.json").write_text(json.dumps({"step": 7, "args": args | {"prediction_type": None}}))
    return folder


@pytest.fixture
def single_file(tiny_model, tmp_path):
    """tiny_model in the original layout."""
    tensors = {}
    for part, name in (("unet", UNET), ("vae", UNET), ("text_encoder", TEXT)):
        own = file_of(tiny_model / part / name)
        names = original_names(part, own)
        tensors |= {names[key]: own[key].reshape(original_shape(part, key, own[key].shape)) for key in own}
    write(tmp_path / "single.safetensors", tensors)
    return tmp_path / "single.safetensors"


@pytest.fixture
def hub_cache(tiny_model, tmp_path):
    """A Hub cache that holds org/name at main, and at v2 with another UNet."""
    storage = tmp_path / "hub" / "models--org--name"
    for number, revision in enumerate(("main", "v2")):
        (storage / "refs").mkdir(parents=True, exist_ok=True)
        (storage / "refs" / revision).write_text(str(number) * 40)
        snapshot = storage / "snapshots" / (str(number) * 40)
        shutil.copytree(tiny_model, snapshot)
        write(snapshot / "unet" / UNET, shifted(load_file(tiny_model / "unet" / UNET), number))
    return storage.parent


# -- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "name"), [("ema", UNET), ("raw", UNET_RAW)])
def test_a_pipeline_folder_gives_all_its_parts(tiny_model, weights, name):
    source = open_source(str(tiny_model), weights=weights)
    assert (source.given, source.folder, source.kind) == (str(tiny_model), tiny_model, "pipeline")
    assert source.components.keys() == PARTS and source.prediction_type == "epsilon" and source.warnings == ()
    assert equal(read(source, "unet"), load_file(tiny_model / "unet" / name))
    assert equal(read(source, "vae"), load_file(tiny_model / "vae" / UNET))
    assert equal(read(source, "text_encoder"), file_of(tiny_model / "text_encoder" / TEXT))
    assert {tiny_model / "unet" / name, tiny_model / "vae" / UNET, tiny_model / "text_encoder" / TEXT} == set(
        source.files
    )


def test_a_text_encoder_as_transformers_5_writes_it_is_the_same(model, tiny_model):
    write(model / "text_encoder" / TEXT, file_of(tiny_model / "text_encoder" / TEXT))
    one, other = open_source(model), open_source(tiny_model)
    assert equal(read(one, "text_encoder"), read(other, "text_encoder"))


def test_a_tensor_under_both_spellings_is_refused(model):
    tensors = load_file(model / "text_encoder" / TEXT)
    write(
        model / "text_encoder" / TEXT, tensors | {"final_layer_norm.bias": tensors["text_model.final_layer_norm.bias"]}
    )
    with pytest.raises(ModelError, match=r"model: text_encoder has one tensor twice.*final_layer_norm\.bias"):
        open_source(model)


def test_an_autoencoder_with_the_older_names_of_attention_is_the_same(model):
    expected = load_file(model / "vae" / UNET)
    older = (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn."))
    renamed = {}
    for key, value in expected.items():
        for now, before in older:
            key = key.replace(now, before)
        renamed[key] = value
    assert renamed.keys() != expected.keys()
    write(model / "vae" / UNET, renamed)
    assert equal(read(open_source(model), "vae"), expected)


@pytest.mark.parametrize("saved", ["v_prediction", "epsilon", None])
def test_what_a_pipeline_predicts_is_in_its_scheduler(model, saved):
    path = model / "scheduler/scheduler_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "prediction_type"}
    path.write_text(json.dumps(config | ({"prediction_type": saved} if saved else {})))
    assert open_source(model).prediction_type == (saved or "epsilon")


def test_parts_without_the_variant_are_taken_without(model):
    half = {key: value.half() for key, value in load_file(model / "unet" / UNET).items()}
    write(model / "unet" / UNET_FP16, half)
    source = open_source(model, variant="fp16", weights="raw")
    assert equal(read(source, "unet"), half)
    assert equal(read(source, "vae"), load_file(model / "vae" / UNET))
    with pytest.raises(ModelError, match=r"no weights of the variant bf16"):
        open_source(model, variant="bf16")


def test_a_variant_that_is_the_only_one_is_taken_and_one_of_two_is_asked_for(model):
    expected = load_file(model / "unet" / UNET_RAW)
    (model / "unet" / UNET).unlink()
    assert equal(read(open_source(model), "unet"), expected)
    write(model / "unet" / UNET_FP16, expected)
    with pytest.raises(ModelError, match="its unet has only variants: name fp16 or non_ema"):
        open_source(model)


@pytest.mark.parametrize(
    ("part", "name", "options"),
    [("unet", UNET, {}), ("unet", UNET_RAW, {"weights": "raw"}), ("text_encoder", TEXT, {})],
)
def test_shards_are_read_as_one(model, part, name, options):
    expected = file_of(model / part / name)
    shards = split(model / part / name)
    source = open_source(model, **options)
    assert equal(read(source, part), expected)
    assert {path.name for path in source.files if path.parent.name == part} == set(shards)
    (model / part / shards[0]).unlink()
    with pytest.raises(ModelError, match=rf"model is not whole.*{re.escape(shards[0])}"):
        open_source(model, **options)


def test_nothing_but_headers_is_read(model, monkeypatch):
    monkeypatch.setattr("finetuning.merging.tensor_references.TensorReference.read", None)
    monkeypatch.setattr("finetuning.merging.tensor_references.TensorReference.read_elements", None)
    assert open_source(model).components.keys() == PARTS


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "by"), [(None, 0), ("v2", 1)])
def test_a_hub_name_is_found_in_the_cache(hub_cache, tiny_model, revision, by):
    source = open_source("org/name", revision=revision, cache_dir=str(hub_cache))
    assert source.given == "org/name" and source.folder.name == str(by) * 40 and source.kind == "pipeline"
    assert equal(read(source, "unet"), shifted(load_file(tiny_model / "unet" / UNET), by))
    raw = open_source("org/name", revision=revision, cache_dir=str(hub_cache), weights="raw")
    assert equal(read(raw, "unet"), load_file(tiny_model / "unet" / UNET_RAW))


@pytest.mark.parametrize(
    ("variant", "weights", "expected"),
    [
        (None, "ema", {"unet/m", "vae/m", "safety_checker/m"}),
        (None, "raw", {"unet/m.non_ema", "vae/m", "safety_checker/m"}),
        ("fp16", "ema", {"unet/m.fp16", "vae/m", "safety_checker/m.fp16"}),
    ],
)
def test_of_the_hub_no_more_is_fetched_than_is_needed(tmp_path, monkeypatch, tiny_model, variant, weights, expected):
    """The Hub is a folder here, from which a fetch copies the files that its patterns name."""
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(tiny_model, there)
    edit(there / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    for name in ("", ".fp16", ".non_ema"):
        write(there / f"unet/diffusion_pytorch_model{name}.safetensors", {"conv_in.weight": torch.zeros(1)})
    for name in (f"safety_checker/{TEXT}", "safety_checker/model.fp16.safetensors", "all-in-one.safetensors"):
        write(there / name, {"x": torch.zeros(1)})
    (there / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")

    def fetch(name, revision, cache_dir, allow_patterns):
        for path in (path for path in there.rglob("*") if path.is_file()):
            if any(fnmatch(str(path.relative_to(there)), pattern) for pattern in allow_patterns):
                (here / path.relative_to(there)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, here / path.relative_to(there))
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    open_source("org/name", variant=variant, weights=weights)
    found = {str(path.relative_to(here)) for path in here.rglob("*") if path.suffix in (".safetensors", ".bin")}
    short = {re.sub(r"(diffusion_pytorch_)?model", "m", name).removesuffix(".safetensors") for name in found}
    assert short == expected | {"text_encoder/m"}
    assert all((here / "tokenizer" / name).is_file() for name in ("vocab.json", "merges.txt"))


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v3")])
def test_what_the_cache_lacks_is_named(hub_cache, name, revision):
    with pytest.raises(ModelError, match=f"^{name}.*{revision or ''}.*nor available on the Hub"):
        open_source(name, revision=revision, cache_dir=str(hub_cache))


# -- checkpoints of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "folder", "by"), [("ema", "unet_ema", 2), ("raw", "unet", 1)])
def test_a_checkpoint_has_its_own_unet_and_the_rest_of_its_base(checkpoint, tiny_model, weights, folder, by):
    source = open_source(checkpoint, weights=weights)
    assert (source.kind, source.folder, source.prediction_type) == ("checkpoint", tiny_model, "epsilon")
    assert equal(read(source, "unet"), shifted(load_file(tiny_model / "unet" / UNET), by))
    assert equal(read(source, "text_encoder"), file_of(tiny_model / "text_encoder" / TEXT))
    assert set(source.files) == {
        checkpoint / folder / UNET, tiny_model / "vae" / UNET, tiny_model / "text_encoder" / TEXT
    }  # fmt: skip
    assert source.configs == {"unet": checkpoint / folder} and source.warnings == ()


def test_a_checkpoint_without_an_average_gives_what_it_has(checkpoint, tiny_model):
    shutil.rmtree(checkpoint / "unet_ema")
    assert equal(read(open_source(checkpoint), "unet"), shifted(load_file(tiny_model / "unet" / UNET), 1))


def test_a_trained_text_encoder_and_prediction_type_are_the_checkpoints(checkpoint, tiny_model):
    trained = shifted(load_file(tiny_model / "text_encoder" / TEXT), 3)
    write(checkpoint / "text_encoder_ema" / TEXT, trained)
    state = json.loads((checkpoint / "training_state.json").read_text())
    edit(checkpoint / "training_state.json", args=state["args"] | {"prediction_type": "v_prediction"})
    source = open_source(checkpoint)
    assert equal(read(source, "text_encoder"), {key.removeprefix("text_model."): v for key, v in trained.items()})
    assert source.prediction_type == "v_prediction" and tiny_model / "text_encoder" / TEXT not in source.files


def test_untrained_parts_are_those_that_the_run_loaded_and_not_the_bases_raw_ones(checkpoint, model):
    state = json.loads((checkpoint / "training_state.json").read_text())
    edit(checkpoint / "training_state.json", args=state["args"] | {"pretrained_model_name_or_path": str(model)})
    write(model / "text_encoder/model.non_ema.safetensors", shifted(load_file(model / "text_encoder" / TEXT), 5))
    source = open_source(checkpoint, weights="raw")
    assert equal(read(source, "text_encoder"), file_of(model / "text_encoder" / TEXT))


def test_a_run_from_the_hub_is_found_with_its_revision(checkpoint, hub_cache):
    state = json.loads((checkpoint / "training_state.json").read_text())
    args = {"pretrained_model_name_or_path": "org/name", "revision": "v2", "cache_dir": str(hub_cache)}
    edit(checkpoint / "training_state.json", args=state["args"] | args)
    assert open_source(checkpoint).folder.name == "1" * 40


def test_a_checkpoint_whose_base_is_gone_has_its_own_parts_and_says_so(checkpoint, tiny_model):
    state = json.loads((checkpoint / "training_state.json").read_text())
    edit(checkpoint / "training_state.json", args=state["args"] | {"pretrained_model_name_or_path": "gone/away"})
    source = open_source(checkpoint)
    assert source.components.keys() == {"unet"} and (source.folder, source.prediction_type) == (None, None)
    assert "gone/away" in source.warnings[0] and "--layout_from" in source.warnings[0]
    source = open_source(checkpoint, layout_from=str(tiny_model))
    assert source.components.keys() == {"unet"} and (source.folder, source.prediction_type) == (tiny_model, "epsilon")


# -- single files and bare UNets -------------------------------------------------------------------------------------


def test_a_single_file_is_the_pipeline_it_was_made_of(single_file, tiny_model):
    source, pipeline = open_source(single_file), open_source(tiny_model)
    assert (source.kind, source.folder, source.prediction_type) == ("original", None, None)
    assert source.files == (single_file,) and source.components.keys() == PARTS
    assert all(equal(read(source, part), read(pipeline, part)) for part in PARTS)


def test_what_a_single_file_holds_besides_is_said(single_file):
    write(single_file, load_file(single_file) | {"betas": torch.zeros(3), "control_model.x": torch.zeros(3)})
    (note,) = open_source(single_file).warnings
    assert note.startswith(f"{single_file}: 1 tensor(s)") and "control_model.x" in note


@pytest.mark.parametrize("place", ["unet", f"unet/{UNET}"])
def test_a_bare_unet_is_a_folder_or_a_file(model, tiny_model, place):
    source = open_source(model / place)
    assert (source.kind, source.folder, source.prediction_type) == ("unet", None, None)
    assert source.components.keys() == {"unet"}
    assert equal(read(source, "unet"), load_file(tiny_model / "unet" / UNET))


def test_the_weights_of_a_bare_unets_folder_are_chosen_as_a_pipelines(model):
    assert equal(read(open_source(model / "unet", weights="raw"), "unet"), load_file(model / "unet" / UNET_RAW))
    assert open_source(model / "unet", variant="non_ema").files == (model / "unet" / UNET_RAW,)
    with pytest.raises(ModelError, match="variant fp16"):
        open_source(model / "unet", variant="fp16")


@pytest.mark.parametrize("kind", ["single", "unet"])
def test_layout_from_gives_the_configurations(model, single_file, kind):
    edit(model / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    source = open_source(single_file if kind == "single" else model / "unet", layout_from=str(model))
    assert (source.folder, source.prediction_type) == (model, "v_prediction")


def test_layout_from_may_be_a_hub_name(single_file, hub_cache):
    source = open_source(single_file, layout_from="org/name", cache_dir=str(hub_cache))
    assert source.folder.name == "0" * 40


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin"])
def test_a_pickle_is_refused_with_a_command_that_converts_it(tmp_path, name):
    path = tmp_path / name
    weight = torch.arange(6.0).reshape(2, 3)
    state = OrderedDict(weight=weight, turned=weight.T, shared=weight, step=3)
    torch.save({"state_dict": state, "epoch": 1, "pytorch-lightning_version": "1.4.2"}, path)
    with pytest.raises(ModelError, match="is a pickle") as problem:
        open_source(path)
    assert str(problem.value).startswith(str(path)) and not path.with_suffix(".safetensors").exists()
    (command,) = [line.strip() for line in str(problem.value).splitlines() if line.strip().startswith("python -c ")]
    exec(shlex.split(command)[2], {})
    converted = load_file(tmp_path / "model.safetensors")
    assert equal(converted, {"weight": weight, "turned": weight.T, "shared": weight})


def test_a_part_that_is_only_there_as_a_pickle_is_refused_with_that_command(model):
    (model / "vae" / UNET).rename(model / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.bin is a pickle[\s\S]*torch\.load"):
        open_source(model)


@pytest.mark.parametrize("place", ["folder", "file", "checkpoint", "other name"])
def test_a_lora_is_to_be_fused(tmp_path, place):
    tensors = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 2)}
    kohya = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)}
    write(tmp_path / "lora/pytorch_lora_weights.safetensors", tensors)
    write(tmp_path / "checkpoint-1/lora/pytorch_lora_weights.safetensors", tensors)
    (tmp_path / "checkpoint-1/training_state.json").write_text('{"args": {}}')
    write(tmp_path / "style.safetensors", kohya)
    named = {
        "folder": tmp_path / "lora",
        "file": tmp_path / "lora/pytorch_lora_weights.safetensors",
        "checkpoint": tmp_path / "checkpoint-1",
        "other name": tmp_path / "style.safetensors",
    }[place]
    with pytest.raises(ModelError, match=rf"^{named} is a LoRA.*merge_checkpoints\.py fuse"):
        open_source(named)


def broken_header(model):
    (model / "unet" / UNET).write_bytes(b"\xff" * 100)


def cut_file(model):
    content = (model / "unet" / UNET).read_bytes()
    (model / "unet" / UNET).write_bytes(content[:-1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (broken_header, r"unet/diffusion_pytorch_model\.safetensors is broken"),
        (cut_file, r"unet/diffusion_pytorch_model\.safetensors is broken"),
        (lambda model: shutil.rmtree(model / "vae"), "model lacks the weights of its vae"),
        (lambda model: shutil.rmtree(model / "scheduler"), r"model: .*scheduler_config\.json cannot be read"),
        (lambda model: (model / "model_index.json").write_text("{"), r"model: .*model_index\.json cannot be read"),
        (lambda model: (model / "model_index.json").write_text("[]"), r"model: .*model_index\.json does not hold"),
        (
            lambda model: edit(model / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "model is a StableDiffusionXLPipeline; what can be merged is .*StableDiffusionPipeline",
        ),
    ],
)
def test_a_pipeline_that_is_not_whole_or_of_another_kind_is_refused(model, spoil, said):
    spoil(model)
    with pytest.raises(ModelError, match=said):
        open_source(model)


def single_of(**tensors):
    return lambda folder: write(folder / "m.safetensors", {key: torch.zeros(2) for key in tensors}) or "m.safetensors"


def folder_of(*names):
    def make(folder):
        for name in names:
            (folder / name).mkdir(parents=True)
        return "."

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: "nowhere", "nowhere: there is no such file or folder"),
        (lambda folder: "nowhere.safetensors", "there is no such file or folder"),
        (folder_of(), "is no model: .*the folder is empty"),
        (folder_of("checkpoint-10", "checkpoint-5"), r"name one of its checkpoints \(checkpoint-10, checkpoint-5\)"),
        (single_of(**{"encoder.weight": 0}), "neither a single file of SD 1.x or 2.x .*encoder.weight"),
        (single_of(**{"first_stage_model.conv_in.weight": 0}), "holds no UNet"),
        (single_of(**{"conditioner.embedders.0.x": 0}), "Stable Diffusion XL"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path, make, said):
    path = tmp_path / make(tmp_path)
    with pytest.raises(ModelError, match=said) as problem:
        open_source(path)
    assert str(problem.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("model", {"revision": "v2"}),
        ("single.safetensors", {"variant": "fp16"}),
        ("run/checkpoint-7", {"variant": "a"}),
    ],
)
def test_options_that_do_not_go_with_the_kind_are_refused(model, single_file, checkpoint, tmp_path, name, option):
    with pytest.raises(ModelError, match=rf"{name} .*leave the {next(iter(option))} {next(iter(option.values()))} out"):
        open_source(tmp_path / name, **option)


def test_a_layout_that_is_no_pipeline_is_refused(single_file, model):
    with pytest.raises(ModelError, match=r"--layout_from .*unet has no model_index\.json"):
        open_source(single_file, layout_from=str(model / "unet"))
