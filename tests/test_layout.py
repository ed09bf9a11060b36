"""The house rules, read off the code: direction of imports, length of scripts, what must not be there."""

import ast
import re
import shutil
import subprocess
from functools import cache

import datasets
import pytest
import torch

from finetuning import files
from finetuning.captioning.captioner import open_model as open_captioner
from finetuning.cli import UserError
from finetuning.evaluation.networks import clip
from finetuning.families.lora_files import read_lora
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.families.opening import open_source, open_vae
from finetuning.families.pipelines import open_pipeline
from finetuning.families.stable_diffusion import StableDiffusion

# A folder of finetuning/, or a module of its ground floor, and what it may import besides itself.
GROUND = {"cli", "rng", "files"}
BELOW_SETS = GROUND | {"diffusion", "families", "data"}
ALLOWED = {
    "__init__": set(),
    "cli": set(),
    "rng": set(),
    "files": {"cli"},
    "diffusion": GROUND,
    "families": GROUND | {"diffusion"},
    "data": GROUND | {"diffusion"},
    "conversion": BELOW_SETS,
    "captioning": BELOW_SETS,
    "evaluation": BELOW_SETS,
    "training": BELOW_SETS | {"evaluation"},
    "merging": BELOW_SETS | {"evaluation", "training"},
    "shapes": GROUND | {"evaluation"},  # the toy world: a plug-in, named by a flag; nothing imports it
}
USE_ACCELERATE = {"finetuning/training/run.py", "finetuning/merging/sweep.py"}  # the second asks for the device only


def sources(root, *patterns):
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def nodes(path):
    """All that a file's code is made of."""
    return parsed(path.read_text(encoding="utf-8"))


@cache
def parsed(code):
    return list(ast.walk(ast.parse(code)))


def imports(path):
    """Names of all modules that a file imports, also inside functions."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(root):
    """[(file, module that it must not import)] of the table above."""
    found = []
    for path in sources(root, "finetuning/**/*.py"):
        own = path.relative_to(root / "finetuning").with_suffix("").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "finetuning" and len(parts) > 1 and parts[1] not in ALLOWED[own] | {own}:
                found.append((str(path.relative_to(root)), parts[1]))
            elif parts[0] in {script.stem for script in root.glob("*.py")} | {"models", "tests", "experiments"}:
                found.append((str(path.relative_to(root)), parts[0]))
    return sorted(set(found))


def test_a_folder_imports_only_what_stands_below_it(root):
    assert forbidden(root) == []


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("data/rows.py", "from finetuning.training.run import Run", "training"),
        ("data/rows.py", "import finetuning.families.model", "families"),
        ("training/run.py", "from finetuning import merging", "merging"),
        ("evaluation/report.py", "def f():\n    from finetuning.shapes import checker", "shapes"),
        ("captioning/folder.py", "from finetuning.conversion.copying import copy", "conversion"),
        ("cli.py", "from finetuning.files import write_text", "files"),
        ("training/run.py", "import train_lora", "train_lora"),
    ],
)
def test_the_table_goes_red_where_it_is_broken(file, line, named, tmp_path):
    (tmp_path / "train_lora.py").touch()
    path = tmp_path / "finetuning" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"from finetuning.{path.parent.name}.other import own\n" if path.parent.name in ALLOWED else "")
    assert forbidden(tmp_path) == []
    path.write_text(path.read_text() + line)
    assert forbidden(tmp_path) == [(f"finetuning/{file}", named)]


def test_scripts_never_import_each_other_and_nothing_imports_the_toy_world(root):
    names = {path.stem for path in sources(root, "*.py")}
    for path in sources(root, "*.py"):
        assert not imports(path) & names, path
        assert not any(name.startswith("finetuning.shapes") for name in imports(path)), path


def test_the_maths_needs_torch_only(root):
    for path in sources(root, "finetuning/diffusion/*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert tops <= {"dataclasses", "functools", "torch", "finetuning", "math"}, path


def test_accelerate_appears_only_where_a_run_is_set_up(root):
    users = {
        str(path.relative_to(root))
        for path in sources(root, "finetuning/**/*.py")
        if any(name.split(".")[0] == "accelerate" for name in imports(path))
    }
    assert users == USE_ACCELERATE


def test_scripts_stay_short(root):
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root, "*.py")}
    assert lengths["train_text_to_image.py"] < 120 and lengths["train_lora.py"] < 120
    assert {name: n for name, n in lengths.items() if n >= 200} == {}


def test_there_is_no_drawer_for_odds_and_ends(root):
    drawers = re.compile(r"utils?|common|helpers?|misc|base|tools?")
    assert not [path for path in sources(root, "finetuning/**/*") if drawers.fullmatch(path.stem)]


def test_datasets_is_data_only(root):
    """datasets/__init__.py would take the place of Hugging Face datasets."""
    assert not list((root / "datasets").rglob("*.py"))
    assert callable(datasets.load_dataset)


def test_no_device_is_named_in_the_code(root):
    """The run's device is accelerate's to choose."""
    for path in sources(root, "*.py", "finetuning/**/*.py", "models/*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"cuda(:\d+)?", node.value), f"{path}:{node.lineno}"


def test_public_modules_and_scripts_have_docstrings(root):
    for path in sources(root, "*.py", "finetuning/**/*.py", "models/*.py"):
        tree = nodes(path)[0]
        assert ast.get_docstring(tree) or not tree.body, path


def test_the_large_files_in_git_are_data_or_the_model(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    sizes = {name: (root / name).stat().st_size for name in listed if (root / name).is_file()}
    data = {"models/mini-sd/": 16, "models/mini-sdxl/": 12, "models/mini-x4/": 8, "datasets/": 8}
    for folder, megabytes in data.items():
        assert sum(size for name, size in sizes.items() if name.startswith(folder)) <= megabytes * 2**20
    others = {n: s for n, s in sizes.items() if not n.startswith(tuple(data)) and s > 2**20}
    assert others == {}


# -- no pickle ---------------------------------------------------------------------------------------------------------

# Calls that open no file of weights; and CLIP, which transformers unpickles with weights_only=True.
OPEN_NO_PICKLE = {
    "finetuning/families/opening.py": (".config_class.", "class_name", "state_dict=tensors"),
    "finetuning/evaluation/networks.py": ("CLIPModel",),
}
NO_WEIGHTS = re.compile(r"(\w*Config|\w*Tokenizer|\w*Processor)\.from_pretrained$")


def test_every_call_that_loads_weights_says_that_pickles_are_not_read(root):
    """The test below really opens one with each of them; a new call makes this one red first."""
    for path in sources(root, "*.py", "finetuning/**/*.py", "models/*.py"):
        assert "pickle" not in imports(path), path
        for node in nodes(path):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("load", "from_pretrained")):
                continue
            called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{path}:{node.lineno} {ast.unparse(node)[:80]}"
            if called == "torch.load":
                assert words.get("weights_only") == "True", where
            elif called.endswith(".from_pretrained") and not NO_WEIGHTS.search(called):
                known = OPEN_NO_PICKLE.get(str(path.relative_to(root)), ())
                is_known = any(
                    word in ast.unparse(node) or (word == "tokenizer" and "class_name" in called) for word in known
                )
                assert words.get("use_safetensors") == "True" or is_known, where


OPENERS = {
    "training, denoiser": ("unet", lambda model: load_model(ModelArgs(str(model)))),
    "training, text encoder": ("text_encoder", lambda model: load_model(ModelArgs(str(model)))),
    "training, autoencoder": ("vae", lambda model: load_model(ModelArgs(str(model)))),
    "generating": ("unet", lambda model: open_pipeline(str(model))),
    "another autoencoder": ("vae", lambda model: open_vae(str(model), StableDiffusion())),
    "merging": ("unet", lambda model: open_source(str(model))),
    "a bare UNet": ("unet", lambda model: open_source(str(model / "unet"))),
    "captioning": (
        "unet",
        lambda model: open_captioner("BlipModel", str(model / "unet"), "cpu", None),
    ),
    "CLIP": ("text_encoder", lambda model: clip(str(model / "text_encoder"), "cpu")),
    "LoRA": ("unet", lambda model: read_lora(model / "unet", {})),
    "LoRA, a file": ("unet", lambda model: read_lora(model / "unet/diffusion_pytorch_model.bin", {})),
}


@pytest.mark.parametrize("way", OPENERS)
def test_a_pickle_is_refused_and_never_opened(way, tiny_model, tmp_path, bomb):
    component, open_it = OPENERS[way]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for path in (model / component).glob("*.safetensors"):
        path.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "pytorch_lora_weights.bin"):
        torch.save(bomb, model / component / name)
    with pytest.raises(UserError):
        open_it(model)
    assert not bomb.path.exists()


def test_a_pickle_in_a_checkpoint_is_never_opened(training, arguments, whole_run, tmp_path, bomb):
    shutil.copytree(whole_run("train_lora") / "checkpoint-1", tmp_path / "checkpoint-1")
    torch.save(bomb, tmp_path / "checkpoint-1/optimizer.pt")
    files.write_manifest(tmp_path / "checkpoint-1")
    assert training.run("train_lora", arguments, tmp_path, "--resume_from_checkpoint", "latest") == 1
    assert not bomb.path.exists()
