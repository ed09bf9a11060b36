"""evaluate_model.py, run as a user runs it: random weights, tiny models, every figure."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate_model
from finetuning.evaluation import candidates
from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import dataset_metrics
from finetuning.evaluation.networks import lpips_network, lpips_of
from finetuning.evaluation.preprocessing import matched
from finetuning.families.lora_files import Layer, write_diffusers
from finetuning.files import write_json

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHAPES = load_checker("finetuning.shapes.checker")
ALL = [*dataset_metrics(SHAPES)]
QUICK = ["--checker", SHAPES.name, "--num_inference_steps", "1", "--guidance_scale", "1"]
PROMPTS = [
    "a small red circle on a white background",
    "a small blue square on a white background",
    "a large red square on a gray background",
]


@pytest.fixture(scope="module")
def local_weights(metric_weights):
    """The flags that name random weights of the three networks."""
    flags = {"inception_weights": "inception.safetensors", "lpips_trunk": "alexnet.safetensors", "clip_model": "clip"}
    return [word for name, file in flags.items() for word in (f"--{name}", str(metric_weights / file))]


@pytest.fixture(scope="module")
def perturbed(tiny_model):
    """Make a copy of the tiny model with other weights in its UNet: perturbed(folder, how much)."""

    def make(folder, strength):
        shutil.copytree(tiny_model, folder)
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        generator = torch.Generator().manual_seed(1)
        noisy = lambda value: value + strength * torch.randn(value.shape, generator=generator)
        save_file({key: noisy(value) for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="module")
def tuned(perturbed, tmp_path_factory):
    return perturbed(tmp_path_factory.mktemp("models") / "tuned", 0.1)


@pytest.fixture
def evaluate(tiny_model, shapes_folder):
    """evaluate(folder, *arguments): main() on the validation rows and the tiny model as `original`; its status."""

    def run(folder, *arguments):
        common = ["--dataset", shapes_folder, "--split", "validation", "--model", f"original={tiny_model}", *QUICK]
        return evaluate_model.main(list(map(str, [*common, "--output_dir", folder, *arguments])))

    return run


@pytest.fixture
def calls(monkeypatch):
    """The captions of each call of a pipeline."""
    found, draw = [], StableDiffusionPipeline.__call__

    def counted(pipeline, captions, **options):
        found.append(captions)
        return draw(pipeline, captions, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    return found


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def pixels(folder):
    """{file name: bytes} of the images in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# -- the whole report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_model, tuned, shapes_folder, local_weights, tmp_path_factory):
    """The folder of a report with every figure: two models, the noise floor, general prompts and losses."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = [
        "--dataset", shapes_folder, "--split", "validation", "--model", f"original={tiny_model}", f"tuned={tuned}",
        "--general_prompts", prompts, "--retain_dataset", shapes_folder, "--retain_split", "train",
        "--output_dir", folder / "report", *local_weights, *QUICK,
    ]  # fmt: skip
    assert evaluate_model.main(list(map(str, arguments))) == 0
    return folder / "report"


LABELS = ["original", "tuned", "original, seed 1"]


def test_every_metric_has_a_figure_for_every_model(whole):
    report = report_of(whole)
    assert not {one["metric"] for one in report["left_out"]} & {*ALL} and [*report["summary"]] == ALL
    for by_side in report["summary"].values():
        assert [*by_side] == ["32"] and [*by_side["32"]] == LABELS
        for one in by_side["32"].values():
            assert one["n"] == 4 and one["low"] <= one["value"] <= one["high"]
    for by_side in report["differences"].values():
        assert [*by_side["32"]] == LABELS[1:] and all("excludes_zero" in one for one in by_side["32"].values())
    assert [(one["label"], one["noise_floor"]) for one in report["models"]] == [
        ("original", False), ("tuned", False), ("original, seed 1", True),
    ]  # fmt: skip
    assert report["reference"] == "original" and report["protocol"] == "clean"


def test_rows_stand_with_their_images_and_values(whole, shapes_folder, local_weights):
    report = report_of(whole)
    listed = (shapes_folder / "validation/metadata.jsonl").read_text().splitlines()
    captions = {record["file_name"]: record["text"] for record in map(json.loads, listed)}
    network = lpips_network(local_weights[3], "cpu")[0]
    assert [row["row"] for row in report["rows"]] == [0, 1, 2, 3]
    for row in report["rows"]:
        truth = whole / row["truth"]
        assert captions[truth.name] == row["caption"]
        drawn = whole / row["images"]["tuned"]
        assert drawn.resolve() == (whole / f"images/tuned/dataset/{row['row']:05d}.png").resolve()
        pair = [[matched(Image.open(path).convert("RGB"), 32)] for path in (drawn, truth)]
        assert row["values"]["lpips"]["tuned"] == pytest.approx(lpips_of(network, *pair)[0], rel=1e-4)
    for metric, by_label in report["rows"][0]["values"].items():
        for label in by_label:
            mean = np.mean([row["values"][metric][label] for row in report["rows"]])
            assert report["summary"][metric]["32"][label]["value"] == pytest.approx(mean)


def test_learned_and_kept_have_intervals_and_prompts(whole):
    known = report_of(whole)["forgetting"]
    assert [prompt["caption"] for prompt in known["prompts"]] == PROMPTS
    assert all([*prompt["images"]] == LABELS for prompt in known["prompts"])
    assert {"drift_clip", "drift_lpips"} <= {*known["summary"]}
    assert known["summary"]["fit_loss"]["original"]["n"] == 4  # validation, which is what is drawn
    assert known["summary"]["retain_loss"]["original"]["n"] == 11  # train
    by_loss = known["all"]["loss"]
    fit = {label: known["summary"]["fit_loss"][label]["value"] for label in ("original", "tuned")}
    assert fit["original"] != fit["tuned"]
    assert by_loss["learned"]["tuned"]["value"] == pytest.approx(1 - fit["tuned"] / fit["original"])
    for figures in (known["learned"], known["kept"], by_loss["learned"], by_loss["kept"]):
        assert "tuned" in figures and figures["tuned"]["low"] <= figures["tuned"]["value"] <= figures["tuned"]["high"]


def test_what_made_the_report_stands_in_it(whole, tuned):
    made = report_of(whole)["made"]
    assert made["command"][0] == "python" and set(evaluate_model.PACKAGES) <= set(made["versions"])
    assert f"tuned={tuned}" in made["args"]["model"] and made["args"]["dtype"] == "fp32"


# -- going on --------------------------------------------------------------------------------------------------------


def test_a_second_run_draws_nothing_and_an_interrupted_one_what_is_missing(evaluate, tmp_path, calls):
    command = [tmp_path, "--metrics", "shapes", "--general_prompts", "none", "--batch_size", 2]
    assert evaluate(*command) == 0
    assert len(calls) == 4  # two batches of the reference, two of its second seed
    first, drawn = report_of(tmp_path), pixels(tmp_path / "images/original/dataset")
    assert evaluate(*command) == 0
    assert len(calls) == 4
    assert report_of(tmp_path)["summary"] == first["summary"]
    (tmp_path / "images/original/dataset/00003.png").unlink()
    assert evaluate(*command) == 0
    assert len(calls) == 5
    assert pixels(tmp_path / "images/original/dataset") == drawn


def test_one_model_is_in_memory_at_a_time_and_labels_that_look_alike_have_folders_of_their_own(
    evaluate, tuned, tmp_path, monkeypatch
):
    alive = []

    def opened(*arguments, **options):
        gc.collect()
        assert not any(one() for one in alive)
        pipeline = open_pipeline(*arguments, **options)
        alive.append(weakref.ref(pipeline))
        return pipeline

    open_pipeline = candidates.open_pipeline
    monkeypatch.setattr(candidates, "open_pipeline", opened)
    models = ["--model", f"a b={tuned}", f"a-b={tuned}", "--metrics", "shapes", "--general_prompts", "none"]
    assert evaluate(tmp_path, *models, "--no-noise_floor", "--max_rows", 2) == 0
    assert len(alive) == 3 and len(list((tmp_path / "images").glob("a-b*"))) == 2


# -- what may be evaluated -------------------------------------------------------------------------------------------


def test_images_drawn_elsewhere_have_the_figures_of_their_model(evaluate, whole, local_weights, tmp_path, calls):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(whole / "images/tuned/dataset", elsewhere)
    (elsewhere / "settings.json").unlink()
    arguments = ["--images", f"elsewhere={elsewhere}", "--general_prompts", "none", "--no-noise_floor"]
    arguments += ["--metrics", "clip_score", "lpips", "--resolutions", 32, 48, *local_weights]
    assert evaluate(tmp_path / "out", *arguments) == 0
    report, known = report_of(tmp_path / "out"), report_of(whole)
    assert [one["label"] for one in report["models"]] == ["original", "elsewhere"] and report["forgetting"] is None
    assert report["models"][1] == {"label": "elsewhere", "source": str(elsewhere), "noise_floor": False}
    assert len(calls) == 1
    for metric in ("clip_score", "lpips"):
        by_side = report["summary"][metric]
        assert [*by_side] == ["32", "48"]
        assert by_side["32"]["elsewhere"] == known["summary"][metric]["32"]["tuned"]
        assert by_side["32"]["elsewhere"] != by_side["48"]["elsewhere"]


def test_images_of_the_whole_split_go_with_some_of_its_rows(evaluate, whole, tmp_path):
    arguments = ["--images", f"tuned={whole / 'images/tuned/dataset'}", "--general_prompts", "none"]
    assert evaluate(tmp_path, *arguments, "--no-noise_floor", "--metrics", "shapes", "--max_rows", 2) == 0
    rows = report_of(tmp_path)["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["images"]["tuned"].endswith(f"tuned/dataset/{row['row']:05d}.png")


def test_images_that_do_not_fit_are_named_before_anything_is_drawn(evaluate, whole, tmp_path, calls, capsys):
    shutil.copytree(whole / "images/tuned/dataset", tmp_path / "half")
    (tmp_path / "half/00002.png").unlink()
    assert evaluate(tmp_path / "out", "--images", tmp_path / "half", "--metrics", "shapes") == 1
    assert "row 2 (" in capsys.readouterr().err and not calls


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA whose adapter is strong."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    torch.manual_seed(0)
    layer = Layer(3 * torch.randn(2, 8), 3 * torch.randn(8, 2), 2.0)
    write_diffusers(path, {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": layer}, {})
    return path


@pytest.mark.parametrize("scale", [0, 1])
def test_a_lora_is_put_on_the_first_model(scale, evaluate, lora, shapes_folder, tmp_path):
    arguments = ["--lora", f"style={lora}", "--lora_scale", scale, "--retain_dataset", shapes_folder]
    assert evaluate(tmp_path, *arguments, "--general_prompts", "none", "--metrics", "shapes") == 0
    report = report_of(tmp_path)
    assert [one["label"] for one in report["models"]] == ["original", "style", "original, seed 1"]
    assert report["models"][1]["source"].endswith(f"with {lora}")
    original, style = (pixels(tmp_path / "images" / label / "dataset") for label in ("original", "style"))
    assert (original == style) == (scale == 0)
    kept = report["forgetting"]["kept"]
    assert [*kept] == ["style"] and (kept["style"]["value"] == 1) == (scale == 0)


def test_checkpoints_and_ratios_make_curves(evaluate, perturbed, shapes_folder, tmp_path):
    models = {}
    for step, ratio in ((20, 1.0), (3, 0.25)):  # not in the order of the curve
        models[step] = perturbed(tmp_path / f"run/checkpoint-{step}", 0.1 * ratio)
        write_json(models[step] / "merge.json", {"ratio": [ratio]})
    arguments = [word for step, path in models.items() for word in ("--model", f"step {step}={path}")]
    arguments += ["--retain_dataset", shapes_folder, "--general_prompts", "none", "--metrics", "shapes"]
    assert evaluate(tmp_path / "out", *arguments, "--split", "train", "--max_rows", 2) == 0
    report = report_of(tmp_path / "out")
    assert report["forgetting"]["summary"]["fit_loss"]["step 3"]["n"] == 11  # of the split that is drawn
    steps, ratios = report["curves"]
    assert (steps["x_title"], ratios["x_title"]) == ("step", "ratio")
    for curve, places in ((steps, (0, 3, 20)), (ratios, (0, 0.25, 1.0))):
        for line, start in zip(curve["lines"], (0, 1), strict=True):
            known = report["forgetting"][line["label"]]
            wanted = [start, known["step 3"]["value"], known["step 20"]["value"]]
            assert [point["x"] for point in line["points"]] == [*places]
            assert [point["y"] for point in line["points"]] == wanted and len(set(wanted)) == 3
    assert "over the steps" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


# -- what cannot be had, and what is wrong ---------------------------------------------------------------------------


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """As on a machine that has downloaded nothing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_weights")
def test_a_metric_asked_for_by_name_without_weights_is_refused_first(evaluate, tmp_path, calls, capsys):
    assert evaluate(tmp_path / "out", "--metrics", "lpips", "fid") == 1
    said = capsys.readouterr().err
    assert "--inception_weights" in said and "--lpips_trunk" in said
    assert not calls and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_figures_that_were_not_asked_for_are_left_out_and_it_is_said(evaluate, tmp_path):
    assert evaluate(tmp_path, "--general_prompts", "none", "--no-noise_floor", "--clip_model", tmp_path / "none") == 1
    assert evaluate(tmp_path, "--general_prompts", "none", "--no-noise_floor") == 0
    report = report_of(tmp_path)
    assert [*report["summary"]] == ["shapes", "style"] and report["weights"] == []
    why = {one["metric"]: one["reason"] for one in report["left_out"]}
    assert [*why] == ["clip_score", "clip_image", "lpips", "kid", "fid"]
    assert (
        "--inception_weights" in why["fid"] and "--lpips_trunk" in why["lpips"] and "--clip_model" in why["clip_score"]
    )
    for name in ("report.md", "report.html"):
        assert "--inception_weights" in (tmp_path / name).read_text(encoding="utf-8")


def test_what_is_wrong_with_the_flags_is_said_together(evaluate, tiny_model, tmp_path, capsys):
    bad = ["--max_rows", 1, "--by_order", "--resolutions", 4, "--retain_split", "train", "--chain", "a=no_comma"]
    with pytest.raises(SystemExit):
        evaluate(tmp_path, *bad)
    message = capsys.readouterr().err
    assert all(word in message for word in bad if str(word).startswith("--"))
    bad = ["--model", f"original={tiny_model}", "--size", 30, "--general_prompts", tmp_path / "none.txt"]
    bad += ["--inception_weights", tmp_path]
    with pytest.raises(SystemExit):
        evaluate(tmp_path, *bad)
    said = capsys.readouterr().err
    for words in (
        "two models would be called original", "--size 30", "none.txt: there is no such file", "--inception_weights",
    ):  # fmt: skip
        assert words in said


def test_nothing_is_written_into_what_is_read(evaluate, tiny_model, shapes_folder, capsys):
    for folder in (tiny_model, tiny_model / "report", shapes_folder / "report"):
        with pytest.raises(SystemExit):
            evaluate(folder)
        assert "--output_dir" in capsys.readouterr().err


def test_a_label_that_names_no_folder_is_refused(evaluate, tiny_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(tmp_path, *(word for label in ("", "..", "?") for word in ("--model", f"{label}={tiny_model}")))
    assert "the label '' and '..' and '?' has no letter" in capsys.readouterr().err


def test_an_unreadable_image_and_a_missing_model_are_named(evaluate, shapes_folder, tmp_path, calls, capsys):
    assert evaluate(tmp_path / "out", "--model", f"none={tmp_path / 'none'}", "--metrics", "shapes") == 1
    assert str(tmp_path / "none") in capsys.readouterr().err and not calls
    dataset = tmp_path / "dataset"
    shutil.copytree(shapes_folder, dataset)
    broken = sorted((dataset / "validation").glob("*.png"))[1]
    broken.write_bytes(b"not an image")
    assert evaluate(tmp_path / "out2", "--dataset", dataset) == 1
    assert broken.name in capsys.readouterr().err and not calls


def test_one_row_is_too_few_for_a_loss_and_said_before_anything_is_generated(
    evaluate, tiny_model, shapes_folder, tmp_path, calls, capsys
):
    retain = tmp_path / "retain"
    shutil.copytree(shapes_folder, retain)
    line, _ = (retain / "validation/metadata.jsonl").read_text().split("\n", 1)
    (retain / "validation/metadata.jsonl").write_text(line + "\n")
    for image in sorted((retain / "validation").glob("*.png")):
        if image.name not in line:
            image.unlink()
    assert evaluate(tmp_path / "out", "--model", tiny_model, "--retain_dataset", retain) == 1
    assert "has 1 row: an interval needs at least 2" in capsys.readouterr().err and not calls


def test_a_user_types_it(run_script, tiny_model, tuned, shapes_folder, tmp_path):
    done = run_script(
        "evaluate_model.py", "--dataset", shapes_folder, "--split", "validation", "--model", f"original={tiny_model}",
        "--model", f"tuned={tuned}", "--general_prompts", "none", "--metrics", "shapes", "--output_dir", tmp_path,
        *QUICK,
    )  # fmt: skip
    assert f"the whole report: {tmp_path / 'report.html'}" in done.stdout
    assert [one["label"] for one in report_of(tmp_path)["models"]] == LABELS
