"""Results on disk: precision, what stands beside the weights, room, and that they are whole or not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source
from finetuning.files import write_json
from finetuning.merging.methods import weighted_sum
from finetuning.merging.model_writer import MergeOutput, OutputArgs, write_models
from finetuning.merging.tensor_matching import match

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def unet(tmp_path):
    """unet(name, dtype, value) makes a folder that looks like a UNet's; returns its Source."""

    def make(name, dtype=torch.float32, value=1.0):
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "config.json", {"name": name})
        tensors = {"conv_in.weight": torch.full((2, 3), value), "down_blocks.0.bias": torch.full((4,), value)}
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / WEIGHTS)
        return open_source(str(folder))

    return make


@pytest.fixture
def write(tmp_path):
    """write(sources, *outputs) with the weighted sum of all tensors; returns the lines to print."""

    def run(sources, *outputs, dtype=None, single_file=False, on_mismatch=None, **options):
        matches, _ = match(sources, None, on_mismatch)
        args = OutputArgs(output_dir=str(tmp_path / "out"), dtype=dtype, single_file=single_file)
        outputs = outputs or [output(tmp_path / "out")]
        return write_models("merge", outputs, sources, matches, args, **options)

    return run


def output(target, ratio=0.5, compute=None):
    compute = compute or (lambda *inputs, out: weighted_sum(*inputs, ratio=ratio, out=out))
    return MergeOutput(target, lambda one: compute, {"ratio": [ratio], "output_dir": str(target)})


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("kinds", "dtype", "written"), [
    (["float16", "float16"], None, "float16"), (["float16", "float32"], None, "float32"),
    (["bfloat16", "float16"], None, "float32"),  # neither holds the other
    (["float32", "float64"], None, "float64"), (["float8_e4m3fn", "float8_e4m3fn"], None, "float8_e4m3fn"),
    (["float8_e4m3fn", "float16"], None, "float32"), (["float64", "float16"], "bf16", "bfloat16"),
])  # fmt: skip
def test_precision_is_the_finest_of_the_inputs_or_as_asked(unet, write, tmp_path, kinds, dtype, written):
    base, tuned = (unet(f"{place} {kind}", getattr(torch, kind), place + 1.0) for place, kind in enumerate(kinds))
    write([base, tuned], dtype=dtype)
    found = load_file(tmp_path / "out" / WEIGHTS)["conv_in.weight"]
    assert found.dtype == getattr(torch, written) and (found.float() == 1.5).all()


def test_compute_gets_whole_tensors_where_it_wants_them(unet, write, tmp_path):
    shapes = []

    def compute(base, tuned, out):
        shapes.append(tuple(base.shape))
        out.view(base.shape).copy_(tuned)

    write([unet("base"), unet("tuned")], output(tmp_path / "out", compute=compute), whole=True)
    assert sorted(shapes) == [(2, 3), (4,)]


@pytest.fixture
def pipeline(tiny_model, tmp_path):
    """A copy of tiny_model with a safety checker as a variant only, pickles, and a checkpoint of a run inside."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "pipeline"))
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"safety_checker": ["a", "B"], "image_encoder": [None, None]})
    (folder / "safety_checker").mkdir()
    save_file({"a": torch.ones(3)}, folder / "safety_checker/model.fp16.safetensors")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "checkpoint-1/unet").mkdir(parents=True)
    (folder / "checkpoint-1/unet" / WEIGHTS).write_bytes(bytes(1 << 20))
    return folder


def test_pipeline_has_all_that_its_index_names_and_nothing_else(tiny_model, pipeline, write, tmp_path):
    write([open_source(str(pipeline)), open_source(str(tiny_model))])
    expected = {name for name in names(tiny_model) if ".non_ema." not in name}
    expected |= {"merge.json", "manifest.json", "safety_checker/model.safetensors"}
    assert set(names(tmp_path / "out")) == expected
    for name in expected - {"merge.json", "manifest.json"}:
        if name.endswith(".json") or name.startswith("vae"):
            assert (tmp_path / "out" / name).read_bytes() == (pipeline / name).read_bytes()


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"dtype": "bf16", "single_file": True}])
def test_with_a_precision_of_its_own_every_part_is_written(tiny_model, write, tmp_path, options):
    write([open_source(str(tiny_model))] * 2, **options)
    kinds = {value.dtype for path in (tmp_path / "out").rglob("*.safetensors") for value in load_file(path).values()}
    assert kinds == {{"fp16": torch.float16, "bf16": torch.bfloat16}[options["dtype"]]}


@pytest.mark.parametrize("changes", [
    {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
])  # fmt: skip
def test_scheduler_says_what_the_trained_unet_predicts(changes, tiny_model, write, tmp_path):
    run = tmp_path / "run/checkpoint-3"
    shutil.copytree(tiny_model / "unet", run / "unet", ignore=shutil.ignore_patterns("*.non_ema.*"))
    args = {"pretrained_model_name_or_path": str(tiny_model), **changes}
    write_json(run / "training_state.json", {"args": args})
    write([open_source(str(run))] * 2)
    written = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    start = json.loads((tiny_model / "scheduler/scheduler_config.json").read_text())
    if "rescale_betas_zero_snr" in changes:
        start |= {"timestep_spacing": "trailing"}
    assert written == start | changes != start


def test_tensors_that_no_configuration_describes_are_refused(unet, write, tmp_path):
    base, wide = unet("base"), unet("wide")
    tensors = load_file(tmp_path / "wide" / WEIGHTS) | {"conv_in.weight": torch.ones(2, 9)}
    save_file(tensors, tmp_path / "wide" / WEIGHTS)
    (tmp_path / "wide/config.json").unlink()
    wide = open_source(str(tmp_path / "wide" / WEIGHTS))
    with pytest.raises(ModelError, match=r"wide.* has no configuration of its unet .*\n--layout_from"):
        write([base, wide], on_mismatch="tuned")
    write([base, wide], on_mismatch="base")
    assert load_file(tmp_path / "out" / WEIGHTS)["conv_in.weight"].shape == (2, 3)


@pytest.fixture
def inpainting(tiny_model, tmp_path):
    """A copy of tiny_model whose UNet takes 9 channels, as an inpainting pipeline."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "inpainting"))
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"_class_name": "StableDiffusionInpaintPipeline"})
    tensors = load_file(folder / "unet" / WEIGHTS)
    save_file(tensors | {"conv_in.weight": torch.ones(8, 9, 3, 3)}, folder / "unet" / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("on_mismatch", "name"), [("tuned", "StableDiffusionInpaintPipeline"), ("base", "StableDiffusionPipeline")]
)
def test_a_pipeline_is_of_the_class_that_its_unet_was_made_for(
    tiny_model, inpainting, write, tmp_path, on_mismatch, name
):
    write([open_source(str(tiny_model)), open_source(str(inpainting), relatives=True)], on_mismatch=on_mismatch)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index == json.loads((tiny_model / "model_index.json").read_text()) | {"_class_name": name}


def test_a_bare_unet_of_other_channels_does_not_say_which_class_and_is_refused(tiny_model, inpainting, write, tmp_path):
    with pytest.raises(ModelError, match=r"9 input channels.*name its whole pipeline"):
        write([open_source(str(tiny_model)), open_source(str(inpainting / "unet"))], on_mismatch="tuned")
    assert not (tmp_path / "out").exists()


def test_all_places_that_are_taken_are_named_before_anything_is_read(unet, write, tmp_path):
    sources = [unet("base"), unet("tuned")]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for source in sources:
        source.files[0].write_bytes(b"")
    places = [output(tmp_path / name) for name in ("taken", "tuned", "empty", "base/new")]
    with pytest.raises(ModelError) as refusal:
        write(sources, *places)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3
    assert all(str(path.target) in line for path, line in zip([*places[:2], places[3]], lines, strict=True))
    assert "notes.txt" in lines[0] and "is read" in lines[1] and "is read" in lines[2]


def test_what_was_read_besides_the_models_is_not_written_into(unet, write, tmp_path):
    sources = [unet("base"), unet("tuned")]
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError, match="run/average lies in"):
        write(sources, output(tmp_path / "run/average"), also_read=[tmp_path / "run"])


@pytest.mark.parametrize("manifest", ["{", "{}", None])
def test_folder_with_a_recipe_but_not_of_an_earlier_result_stays(unet, write, tmp_path, manifest):
    out = tmp_path / "out"
    out.mkdir()
    (out / "merge.json").write_text("{}")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    with pytest.raises(ModelError, match=r"no earlier result of this script \(m"):
        write([unet("base"), unet("tuned")])
