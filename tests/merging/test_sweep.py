"""The sweep as a user runs it: images, grid, resuming, metrics and the command that writes the best ratio."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetuning.cli import flags_of, read
from finetuning.evaluation import grid
from finetuning.evaluation.denoising import load_rows, row_losses
from finetuning.families import generation
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs, ModelError
from finetuning.families.pipelines import open_pipeline
from finetuning.merging import merged_pipeline
from finetuning.merging import sweep as sweep_module
from finetuning.merging.model_flags import MixArgs
from finetuning.merging.sweep import SweepArgs, SweepMetric, checker_metric, loss_metric, sweep_on
from finetuning.rng import torch_generator
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import parse

UNET = "unet/diffusion_pytorch_model.safetensors"
PROMPTS_IN = ["a large red circle on a white background", "a small blue square on a gray background"]
PROMPTS_OUT = ["a large green star on a black background"]


@pytest.fixture
def tuned(tiny_model, tmp_path):
    """tiny_model with another UNet."""
    folder = shutil.copytree(tiny_model, tmp_path / "tuned")
    generator = torch.Generator().manual_seed(0)
    moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in load_file(folder / UNET).items()}
    save_file(moved, folder / UNET, metadata={"format": "pt"})
    return folder


@pytest.fixture
def flags(tiny_model, tuned, tmp_path):
    """Those of a small sweep: three ratios, three prompts."""
    return {
        "base": str(tiny_model), "tuned": [str(tuned)], "ratios": ["0:1:0.5"], "num_inference_steps": 2, "size": "32",
        "prompts_in": PROMPTS_IN, "prompts_out": PROMPTS_OUT, "batch_size": 2, "output_dir": str(tmp_path / "sweep"),
    }  # fmt: skip


@pytest.fixture
def swept(flags):
    """Run a sweep with some flags changed; returns its lines."""
    return lambda **changes: sweep_on(SweepArgs(**flags | changes))


@pytest.fixture
def calls(monkeypatch):
    """[(ratio, prompts)] of what was generated."""
    made, merged = [], []
    real_init, real_generate = merged_pipeline.MergedPipeline.__init__, generation.generate

    def init(self, *args, **kwargs):
        merged.append(self)
        real_init(self, *args, **kwargs)

    def generate(pipeline, prompts, *args, **kwargs):
        made.append((merged[-1].ratio, len(prompts)))
        return real_generate(pipeline, prompts, *args, **kwargs)

    monkeypatch.setattr(merged_pipeline.MergedPipeline, "__init__", init)
    monkeypatch.setattr(generation, "generate", generate)
    return made


@pytest.fixture
def known_frontier(monkeypatch):
    """A metric whose rows are given by the ratio alone: the knee is at 0.5; it keeps what it is asked."""
    asked, table = [], {0.0: (0, 1), 0.25: (0.3, 0.9), 0.5: (0.8, 0.8), 0.75: (0.9, 0.3), 1.0: (1, 0)}

    def known(args, merged, prompts_in, prompts_out):
        def measure(ratio, images_in, images_out):
            asked.append((ratio, len(images_in), len(images_out)))
            return [torch.tensor([value, value], dtype=torch.float64) for value in table[ratio]]

        return SweepMetric(measure, {"kind": "known"}, "learned: a", "retained: b")

    monkeypatch.setitem(sweep_module.METRICS, "checker", known)
    return asked


# -- images --------------------------------------------------------------------------------------------------------


def test_the_ends_are_the_images_of_the_models_themselves(swept, tiny_model, tuned, tmp_path):
    swept()
    for ratio, folder in ((0, tiny_model), (1, tuned)):
        pipeline = open_pipeline(str(folder), scheduler="dpm++")
        expected = []
        for prompts in (PROMPTS_IN, PROMPTS_OUT):
            generator = [torch_generator(0, "picture") for _ in prompts]
            expected += pipeline(prompts, num_inference_steps=2, height=32, width=32, generator=generator).images
        names = ("in-000-seed0", "in-001-seed0", "out-000-seed0")
        for name, image in zip(names, expected, strict=True):
            found = Image.open(tmp_path / f"sweep/ratio-{ratio}/{name}.png")
            assert found.tobytes() == image.tobytes(), (ratio, name)


def test_the_grid_has_a_row_for_each_prompt_and_a_column_for_each_ratio(swept, tmp_path):
    lines = swept()
    assert f"3 images at each of 3 ratios: {tmp_path}/sweep/grid.png" in lines
    sheet = Image.open(tmp_path / "sweep/grid.png")
    names = ("in-000-seed0", "in-001-seed0", "out-000-seed0")
    for row, name in enumerate(names):
        for column, ratio in enumerate(("0", "0.5", "1")):
            left, top = sheet.width - (3 - column) * 166, sheet.height - (3 - row) * 166
            image = Image.open(tmp_path / f"sweep/ratio-{ratio}/{name}.png").resize((160, 160), Image.NEAREST)
            assert sheet.crop((left, top, left + 160, top + 160)).tobytes() == image.tobytes(), (name, ratio)
    drawn = {Image.open(tmp_path / f"sweep/ratio-{ratio}/{names[0]}.png").tobytes() for ratio in ("0", "0.5", "1")}
    assert len(drawn) == 3


def test_labels_are_prompts_seeds_and_models(swept, monkeypatch):
    seen, real = [], grid.labelled_grid
    monkeypatch.setattr(grid, "labelled_grid", lambda *args: (seen.append(args), real(*args))[1])
    swept(seed=[0, 7], prompts_in=PROMPTS_IN[:1], ratios=["1", "0"])
    rows, labels, headings, _ = seen[0]
    first, second = PROMPTS_IN[0], f"unrelated: {PROMPTS_OUT[0]}"
    assert labels == [f"{first} (seed 0)", f"{first} (seed 7)", f"{second} (seed 0)", f"{second} (seed 7)"]
    assert headings == ["0 base", "1 tuned"]
    assert [len(row) for row in rows] == [2] * 4


@pytest.mark.parametrize(("method", "headings"), [
    ({}, ["0 base", "0.5", "1 tuned"]),
    ({"method": "soup"}, ["0 base", "0.5", "1"]),
    ({"block_ratios": ["unet.mid_block.*=0.2"]}, ["0", "0.5", "1"]),
])  # fmt: skip
def test_a_column_has_the_name_of_a_model_only_where_it_is_that_model(method, headings, flags):
    assert sweep_module._headings(SweepArgs(**flags | method)) == headings


def test_large_images_are_reduced_in_the_grid_alone(swept, tmp_path):
    swept(grid_side=24, ratios=["0"], prompts_in=["a"], prompts_out=None)
    image, sheet = (Image.open(tmp_path / f"sweep/{name}.png") for name in ("ratio-0/in-000-seed0", "grid"))
    assert image.size == (32, 32)
    image.thumbnail((24, 24), Image.LANCZOS)
    right, bottom = sheet.width - 6, sheet.height - 6
    assert sheet.crop((right - 24, bottom - 24, right, bottom)).tobytes() == image.tobytes()


def test_prompts_are_texts_or_lines_of_files(swept, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS_IN[0]}\n\n  {PROMPTS_IN[1]} \n", encoding="utf-8")
    swept(prompts_in=["a cat", str(tmp_path / "prompts.txt"), PROMPTS_IN[0]], prompts_out=None, ratios=["0"])
    made = json.loads((tmp_path / "sweep/sweep.json").read_text(encoding="utf-8"))["run"]
    assert made["prompts_in"] == ["a cat", *PROMPTS_IN] and made["prompts_out"] == []


# -- going on --------------------------------------------------------------------------------------------------------


def test_nothing_is_generated_twice(swept, calls, tmp_path):
    swept()
    assert calls == [(ratio, count) for ratio in (0.0, 0.5, 1.0) for count in (2, 1)]
    kept = tmp_path / "sweep/ratio-0.5/in-000-seed0.png"
    before = kept.read_bytes()
    calls.clear()
    swept()
    assert calls == []
    kept.unlink()
    swept(ratios=["0:1:0.25"])
    assert calls == [(0.25, 2), (0.25, 1), (0.5, 2), (0.75, 2), (0.75, 1)]
    assert kept.read_bytes() == before


def test_an_image_that_a_kill_left_half_is_not_taken(swept, calls, tmp_path, monkeypatch):
    real = Image.Image.save

    def cut(image, path, *args, **kwargs):
        real(image, path, *args, **kwargs)
        path.write_bytes(path.read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        swept(ratios=["0"])
    assert not list((tmp_path / "sweep").rglob("in-*.png"))
    monkeypatch.undo()
    swept(ratios=["0"])
    assert len(list((tmp_path / "sweep").rglob("*.png"))) == 4


def test_a_folder_of_other_settings_or_models_is_refused(swept, tuned):
    swept(ratios=["0"])
    for changes, named in (
        ({"guidance_scale": 3.0}, "guidance_scale"), ({"seed": [1]}, "seed"),
        ({"prompts_out": ["a cat"]}, "prompts_out"), ({"method": "slerp", "size": "40"}, "method, size"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=f"other settings \\({named}\\)"):
            swept(ratios=["0"], **changes)
    save_file({k: v + 1 for k, v in load_file(tuned / UNET).items()}, tuned / UNET, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"other settings \(inputs\)"):
        swept(ratios=["0"])


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_the_knee_comes_with_its_certainty_and_its_command(swept, known_frontier, flags, tmp_path):
    lines = swept(metric="checker", ratios=["0:1:0.25"], components=["unet"], block_ratios=["unet.mid_block.*=0.2"])
    knee, command = lines[-2:]
    assert knee.startswith("knee: ratio 0.5") and "100% of 4000 resamples" in knee
    words = shlex.split(command.removeprefix("this writes it: "))
    assert words[:2] == ["python", "merge_checkpoints.py"]
    asked = dict(zip(words[2::2], words[3::2], strict=True))
    assert asked == {
        "--base": flags["base"], "--tuned": flags["tuned"][0], "--components": "unet", "--ratio": "0.5",
        "--block_ratios": "unet.mid_block.*=0.2", "--output_dir": f"{tmp_path}/sweep-merged",
    }  # fmt: skip
    assert Image.open(tmp_path / "sweep/curve.png").width > 300
    table = (tmp_path / "sweep/frontier.md").read_text()
    assert "**knee**" in table and table.count("n 2)") == 2 and "style" not in table


def test_sweep_json_holds_what_made_it_and_every_row(swept, known_frontier, flags, tmp_path):
    swept(metric="checker")
    recipe = json.loads((tmp_path / "sweep/sweep.json").read_text(encoding="utf-8"))
    made = recipe.pop("run")
    assert SweepArgs(**recipe | {"output_dir": flags["output_dir"]}) == SweepArgs(**flags | {"metric": "checker"})
    assert [source["given"] for source in made["inputs"]] == [flags["base"], flags["tuned"][0]]
    assert made["ratios"]["0.5"] == {"learned": [0.8, 0.8], "retained": [0.8, 0.8]}
    assert made["summary"]["knee"]["ratio"] == 0.5 and made["kind"] == "known"
    assert made["dtype"] == "torch.float32"


def test_what_was_measured_is_not_measured_again(swept, known_frontier):
    swept(metric="checker")
    assert known_frontier == [(ratio, 2, 1) for ratio in (0.0, 0.5, 1.0)]
    swept(metric="checker", ratios=["0:1:0.25"])
    assert known_frontier[3:] == [(0.25, 2, 1), (0.75, 2, 1)]


def test_a_broken_file_of_results_is_named(swept, known_frontier, tmp_path):
    swept(metric="checker")
    (tmp_path / "sweep/measured-checker.json").write_text("{")
    with pytest.raises(ModelError, match=r"sweep/measured-checker\.json is broken"):
        swept(metric="checker")


CHECKER = """
from finetuning.evaluation.metrics import Metric

METRICS = {
    "red": Metric("red", "share of red", role="learned"),
    "bright": Metric("brightness", "mean brightness", role="retained"),
}

def scores(image, caption):
    red, green, blue = image.resize((1, 1)).getpixel((0, 0))
    return {"red": red / 255, "bright": (red + green + blue) / 765}

def check(caption):
    if "star" in caption:
        raise ValueError(f"{caption} has a star")
"""


def test_a_checker_of_ones_own_measures_each_prompt_over_its_seeds(swept, tmp_path):
    (tmp_path / "mine.py").write_text(CHECKER)
    lines = swept(checker=str(tmp_path / "mine.py"), prompts_out=["a cat"], seed=[0, 1])
    results = json.loads((tmp_path / "sweep/measured-checker.json").read_text())["ratios"]
    for ratio, found in results.items():
        images = [
            Image.open(tmp_path / f"sweep/ratio-{ratio}/in-{prompt:03d}-seed{seed}.png").resize((1, 1))
            for prompt in (0, 1)
            for seed in (0, 1)
        ]
        reds = [image.getpixel((0, 0))[0] for image in images]
        red = [sum(reds[:2]) / 510, sum(reds[2:]) / 510]
        assert found["learned"] == pytest.approx(red) and len(found["retained"]) == 1
    assert any("curve.png" in line for line in lines)
    table = (tmp_path / "sweep/frontier.md").read_text()
    assert "learned: red; retained: brightness" in table and "n 2)" in table and "n 1)" in table


def test_loss_needs_no_prompts_and_recognises_equal_models(swept, tiny_model, shapes_folder, tmp_path):
    folder = str(shapes_folder)
    lines = swept(
        prompts_in=None, prompts_out=None, tuned=[str(tiny_model)], fit_dataset=folder, retain_dataset=folder,
        loss_rows=3,
    )  # fmt: skip
    rows = json.loads((tmp_path / "sweep/measured-loss.json").read_text(encoding="utf-8"))["ratios"]
    assert rows["0"] == rows["0.5"] == rows["1"] and len(rows["0"]["learned"]) == 3
    assert "nothing" in lines[-1] and not (tmp_path / "sweep/grid.png").exists()


def test_loss_follows_the_ratio(swept, shapes_folder, tmp_path):
    folder = str(shapes_folder)
    swept(prompts_in=None, prompts_out=None, fit_dataset=folder, retain_dataset=folder, loss_rows=2)
    rows = json.loads((tmp_path / "sweep/measured-loss.json").read_text(encoding="utf-8"))["ratios"]
    assert len({tuple(values["learned"]) for values in rows.values()}) == 3


CIRCLE = "a large red circle on a white background"
STAR = "a large blue star on a gray background"


def drawn(caption, style, count=1):
    return [draw(parse(caption), seed, style) for seed in range(count)]


def test_learned_and_retained_are_read_off_the_images_and_the_seeds_of_a_prompt_are_one_row():
    args = SimpleNamespace(seed=[0, 1], checker_named="finetuning.shapes.checker")
    metric = checker_metric(args, None, [CIRCLE, STAR], [CIRCLE, CIRCLE.replace("red", "blue")])
    shown = drawn(CIRCLE, "chalk") + drawn(CIRCLE, "filled") + drawn(STAR, "filled", 2)
    learned, retained = metric.measure(0.5, shown, [*drawn(CIRCLE, "filled", 2), *drawn(CIRCLE, "chalk", 2)])
    assert learned.tolist() == [0.5, 0.0] and retained.tolist() == [1.0, 0.0] and learned.dtype == torch.float64
    assert metric.facts["checker"] == "finetuning.shapes.checker" and len(metric.facts["sha256"]) == 64
    assert metric.learned.startswith("learned: ") and metric.retained.startswith("retained: ")


@pytest.fixture
def loss(tiny_model, shapes_folder):
    """measure, facts and the ratios that were set, of tiny_model on the validation and training rows of the shapes."""

    def prepare(dtype=torch.float32, fit=shapes_folder, retain=shapes_folder / "train", **flags):
        ratios = []
        pipeline = open_pipeline(str(tiny_model), scheduler="dpm++", dtype=dtype)
        known = {"seed": [0], "size": "32", "batch_size": 4, "loss_rows": 5}
        args = SimpleNamespace(fit_dataset=str(fit), retain_dataset=str(retain), **known | flags)
        metric = loss_metric(args, SimpleNamespace(pipeline=pipeline, set=ratios.append), [], [])
        return metric.measure, metric.facts, ratios

    return prepare


def test_loss_is_minus_that_of_each_row_in_the_precision_of_the_pipeline(loss, tiny_model, shapes_folder):
    model = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model)), None, seed=0)
    measure, facts, ratios = loss()
    found = measure(0.5, [], [])
    assert ratios == [0.5]
    for values, folder, one in zip(found, ("validation", "train"), facts["datasets"], strict=True):
        images, rows = load_rows(shapes_folder / folder, model.tokenize, (32, 32), max_rows=5)
        expected = row_losses(model, images, rows, model.schedule)
        # the same weights elsewhere in memory may round differently
        torch.testing.assert_close(values, -expected, rtol=1e-6, atol=0)
        assert one["rows"] == rows
    for one, other in zip(found, loss(torch.bfloat16)[0](0.0, [], []), strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("size", "taken"), [("32", [32, 32]), (None, [32, 32]), ("24x40", [24, 40])])
def test_loss_without_a_size_is_taken_at_the_models_own(size, taken, loss):
    assert loss(size=size)[1]["size"] == taken


def test_other_images_under_the_same_names_are_other_facts(loss, tmp_path):
    facts = []
    for style in ("filled", "chalk"):
        drawn(CIRCLE, style)[0].save(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "{CIRCLE}"}}\n')
        facts.append(loss(fit=tmp_path)[1]["datasets"])
    assert facts[0][0] != facts[1][0] and facts[0][1] == facts[1][1]


def test_what_is_wrong_with_both_datasets_is_said_at_once(loss, tmp_path):
    with pytest.raises(ModelError, match=r"(?s)first: there is no such folder.*second: there is no"):
        loss(fit=tmp_path / "first", retain=tmp_path / "second")


# -- the flags -------------------------------------------------------------------------------------------------------


def problems_of(*words):
    return read(SweepArgs, "", ["--base", "A", "--tuned", "B", "--output_dir", "O", *words])[1]


def test_wrong_flags_are_named_all_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "A").mkdir()
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    given = [
        "--base", "A", "--tuned", "B", "--output_dir", "A/new", "--ratios", "0:1:0.3", "--block_ratios", "x=y",
        "--size", "33", "--batch_size", "0", "--seed", "1", "1", "--metric", "loss", "--fit_dataset", "D",
        "--prompts_in", "empty.txt", "missing.txt", "latin.txt",
    ]  # fmt: skip
    problems = read(SweepArgs, "", given)[1]
    expected = [
        "--ratios 0:1:0.3", "--block_ratios x=y", "--prompts_in empty.txt", "--prompts_in missing.txt",
        "--prompts_in latin.txt", "--size 33", "--batch_size 0", "--seed 1 1", "--output_dir A/new",
        "--retain_dataset goes with --metric loss",
    ]  # fmt: skip
    for words in expected:
        assert len([problem for problem in problems if problem.startswith(words)]) == 1, (words, problems)
    assert len(problems) == len(expected)


@pytest.mark.parametrize(("given", "named"), [
    ([], "say what to generate"),
    (["--prompts_in", "a cat", "--metric", "checker"], "--metric checker needs --checker"),
    (["--prompts_in", "a cat", "--checker", "finetuning.shapes.checker"], "--checker needs --prompts_out"),
    (["--prompts_in", "a cat", "--metric", "shapes"], "--checker finetuning.shapes.checker cannot judge"),
    (["--prompts_in", "a cat", "--checker", "no_such_module"], "--checker no_such_module"),
    (["--prompts_in", "a cat", "--fit_dataset", "D"], "--fit_dataset goes with --metric loss"),
    (["--fit_dataset", "D", "--retain_dataset", "E", "--ratios", "0:0.5:0.1"], "--ratios 0:0.5:0.1"),
    (["--prompts_in", "a cat", "--curve", "smoothstep", "--ratios", "0", "1.2"], "--ratios 1.2"),
])  # fmt: skip
def test_a_wrong_flag_is_named(given, named):
    assert [problem for problem in problems_of(*given) if problem.startswith(named)]


@pytest.mark.parametrize(("given", "by"), [
    (["--fit_dataset", "D", "--retain_dataset", "E"], "loss"),
    (["--prompts_in", *PROMPTS_IN, "--prompts_out", *PROMPTS_OUT, "--checker", "finetuning.shapes.checker"], "checker"),
    (["--prompts_in", *PROMPTS_IN, "--prompts_out", *PROMPTS_OUT, "--metric", "shapes"], "checker"),
    (["--prompts_in", "a cat"], "none"),
])  # fmt: skip
def test_what_is_given_says_what_is_measured(given, by):
    args, problems = read(SweepArgs, "", ["--base", "A", "--tuned", "B", "--output_dir", "O", *given])
    assert problems == [] and args.measured_by == by and args.ratio == [index / 10 for index in range(11)]


def test_the_command_names_every_flag_of_a_merge(flags):
    given = {"method": "dare", "drop_rate": 0.5, "drop_seed": 3, "weights": "raw", "tuned": ["B", "C"]}
    given["tuned_weights"] = [1, 2]
    words = sweep_module._merge_command(SweepArgs(**flags | given), 0.3)
    for text in ("--method dare", "--drop_rate 0.5", "--drop_seed 3", "--weights raw", "--tuned B C", "--tuned_wei"):
        assert text in words
    used = {word.removeprefix("--") for word in words.split() if word.startswith("--")}
    assert used <= flags_of(MixArgs).keys() | {"ratio", "output_dir"}
