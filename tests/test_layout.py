"""The house rules, read off the code: direction of imports, length of scripts, what must not be there."""

import ast
import re
import subprocess

import datasets

MODULES_OF_ACCELERATE = {"finetuning/training/run.py"}


def sources(root, *patterns):
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def imports(path):
    """Names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
    return found


def test_scripts_import_finetuning_and_never_each_other(root):
    scripts = sources(root, "*.py")
    names = {path.stem for path in scripts}
    for path in scripts:
        assert not imports(path) & names, path
    for path in sources(root, "finetuning/**/*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & (names | {"models", "tests"}), path


def test_cli_imports_nothing_of_ours_and_noise_is_torch_only(root):
    assert not any(name.startswith("finetuning") for name in imports(root / "finetuning/cli.py"))
    allowed = {"dataclasses", "torch", "torch.nn.functional", "finetuning.cli", "finetuning.rng"}
    assert imports(root / "finetuning/diffusion/objective.py") <= allowed


def test_accelerate_appears_only_where_a_run_is_set_up(root):
    users = {
        str(path.relative_to(root))
        for path in sources(root, "finetuning/**/*.py")
        if any(name.split(".")[0] == "accelerate" for name in imports(path))
    }
    assert users == MODULES_OF_ACCELERATE


def test_scripts_stay_under_250_lines(root):
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root, "*.py")}
    assert lengths and {name: n for name, n in lengths.items() if n > 250} == {}


def test_there_is_no_drawer_for_odds_and_ends(root):
    assert not [path for path in sources(root, "finetuning/**/*.py") if path.stem in ("utils", "common", "helpers")]


def test_datasets_is_data_only(root):
    """datasets/__init__.py would take the place of Hugging Face datasets."""
    assert not list((root / "datasets").rglob("*.py"))
    assert callable(datasets.load_dataset)


def test_no_device_is_named_in_the_code(root):
    """The run's device is accelerate's to choose."""
    for path in sources(root, "*.py", "finetuning/**/*.py", "models/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"cuda(:\d+)?", node.value), f"{path}:{node.lineno}"


def test_no_pickle_is_loaded_without_weights_only(root):
    for path in sources(root, "*.py", "finetuning/**/*.py", "models/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(word.arg == "weights_only" and word.value.value is True for word in node.keywords), path
        assert "pickle" not in imports(path), path


def test_public_modules_and_scripts_have_docstrings(root):
    for path in sources(root, "*.py", "finetuning/**/*.py", "models/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or not tree.body, path


def test_the_large_files_in_git_are_data_or_the_model(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    sizes = {name: (root / name).stat().st_size for name in listed if (root / name).is_file()}
    assert sum(size for name, size in sizes.items() if name.startswith("models/mini-sd/")) <= 16 * 2**20
    assert sum(size for name, size in sizes.items() if name.startswith("datasets/")) <= 8 * 2**20
    others = {n: s for n, s in sizes.items() if not n.startswith(("models/mini-sd/", "datasets/")) and s > 2**20}
    assert others == {}
