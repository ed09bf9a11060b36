"""Write the flags' tables into README.md, from the code. Run by `make readme`."""

from pathlib import Path

import generate_images
import train_text_to_image
from finetuning.cli import flag_table

README = Path("README.md")
text = README.read_text(encoding="utf-8")
for mark, args in (("flags", train_text_to_image.Args), ("flags of generate_images", generate_images.Args)):
    before, rest = text.split(f"<!-- {mark} -->")
    after = rest.split(f"<!-- /{mark} -->")[1]
    text = f"{before}<!-- {mark} -->\n\n{flag_table(args)}\n<!-- /{mark} -->{after}"
README.write_text(text, encoding="utf-8")
