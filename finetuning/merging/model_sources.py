"""A model to merge, from whatever a user has: pipeline, Hub name, checkpoint of a run, single file, bare UNet.

Only headers are read here. All kinds come out alike: tensors by component, under diffusers' names.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from finetuning.cli import first_few
from finetuning.families.folders import PICKLES, parts_of_index, pipeline_index, weights_name
from finetuning.families.model_args import ModelError
from finetuning.families.original import OLD_VAE_ATTENTION, canonical_parts, is_original
from finetuning.merging.tensor_references import TensorReference, tensor_references

COMPONENTS = ("unet", "text_encoder", "vae")
PIPELINES = frozenset(  # those of one text encoder, one UNet and one autoencoder
    {
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionPipeline",
    }
)
RAW = "non_ema"
STEMS = ("diffusion_pytorch_model", "model")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "kohya_lora_weights.safetensors")
LORA_KEY = re.compile(r"[._]lora(_\w+)?[._]|^lora_(unet|te)")
CONVERT = (
    "{name} is a pickle, which can run any code when it is loaded: it is not read. This makes a safetensors file of "
    "it, loading nothing but tensors:\n"
    "    python -c \"import torch; from safetensors.torch import save_file; found = torch.load('{name}', 'cpu', "
    "weights_only=True); save_file({{key: value.clone().contiguous() for key, value in found.get('state_dict', found)"
    ".items() if torch.is_tensor(value)}}, '{stem}.safetensors')\"\n"
    'See "Pickled checkpoints" in the README where torch refuses it'
)


@dataclass(frozen=True)
class Source:
    """A model that was opened."""

    given: str  # as the user wrote it
    components: dict[str, dict[str, TensorReference]]  # canonical names; without those that the model lacks
    folder: Path | None  # diffusers pipeline whose other files (configurations, tokenizer, scheduler) go with it
    files: tuple[Path, ...]  # weights files it was read from
    kind: str  # "pipeline" | "checkpoint" | "original" | "unet"
    prediction_type: str | None
    configs: dict[str, Path] = field(default_factory=dict)  # folders with config.json of what is not `folder`'s
    warnings: tuple[str, ...] = ()  # tensors that are left out, a base that is missing


def open_source(name, *, weights="ema", revision=None, variant=None, cache_dir=None, layout_from=None):
    """The Source that `name` names. Raises ModelError, which says `name`.

    name         folder of a diffusers pipeline or its name on the Hub (with `revision`); checkpoint-N folder of a run,
                 whose untrained components are those of the model it started from; .safetensors file in the original
                 layout of SD 1.x and 2.x; a diffusers UNet's file or folder
    weights      "ema" or "raw", where both are there: unet_ema/ and unet/ of a checkpoint, plain files and *.non_ema.*
                 of a pipeline, model_ema.* and model.* of a single file
    variant      of a pipeline's files; it goes before `weights`. Components that have none are taken without
    layout_from  folder or Hub name of the pipeline whose configurations go with a model that has none of its own
    """
    path = Path(name)
    _refuse_what_is_no_model(name, path)
    local = path.exists()
    if local and revision:
        raise ModelError(f"{name} is on this machine and has no revisions: leave the revision {revision} out")
    variants = [variant, None] if variant else [RAW, None] if weights == "raw" else [None]
    if not local or (path / "model_index.json").is_file():
        folder = path if local else _hub_folder(name, revision, variants, cache_dir)
        return _pipeline(name, folder, variants, variant)
    is_checkpoint = (path / "training_state.json").is_file()
    if variant and (is_checkpoint or path.is_file()):
        raise ModelError(f"{name} is no pipeline and has no variants: leave the variant {variant} out")
    layout = _layout(layout_from, cache_dir)
    if is_checkpoint:
        return _checkpoint(name, path, weights, cache_dir, layout)
    if path.is_file():
        return _single_file(name, path, weights, layout)
    return _bare_unet(name, path, variants, variant, layout)


# -- one reader for each kind --------------------------------------------------------------------------------------


def _pipeline(name, folder, variants, asked):
    index = _pipeline_index(name, folder)
    components, files, found = {}, [], set()
    for component in (component for component in COMPONENTS if component in parts_of_index(index)):
        chosen, variant = _weights_files(name, folder / component, component, variants)
        components[component] = _diffusers_component(name, component, chosen)
        files += chosen
        found.add(variant)
    if asked and asked not in found:
        raise _no_variant(name, asked)
    return Source(str(name), components, folder, tuple(files), "pipeline", _prediction_type(name, folder))


def _checkpoint(name, path, weights, cache_dir, layout):
    """The trained components are the checkpoint's; the others are the base's, as the run loaded them."""
    args = _json(name, path / "training_state.json").get("args", {})
    suffix = "_ema" if weights == "ema" and (path / "unet_ema").is_dir() else ""
    own = {name: path / f"{name}{suffix}" for name in COMPONENTS if (path / f"{name}{suffix}").is_dir()}
    if "unet" not in own:
        raise ModelError(f"{name} holds no trained UNet (unet/): it is not a whole checkpoint of a run")
    chosen = {component: _weights_files(name, folder, component, [None])[0] for component, folder in own.items()}
    components = {component: _diffusers_component(name, component, files) for component, files in chosen.items()}
    files = [path for own_files in chosen.values() for path in own_files]
    base, warnings = Source(str(name), {}, layout, (), "pipeline", _prediction_type(name, layout)), ()
    try:
        base = open_source(
            args["pretrained_model_name_or_path"],
            revision=args.get("revision"),
            variant=args.get("variant"),
            cache_dir=cache_dir or args.get("cache_dir"),
        )
    except (ModelError, KeyError) as problem:
        without = "its other components are not there" + ("" if layout else "; name a pipeline with --layout_from")
        warnings = (f"{name}: the model that the run started from cannot be opened, so {without}: {problem}",)
    untrained = {component: tensors for component, tensors in base.components.items() if component not in components}
    read = {reference.path for tensors in untrained.values() for reference in tensors.values()}
    files += [path for path in base.files if path in read]
    kind = args.get("prediction_type") or base.prediction_type
    return Source(str(name), components | untrained, base.folder, tuple(files), "checkpoint", kind, own, warnings)


def _single_file(name, path, weights, layout):
    tensors, _ = tensor_references(path)
    if any(LORA_KEY.search(key) for key in tensors):
        raise _is_lora(name)
    if _is_unet(tensors):
        return Source(str(name), {"unet": dict(tensors)}, layout, (path,), "unet", _prediction_type(name, layout))
    if not is_original(tensors):
        raise ModelError(
            f"{name} is neither a single file of SD 1.x or 2.x (model.diffusion_model.*) nor a UNet of diffusers "
            f"(conv_in.weight); its tensors are named {first_few(sorted(tensors), 3) or 'nothing'}"
        )
    try:
        components, strange = canonical_parts(tensors, weights)
    except ModelError as problem:
        raise ModelError(f"{name}: {problem}") from problem
    if "unet" not in components:
        raise ModelError(f"{name} holds no UNet of SD 1.x or 2.x (model.diffusion_model.*)")
    warnings = ()
    if strange:
        warnings = (f"{name}: {len(strange)} tensor(s) of no component of SD are left out: {first_few(strange, 3)}",)
    kind = _prediction_type(name, layout)
    return Source(str(name), components, layout, (path,), "original", kind, warnings=warnings)


def _bare_unet(name, path, variants, asked, layout):
    if not (path / "config.json").is_file() or not _found_weights(path, "unet"):
        raise ModelError(_not_a_model(name, path))
    files, variant = _weights_files(name, path, "unet", variants)
    if asked and variant != asked:
        raise _no_variant(name, asked)
    tensors = _diffusers_component(name, "unet", files)
    if not _is_unet(tensors):
        raise ModelError(f"{name} is a component of a model, but not a UNet: name the folder of its pipeline")
    config = {"unet": path}
    return Source(str(name), {"unet": tensors}, layout, tuple(files), "unet", _prediction_type(name, layout), config)


def _is_unet(tensors):
    return "conv_in.weight" in tensors and any(key.startswith("down_blocks.") for key in tensors)


# -- files ---------------------------------------------------------------------------------------------------------


def _weights_files(name, folder, component, variants):
    """(files, variant) of the first of `variants` that a component has, else of the only variant that is there."""
    found = _found_weights(folder, component)
    variant = next((variant for variant in variants if variant in found), None)
    if variant not in found and len(found) == 1:
        variant = next(iter(found))
    if variant in found:
        return _with_shards(name, found[variant]), variant
    if found:
        raise ModelError(f"{name}: its {component} has only variants: name {' or '.join(sorted(found))} as the variant")
    if folder.is_dir() and (pickles := sorted(path for path in folder.iterdir() if path.suffix in PICKLES)):
        raise ModelError(_how_to_convert(pickles[0], pickles[0].with_name(weights_name(component))))
    raise ModelError(f"{name} lacks the weights of its {component} ({weights_name(component)}, or a variant of them)")


def _found_weights(folder, component):
    """{variant or None: file, or index of a file that is split} of a component's folder."""
    stem = weights_name(component).removesuffix(".safetensors")
    whole = re.compile(rf"{stem}(?:\.([\w-]+?))?(?<!-of-\d{{5}})\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    # Whole files come second: where a component is there both ways, from_pretrained takes the file as well.
    return {match[1]: path for kind in (index, whole) for path in paths if (match := kind.fullmatch(path.name))}


def _with_shards(name, path):
    """The files that hold the weights: the one itself, or all that an index lists."""
    if path.suffix == ".safetensors":
        return [path]
    files = [path.parent / file for file in sorted(set(_json(name, path).get("weight_map", {}).values()))]
    if missing := [file.name for file in files if not file.is_file()] or (["any file"] if not files else []):
        raise ModelError(f"{name} is not whole: {path.name} lists {', '.join(missing)}, which is not there")
    return files


def _diffusers_component(name, component, files):
    """{canonical key: TensorReference} of a component of a diffusers folder; a name that comes twice is refused."""
    tensors, came_from = {}, {}
    for path in files:
        for key, reference in tensor_references(path)[0].items():
            canonical = _canonical(component, key)
            if canonical in tensors:
                raise ModelError(
                    f"{name}: {component} has one tensor twice, as {came_from[canonical]} and as {key}: remove one"
                )
            tensors[canonical], came_from[canonical] = reference, key
    return tensors


def _canonical(component, key):
    if component == "text_encoder":
        return key.removeprefix("text_model.")
    found = component == "vae" and re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", key)
    return f"{found[1]}{OLD_VAE_ATTENTION[found[2]]}{found[3]}" if found else key


def _hub_folder(name, revision, variants, cache_dir):
    """The Hub's files in the cache: configurations, tokenizer, and of every component the first variant that it has."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or Path(name).suffix == ".safetensors":
        raise ModelError(f"{name}: there is no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=["model_index.json", "*/*.json", "*/*.txt"]
        )
        if not (Path(folder) / "model_index.json").is_file():
            raise ModelError(f"{name} on the Hub has no model_index.json: it is not a diffusers pipeline")
        lacking = parts_of_index(_pipeline_index(name, Path(folder)))
        for variant in variants:
            ending = f".{variant}" if variant else ""
            wanted = [f"{component}/{stem}{ending}{shard}.safetensors"
                      for component in lacking for stem in STEMS for shard in ("", "-*-of-*")]  # fmt: skip
            snapshot_download(name, revision=Path(folder).name, cache_dir=cache_dir, allow_patterns=wanted)
            lacking = [own for own in lacking if variant not in _found_weights(Path(folder) / own, own)]
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        where = f"{name} at revision {revision}" if revision else name
        raise ModelError(f"{where} is neither a file nor a folder, nor available on the Hub: {error}") from error
    return Path(folder)


def _layout(name, cache_dir):
    """The pipeline folder that --layout_from names, or None."""
    if name is None:
        return None
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise ModelError(f"--layout_from {name} has no model_index.json: it is not a diffusers pipeline")
    folder = Path(name) if Path(name).exists() else _hub_folder(name, None, [None], cache_dir)
    _pipeline_index(name, folder)
    return folder


def _pipeline_index(name, folder):
    """model_index.json, of a pipeline that can be merged."""
    _json(name, folder / "model_index.json")
    index = pipeline_index(folder)
    if index.get("_class_name") not in PIPELINES:
        raise ModelError(
            f"{name} is a {index.get('_class_name')}; what can be merged is {', '.join(sorted(PIPELINES))}"
        )
    return index


def _prediction_type(name, folder):
    if folder is None:
        return None
    return _json(name, folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")


def _json(name, path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path} does not hold what its name says")
    return content


# -- what is refused -----------------------------------------------------------------------------------------------


def _refuse_what_is_no_model(name, path):
    if path.suffix in PICKLES and not path.is_dir():
        raise ModelError(_how_to_convert(path, path.with_suffix(".safetensors")))
    if path.name in LORA_FILES or (path / "lora").is_dir() or any((path / file).is_file() for file in LORA_FILES):
        raise _is_lora(name)


def _no_variant(name, asked):
    return ModelError(f"{name} has no weights of the variant {asked} (*.{asked}.safetensors)")


def _is_lora(name):
    return ModelError(
        f"{name} is a LoRA, not a whole model: make one of it with `merge_checkpoints.py fuse`, or merge the LoRAs "
        "themselves with `merge_checkpoints.py combine`"
    )


def _how_to_convert(path, target):
    return CONVERT.format(name=path, stem=str(target).removesuffix(".safetensors"))


def _not_a_model(name, path):
    checkpoints = sorted(below.name for below in path.glob("checkpoint-*") if below.is_dir())
    if checkpoints:
        return f"{name} is a run that is not finished: name one of its checkpoints ({', '.join(checkpoints)})"
    inside = [] if any(path.iterdir()) else ["the folder is empty"]
    files = sorted(below.name for below in path.glob("*.safetensors"))
    inside += [f"name the file itself: {', '.join(files)}"] if files else []
    return "; ".join(
        [f"{name} is no model: it has no model_index.json (a pipeline), no training_state.json (a checkpoint of a run) "
         "and no config.json beside weights (a UNet)", *inside]
    )  # fmt: skip
