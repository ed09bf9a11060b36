"""Write FLAGS.md, the tables of every script's flags, from the code. Run by `make flags`."""

from pathlib import Path

import caption_images
import evaluate_model
import generate_images
import merge_checkpoints
import prepare_dataset
import train_lora
import train_text_to_image
from finetuning.cli import flag_table

HEAD = """# Every flag of every script

Written by `make flags` from the code; `--help` says the same. `--config FILE` (YAML or JSON, keys named as flags) fills
any of them, the command line wins. Flags that are on or off are switched off by `--no-` before their name.
"""


def page():
    """The whole file as text."""
    training = flag_table(train_text_to_image.Args)
    lora = flag_table(train_lora.Args, besides=train_text_to_image.Args)
    sections = [
        (
            "train_text_to_image.py",
            "Names and defaults are those of diffusers' official example where it has them.",
            training,
        ),
        ("train_lora.py", 'Those of train_text_to_image.py, without its group "Weights to start from", and:', lora),
        ("generate_images.py", "", flag_table(generate_images.Args)),
        *((f"prepare_dataset.py {name}", "", flag_table(args)) for name, args in prepare_dataset.COMMANDS.items()),
        ("evaluate_model.py", "", flag_table(evaluate_model.Args)),
        ("caption_images.py", "", flag_table(caption_images.Args)),
        *(
            (f"merge_checkpoints.py {name}", "", flag_table(args))
            for name, (args, _) in merge_checkpoints.commands().items()
        ),
    ]
    return "\n".join(
        [HEAD, *(f"## {title}\n\n" + (f"{note}\n\n" if note else "") + table for title, note, table in sections)]
    )


if __name__ == "__main__":
    Path("FLAGS.md").write_text(page(), encoding="utf-8")
