"""benchmarks/gpu/run.py in miniature: it runs where there is no GPU, and writes what it found. Nothing is timed."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.training import preflight

pytestmark = pytest.mark.run


def test_a_case_is_run_and_written_down(root, tmp_path):
    command = [sys.executable, "benchmarks/gpu/run.py", "--small", "--only", "full-1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    [written] = tmp_path.glob("*.json")
    result = json.loads(written.read_text(encoding="utf-8"))
    assert {"card", "versions", "command", "date"} <= result.keys()
    [(name, case)] = result["cases"].items()
    assert name == "full-1" and case["status"] == "pass", case
    assert case["steps"] == 8 and case["images_per_second"] > 0
    assert "pass full-1" in done.stdout
    assert not list((tmp_path / written.stem).glob("*/checkpoint-*"))


@pytest.fixture
def gpu_check(root, monkeypatch):
    """benchmarks/gpu/run.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", root / "benchmarks/gpu/run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_it_is_written_down_which_attention_a_case_ran_with(gpu_check, tiny_model, monkeypatch):
    """A case called xformers runs without it where PyTorch's attention is faster."""
    said = []
    run = SimpleNamespace(device=torch.device("cpu"), weights_dtype=torch.float32, say=said.append)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    ops = SimpleNamespace(memory_efficient_attention=preflight._pytorch_attention)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    args = SimpleNamespace(size=(32, 32), patch_size=None, train_batch_size=1)
    is_faster = preflight._xformers_is_faster(args, run, load_model(ModelArgs(str(tiny_model))))
    found = gpu_check.attention(f"device: cpu\n{said[-1]}\n")
    assert found.keys() == {"xformers_ms", "pytorch_ms"} and min(found.values()) > 0
    assert is_faster == (found["xformers_ms"] < found["pytorch_ms"]) or len(set(found.values())) == 1
    assert gpu_check.attention("device: cpu\n") == {}


@pytest.mark.parametrize(("cores", "gigabytes", "right", "fits"), [
    (2, 15.8, 1, 1), (8, 15.8, 4, 1), (16, 51.0, 7, 1), (16, 150.8, 7, 3),
])  # fmt: skip
def test_as_many_cases_run_side_by_side_as_cores_and_card_have_room_for(
    cores, gigabytes, right, fits, gpu_check, tmp_path, monkeypatch
):
    """Two on one card would each be out of memory for the other's sake."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    check = gpu_check.Check(None, tmp_path)
    check.facts = {"gb": gigabytes}
    assert (check.side_by_side(7), check.side_by_side(3, gpu_check.A6000)) == (right, fits)
