"""The README says what is so."""

import re

import generate_images
import train_lora
import train_text_to_image
from finetuning.cli import flag_table


def test_the_tables_of_flags_are_those_of_the_code(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    lora = flag_table(train_lora.Args, besides=train_text_to_image.Args)
    for table in (flag_table(train_text_to_image.Args), lora, flag_table(generate_images.Args)):
        assert table in text, "run `make readme`"


def test_pictures_and_files_that_it_names_are_there(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / path).is_file(), path
    tree = text.split("## What is where")[1].split("To train on another")[0]
    for name in re.findall(r"^    (\S+)  ", tree, flags=re.MULTILINE):
        assert (root / name).exists(), name
