"""benchmarks/train/run.py: its command lines are valid, and its figures are what it says. Nothing is timed."""

import importlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetuning.cli import read


@pytest.fixture(scope="module")
def benchmark(root):
    return SimpleNamespace(**runpy.run_path(str(root / "benchmarks/train/run.py")))


def test_every_case_is_a_command_line_that_its_script_takes(benchmark, tmp_path):
    found = benchmark.cases(SimpleNamespace(official=None, rows=[4], only=None), tmp_path)
    assert {"cached", "live", "live, 4 rows"} <= found.keys()
    for batch, side, _, script, words in found.values():
        args, problems = read(importlib.import_module(Path(script).stem).Args, "", [*words, "--output_dir", "runs/x"])
        assert problems == []
        assert (args.train_batch_size, args.size) == (batch, (side, side))


def test_the_ratio_is_of_the_medians_and_the_table_has_its_spread(benchmark):
    one = lambda own: {"own": [own, own, 9.0], "bare": [0.2, 0.1, 0.2], "to_first_step": 10 * own}
    table = benchmark.table({"cached": (4, 64, 1, "", [])}, {"cached": [one(0.4), one(0.2), one(0.3)]})
    assert table.splitlines()[2] == "| cached | 0.300 | 0.0750 | 1.50 (1.00 to 2.00) | 4, 2 |"
