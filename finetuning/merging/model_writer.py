"""Models as files: several results of one pass, each a folder that is whole or not there, with its recipe beside it."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag
from finetuning.families.folders import (
    components_of_index,
    copy_component,
    pipeline_index,
    weights_name,
    write_scheduler,
)
from finetuning.families.generation import DTYPES
from finetuning.families.model_args import ModelError
from finetuning.families.original import Place, original_names, place
from finetuning.families.tensors import refuse_not_finite
from finetuning.files import MANIFEST, atomic_folder, output_problems, remove_leftovers, write_json
from finetuning.merging.merge_writer import MergeTask, OutputTensor, write_files
from finetuning.merging.recipe import RECIPE, metadata_of, recipe_of

SINGLE_FILE = "merged.safetensors"


@dataclass
class OutputArgs:
    """Output"""

    output_dir: str = flag(REQUIRED, "where the result goes; several go into folders inside it", affects_result=False)
    single_file: bool = flag(False, f"write {SINGLE_FILE} in the original layout, which A1111 and ComfyUI load")
    dtype: str | None = flag(None, "precision of the files (none: the inputs' own)", choices=tuple(DTYPES))


@dataclass(frozen=True)
class MergeOutput:
    """One model to be written."""

    target: Path
    compute: Callable  # (Match) -> what makes that tensor (see merge_writer.OutputTensor)
    flags: dict  # which make this model again


def output_folder(output_dir, name, all_of_them):
    """Where one of several results goes: a folder of its own inside --output_dir; a single one is --output_dir."""
    return Path(output_dir) if len(all_of_them) == 1 else Path(output_dir) / name


def write_models(command, outputs, sources, matches, args: OutputArgs, *, whole=False, fallback=None, also_read=()):
    """Write every output in one pass over the sources' files. Returns lines to print. Raises ModelError.

    matches           the result's tensors, of tensor_matching.match; the first source is what the rest is copied from
    whole, fallback   of merge_writer.MergeTask, for the tensors that are not copies
    also_read         what was read besides the sources: no output may lie there
    An exception, a full disk or a kill leaves no output, and what was there before stays.
    """
    base = sources[0]
    changed = {one.component for one in matches if not one.is_copy}
    if base.folder and not args.dtype and not args.single_file:
        # The files of other components are copied as they are
        lies_there = lambda one: base.folder / one.component in one.inputs[0].path.parents
        matches = [one for one in matches if one.component in changed or not lies_there(one)]
    _check_layout(base, matches, args)
    for target in (output.target.resolve() for output in outputs):
        remove_leftovers(target.parent, target.name)  # of a merge that was killed
    read = [path for source in sources for path in (Path(source.given), source.folder, *source.files) if path]
    _check_targets(outputs, [*read, *also_read])
    configs = {} if args.single_file else _config_folders(sources, matches)
    class_name = None if args.single_file or base.folder is None else _class_name(sources, matches)
    names = _names(matches, base, args.single_file)
    inputs = tuple(dict.fromkeys(path for source in sources for path in source.files))
    for name in base.components.keys() - {one.component for one in matches} if base.folder else ():
        for key, reference in base.tensors[name].items():  # copied as whole files: the writer looks at all others
            refuse_not_finite({key: reference.read()}, reference.path)
    with ExitStack() as stack:
        folders = [stack.enter_context(atomic_folder(output.target.resolve())) for output in outputs]
        tasks = [
            _task(one, *names[one.name], folders, outputs, args.dtype, whole, fallback)
            for one in matches if one.name in names  # a single file has no place for position ids
        ]  # fmt: skip
        if not args.single_file:
            for folder in folders:
                _copy_rest(sources, matches, configs, class_name, folder)

        def metadata(hashes):
            recipes = [recipe_of(command, output.flags, sources, hashes) for output in outputs]
            return {
                folder / file: metadata_of(recipe)
                for folder, recipe in zip(folders, recipes, strict=True)
                for file in {file for file, _ in names.values()}
            }

        total = sum(output.dtype.itemsize * task.inputs[0].numel for task in tasks for output in task.outputs)
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging", leave=False) as bar:
            hashes, replaced = write_files(tasks, metadata, inputs, bar.update)
        for folder, output in zip(folders, outputs, strict=True):
            recipe = recipe_of(command, output.flags, sources, hashes)
            recipe["run"]["taken_over"] = replaced
            write_json(folder / RECIPE, recipe)
    lines = [f"{output.target / (SINGLE_FILE if args.single_file else '')}" for output in outputs]
    if replaced:
        lines.append(f"not finite, so taken over unmerged: {', '.join(replaced)}")
    return lines


def _task(one, file, place, folders, outputs, dtype, whole, fallback):
    """A match as work for the writer: a file's tensor for every output."""
    written = tuple(
        OutputTensor(
            folder / file, place.key, _written_dtype(one, dtype), place.shape,
            0 if one.is_copy else output.compute(one), place.first, place.transposed,
        )
        for folder, output in zip(folders, outputs, strict=True)
    )  # fmt: skip
    whole = place.transposed or (whole and not one.is_copy)
    return MergeTask(one.name, one.inputs, written, whole, None if one.is_copy else fallback)


def _written_dtype(one, dtype):
    """The dtype in which a match is written: --dtype, or the most precise of the inputs'."""
    kinds = {reference.dtype for reference in one.inputs}
    if dtype and one.inputs[0].dtype.is_floating_point:
        return DTYPES[dtype]
    if len(kinds) > 1 and any(kind.itemsize == 1 for kind in kinds):
        return torch.float32  # torch promotes no 8-bit floats
    return reduce(torch.promote_types, kinds)


def _names(matches, base, single_file):
    """{canonical name: (file in the output, Place in the file)}."""
    names = {}
    for component in {one.component for one in matches}:
        own, declared = [one for one in matches if one.component == component], base.family.by_name[component]
        if single_file:
            keys = original_names(declared, [one.key for one in own])
            at = lambda one, declared=declared, keys=keys: place(declared, one.key, keys[one.key], one.inputs[0].shape)
            names |= {one.name: (SINGLE_FILE, at(one)) for one in own if one.key in keys}
            continue
        file = Path(component if base.folder else "", weights_name(declared))  # a bare UNet lies in the folder itself
        names |= {one.name: (file, Place(declared.file_prefix + one.key, one.inputs[0].shape)) for one in own}
    return names


# -- what stands beside the weights --------------------------------------------------------------------------------


def _copy_rest(sources, matches, configs, class_name, folder):
    """Configurations, tokenizer, scheduler, and the components that are as they were."""
    base = sources[0]
    written = {one.component for one in matches}
    if base.folder is None:
        shutil.copyfile(configs["unet"] / "config.json", folder / "config.json")
        return
    index = pipeline_index(base.folder)
    if class_name == index["_class_name"]:
        shutil.copyfile(base.folder / "model_index.json", folder / "model_index.json")
    else:
        write_json(folder / "model_index.json", index | {"_class_name": class_name})
    for component in components_of_index(index):
        if component == "scheduler":
            write_scheduler(base.folder, folder, base.scheduler_config)
        elif component in written:
            copy_component(configs[component], folder / component, weights=False)
        else:
            copy_component(base.folder / component, folder / component)


def _config_folders(sources, matches):
    """{component: folder with the config.json that describes it} of what is written. Raises ModelError."""
    base, *others = sources
    shapes = {component: {key: one.shape for key, one in own.items()} for component, own in base.tensors.items()}
    foreign = {one.component for one in matches if shapes[one.component].get(one.key) != one.inputs[0].shape}
    found, lacking = {}, []
    for component in dict.fromkeys(one.component for one in matches):
        source = others[0] if component in foreign else base  # whose configuration describes what was taken
        files = source.components[component]
        found[component] = files.config or files.files[0].parent  # a UNet's file may have its configuration beside it
        if not (found[component] / "config.json").is_file():
            lacking.append(f"{source.given} has no configuration of its {component} (config.json)")
    if lacking:
        raise ModelError("\n".join(lacking) + "\n--layout_from names a pipeline whose configurations are taken")
    return found


def _class_name(sources, matches):
    """The pipeline's class: the base's, or that of the model whose UNet takes other channels. Raises ModelError."""
    base, *others = sources
    channels = base.tensors["unet"].get("conv_in.weight")
    taken = next((one.inputs[0] for one in matches if one.name == "unet.conv_in.weight"), channels)
    if taken is None or channels is None or taken.shape[1:2] == channels.shape[1:2]:
        return base.class_name
    if others[0].kind in ("original", "unet"):
        raise ModelError(
            f"{others[0].given} has a UNet of {taken.shape[1]} input channels and does not say which pipeline it goes "
            f"with, which is another than that of {base.given}: name its whole pipeline with --tuned"
        )
    return others[0].class_name


# -- refused before anything is written ----------------------------------------------------------------------------


def _check_layout(base, matches, args):
    components = {one.component for one in matches}
    if args.single_file and (lacking := base.family.by_name.keys() - components):
        raise ModelError(
            f"--single_file: the file holds a whole model, and {base.given} has no {', '.join(sorted(lacking))}: "
            "name a whole pipeline with --base"
        )
    if not args.single_file and base.folder is None and base.kind != "unet":
        raise ModelError(
            f"{base.given} has no configuration and no tokenizer beside it: add --single_file, or --layout_from with "
            "the pipeline (folder or Hub name) whose configuration and tokenizer go with it"
        )


def _check_targets(outputs, paths):
    """No output may stand where an input does, or where something else would be replaced."""
    wrong = []
    for output in outputs:
        if problems := list(output_problems(output.target, paths, around=True)):
            wrong.append(problems[0])
        elif foreign := _foreign(output.target.resolve()):
            wrong.append(
                f"--output_dir {output.target} is there already and no earlier result of this script ({foreign[0]})"
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
