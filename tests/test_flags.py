"""The declarations of all scripts' flags: they fit together, and no flag that people use is lost."""

import importlib
import re
import runpy

import pytest

from finetuning.cli import flags_of, load_command

OLDER_NAMES = {
    "check_pictures": "check_images", "picture_field": "image_field", "pictures": "images",
    "pictures_folder": "images_folder", "parts": "components", "stop_when_kept_below": "stop_when_retention_below",
}  # fmt: skip


@pytest.fixture(scope="module")
def all_flags(root):
    """{script, or script and command: {name: Flag}}."""
    found = {}
    for name in runpy.run_path(str(root / "tests/write_flags.py"))["SCRIPTS"]:
        script = importlib.import_module(name)
        commands = getattr(script, "COMMANDS", {"": (getattr(script, "Args", None), None)})
        found |= {f"{name} {command}": flags_of(load_command(entry)[0]) for command, entry in commands.items()}
    return found


def test_flags_name_each_other_as_they_are_called(all_flags):
    wrong = []
    for script, flags in all_flags.items():
        for flag in flags.values():
            for other in (*flag.requires, *flag.conflicts):
                name, _, value = other.partition("=")
                if name in flags and value and flags[name].allowed and value not in flags[name].allowed:
                    wrong.append((script, flag.name, other))
            wrong += [(script, flag.name, other) for other in flag.conflicts if other not in flags]
            # Of several of which one suffices, a script may lack some
            if flag.requires and not any(other.partition("=")[0] in flags for other in flag.requires):
                wrong.append((script, flag.name, flag.requires))
            wrong += [(script, flag.name, older) for older in flag.was if older in flags]
    assert not wrong


def test_every_default_is_an_allowed_value_and_every_flag_has_help(all_flags):
    for script, flags in all_flags.items():
        for flag in flags.values():
            values = flag.default if flag.is_list else [flag.default]
            for value in [] if flag.required or flag.default is None else values:
                assert not flag.allowed or value in flag.allowed, (script, flag.name)
                assert not flag.range or flag.in_range(value), (script, flag.name)
            assert flag.help, (script, flag.name)


def test_what_names_a_model_or_a_dataset_is_not_written_to(all_flags):
    names = re.compile(
        r"name_or_path$|^(base|origin|tuned|vae|upscaler|init_lora|layout_from)$|(_|^)dataset$|clip_model$"
    )
    wrong = [(script, flag.name) for script, flags in all_flags.items() for flag in flags.values()
             if "output_dir" in flags and names.search(flag.name) and not flag.reads]  # fmt: skip
    assert not wrong


def test_older_names_are_known(all_flags):
    known = {older: flag.name for flags in all_flags.values() for flag in flags.values() for older in flag.was}
    assert OLDER_NAMES.items() <= known.items()
