"""The documents say what is so: files, links, flags and make targets that they name are there."""

import re
import runpy

import pytest

PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "experiments/**/*.md", "benchmarks/**/*.md", "datasets/README.md")
# Of other programs, and of scripts whose flags docs/flags.md does not list
OTHERS = {"--config", "--config_file", "--exclude", "--help", "--quiet", "--cpu", "--num_processes", "--logdir"}
OTHERS |= {"--preset", "--unet", "--text"}  # of models/make_start.py


def pages(root):
    return sorted(path for pattern in PAGES for path in root.glob(pattern))


def test_the_list_of_flags_is_the_codes(root):
    page = runpy.run_path(str(root / "tests/write_flags.py"))["page"]
    assert (root / "docs/flags.md").read_text(encoding="utf-8") == page(), "run `make flags`"


def test_links_lead_to_files(root):
    for page in pages(root):
        for path in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("folder", ["README.md", "CONTRIBUTING.md", "docs"])
def test_flags_that_are_named_are_there(root, folder):
    known = set(re.findall(r"`(--\w+)`", (root / "docs/flags.md").read_text(encoding="utf-8"))) | OTHERS
    for page in pages(root):
        if page.relative_to(root).parts[0] == folder and page.name != "flags.md":
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
            assert {name for name in named if name.replace("--no-", "--") not in known} == set(), page


def test_make_targets_that_are_named_are_there(root):
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in pages(root):
        named = set(re.findall(r"(?:^    |`)make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert named <= targets, page
