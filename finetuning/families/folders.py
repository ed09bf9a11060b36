"""What lies where: in folders of diffusers pipelines, and in folders of this project's runs.

pipeline       model_index.json, and a folder for each component: unet/diffusion_pytorch_model.safetensors, ...
               A finished run has averaged weights under the plain name and raw ones as the variant non_ema
checkpoint-N   training_state.json, and a folder for each trained component: unet/ raw, unet_ema/ averaged;
               lora/ and lora_ema/ of train_lora.py
"""

import re
import shutil
from pathlib import Path

from finetuning.cli import first_few
from finetuning.families.model_args import ModelError
from finetuning.families.tensors import PICKLES, pickled, read_json, tensor_references
from finetuning.files import write_json

RAW = "non_ema"  # the variant of the weights as they were trained, beside their average
STATE = "training_state.json"
OTHER_FORMATS = (*PICKLES, ".msgpack", ".h5", ".onnx", ".ot", ".gguf")  # of weights; they are never read or copied

WHOLE = re.compile(r"(?:diffusion_pytorch_)?model(?:\.([\w-]+?))?(?<!-of-\d{5})\.safetensors")
SHARDED = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.([\w-]+))?\.json")


def pipeline_index(folder):
    """The content of model_index.json. Raises ModelError."""
    return read_json(Path(folder) / "model_index.json")


def class_of(folder, name):
    """The class that a pipeline's model_index.json names for a component, or None. Raises ModelError."""
    entry = pipeline_index(folder).get(name)  # [library, class]
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def scheduler_config(folder, name="scheduler"):
    """A pipeline's scheduler configuration, always with prediction_type and _class_name. Raises ModelError."""
    config = read_json(Path(folder) / name / "scheduler_config.json")
    named, predicts = class_of(folder, name) or config.get("_class_name"), config.get("prediction_type", "epsilon")
    return config | {"_class_name": named, "prediction_type": predicts}


def components_of_index(index):
    """The folders that a model_index.json names."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0]]


def weights_name(component, variant=None):
    """The file that holds a Component's weights."""
    return f"{component.stem}.{variant}.safetensors" if variant else f"{component.stem}.safetensors"


def of_checkpoint(folder, name, weights="ema"):
    """The folder in checkpoint-N that holds what is named: its average, where "ema" is asked for and there is one."""
    averaged = Path(folder) / f"{name}_ema"
    return averaged if weights == "ema" and averaged.is_dir() else Path(folder) / name


def weights_by_variant(folder):
    """{variant, or None: file, or index of weights that are split} of a component's folder."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    # Whole files come second: where weights are there both ways, from_pretrained takes the file as well.
    return {found[1]: path for kind in (SHARDED, WHOLE) for path in paths if (found := kind.fullmatch(path.name))}


def weights_files(given, name, folder, variants):
    """(files, variant) of the first of `variants` that a component has; where it has none, of the only one there.

    Raises ModelError, which says `given`, the model as the user named it, and `name`, the component.
    """
    found = weights_by_variant(folder)
    variant = next((variant for variant in variants if variant in found), None)
    if variant not in found and len(found) == 1:
        variant = next(iter(found))
    if variant in found:
        return _with_shards(found[variant]), variant
    if found:
        raise ModelError(f"{given}: its {name} has only variants: name {' or '.join(sorted(found))} as the variant")
    refuse_pickles(folder)
    raise ModelError(f"{given} lacks the weights of its {name}: there is no .safetensors file in {folder}")


def refuse_pickles(folder):
    """Raises ModelError, with the command that converts it, where a folder has weights only as a pickle."""
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles and not weights_by_variant(folder):
        name = re.sub(r"^pytorch_model", "model", pickles[0].stem)  # transformers' names of the two
        raise pickled(pickles[0], pickles[0].with_name(f"{name}.safetensors"))


def check_weights_files(folder):
    """Raises ModelError where weights in a folder are damaged, pointers of git LFS, or there only as a pickle."""
    refuse_pickles(folder)
    for path in sorted(folder.glob("*.safetensors")):
        tensor_references(path)


def _with_shards(path):
    """The files that hold the weights: the one itself, or all that an index lists."""
    if path.suffix == ".safetensors":
        return [path]
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} lists no files of weights (weight_map): copy or download it again")
    names = sorted(set(map(str, weight_map.values())))
    if wrong := [name for name in names if Path(name).name != name or not (path.parent / name).is_file()]:
        raise ModelError(f"{path} lists {first_few(wrong)}, which is not beside it: copy or download it again")
    return [path.parent / name for name in names]


def copy_component(source, target, weights=True):
    """Copy a component's files, but for weights that are not safetensors. Where only a variant is there
    (model.fp16.safetensors), it takes the plain name. Without `weights` only what stands beside them.
    """
    if weights:
        refuse_pickles(source)
    target.mkdir()
    for path in sorted(source.iterdir()):
        is_weights = path.suffix == ".safetensors" or ".safetensors.index" in path.name
        if path.is_file() and path.suffix not in OTHER_FORMATS and (weights or not is_weights):
            shutil.copyfile(path, target / path.name)
    whole = {variant: path for variant, path in weights_by_variant(target).items() if path.suffix == ".safetensors"}
    if whole and None not in whole:
        variant, path = next(iter(whole.items()))
        path.rename(path.with_name(path.name.replace(f".{variant}.", ".")))


def write_scheduler(source, target, config):
    """Give the pipeline in `target` the scheduler of the one in `source`, changed where `config` differs from it."""
    own, path = scheduler_config(source), target / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    if own == config:
        shutil.copyfile(source / "scheduler" / path.name, path)
        return
    write_json(path, config)
    if own["_class_name"] != config["_class_name"]:
        index = pipeline_index(target) | {"scheduler": ["diffusers", config["_class_name"]]}
        write_json(target / "model_index.json", index)
