"""The recipe: what it holds, where it is found again, how it is told, and files that are no longer its own."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from finetuning.families.model_args import ModelError
from finetuning.files import write_json
from finetuning.merging.recipe import (
    CHECKOUT,
    changed_inputs,
    code_version,
    described,
    metadata_of,
    read_recipe,
    recipe_of,
)


def opened(given, folder, files):
    """What a recipe names of a model that was opened."""
    return SimpleNamespace(given=str(given), folder=folder, files=tuple(files))


@pytest.fixture
def source(tmp_path):
    """A model of two files: its own, and one of the pipeline that it started from."""
    files = [tmp_path / name for name in ("run/checkpoint-1/unet/a.safetensors", "start/vae/b.safetensors")]
    for path in files:
        path.parent.mkdir(parents=True)
        path.write_bytes(path.name.encode())
    return opened(tmp_path / "run/checkpoint-1", tmp_path / "start", files)


@pytest.fixture
def hashes(source):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.files}


@pytest.fixture
def made(source, hashes):
    flags = {"base": "a", "ratio": [0.3, 1.0], "drop_rate": 0.0, "dtype": None, "single_file": False, "output_dir": "x"}
    return recipe_of("merge", flags, [source], hashes)


def test_recipe_holds_flags_and_files_by_the_names_that_they_have_inside_a_model(made, source, hashes):
    assert set(made) == {"base", "ratio", "drop_rate", "dtype", "single_file", "run"}
    own, start = hashes.values()
    files = {"unet/a.safetensors": own, "vae/b.safetensors": start}
    assert made["run"]["inputs"] == [{"given": source.given, "files": files}]
    assert made["run"]["command"] == "merge" and made["run"]["code"] == code_version()
    assert torch.__version__.startswith(made["run"]["versions"]["torch"])
    assert json.loads(json.dumps(made)) == made


def test_single_file_is_named_without_its_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    found = recipe_of("merge", {}, [opened(path, None, [path])], {path: "0"})
    assert found["run"]["inputs"] == [{"given": str(path), "files": {"model.safetensors": "0"}}]


@pytest.mark.parametrize("name", ["", "merge.json", "model.safetensors"])
def test_recipe_is_read_from_a_folder_its_json_and_its_weights(made, tmp_path, name):
    write_json(tmp_path / "merge.json", made)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", metadata=metadata_of(made))
    assert read_recipe(str(tmp_path / name)) == made


def test_what_holds_no_recipe_is_refused(made, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"1")
    lacking = [
        made | {"run": {**made["run"], key: value}} for key, value in (("inputs", []), ("command", ""), ("code", ""))
    ]
    contents = ["{", "[]", "3", "{}", '{"run": 1}', '{"run": {"inputs": [1]}}', *map(json.dumps, lacking)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.json").write_text(content)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path in (*sorted(tmp_path.glob("*.*")), tmp_path, tmp_path / "absent", tmp_path / "absent.safetensors"):
        with pytest.raises(ModelError, match="holds no recipe") as refusal:
            read_recipe(path)
        assert str(path) in str(refusal.value)


def test_recipe_is_described_with_every_flag_that_says_something(made, hashes):
    lines = described(made)
    assert lines[0].startswith("made by  merge_checkpoints.py merge, code ")
    assert [line.split() for line in lines[2:4]] == [
        [digest, name]
        for digest, name in zip(hashes.values(), ("unet/a.safetensors", "vae/b.safetensors"), strict=True)
    ]
    assert lines[4].split() == ["flags", "--base", "a", "--ratio", "0.3", "1.0", "--drop_rate", "0.0"]
    made["run"]["taken_over"] = ["unet.a", "unet.b"]
    assert described(made)[-1].endswith("unet.a, unet.b")


def test_files_that_changed_or_are_others_are_named(made, source, hashes):
    assert list(changed_inputs(made, [source])) == []
    source.files[0].write_bytes(b"other")
    (said,) = changed_inputs(made, [source])
    now = hashlib.sha256(b"other").hexdigest()
    assert str(source.files[0]) in said and now[:12] in said and hashes[source.files[0]][:12] in said
    fewer = opened(source.given, source.folder, source.files[1:])
    (said,) = changed_inputs(made, [fewer])
    assert "other files than the recipe lists: vae/b.safetensors" in said


def test_code_version_is_what_git_says_of_the_checkout(tmp_path, monkeypatch):
    git = tmp_path / "git"
    monkeypatch.setenv("PATH", str(tmp_path))
    version = code_version.__wrapped__
    assert version() == "unknown"  # there is no git
    git.write_text('#!/bin/sh\necho "$@"\n')
    git.chmod(0o755)
    assert version() == f"-C {CHECKOUT} describe --always --dirty"
    git.write_text("#!/bin/sh\necho half\nexit 128\n")
    assert version() == "unknown"  # it is no checkout


def test_checkout_is_the_folder_of_the_script(root):
    assert root == CHECKOUT
