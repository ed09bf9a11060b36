"""`--help` and complaints about flags come before the libraries that take long to import."""

import json
import subprocess
import sys

import pytest
from diffusers.optimization import SchedulerType
from torchvision.transforms import InterpolationMode

from finetuning.data.transforms import INTERPOLATIONS
from finetuning.training.optim import SCHEDULES

pytestmark = pytest.mark.run

SLOW = (
    "accelerate", "bitsandbytes", "datasets", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "peft", "pyarrow",
    "scipy", "sklearn", "sympy", "tensorboard", "torchvision", "transformers",
)  # fmt: skip
SCRIPTS = (
    "caption_images", "evaluate_model", "generate_images", "merge_checkpoints", "prepare_dataset", "train_lora",
    "train_text_to_image",
)  # fmt: skip
# Asks each script, and each of its commands, for help and for a flag that does not exist; prints which of the slow
# libraries were imported, and by which chain of modules.
PROGRAM = """
import importlib, json, runpy, sys

scripts, slow = map(json.loads, sys.argv[1:])
found = {}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in slow and name not in found:
            frame, chain = sys._getframe(1), []
            while frame:
                module = frame.f_globals.get("__name__", "")
                if module.startswith(("finetuning", *scripts)) and module not in chain:
                    chain.append(module)
                frame = frame.f_back
            found[name] = " <- ".join(chain)

import torch  # what it imports itself is none of our business
slow = [name for name in slow if name not in sys.modules]
sys.meta_path.insert(0, Watch())
for name in scripts:
    for command in getattr(importlib.import_module(name), "COMMANDS", [None]):
        for flag in ("--help", "--no_such_flag"):
            try:
                sys.argv = [word for word in (name + ".py", command, flag) if word]
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                assert end.code == (0 if flag == "--help" else 2)
print("\\n" + json.dumps(found))
"""


def test_no_slow_library_is_imported_for_help_or_a_wrong_flag(root):
    command = [sys.executable, "-c", PROGRAM, json.dumps(SCRIPTS), json.dumps(SLOW)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_every_script_is_asked(root):
    assert sorted(path.stem for path in root.glob("*.py")) == list(SCRIPTS)


def test_choices_written_out_are_those_of_the_libraries():
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType}
    assert set(INTERPOLATIONS) == {mode.value for mode in InterpolationMode}
