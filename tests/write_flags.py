"""Write docs/flags.md, the tables of every script's flags, from the code. Run by `make flags`."""

import importlib
from pathlib import Path

from finetuning.cli import flag_table, load_command

HEAD = """# Every flag of every script

Written by `make flags` from the code; `--help` says the same. `--config FILE` (YAML or JSON, keys named as the flags)
fills any of them; the command line wins. A flag that is on or off is given as `--use_ema`, `--no-use_ema` or
`--use_ema false`. A flag that takes several values takes them all at once: `--seed 1 2 3`.
"""
NOTES = {
    "train_text_to_image.py": "Names and defaults are those of diffusers' official example where it has them.",
    "train_lora.py": 'Those of train_text_to_image.py, without its group "Weights to start from", and:',
}
SCRIPTS = (
    "train_text_to_image", "train_lora", "generate_images", "prepare_dataset", "evaluate_model", "caption_images",
    "merge_checkpoints",
)  # fmt: skip


def page():
    """The whole file as text."""
    scripts = {name: importlib.import_module(name) for name in SCRIPTS}
    sections = []
    for name, script in scripts.items():
        if hasattr(script, "COMMANDS"):
            tables = {command: flag_table(load_command(entry)[0]) for command, entry in script.COMMANDS.items()}
            sections += [(f"{name}.py {command}", table) for command, table in tables.items()]
        else:
            besides = scripts["train_text_to_image"].Args if name == "train_lora" else None
            sections.append((f"{name}.py", flag_table(script.Args, besides)))
    notes = {title: f"{NOTES[title]}\n\n" if title in NOTES else "" for title, _ in sections}
    return "\n".join([HEAD, *(f"## {title}\n\n{notes[title]}{table}" for title, table in sections)])


if __name__ == "__main__":
    Path("docs/flags.md").write_text(page(), encoding="utf-8")
