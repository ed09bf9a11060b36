"""merge_checkpoints.py as a user runs it: the models that come out, the recipe, the messages, and kills."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge_checkpoints
from finetuning.files import check_manifest, write_json
from finetuning.merging.methods import METHODS, Method

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def edit(model, file, change):
    """Put `change({name: tensor})` in the place of a weights file's tensors."""
    save_file(change(load_file(model / file)), model / file, metadata={"format": "pt"})


def without(*ends):
    """For edit: leave tensors out."""
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(ends)}


def with_value(name, *values):
    """For edit: let a tensor start with these values."""

    def change(tensors):
        tensors[name].view(-1)[: len(values)] = torch.tensor(values)
        return tensors

    return change


def as_dtype(dtype):
    """For edit: cast all tensors."""
    return lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}


@pytest.fixture
def copy(tmp_path):
    """copy(model, name) puts a copy of a model into the test's folder; returns it."""
    return lambda model, name: Path(shutil.copytree(model, tmp_path / name))


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory):
    """tiny_model trained on: all its weights have moved. Never write to it."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.non_ema.*"))
    generator = torch.Generator().manual_seed(1)

    move = lambda value: value + 0.05 * torch.randn(value.shape, generator=generator)
    for file in (UNET, TEXT_ENCODER, VAE):
        edit(folder, file, lambda tensors: {name: move(value) for name, value in tensors.items()})
    return folder


@pytest.fixture
def merged(tmp_path):
    """merged(*words) runs the script in this process, to a folder `out` unless the words say where; returns it."""

    def run(*words, out=tmp_path / "out"):
        assert merge_checkpoints.main([*map(str, words), "--output_dir", str(out)]) == 0
        return out

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(*words) is what the script says when it refuses; nothing below the test's folder has changed."""

    def run(*words, out=tmp_path / "out", status=1):
        before = listing(tmp_path)
        try:
            ended = merge_checkpoints.main([*map(str, words), *(["--output_dir", str(out)] if out else [])])
        except SystemExit as end:
            ended = end.code
        message = capsys.readouterr().err
        assert ended == status, message
        assert listing(tmp_path) == before
        return message

    return run


def listing(folder):
    """{path: content} of all that lies below a folder."""
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def below(folder):
    """The same with paths below the folder, to compare two."""
    return {path.relative_to(folder): content for path, content in listing(folder).items()}


def bits(tensor):
    """So that -0.0 is not 0.0, and NaN is itself."""
    return tensor.contiguous().view(torch.uint8)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


def assert_mixture(result, base, tuned, ratio):
    """Every tensor of `result` is base + ratio (tuned - base), to an ulp of the larger of the two."""
    assert result.keys() == base.keys()
    for name, value in result.items():
        start, end = base[name].double(), tuned[name].double()
        error = (value.double() - (start + ratio * (end - start))).abs()
        assert (error <= torch.finfo(value.dtype).eps * torch.maximum(start.abs(), end.abs())).all(), name


# -- the model that comes out ----------------------------------------------------------------------------------------


def test_result_loads_and_is_the_mixture(tiny_model, tuned, merged, tensors):
    out = merged("--base", tiny_model, "--tuned", tuned, "--ratio", 0.3)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    base, other, result = tensors(tiny_model), tensors(tuned), tensors(out)
    assert result.keys() == {UNET, TEXT_ENCODER, VAE}
    assert_mixture(pipeline.unet.state_dict(), base[UNET], other[UNET], 0.3)
    assert_mixture(result[TEXT_ENCODER], base[TEXT_ENCODER], other[TEXT_ENCODER], 0.3)
    loaded = {f"text_model.{name}": value for name, value in pipeline.text_encoder.state_dict().items()}
    assert same(loaded, result[TEXT_ENCODER])
    assert (out / VAE).read_bytes() == (tiny_model / VAE).read_bytes()
    assert pipeline.scheduler.config.beta_end == 0.012
    check_manifest(out)


@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
def test_ratio_0_is_base_and_ratio_1_is_tuned_to_the_last_bit(tiny_model, tuned, merged, tensors, method):
    parts = ["--components", "unet,text_encoder", "vae"]
    out = merged("--base", tiny_model, "--tuned", tuned, "--ratio", 0, 1, "--method", method, *parts)
    for ratio, model in enumerate((tiny_model, tuned)):
        found, expected = tensors(out / f"ratio-{ratio}"), tensors(model)
        assert all(same(result, expected[file]) for file, result in found.items()), ratio


def test_equal_models_come_out_as_they_were_also_minus_zero(tiny_model, copy, merged, tensors, capsys):
    model = copy(tiny_model, "model")
    edit(model, UNET, with_value("conv_in.bias", 0.0, -0.0, 1e-42, -1e-42))
    out = merged("--base", model, "--tuned", model, "--ratio", 0.3)
    assert f"{model} is merged with itself: the result is a copy" in capsys.readouterr().out
    assert tensors(out)[UNET]["conv_in.bias"][:2].signbit().tolist() == [False, True]
    for file, result in tensors(out).items():
        assert same(result, tensors(model)[file])


def test_ratios_of_one_run_are_those_of_runs_of_their_own(tiny_model, tuned, merged, tensors, tmp_path):
    models = ["--base", tiny_model, "--tuned", tuned]
    together = merged(*models, "--ratio", 0, 0.25, 0.7)
    assert sorted(path.name for path in together.iterdir()) == ["ratio-0", "ratio-0.25", "ratio-0.7"]
    for ratio in ("0", "0.25", "0.7"):
        alone = merged(*models, "--ratio", ratio, out=tmp_path / ratio)
        assert below(together / f"ratio-{ratio}") == below(alone)


def test_text_encoder_keys_of_transformers_4_and_5_are_the_same_tensors(tiny_model, tuned, copy, merged, tensors):
    renamed = copy(tuned, "renamed")
    bare = lambda tensors: {name.removeprefix("text_model."): value for name, value in tensors.items()}
    edit(renamed, TEXT_ENCODER, bare)
    old = tensors(merged("--base", tiny_model, "--tuned", tuned, out=renamed.parent / "old"))
    new = tensors(merged("--base", tiny_model, "--tuned", renamed, out=renamed.parent / "new"))
    assert same(old[TEXT_ENCODER], new[TEXT_ENCODER])
    assert all(name.startswith("text_model.") for name in new[TEXT_ENCODER])


# -- kinds of models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tuned, tmp_path_factory):
    """`tuned` as one file in the original layout."""
    out = tmp_path_factory.mktemp("original") / "out"
    words = ["--base", tuned, "--tuned", tuned, "--single_file", "--output_dir", out]
    assert merge_checkpoints.main(list(map(str, words))) == 0
    return out / "merged.safetensors"


def test_single_file_loads_and_holds_what_the_folder_holds(tiny_model, tuned, merged, tmp_path):
    models = ["--base", tiny_model, "--tuned", tuned, "--ratio", 0.4]
    file = merged(*models, "--single_file", out=tmp_path / "single") / "merged.safetensors"
    single = StableDiffusionPipeline.from_single_file(str(file), config=str(tiny_model), local_files_only=True)
    folder = StableDiffusionPipeline.from_pretrained(merged(*models))
    for part in ("unet", "text_encoder", "vae"):
        assert same(getattr(single, part).state_dict(), getattr(folder, part).state_dict()), part
    with safe_open(file, "pt") as content:
        shape = content.get_slice("first_stage_model.encoder.mid.attn_1.q.weight").get_shape()
    assert shape == [4, 4, 1, 1]
    assert sorted(path.name for path in file.parent.iterdir()) == ["manifest.json", "merge.json", "merged.safetensors"]


def test_single_file_is_as_good_an_input_as_the_folder(tiny_model, tuned, original, merged, tensors, tmp_path):
    words = ["--base", tiny_model, "--components", "unet", "text_encoder", "vae", "--tuned"]
    expected, found = (tensors(merged(*words, one, out=tmp_path / one.name)) for one in (tuned, original))
    assert all(same(found[file], expected[file]) for file in (UNET, TEXT_ENCODER, VAE))


def test_single_file_as_base_takes_configuration_and_tokenizer_from_layout(
    tiny_model, tuned, original, merged, tensors, tmp_path
):
    out = merged("--base", original, "--tuned", tiny_model, "--layout_from", tuned, "--ratio", 0.2)
    expected = tensors(merged("--base", tuned, "--tuned", tiny_model, "--ratio", 0.2, out=tmp_path / "expected"))
    assert all(same(result, expected[file]) for file, result in tensors(out).items())
    assert StableDiffusionPipeline.from_pretrained(out).tokenizer("a red circle")


@pytest.mark.parametrize("place", ["unet", UNET])
def test_bare_unet_as_base_gives_a_bare_unet(tiny_model, tuned, merged, tensors, place):
    out = merged("--base", tiny_model / place, "--tuned", tuned, "--ratio", 0.3)
    result = UNet2DConditionModel.from_pretrained(out).state_dict()
    assert_mixture(result, tensors(tiny_model)[UNET], tensors(tuned)[UNET], 0.3)
    names = ["config.json", "diffusion_pytorch_model.safetensors", "manifest.json", "merge.json"]
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.parametrize("place", ["unet", UNET])
def test_bare_unet_as_tuned_leaves_the_text_encoder_to_the_base(tiny_model, tuned, merged, tensors, place):
    out = tensors(merged("--base", tiny_model, "--tuned", tuned / place))
    assert_mixture(out[UNET], tensors(tiny_model)[UNET], tensors(tuned)[UNET], 0.5)
    assert same(out[TEXT_ENCODER], tensors(tiny_model)[TEXT_ENCODER])


@pytest.fixture
def checkpoint(tiny_model, tuned, tmp_path):
    """checkpoint-2 of a run on tiny_model: the average of its UNet is `tuned`'s, and the raw text encoder."""
    folder = tmp_path / "run/checkpoint-2"
    for source, part in (
        (tuned / "unet", "unet_ema"),
        (tiny_model / "unet", "unet"),
        (tuned / "text_encoder", "text_encoder"),
        (tiny_model / "text_encoder", "text_encoder_ema"),
    ):
        shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("*.non_ema.*"))
    edit(folder, UNET, lambda tensors: {name: value + 1 for name, value in tensors.items()})
    args = {"pretrained_model_name_or_path": str(tiny_model), "revision": None, "variant": None, "cache_dir": None}
    args |= {"prediction_type": "epsilon"}
    write_json(folder / "training_state.json", {"step": 2, "args": args})
    return folder


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_checkpoint_of_a_run_gives_its_average_or_its_raw_weights(
    tiny_model, tuned, checkpoint, merged, tensors, weights
):
    out = tensors(merged("--base", tiny_model, "--tuned", checkpoint, "--weights", weights, "--ratio", 1))
    raw = {name: value + 1 for name, value in tensors(tiny_model)[UNET].items()}
    assert same(out[UNET], tensors(tuned)[UNET] if weights == "ema" else raw)
    assert same(out[TEXT_ENCODER], tensors(tiny_model if weights == "ema" else tuned)[TEXT_ENCODER])


def test_checkpoint_as_base_takes_the_other_parts_of_what_its_run_started_from(
    tiny_model, tuned, checkpoint, merged, tensors
):
    out = merged("--base", checkpoint, "--tuned", tiny_model, "--ratio", 0)
    StableDiffusionPipeline.from_pretrained(out)
    expected = tensors(tiny_model) | {UNET: tensors(tuned)[UNET]}
    assert all(same(result, expected[file]) for file, result in tensors(out).items())


def test_checkpoint_trained_from_scratch_keeps_its_own_configuration(tiny_model, checkpoint, merged):
    for part in ("unet", "unet_ema"):
        other = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(checkpoint / part), block_out_channels=(8, 24)
        )
        other.save_pretrained(checkpoint / part)
    out = merged("--base", checkpoint, "--tuned", checkpoint, "--ratio", 0.5)
    assert StableDiffusionPipeline.from_pretrained(out).unet.config.block_out_channels == [8, 24]


def test_paths_may_be_written_in_any_way(tiny_model, tuned, merged, tensors, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    expected = tensors(merged("--base", tiny_model, "--tuned", tuned))
    found = merged("--base", "link/", "--tuned", f"{tuned}/../{tuned.name}/", out=Path("new/../new/out"))
    assert all(same(result, expected[file]) for file, result in tensors(found).items())
    recipe = json.loads(Path("new/out/merge.json").read_text())
    assert [sorted(one["files"]) for one in recipe["run"]["inputs"]] == [sorted([UNET, TEXT_ENCODER, VAE])] * 2


def test_output_through_a_link_goes_where_the_link_points(tiny_model, tuned, merged, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    for _ in range(2):  # anew, and in the place of an earlier result
        merged("--base", tiny_model, "--tuned", tuned)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/out/model_index.json").is_file()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


# -- parts, blocks ---------------------------------------------------------------------------------------------------


def test_block_ratios_go_before_ratio(tiny_model, tuned, merged, tensors):
    out = tensors(merged("--base", tiny_model, "--tuned", tuned, "--ratio", 1, "--block_ratios", "unet.mid_block.*=0"))[
        UNET
    ]
    expected = {True: tensors(tiny_model)[UNET], False: tensors(tuned)[UNET]}
    assert same(out, {name: expected[name.startswith("mid_block.")][name] for name in out})


# -- refused ---------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_the_flags_is_said_together(tiny_model, refused):
    message = refused("--base", tiny_model, "--tuned", "a", "b", "--ratio", 2, 2, "--components", "clip", status=2)
    assert all(named in message for named in ("--ratio 2.0 2.0", "--components clip", "--tuned names 2 models"))
    message = refused("merge", status=2, out=None)
    assert all(f"{name} is required" in message for name in ("--base", "--tuned", "--output_dir"))


def test_what_is_no_model_is_refused_and_all_of_it_at_once(tiny_model, refused, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    (tmp_path / "style").mkdir()
    save_file({"unet.a.lora_A.weight": torch.ones(1)}, tmp_path / "style/pytorch_lora_weights.safetensors")
    save_file({"lora_unet_a.lora_up.weight": torch.ones(1)}, tmp_path / "kohya.safetensors")
    wrong = [tmp_path / name for name in ("nothing", "model.ckpt", "style", "kohya.safetensors", "absent")]
    message = refused("--base", tiny_model, "--tuned", *wrong, "--method", "soup")
    for path, said in zip(
        wrong, ("is no model", "is a pickle", "is a LoRA", "is a LoRA", "no such file or folder"), strict=True
    ):
        assert any(str(path) in line and said in line for line in message.splitlines()), path


@pytest.mark.parametrize(("words", "said"), [
    (["--base", "{tiny}", "--tuned", "{tuned}/unet", "--components", "text_encoder"], "/unet has no text_encoder"),
    (["--base", "{tiny}/unet", "--tuned", "{tuned}", "--single_file"], "has no text_encoder, vae"),
    (["--base", "{original}", "--tuned", "{tuned}"], "add --single_file, or --layout_from"),
    (["--base", "{bare}", "--tuned", "{tuned}"], "--layout_from"),
    (["--base", "{tiny}", "--tuned", "{tuned}", "--block_ratios", *"123"], "3 numbers, but this UNet has"),
    (["--base", "{tiny}", "--tuned", "{tuned}", "--block_ratios", "unet.nose.*=1"], "unet.nose.* matches none"),
    (["--base", "{tiny}", "--tuned", "{tuned}", "--variant", "fp16"], "no weights of the variant fp16"),
    (["--base", "{tiny}", "--tuned", "{tuned}", "--method", "add_difference", "--origin", "none"], "none"),
])  # fmt: skip
def test_what_cannot_be_made_of_these_models_is_refused(tiny_model, tuned, original, refused, tmp_path, words, said):
    bare = tmp_path / "bare.safetensors"
    shutil.copyfile(tuned / UNET, bare)
    names = {"tiny": tiny_model, "tuned": tuned, "original": original, "bare": bare}
    assert said in refused(*(word.format(**names) for word in words))


@pytest.mark.parametrize("place", ["base/", "base/new", "linked/unet", "."])
def test_output_that_is_an_input_or_around_or_inside_one_is_refused(tiny_model, tuned, copy, refused, tmp_path, place):
    base = copy(tiny_model, "base")
    write_json(base / "merge.json", {})  # also where the input is an earlier result
    write_json(tmp_path / "merge.json", {})
    (tmp_path / "linked").symlink_to(base)
    assert "which is read" in refused("--base", base, "--tuned", tuned, out=f"{tmp_path}/{place}")


def test_output_where_something_else_lies_is_refused(tiny_model, tuned, merged, refused, tmp_path):
    models = ["--base", tiny_model, "--tuned", tuned]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    for name in ("file", "folder"):
        assert f"{tmp_path / name} is there already" in refused(*models, out=tmp_path / name)
    out = merged(*models)
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(*models)
    (out / "notes.txt").unlink()
    merged(*models, "--ratio", 0.1, 0.2)  # into folders below an earlier result
    assert "ratio-0.1" in refused(*models)


# -- --on_mismatch ---------------------------------------------------------------------------------------------------


def test_on_mismatch_tuned_takes_a_wider_unet_with_its_configuration(tiny_model, tuned, copy, merged, tensors):
    inpainting = copy(tuned, "inpainting")
    UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tuned / "unet"), in_channels=9).save_pretrained(
        inpainting / "unet"
    )
    models = ["--base", tiny_model, "--tuned", inpainting, "--ratio", 0.3]
    wide = merged(*models, "--on_mismatch", "tuned", out=inpainting.parent / "wide")
    assert StableDiffusionPipeline.from_pretrained(wide).unet.config.in_channels == 9
    narrow = merged(*models, "--on_mismatch", "base")
    assert StableDiffusionPipeline.from_pretrained(narrow).unet.config.in_channels == 4
    base, other = tensors(tiny_model)[UNET], tensors(inpainting)[UNET]
    for out, source in ((wide, other), (narrow, base)):
        result, rest = tensors(out)[UNET], without("conv_in.weight")
        assert torch.equal(result["conv_in.weight"], source["conv_in.weight"])
        assert_mixture(rest(result), rest(base), rest(other), 0.3)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_on_mismatch_says_whose_tensor_is_taken_where_one_is_not_finite(
    tiny_model, tuned, copy, merged, tensors, capsys, side
):
    base, other = copy(tiny_model, "base"), copy(tuned, "other")
    broken = other if side == "base" else base
    edit(broken, UNET, with_value("conv_out.weight", torch.nan))
    out = merged("--base", base, "--tuned", other, "--on_mismatch", side)
    result, first, second = (tensors(folder)[UNET] for folder in (out, base, other))
    assert torch.equal(result["conv_out.weight"], (first if side == "base" else second)["conv_out.weight"])
    rest = without("conv_out.weight")
    assert_mixture(rest(result), rest(first), rest(second), 0.5)
    assert json.loads((out / "merge.json").read_text())["run"]["taken_over"] == ["unet.conv_out.weight"]
    assert "unet.conv_out.weight" in capsys.readouterr().out


# -- whole or not there ----------------------------------------------------------------------------------------------


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*_, **__):
    raise RuntimeError("a cosmic ray")


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("failing", ["compute", "posix_fallocate", "fsync"])
def test_failure_leaves_nothing_or_what_was_there(
    tiny_model, tuned, merged, tmp_path, monkeypatch, capsys, failing, earlier
):
    models = ["--base", tiny_model, "--tuned", tuned]
    if earlier:
        merged(*models, "--ratio", 0.9)
    before = listing(tmp_path)
    words = [*map(str, models), "--output_dir", str(tmp_path / "out")]
    if failing == "compute":
        monkeypatch.setitem(METHODS, "weighted_sum", Method(broken))
        with pytest.raises(RuntimeError, match="cosmic"):
            merge_checkpoints.main(words)
    else:
        monkeypatch.setattr(os, failing, full)
        assert merge_checkpoints.main(words) == 1
        assert "No space left on device" in capsys.readouterr().err
    assert listing(tmp_path) == before
    monkeypatch.undo()
    merged(*models)
    check_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "out/merge.json").read_text())["ratio"] == [0.5]


SLOW = """
import sys, time
import merge_checkpoints
from finetuning.merging.methods import METHODS, Method, weighted_sum
calls = []
def slow(*inputs, **options):
    calls.append(0)
    if len(calls) > 9:
        print("in the middle", flush=True)
        time.sleep(300)
    return weighted_sum(*inputs, **options)
METHODS["weighted_sum"] = Method(slow)
merge_checkpoints.main(sys.argv[1:])
"""


def test_kill_in_the_middle_leaves_no_model_and_the_same_command_succeeds(tiny_model, tuned, merged, root, tmp_path):
    inputs = {folder: listing(folder) for folder in (tiny_model, tuned)}
    words = ["--base", tiny_model, "--tuned", tuned, "--ratio", 0.3, 0.6]
    command = [sys.executable, "-c", SLOW, *words, "--output_dir", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), cwd=root, stdout=subprocess.PIPE, text=True)
    assert "in the middle" in process.stdout.readline()
    written = [path for path in (tmp_path / "out").rglob("*.safetensors") if path.stat().st_size]
    process.kill()
    process.wait()
    process.stdout.close()
    assert written, "it was killed before it wrote"
    assert not (tmp_path / "out/ratio-0.3").exists() and not (tmp_path / "out/ratio-0.6").exists()
    assert inputs == {folder: listing(folder) for folder in inputs}
    merged(*words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ratio-0.3", "ratio-0.6"]  # no leftovers
    for name in ("ratio-0.3", "ratio-0.6"):
        check_manifest(tmp_path / "out" / name)


# -- the recipe ------------------------------------------------------------------------------------------------------


def test_recipe_has_what_was_read_and_the_flags_in_both_places(tiny_model, tuned, merged):
    out = merged("--base", tiny_model, "--tuned", tuned, "--ratio", 0.3, "--dtype", "fp16")
    recipe = json.loads((out / "merge.json").read_text())
    assert (recipe["ratio"], recipe["dtype"], recipe["method"]) == ([0.3], "fp16", "weighted_sum")
    assert "output_dir" not in recipe and str(out) not in json.dumps(recipe)
    for model, said in zip((tiny_model, tuned), recipe["run"]["inputs"], strict=True):
        assert said["given"] == str(model)
        hashes = {file: hashlib.sha256((model / file).read_bytes()).hexdigest() for file in (UNET, TEXT_ENCODER, VAE)}
        assert said["files"] == hashes
    recipe["run"].pop("taken_over")
    for file in (UNET, TEXT_ENCODER, VAE):
        with safe_open(out / file, "pt") as content:
            assert content.metadata()["format"] == "pt"
            assert json.loads(content.metadata()["merge"]) == recipe


@pytest.mark.parametrize("place", ["", "merge.json", UNET])
def test_show_tells_how_a_result_was_made(tiny_model, tuned, merged, capsys, place):
    out = merged("--base", tiny_model, "--tuned", tuned, "--ratio", 0.3)
    capsys.readouterr()
    assert merge_checkpoints.main(["show", str(out / place)]) == 0
    told = capsys.readouterr().out
    digest = hashlib.sha256((tuned / UNET).read_bytes()).hexdigest()
    assert all(said in told for said in ("--ratio 0.3", str(tiny_model), f"{digest}  {UNET}"))


@pytest.mark.parametrize("how", ["replay", "--config"])
def test_recipe_makes_the_same_files_again(tiny_model, tuned, merged, tmp_path, how):
    first = merged(
        "--base", tiny_model, "--tuned", tuned, "--ratio", 0.3, "--components", "unet,vae", "--dtype", "bf16"
    )
    path = first if how == "replay" else first / "merge.json"
    assert below(merged(how, path, out=tmp_path / "again")) == below(first)


def test_replay_refuses_inputs_that_have_changed_by_name(tiny_model, tuned, copy, merged, refused):
    other = copy(tuned, "other")
    first = merged("--base", tiny_model, "--tuned", other)
    edit(other, TEXT_ENCODER, with_value("text_model.final_layer_norm.bias", 7.0))
    message = refused("replay", first, out=first.parent / "again")
    assert f"{other / TEXT_ENCODER} is not the file of the recipe" in message and str(other / UNET) not in message


@pytest.mark.parametrize(("flags", "command", "named"), [
    ({"warp": 9}, "merge", "warp"), ({}, "mix", "mix"), ({"ratio": [0.5, 0.5]}, "merge", "--ratio 0.5 0.5"),
    ({"components": ["clip"]}, "merge", "--components clip"),
])  # fmt: skip
def test_replay_refuses_a_recipe_that_this_version_cannot_follow(
    tiny_model, tuned, merged, refused, flags, command, named
):
    first = merged("--base", tiny_model, "--tuned", tuned)
    recipe = json.loads((first / "merge.json").read_text())
    write_json(first.parent / "changed.json", recipe | flags | {"run": recipe["run"] | {"command": command}})
    message = refused("replay", first.parent / "changed.json", out=first.parent / "again")
    assert named in message and "changed.json" in message


def test_replay_follows_a_recipe_with_older_names(tiny_model, tuned, merged):
    first = merged("--base", tiny_model, "--tuned", tuned, "--components", "vae", "--ratio", 1)
    recipe = json.loads((first / "merge.json").read_text())
    recipe["parts"] = recipe.pop("components")
    write_json(first.parent / "older.json", recipe)
    again = merged("replay", first.parent / "older.json", out=first.parent / "again")
    assert below(again) == below(first)


# -- the script ------------------------------------------------------------------------------------------------------


def test_help_of_every_command(capsys):
    for command in ("", *merge_checkpoints.commands()):
        with pytest.raises(SystemExit) as end:
            merge_checkpoints.main([*command.split(), "--help"])
        assert end.value.code == 0 and "merge_checkpoints.py" in capsys.readouterr().out


def test_fold_goes_on_working_as_fuse(tiny_model, refused, capsys):
    message = refused("fold", "--base", tiny_model, "--lora", "nowhere.safetensors")
    assert "fold is now called fuse" in message and "nowhere.safetensors" in message


def test_script_as_a_user_runs_it(tiny_model, tuned, run_script, tmp_path):
    done = run_script(
        "merge_checkpoints.py", "--base", tiny_model, "--tuned", tuned, "--ratio", 0.3, 0.6,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(tmp_path / f"out/ratio-{ratio}") for ratio in (0.3, 0.6)]
