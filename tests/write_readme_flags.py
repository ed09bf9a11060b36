"""Write the flags' tables into README.md, from the code. Run by `make readme`."""

from pathlib import Path

import generate_images
import train_lora
import train_text_to_image
from finetuning.cli import flag_table

TABLES = {
    "flags": flag_table(train_text_to_image.Args),
    "flags of train_lora": flag_table(train_lora.Args, besides=train_text_to_image.Args),
    "flags of generate_images": flag_table(generate_images.Args),
}
README = Path("README.md")
text = README.read_text(encoding="utf-8")
for mark, table in TABLES.items():
    before, rest = text.split(f"<!-- {mark} -->")
    after = rest.split(f"<!-- /{mark} -->")[1]
    text = f"{before}<!-- {mark} -->\n\n{table}\n<!-- /{mark} -->{after}"
README.write_text(text, encoding="utf-8")
