"""The README and the list of flags say what is so."""

import re
import runpy


def test_the_list_of_flags_is_the_codes(root):
    page = runpy.run_path(str(root / "tests/write_flags.py"))["page"]
    assert (root / "docs/flags.md").read_text(encoding="utf-8") == page(), "run `make flags`"


def test_images_and_files_that_it_names_are_there(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / path).is_file(), path
    tree = text.split("## What is where")[1].split("To train on another")[0]
    for name in re.findall(r"^    (\S+)  ", tree, flags=re.MULTILINE):
        assert (root / name).exists(), name


def test_flags_that_it_names_are_there(root):
    known = set(re.findall(r"`(--\w+)`", (root / "docs/flags.md").read_text(encoding="utf-8")))
    known |= {"--config", "--config_file", "--exclude", "--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", (root / "README.md").read_text(encoding="utf-8")))
    assert {name for name in named if name.replace("--no-", "--") not in known} == set()
