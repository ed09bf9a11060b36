"""Models as files: several results of one pass, each a folder that is whole or not there, with its recipe beside it."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag
from finetuning.families.folders import copy_part, parts_of_index, pipeline_index, weights_name, write_scheduler
from finetuning.families.model_args import ModelError
from finetuning.families.original import original_names, original_shape
from finetuning.files import MANIFEST, atomic_folder, remove_leftovers, write_json
from finetuning.merging.recipe import RECIPE, metadata_of, recipe_of
from finetuning.merging.streaming import Piece, Written, write_files

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SINGLE_FILE = "merged.safetensors"
SPARE_BYTES = 64 * 2**20  # for configurations, tokenizer, recipe, and what the disk needs itself


@dataclass
class OutputArgs:
    """Output"""

    output_dir: str = flag(REQUIRED, "where the result goes; several results go into folders inside it")
    single_file: bool = flag(False, f"write {SINGLE_FILE} in the original layout, which A1111 and ComfyUI load")
    dtype: str | None = flag(None, "precision of the files (none: the inputs' own)", choices=tuple(DTYPES))


@dataclass(frozen=True)
class Product:
    """One model to be written."""

    target: Path
    compute: Callable  # (Match) -> what makes that tensor (see streaming.Written)
    flags: dict  # which make this model again


def place(output_dir, name, all_of_them):
    """Where one of several results goes: a folder of its own inside --output_dir; a single one is --output_dir."""
    return Path(output_dir) if len(all_of_them) == 1 else Path(output_dir) / name


def write_models(command, products, sources, matches, args: OutputArgs, whole=False, fallback=None):
    """Write every product in one pass over the sources' files. Returns lines for a person. Raises ModelError.

    matches           the result's tensors, of matching.match; the first source is what the rest is copied from
    whole, fallback   of streaming.Piece, for the tensors that are not copies
    An exception, a full disk or a kill leaves no product, and what was there before stays.
    """
    base = sources[0]
    changed = {one.part for one in matches if not one.is_copy}
    if base.folder and not args.dtype and not args.single_file:
        # The files of other parts are copied as they are
        lies_there = lambda one: base.folder / one.part in one.inputs[0].path.parents
        matches = [one for one in matches if one.part in changed or not lies_there(one)]
    _check_layout(base, matches, args)
    for target in (product.target.resolve() for product in products):
        remove_leftovers(target.parent, target.name)  # of a merge that was killed
    _check_targets(products, sources)
    _check_room(matches, base, products, args)
    configs = {} if args.single_file else _config_folders(sources, matches)
    names = _names(matches, base, args.single_file)
    inputs = tuple(dict.fromkeys(path for source in sources for path in source.files))
    hashes_written = {}
    with ExitStack() as stack:
        folders = [stack.enter_context(atomic_folder(product.target.resolve(), hashes_written)) for product in products]
        pieces = [_piece(one, *names[one.name], folders, products, args.dtype, whole, fallback) for one in matches]
        if not args.single_file:
            for folder in folders:
                _copy_rest(sources, matches, configs, folder)

        def metadata(hashes):
            recipes = [recipe_of(command, product.flags, sources, hashes) for product in products]
            return {
                folder / file: metadata_of(recipe)
                for folder, recipe in zip(folders, recipes, strict=True)
                for file in {file for file, _, _ in names.values()}
            }

        total = sum(stored_bytes(written) for piece in pieces for written in piece.outputs)
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging", leave=False) as bar:
            report = write_files(pieces, metadata, inputs, bar.update)
        hashes_written |= report.written
        for folder, product in zip(folders, products, strict=True):
            recipe = recipe_of(command, product.flags, sources, report.hashes)
            recipe["run"]["taken_over"] = list(report.replaced)
            write_json(folder / RECIPE, recipe)
    lines = [f"{product.target / (SINGLE_FILE if args.single_file else '')}" for product in products]
    if report.replaced:
        lines.append(f"not finite, so taken over unmerged: {', '.join(report.replaced)}")
    return lines


def stored_bytes(written):
    """Size of a tensor in its file."""
    return written.dtype.itemsize * math.prod(written.shape)


def _piece(one, file, key, shape, folders, products, dtype, whole, fallback):
    """A match as work for the streaming: a file's tensor for every product."""
    outputs = tuple(
        Written(folder / file, key, _kept(one, dtype), shape, 0 if one.is_copy else product.compute(one))
        for folder, product in zip(folders, products, strict=True)
    )
    return Piece(one.name, one.inputs, outputs, whole and not one.is_copy, None if one.is_copy else fallback)


def _kept(one, dtype):
    """The dtype in which a match is written: --dtype, or the most precise of the inputs'."""
    kinds = {stored.dtype for stored in one.inputs}
    if dtype and one.inputs[0].dtype.is_floating_point:
        return DTYPES[dtype]
    if len(kinds) > 1 and any(kind.itemsize == 1 for kind in kinds):
        return torch.float32  # torch promotes no 8-bit floats
    return reduce(torch.promote_types, kinds)


def _names(matches, base, single_file):
    """{canonical name: (file in the product, key in the file, shape there)}."""
    names = {}
    for part in {one.part for one in matches}:
        own = [one for one in matches if one.part == part]
        if single_file:
            keys = original_names(part, [one.key for one in own])
            names |= {
                one.name: (SINGLE_FILE, keys[one.key], original_shape(part, one.key, one.inputs[0].shape))
                for one in own
            }
            continue
        file = Path(part if base.folder else "", weights_name(part))  # a bare UNet lies in the folder itself
        # The names that transformers 4, A1111 and every file of SD 1.x have; transformers 5 writes them without.
        prefix = "text_model." if part == "text_encoder" else ""
        names |= {one.name: (file, prefix + one.key, one.inputs[0].shape) for one in own}
    return names


def _copy_rest(sources, matches, configs, folder):
    """What stands beside the weights: configurations, tokenizer, scheduler, and the parts that are as they were."""
    base = sources[0]
    written = {one.part for one in matches}
    if base.folder is None:
        shutil.copyfile(configs["unet"] / "config.json", folder / "config.json")
        return
    shutil.copyfile(base.folder / "model_index.json", folder / "model_index.json")
    for part in parts_of_index(pipeline_index(base.folder)):
        if part == "scheduler":
            write_scheduler(base.folder / part, folder / part, base.prediction_type or "epsilon")
        elif part in written:
            copy_part(configs[part], folder / part, weights=False)
        else:
            copy_part(base.folder / part, folder / part)


def _config_folders(sources, matches):
    """{part: folder with the config.json that describes it} of what is written. Raises ModelError."""
    base, *others = sources
    found, lacking = {}, []
    for part in dict.fromkeys(one.part for one in matches):
        source = others[0] if _has_foreign(matches, part, base) else base
        beside = source.folder / part if source.folder else source.files[0].parent
        found[part] = source.configs.get(part, beside)
        if not (found[part] / "config.json").is_file():
            lacking.append(f"{source.given} has no configuration of its {part} (config.json)")
    if lacking:
        raise ModelError("\n".join(lacking) + "\n--layout_from names a pipeline whose configurations are taken")
    return found


def _has_foreign(matches, part, base):
    """Whether --on_mismatch took tensors that the base's configuration does not describe."""
    own = base.parts[part]
    return any(
        one.part == part and (one.key not in own or one.inputs[0].shape != own[one.key].shape) for one in matches
    )


def _check_layout(base, matches, args):
    parts = {one.part for one in matches}
    if args.single_file and (lacking := {"unet", "text_encoder", "vae"} - parts):
        raise ModelError(
            f"--single_file: the file holds a whole model, and {base.given} has no {', '.join(sorted(lacking))}: "
            "name a whole pipeline with --base"
        )
    if not args.single_file and base.folder is None and base.kind != "unet":
        raise ModelError(
            f"{base.given} has no configuration and no tokenizer beside it: add --single_file, or --layout_from with "
            "the pipeline (folder or Hub name) whose configuration and tokenizer go with it"
        )


def _check_targets(products, sources):
    """No product may stand where an input does, or where something else would be replaced."""
    inputs = {path for source in sources for path in (Path(source.given), source.folder, *source.files) if path}
    inputs = {path.resolve() for path in inputs if path.exists()}
    wrong = []
    for product in products:
        target = product.target.resolve()
        if any(target == path or target in path.parents or path in target.parents for path in inputs):
            wrong.append(
                f"--output_dir {product.target} is one of the inputs, holds one or lies in one: name another folder"
            )
        elif foreign := _foreign(target):
            wrong.append(
                f"--output_dir {product.target} is there already and no earlier result of this script ({foreign[0]})"
            )
    if wrong:
        raise ModelError("\n".join(wrong))


def _foreign(target):
    """What lies there and is of no earlier result, which lists its files."""
    if target.is_file():
        return [target.name]
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir())
    if not {RECIPE, MANIFEST} <= set(found):
        return found
    try:
        own = {MANIFEST, *json.loads((target / MANIFEST).read_text(encoding="utf-8"))}
    except ValueError:
        return found
    return [name for name in found if name not in own]


def _check_room(matches, base, products, args):
    needed = sum(_kept(one, args.dtype).itemsize * one.inputs[0].numel for one in matches) + SPARE_BYTES
    if base.folder is not None and not args.single_file:
        copied = set(parts_of_index(pipeline_index(base.folder))) - {one.part for one in matches}
        needed += sum(path.stat().st_size for part in copied for path in (base.folder / part).glob("*.safetensors"))
    needed *= len(products)
    where = next(path for path in products[0].target.resolve().parents if path.exists())
    free = shutil.disk_usage(where).free
    if needed > free:
        raise ModelError(
            f"the results take {needed / 1e9:.1f} GB and {where} has {free / 1e9:.1f} GB left: free some, choose "
            "another --output_dir, fewer ratios, or --dtype fp16"
        )
