"""benchmarks/gpu/run.py in miniature: it runs where there is no GPU, and writes what it found. Nothing is timed."""

import json
import subprocess
import sys

import pytest

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
