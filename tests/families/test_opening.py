"""Models of every kind that a person may name open alike, and what is damaged, foreign or incomplete is refused."""

import json
import re
import shlex
import shutil
from collections import OrderedDict
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source, open_tokenizer
from finetuning.families.original import original_names, place
from finetuning.families.pipelines import open_pipeline
from finetuning.families.table import DEFAULT_FAMILY

UNET = "diffusion_pytorch_model.safetensors"
UNET_RAW = "diffusion_pytorch_model.non_ema.safetensors"
UNET_FP16 = "diffusion_pytorch_model.fp16.safetensors"
TEXT = "model.safetensors"
FILES = {"unet": UNET, "text_encoder": TEXT, "vae": UNET}


def weights(module):
    return module.state_dict() if hasattr(module, "state_dict") else module


def equal(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def file_of(path):
    return {key.removeprefix("text_model."): value for key, value in load_file(path).items()}


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata={"format": "pt"})


def change(path, edit):
    """Write the tensors of a file again after `edit` has changed their dict."""
    tensors = load_file(path)
    edit(tensors)
    write(path, tensors)


def shifted(tensors, by):
    return {key: value + by for key, value in tensors.items()}


def edit_json(path, **changes):
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
def model(copied):
    return copied


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


def started_from(checkpoint, **args):
    state = json.loads((checkpoint / "training_state.json").read_text())
    edit_json(checkpoint / "training_state.json", args=state["args"] | args)


@pytest.fixture
def single_file(tiny_model, tmp_path):
    """tiny_model in the original layout."""
    tensors = {}
    for name, file in FILES.items():
        own = file_of(tiny_model / name / file)
        component = DEFAULT_FAMILY.by_name[name]
        places = [place(component, key, file, own[key].shape) for key, file in original_names(component, own).items()]
        tensors |= {at.key: value.reshape(at.shape) for at, value in zip(places, own.values(), strict=True)}
    write(tmp_path / "single.safetensors", tensors)
    return tmp_path / "single.safetensors"


# -- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("ema", UNET), ("raw", UNET_RAW)])
def test_a_pipeline_folder_gives_all_its_components(tiny_model, kind, name):
    source = open_source(str(tiny_model), weights=kind)
    assert (source.given, source.folder, source.kind) == (str(tiny_model), tiny_model, "pipeline")
    assert source.objective == "epsilon" and source.warnings == ()
    files = FILES | {"unet": name}
    assert set(source.files) == {tiny_model / one / file for one, file in files.items()}
    for one, file in files.items():
        module = source.open(one)
        assert equal(module, file_of(tiny_model / one / file)) and not module.training
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("name", FILES)
def test_a_component_opened_twice_is_two_modules(tiny_model, name):
    source = open_source(tiny_model)
    first, second = source.open(name), source.open(name)
    with torch.no_grad():
        for weight in first.parameters():
            weight.zero_()
    if name != "text_encoder":
        first.register_to_config(sample_size=1)
        assert second.config.sample_size == source.check(name).config.sample_size != 1
    assert not equal(first, second)
    assert all(weight.is_meta for weight in source.check(name).parameters())


def test_a_module_does_what_the_libraries_own_does(tiny_model):
    source = open_source(tiny_model)
    component = source.family.by_name["text_encoder"]
    theirs, ours = component.cls.from_pretrained(tiny_model / "text_encoder"), source.open("text_encoder")
    tokens = source.tokenizer()(["a circle"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ours(tokens)[0], theirs(tokens)[0])
    assert source.open("unet", torch.bfloat16).dtype == torch.bfloat16


def older_names(tensors):
    """A text encoder's as transformers 4 wrote them, an autoencoder's as diffusers did before 0.12."""
    if "embeddings.token_embedding.weight" in tensors:
        text = {f"text_model.{key}": value for key, value in tensors.items()}
        return text | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    return {re.sub("|".join(older), lambda found: older[found[0]], key): value for key, value in tensors.items()}


@pytest.mark.parametrize("renamed", [dict, older_names])
@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_weights_under_the_names_of_older_and_newer_libraries_are_the_same(model, name, renamed):
    expected = file_of(model / name / FILES[name])
    assert (renamed(expected).keys() == expected.keys()) == (renamed is dict)
    write(model / name / FILES[name], renamed(expected))
    assert equal(open_source(model).open(name), expected)


@pytest.mark.parametrize("saved", ["v_prediction", "epsilon", None])
def test_what_a_pipeline_predicts_is_in_its_scheduler(model, saved):
    path = model / "scheduler/scheduler_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "prediction_type"}
    path.write_text(json.dumps(config | ({"prediction_type": saved} if saved else {})))
    source = open_source(model)
    assert source.objective == source.scheduler().config.prediction_type == (saved or "epsilon")


def test_components_without_the_variant_are_taken_without(model):
    half = {key: value.half() for key, value in load_file(model / "unet" / UNET).items()}
    write(model / "unet" / UNET_FP16, half)
    source = open_source(model, variant="fp16", weights="raw")
    assert equal(source.open("unet", torch.float16), half)
    assert equal(source.open("vae"), load_file(model / "vae" / UNET))
    with pytest.raises(ModelError, match="variant bf16"):
        open_source(model, variant="bf16")


def test_a_variant_that_is_the_only_one_is_taken_and_one_of_two_is_asked_for(model):
    expected = load_file(model / "unet" / UNET_RAW)
    (model / "unet" / UNET).unlink()
    assert equal(open_source(model).open("unet"), expected)
    write(model / "unet" / UNET_FP16, expected)
    with pytest.raises(ModelError, match="fp16 or non_ema"):
        open_source(model)


@pytest.mark.parametrize(("name", "file", "kind"), [("unet", UNET, "ema"), ("unet", UNET_RAW, "raw"),
                                                    ("text_encoder", TEXT, "ema")])  # fmt: skip
def test_shards_are_read_as_one(model, name, file, kind):
    expected = file_of(model / name / file)
    shards = split(model / name / file)
    source = open_source(model, weights=kind)
    assert equal(source.open(name), expected)
    assert {path.name for path in source.components[name].files} == set(shards)
    (model / name / shards[0]).unlink()
    with pytest.raises(ModelError, match=re.escape(shards[0])):
        open_source(model, weights=kind)


def test_weights_that_are_not_wanted_may_be_missing(model):
    (model / "unet" / UNET).unlink()
    (model / "unet" / UNET_RAW).unlink()
    source = open_source(model, without_weights=("unet",))
    assert source.components.keys() == {"text_encoder", "vae"} and source.folder == model


def test_nothing_but_headers_is_read(model, monkeypatch):
    monkeypatch.setattr("finetuning.families.tensors.TensorReference.read", None)
    source = open_source(model)
    assert source.components.keys() == FILES.keys()
    assert all(source.check(name) for name in FILES)


def test_pipelines_of_the_same_components_are_taken_only_where_asked(model):
    edit_json(model / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    assert open_source(model, relatives=True).class_name == "StableDiffusionInpaintPipeline"
    with pytest.raises(ModelError, match="is a StableDiffusionInpaintPipeline"):
        open_source(model)


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "by"), [(None, 0), ("v2", 1)])
def test_a_hub_name_is_found_in_the_cache(hub_cache, tiny_model, revision, by):
    source = open_source("org/name", revision=revision, cache_dir=str(hub_cache))
    assert source.given == "org/name" and source.folder.name == str(by) * 40 and source.kind == "pipeline"
    assert equal(source.open("unet"), shifted(load_file(tiny_model / "unet" / UNET), by))
    raw = open_source("org/name", revision=revision, cache_dir=str(hub_cache), weights="raw")
    assert equal(raw.open("unet"), load_file(tiny_model / "unet" / UNET_RAW))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"unet/m", "vae/m", "text_encoder/m", "safety_checker/m"}),
        ({"weights": "raw"}, {"unet/m.non_ema", "vae/m", "text_encoder/m", "safety_checker/m"}),
        ({"variant": "fp16"}, {"unet/m.fp16", "vae/m", "text_encoder/m", "safety_checker/m.fp16"}),
        ({"only": ("unet", "vae")}, {"unet/m", "vae/m"}),
    ],
)
def test_of_the_hub_no_more_is_fetched_than_is_needed(tmp_path, monkeypatch, model, options, expected):
    """The Hub is a folder here, from which a fetch copies the files that its patterns name."""
    there, here = model, tmp_path / "here"
    edit_json(there / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (there / "safety_checker").mkdir()
    (there / "safety_checker/config.json").write_text("{}")
    for name in ("unet/diffusion_pytorch_model.fp16", "safety_checker/model", "safety_checker/model.fp16", "one"):
        write(there / f"{name}.safetensors", {"x": torch.zeros(1)})
    (there / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")

    def fetch(name, revision, cache_dir, allow_patterns):
        for path in (path for path in there.rglob("*") if path.is_file()):
            if any(fnmatch(str(path.relative_to(there)), pattern) for pattern in allow_patterns):
                (here / path.relative_to(there)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, here / path.relative_to(there))
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    open_source("org/name", **options)
    found = {str(path.relative_to(here)) for path in here.rglob("*") if path.suffix in (".safetensors", ".bin")}
    short = {re.sub(r"(diffusion_pytorch_)?model", "m", name).removesuffix(".safetensors") for name in found}
    assert short == expected
    assert all((here / "tokenizer" / name).is_file() for name in ("vocab.json", "merges.txt"))


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v3")])
def test_what_the_cache_lacks_is_named(hub_cache, name, revision):
    with pytest.raises(ModelError, match=f"^{name}.*{revision or ''}"):
        open_source(name, revision=revision, cache_dir=str(hub_cache))


# -- checkpoints of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "folder", "by"), [("ema", "unet_ema", 2), ("raw", "unet", 1)])
def test_a_checkpoint_has_its_own_unet_and_the_rest_of_its_base(checkpoint, tiny_model, kind, folder, by):
    source = open_source(checkpoint, weights=kind)
    assert (source.kind, source.folder, source.objective) == ("checkpoint", tiny_model, "epsilon")
    assert equal(source.open("unet"), shifted(load_file(tiny_model / "unet" / UNET), by))
    assert equal(source.open("text_encoder"), file_of(tiny_model / "text_encoder" / TEXT))
    assert source.components["unet"].config == checkpoint / folder
    assert source.files[0] == checkpoint / folder / UNET and len(source.files) == 3
    shutil.rmtree(checkpoint / "unet_ema")  # without an average it gives what it has
    assert equal(open_source(checkpoint).open("unet"), shifted(load_file(tiny_model / "unet" / UNET), 1))


def test_a_trained_text_encoder_and_prediction_type_are_the_checkpoints(checkpoint, tiny_model):
    shutil.copytree(tiny_model / "text_encoder", checkpoint / "text_encoder_ema")
    trained = shifted(load_file(tiny_model / "text_encoder" / TEXT), 3)
    write(checkpoint / "text_encoder_ema" / TEXT, trained)
    started_from(checkpoint, prediction_type="v_prediction")
    source = open_source(checkpoint)
    assert equal(source.open("text_encoder"), {key.removeprefix("text_model."): v for key, v in trained.items()})
    assert source.objective == source.scheduler().config.prediction_type == "v_prediction"
    assert tiny_model / "text_encoder" / TEXT not in source.files


def test_untrained_components_are_those_that_the_run_loaded_or_those_of_base(checkpoint, model, tiny_model):
    write(model / "text_encoder/model.non_ema.safetensors", shifted(load_file(model / "text_encoder" / TEXT), 5))
    change(model / "vae" / UNET, lambda tensors: tensors.update(shifted(tensors, 1)))
    expected = file_of(model / "text_encoder" / TEXT)
    assert equal(open_source(checkpoint, base=model).open("vae"), load_file(model / "vae" / UNET))
    started_from(checkpoint, pretrained_model_name_or_path=str(model))
    assert equal(open_source(checkpoint, weights="raw").open("text_encoder"), expected)


def test_a_run_from_the_hub_is_found_with_its_revision(checkpoint, hub_cache):
    started_from(checkpoint, pretrained_model_name_or_path="org/name", revision="v2", cache_dir=str(hub_cache))
    assert open_source(checkpoint).folder.name == "1" * 40


def test_a_checkpoint_whose_base_is_gone_has_its_own_components_and_says_so(checkpoint, tiny_model):
    started_from(checkpoint, pretrained_model_name_or_path="gone/away")
    source = open_source(checkpoint)
    assert source.components.keys() == {"unet"} and (source.folder, source.objective) == (None, None)
    assert "gone/away" in source.warnings[0] and source.open("unet")
    for missing in (lambda: source.open("vae"), source.tokenizer, source.scheduler):
        with pytest.raises(ModelError, match="gone/away"):
            missing()
    assert open_source(checkpoint, base=str(tiny_model)).open("vae")


# -- single files and bare UNets -------------------------------------------------------------------------------------


def test_a_single_file_is_the_pipeline_it_was_made_of(single_file, tiny_model, hub_cache):
    source, pipeline = open_source(single_file, base=str(tiny_model)), open_source(tiny_model)
    assert (source.kind, source.folder, source.files) == ("original", tiny_model, (single_file,))
    assert all(equal(source.open(name), pipeline.open(name)) for name in FILES)
    of_the_hub = open_source(single_file, base="org/name", cache_dir=str(hub_cache))
    assert of_the_hub.folder.name == "0" * 40
    alone = open_source(single_file)
    assert (alone.folder, alone.objective) == (None, None)
    for missing in (lambda: alone.open("unet"), alone.tokenizer):
        with pytest.raises(ModelError, match="--base"):
            missing()


def test_what_a_single_file_holds_besides_is_said(single_file):
    change(single_file, lambda tensors: tensors.update({"betas": torch.zeros(3), "control_model.x": torch.zeros(3)}))
    (warning,) = open_source(single_file).warnings
    assert warning.startswith(f"{single_file}: 1 tensors") and "control_model.x" in warning


@pytest.mark.parametrize("place", ["unet", f"unet/{UNET}"])
def test_a_bare_unet_is_a_folder_or_a_file(model, tiny_model, place):
    source = open_source(model / place)
    assert (source.kind, source.folder, source.objective) == ("unet", None, None)
    assert source.components.keys() == {"unet"}
    edit_json(model / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    source = open_source(model / place, base=str(model))
    assert (source.folder, source.objective) == (model, "v_prediction")
    assert equal(source.open("unet"), load_file(tiny_model / "unet" / UNET)) and source.open("vae")
    for options in ({"weights": "raw"}, {"variant": "non_ema"}):  # of a folder they are chosen as a pipeline's
        assert open_source(model / "unet", **options).files == (model / "unet" / UNET_RAW,)

    with pytest.raises(ModelError, match="variant fp16"):
        open_source(model / "unet", variant="fp16")


# -- what is damaged: one line with the file -------------------------------------------------------------------------


def of_weights(edit, name="unet"):
    """Damage done to the tensors of a component: (what it does to a pipeline folder, the file)."""
    return (lambda model: change(model / name / FILES[name], edit)), f"{name}/{FILES[name]}"


def of_bytes(damage, file=f"unet/{UNET}"):
    return (lambda model: (model / file).write_bytes(damage((model / file).read_bytes()))), file


def replaced(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key]) if callable(value) else value})


def of_json(file, **changes):
    return (lambda model: edit_json(model / file, **changes)), file


def without(file):
    return lambda model: (model / file).unlink()


def emptied(name):
    return lambda model: [path.unlink() for path in (model / name).iterdir()]


def to_bin(name):
    return lambda model: (model / name / FILES[name]).rename(model / name / "diffusion_pytorch_model.bin")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n"
DAMAGED = {
    "missing tensor": (*of_weights(lambda tensors: tensors.pop("conv_in.bias")), "conv_in.bias"),
    "missing in text encoder": (
        *of_weights(lambda t: t.pop("text_model.final_layer_norm.bias"), "text_encoder"), "final_layer_norm.bias",
    ),
    "missing in vae": (*of_weights(lambda tensors: tensors.pop("decoder.conv_in.bias"), "vae"), "decoder.conv_in.bias"),
    "extra tensor": (*of_weights(replaced("more.weight", torch.zeros(2))), "more.weight"),
    "other shape": (*of_weights(replaced("conv_in.weight", lambda one: one[:4])), "conv_in.weight"),
    "tensor twice": (
        *of_weights(replaced("final_layer_norm.bias", torch.zeros(16)), "text_encoder"), "final_layer_norm.bias",
    ),
    "NaN": (*of_weights(replaced("conv_in.bias", lambda one: one * float("nan"))), "conv_in.bias"),
    "infinite": (*of_weights(replaced("quant_conv.bias", lambda one: one + float("inf")), "vae"), "quant_conv.bias"),
    "quantised to 4 bits": (*of_weights(replaced("conv_in.weight.absmax", torch.zeros(2))), "quantised"),
    "quantised to 8 bits": (*of_weights(replaced("conv_in.weight", lambda one: one.to(torch.int8))), "quantised"),
    "quantised by its config": (*of_json("unet/config.json", quantization_config={"load_in_4bit": True}), "quantised"),
    "adapters inside": (
        *of_weights(lambda tensors: tensors.update({"conv_in.base_layer.bias": tensors.pop("conv_in.bias")})),
        "adapters",
    ),
    "pickle only": (to_bin("vae"), "vae/diffusion_pytorch_model.bin", "torch.load"),
    "LFS pointer": (*of_bytes(lambda _: LFS), "git lfs pull"),
    "LFS pointer for JSON": (*of_bytes(lambda _: LFS, "unet/config.json"), "git lfs pull"),
    "cut": (*of_bytes(lambda content: content[:-1]), "again"),
    "cut header": (*of_bytes(lambda content: content[:100]), "again"),
    "empty": (*of_bytes(lambda _: b""), "empty"),
    "no safetensors": (*of_bytes(lambda _: b"\xff" * 100), "again"),
    "broken config": (*of_bytes(lambda content: content[:-3], "text_encoder/config.json"), "JSON"),
    "wrong config": (*of_json("unet/config.json", block_out_channels="many"), "cannot be used"),
    "config of another class": (*of_json("unet/config.json", _class_name="UNet2DModel"), "UNet2DModel"),
    "no config": (without("vae/config.json"), "vae/config.json", "cannot be read"),
    "no weights": (without(f"vae/{UNET}"), "", "vae"),
    "no component": (lambda model: shutil.rmtree(model / "vae"), "", "vae"),
    "broken index": (*of_bytes(lambda _: b"{", "model_index.json"), "JSON"),
    "index that is none": (*of_bytes(lambda _: b"[]", "model_index.json"), "model_index.json"),
    "broken scheduler": (*of_bytes(lambda _: b"", "scheduler/scheduler_config.json"), "JSON"),
    "unknown scheduler": (of_json("model_index.json", scheduler=["diffusers", "No"])[0], "", "scheduler No"),
    "another pipeline": (
        of_json("model_index.json", _class_name="LatentConsistencyModelPipeline")[0], "",
        "is a LatentConsistencyModelPipeline; what can be used here is StableDiffusionPipeline",
    ),
    "empty tokenizer": (emptied("tokenizer"), "tokenizer", "no tokenizer"),
    "broken tokenizer": (*of_bytes(lambda content: content[:50], "tokenizer/tokenizer_config.json"), "JSON"),
    "no tokenizer": (of_json("model_index.json", tokenizer=["transformers", "CLIPModel"])[0], "tokenizer", "CLIPModel"),
    "endless tokenizer": (*of_json("tokenizer/tokenizer_config.json", model_max_length=None), "model_max_length"),
    "inpainting under another name": (
        lambda model: (change(model / f"unet/{UNET}", replaced("conv_in.weight", torch.zeros(8, 9, 3, 3))),
                       edit_json(model / "unet/config.json", in_channels=9)), "", "9 channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_foreign_or_incomplete_is_one_line_with_its_file(model, case):
    damage, file, word = DAMAGED[case]
    damage(model)
    with pytest.raises(ModelError) as error:
        open_pipeline(model)
    message = str(error.value)
    assert str(model / file) in message and word in message
    assert "\n" not in message or case == "pickle only"


def test_single_files_and_checkpoints_are_checked_too(single_file, checkpoint, tiny_model):
    change(single_file, lambda tensors: tensors.pop("first_stage_model.decoder.conv_in.bias"))
    with pytest.raises(ModelError, match=r"decoder\.conv_in\.bias"):
        open_pipeline(single_file, base=tiny_model)
    change(checkpoint / "unet_ema" / UNET, lambda tensors: tensors.pop("conv_in.bias"))
    with pytest.raises(ModelError, match=r"conv_in\.bias"):
        open_pipeline(checkpoint)


def test_a_component_that_is_only_copied_must_have_weights_that_are_read(model):
    edit_json(model / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (model / "safety_checker").mkdir()
    (model / "safety_checker/config.json").write_text("{}")
    with pytest.raises(ModelError, match="safety_checker"):
        open_source(model)
    (model / "safety_checker/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"safety_checker/model\.safetensors"):
        open_source(model)
    assert open_pipeline(model).safety_checker is None  # which needs none


@pytest.mark.parametrize("files", [("vocab.json",), ("tokenizer.json", "merges.txt")])
def test_a_tokenizer_needs_its_words(model, files):
    keep = [model / "tokenizer" / name for name in ("tokenizer_config.json", "vocab.json", "merges.txt")]
    for path in (model / "tokenizer").iterdir():
        if path not in keep or path.name in files:
            path.unlink()
    with pytest.raises(ModelError, match=str(model / "tokenizer")):
        open_tokenizer(model / "tokenizer")


# -- what is no model ------------------------------------------------------------------------------------------------


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


def tensors_named(*names):
    return lambda folder: write(folder / "m.safetensors", {key: torch.zeros(2) for key in names}) or "m.safetensors"


def files_named(*names):
    """Make files, or folders where a name ends with a slash; the model is the folder of the first."""

    def make(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("{}")
        return Path(names[0]).parts[0] if names else "."

    return make


LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda folder: "nowhere", "no such file or folder"),
        (lambda folder: "nowhere.safetensors", "no such file or folder"),
        (files_named(), "is empty"),
        (lambda folder: files_named("run/checkpoint-10/", "run/checkpoint-5/")(folder), "checkpoint-10, checkpoint-5"),
        (files_named("run/training_state.json"), "no trained unet"),
        (files_named("notes.txt"), "not a .safetensors file"),
        (tensors_named("encoder.weight"), "encoder.weight"),
        (tensors_named("first_stage_model.conv_in.weight"), "no UNet"),
        (tensors_named("conditioner.embedders.0.model.x"), "Stable Diffusion XL"),
        (tensors_named("conv_in.base_layer.weight", "conv_in.lora_A.default.weight"), "adapters"),
        (tensors_named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "fuse"),
        (files_named(LORA), "fuse"),
        (files_named(f"run/{LORA}"), "fuse"),
        (files_named("run/kohya_lora_weights.safetensors"), "fuse"),
        (files_named(f"checkpoint-1/lora/{LORA}", "checkpoint-1/training_state.json"), "fuse"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path, make, word):
    path = tmp_path / make(tmp_path)
    for options in ({}, {"weights": "raw"}):
        with pytest.raises(ModelError) as problem:
            open_source(path, **options)
        assert str(problem.value).startswith(str(path)) and word in str(problem.value)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("model", {"revision": "v2"}, "v2"),
        ("single.safetensors", {"variant": "fp16"}, "fp16"),
        ("run/checkpoint-7", {"variant": "a"}, "variant a"),
        ("run/checkpoint-7", {"kinds": ("pipeline",)}, "--resume_from_checkpoint"),
        ("single.safetensors", {"kinds": ("pipeline",)}, "model_index.json"),
        ("single.safetensors", {"base": "run/checkpoint-7"}, "model_index.json"),
    ],
)
def test_options_that_do_not_go_with_the_kind_are_refused(
    model, single_file, checkpoint, tmp_path, name, options, word, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=word):
        open_source(name, **options)
