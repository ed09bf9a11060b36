"""Write the flags' tables into README.md, from the code. Run by `make readme`."""

from pathlib import Path

from finetuning.cli import flag_table
from train_text_to_image import Args

README = Path("README.md")
before, rest = README.read_text(encoding="utf-8").split("<!-- flags -->")
_, after = rest.split("<!-- /flags -->")
table = flag_table(Args)
README.write_text(f"{before}<!-- flags -->\n\n{table}\n<!-- /flags -->{after}", encoding="utf-8")
