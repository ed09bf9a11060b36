"""The recipe of a merged model: merge.json beside its weights, and the same in their safetensors metadata.

It holds the flags under their own names, so that `--config merge.json` and `replay` make the model again, and under
"run" what was read: every input file with its sha256.
"""

import json
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from finetuning.families.model_args import ModelError
from finetuning.families.tensors import tensor_references
from finetuning.files import sha256

RECIPE = "merge.json"
METADATA_KEY = "merge"
CHECKOUT = Path(__file__).resolve().parents[2]


def recipe_of(command, flags, sources, hashes=None):
    """{flag: value, ..., "run": {...}}, ready for JSON; `hashes` {path: sha256} of the sources' files, if known."""
    hashes = hashes or {path: sha256(path) for source in sources for path in source.files}
    inputs = [
        {"given": source.given, "files": {_below(source, path): hashes[path] for path in source.files}}
        for source in sources
    ]
    flags = {name: value for name, value in flags.items() if name != "output_dir"}  # where it lies is not what it is
    versions = {name: version(name) for name in ("torch", "safetensors")}
    return {**flags, "run": {"command": command, "inputs": inputs, "code": code_version(), "versions": versions}}


def metadata_of(recipe):
    """For the header of a safetensors file, where every value is text."""
    return {"format": "pt", METADATA_KEY: json.dumps(recipe, ensure_ascii=False, sort_keys=True)}


def read_recipe(place):
    """The recipe of a folder, of its merge.json or of a .safetensors file. Raises ModelError."""
    path = Path(place)
    if path.is_dir():
        path = path / RECIPE
    try:
        if path.suffix == ".safetensors":
            content = json.loads(tensor_references(path)[1][METADATA_KEY])
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
        if not all(content["run"][key] for key in ("command", "inputs", "code")):
            raise ValueError("nothing was read")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place} holds no recipe of a merge ({RECIPE}, or metadata of a .safetensors)") from error
    return content


def described(recipe):
    """The recipe in lines to print."""
    run = recipe["run"]
    lines = [f"made by  merge_checkpoints.py {run['command']}, code {run['code']}"]
    for source in run["inputs"]:
        lines.append(f"from     {source['given']}")
        lines += [f"           {digest}  {name}" for name, digest in source["files"].items()]
    words = []
    for name, value in recipe.items():
        if name != "run" and not (value is None or value is False or value == []):
            given = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name}" if value is True else f"--{name} {given}")
    lines.append("flags    " + "  ".join(words))
    if run.get("taken_over"):
        lines.append(f"taken over unmerged, for they are not finite: {', '.join(run['taken_over'])}")
    return lines


def changed_inputs(recipe, sources):
    """Sentences on files that are no longer those of the recipe; reads them whole."""
    for source, known in zip(sources, recipe["run"]["inputs"], strict=True):
        files = {_below(source, path): path for path in source.files}
        if files.keys() != known["files"].keys():
            yield f"{source.given} has other files than the recipe lists: {', '.join(sorted(files))}"
        for name in sorted(files.keys() & known["files"].keys()):
            if (now := sha256(files[name])) != known["files"][name]:
                then = known["files"][name]
                yield f"{files[name]} is not the file of the recipe (sha256 {now[:12]}, not {then[:12]})"


@cache
def code_version():
    """The checkout's commit, with -dirty where files differ from it; "unknown" outside of git."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _below(source, path):
    """A file's name inside its source: the same wherever that lies."""
    given = Path(source.given)
    for top in (given, source.folder):
        if top is not None and top in path.parents:
            return str(path.relative_to(top))
    return path.name
