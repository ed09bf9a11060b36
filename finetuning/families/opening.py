"""One opener for every model that a person may name: pipeline, Hub name, checkpoint of a run, single file, bare UNet.

    source = open_source("runs/dogs/checkpoint-500")     # reads headers and configurations, no weights
    unet = source.open("unet")                           # the module, in fp32 on the CPU

Only safetensors are read. A component whose weights are not exactly those that its class expects is refused.
"""

import copy
import inspect
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from finetuning.cli import first_few
from finetuning.diffusion.objective import PREDICTION_TYPES, scheduler_changes
from finetuning.families.family import Family
from finetuning.families.folders import (
    OTHER_FORMATS,
    RAW,
    STATE,
    class_of,
    components_of_index,
    of_checkpoint,
    pipeline_index,
    refuse_pickles,
    scheduler_config,
    weights_by_variant,
    weights_files,
)
from finetuning.families.lora_files import is_lora_key, is_lora_path
from finetuning.families.model_args import ModelError
from finetuning.families.original import OLD_VAE_ATTENTION, canonical_parts, is_original
from finetuning.families.quiet import errors_only
from finetuning.families.table import DEFAULT_FAMILY, FAMILIES, family_of_tensors
from finetuning.families.tensors import (
    PICKLES,
    TensorReference,
    check_weights,
    pickled,
    read_json,
    refuse_not_finite,
    tensor_references,
)

# Pipelines made of a family's components, whose weights can be merged; what they do to images is not done here.
RELATIVES = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInstructPix2PixPipeline": "StableDiffusionXLPipeline",
}
KINDS = ("pipeline", "checkpoint", "original", "unet")

# Tensors that files of sound models have and their classes have not: transformers 4 wrote position ids, and some
# conversions keep CLIP's other half.
KNOWN_EXTRAS = re.compile(
    r"(.*\.)?position_ids|(text_model\.)?(text_projection(\.weight)?|logit_scale)|visual_projection\.weight"
    r"|vision_model\..*"
)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ComponentFiles:
    """Where one component of a model lies."""

    config: Path | None  # folder with its config.json
    files: tuple[Path, ...]  # .safetensors
    variant: str | None
    tensors: dict[str, TensorReference] = field(repr=False)  # by the names that its module has


@dataclass(frozen=True)
class Source:
    """A model that was opened: which files hold what. No weights have been read yet."""

    given: str  # as the user named it
    kind: str  # "pipeline" | "checkpoint" | "original" (a single file) | "unet"
    family: Family
    class_name: str  # of the pipeline: the family's own, or one of RELATIVES
    folder: Path | None  # pipeline folder whose other files (configurations, tokenizers, scheduler) go with it
    components: dict[str, ComponentFiles]
    scheduler_config: dict  # of its pipeline, as the run that it is of changed it; {} where there is none
    warnings: tuple[str, ...] = ()  # tensors that are left out, a base that cannot be opened
    base: "Source | None" = field(default=None, repr=False)  # what components that it lacks are opened from

    @property
    def tensors(self):
        """{component: {key: TensorReference}}, by the names that the modules have."""
        return {name: one.tensors for name, one in self.components.items()}

    @property
    def files(self):
        """All files of weights, each once."""
        return tuple(dict.fromkeys(path for one in self.components.values() for path in one.files))

    def open(self, name, dtype=torch.float32):
        """A component's module in `dtype`, on the CPU, in evaluation mode. Raises ModelError."""
        module, found = self.check(name), self._holder(name).components[name]
        tensors = {key: found.tensors[key].read() for key in module.state_dict() if key in found.tensors}
        for key, tensor in tensors.items():
            refuse_not_finite({key: tensor}, found.tensors[key].path)
            if tensor.is_floating_point():
                tensors[key] = tensor.to(dtype)
        return _filled(module, tensors, dtype).eval()

    def check(self, name):
        """Compare a component's tensors with those that its class expects; no weights are read.

        Returns its skeleton. Raises ModelError naming what is missing, what nothing knows, and what has another shape.
        """
        if name not in self.components:
            return self._holder(name).check(name)
        found = self.components[name]
        if found.config is None:
            raise ModelError(f"{self.given} has no configuration of its {name}: {self._why_missing()}")
        module = skeleton_of(self.family.by_name[name], found.config)
        if problems := misfits(module, found.tensors):
            raise ModelError(
                f"{self.given}: the weights of its {name} ({first_few(found.files, 1)}) are not those of a "
                f"{type(module).__name__} as {found.config / 'config.json'} describes it. Tensors that are " + problems
            )
        return module

    def _holder(self, name):
        """The Source that has a component: this one, or what it borrows from. Raises ModelError."""
        if name in self.components:
            return self
        if self.base is None:
            raise ModelError(f"{self.given} has no {name}: {self._why_missing()}")
        return self.base._holder(name)

    def with_vae(self, name, cache_dir=None):
        """This one with the autoencoder that open_vae opens, or as it is where `name` is None. Raises ModelError."""
        return replace(self, components=self.components | open_vae(name, self.family, cache_dir)) if name else self

    def tokenizers(self):
        """{text encoder: its tokenizer}. Raises ModelError, also where the two are of different models."""
        found = {encoder: self.tokenizer(folder) for encoder, folder in self.family.tokenizers.items()}
        for encoder, tokenizer in found.items():
            config = self.check(encoder).config
            longest = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
            if len(tokenizer) > config.vocab_size or tokenizer.model_max_length > longest:
                raise ModelError(
                    f"{self.given}: its tokenizer has {len(tokenizer)} tokens, texts of {tokenizer.model_max_length}; "
                    f"its {encoder} takes {config.vocab_size}, and {longest}: they are of different models"
                )
        return found

    def tokenizer(self, name="tokenizer"):
        """The tokenizer in a folder of the pipeline. Raises ModelError."""
        folder = self._pipeline_folder()
        return open_tokenizer(folder / name, class_of(folder, name) or "CLIPTokenizer")

    @property
    def objective(self):
        """What the denoiser was trained to predict, in words; None where that is not known."""
        config = self.scheduler_config
        predicts = config.get("prediction_type")
        return f"{predicts} with rescale_betas_zero_snr" if config.get("rescale_betas_zero_snr") else predicts

    def trained_with(self, flags):
        """This one with the scheduler of a run that started from it with these flags, {name: value}: DDIM's, where its
        own class cannot sample from what the run makes."""
        changes = scheduler_changes(flags)
        config = self.scheduler_config | changes
        if changes and cannot_sample(config.get("_class_name"), config):
            from diffusers import DDIMScheduler

            known = inspect.signature(DDIMScheduler).parameters
            config = {key: value for key, value in config.items() if key in known or key.startswith("_")}
            config = {"clip_sample": False} | config | {"_class_name": "DDIMScheduler"}  # the others do not clip
        return replace(self, scheduler_config=config)

    def scheduler(self, part="scheduler", class_name=None):
        """A scheduler that the pipeline names, or of another of diffusers' classes. Raises ModelError."""
        import diffusers

        folder = self._pipeline_folder() / part
        path = folder / "scheduler_config.json"
        config = (part == "scheduler" and self.scheduler_config) or scheduler_config(folder.parent, part)
        predicts, named = config.get("prediction_type"), config.get("_class_name")
        if predicts not in PREDICTION_TYPES:
            raise ModelError(f"{path}: a prediction_type {predicts} is none of {', '.join(PREDICTION_TYPES)}")
        if not str(named).endswith("Scheduler") or not hasattr(diffusers, named):
            raise ModelError(f"{folder.parent} names the {part} {named}, which diffusers does not have")
        with _one_line(folder), errors_only():
            made = getattr(diffusers, class_name or named).from_config(config)
        if not len(getattr(made, "alphas_cumprod", "?")):
            raise ModelError(f"{path} describes a schedule without a step")
        return made

    def settings(self):
        """What else model_index.json says of the pipeline, e.g. {"force_zeros_for_empty_prompt": True}."""
        index = pipeline_index(self._pipeline_folder())
        return {key: value for key, value in index.items() if isinstance(value, bool | int | float)}

    def _pipeline_folder(self):
        if self.folder is None:
            raise ModelError(f"{self.given} has no tokenizer and no scheduler beside it: {self._why_missing()}")
        return self.folder

    def _why_missing(self):
        if self.warnings and self.kind == "checkpoint":
            return self.warnings[0]
        if self.kind == "pipeline":
            return f"a {self.class_name} cannot be used without it"
        return "name the pipeline that goes with it (--base; --layout_from of a merge)"


def open_source(
    name, *, weights="ema", revision=None, variant=None, cache_dir=None, base=None, only=None, without_weights=(),
    kinds=KINDS, relatives=False,
):  # fmt: skip
    """The Source that `name` names. Raises ModelError, which says `name`.

    name       folder of a diffusers pipeline or its name on the Hub (with `revision`); checkpoint-N folder of a run;
               .safetensors file in the original layout; a diffusers UNet's file or folder
    weights    "ema" or "raw", where both are there: unet_ema/ and unet/ of a checkpoint, plain files and *.non_ema.*
               of a pipeline, model_ema.* and model.* of a single file
    variant    of a pipeline's files; it goes before `weights`. Components that have none are taken without
    base       folder or Hub name of the pipeline that lends what `name` lacks: the untrained components of a
               checkpoint (none: the model that the run started from), configurations, tokenizer and scheduler
    only       names of the components that are wanted: others are not downloaded and may be missing (none: all)
    without_weights  components of which only the configuration is wanted
    kinds      those of KINDS that the caller can use
    relatives  whether RELATIVES of a family will do as well
    """
    path, only = Path(name), None if only is None else frozenset(only)
    _refuse_what_is_no_model(name, path)
    local = path.exists()
    if local and revision:
        raise ModelError(f"{name} is on this machine and has no revisions: leave the revision {revision} out")
    kind = _kind(name, path)
    if kind not in kinds:
        hint = "; a run is continued with --resume_from_checkpoint" if kind == "checkpoint" else ""
        what = {"checkpoint": "a checkpoint of a run", "original": "a file", "unet": "a component alone"}[kind]
        raise ModelError(f"{name} is {what}, not a diffusers pipeline: it has no model_index.json{hint}")
    variants = [variant, None] if variant else [RAW, None] if weights == "raw" else [None]
    if kind == "pipeline":
        folder = path if local else _hub_folder(name, revision, variants, cache_dir, only, without_weights)
        return _pipeline(str(name), folder, variants, variant, only, without_weights, relatives)
    if variant and (kind == "checkpoint" or path.is_file()):
        raise ModelError(f"{name} is no pipeline and has no variants: leave the variant {variant} out")
    options = {"cache_dir": cache_dir, "only": only, "relatives": relatives}
    if kind == "checkpoint":
        return _checkpoint(str(name), path, weights, base, options)
    lent = _lent(base, options)
    if path.is_file():
        return _single_file(str(name), path, weights, lent)
    return _bare_unet(str(name), path, variants, variant, lent)


def open_tokenizer(folder, class_name="CLIPTokenizer"):
    """The tokenizer in a folder. Raises ModelError: transformers makes an empty one where the files are missing."""
    import transformers

    folder = Path(folder)
    has = lambda *names: all((folder / name).is_file() for name in names)
    if not (has("tokenizer.json") or has("vocab.json", "merges.txt") or has("spiece.model")):
        raise ModelError(
            f"{folder} holds no tokenizer: there is neither tokenizer.json nor vocab.json with merges.txt"
            if folder.is_dir() else f"{folder} is not there: the tokenizer is missing"
        )  # fmt: skip
    for path in sorted(folder.glob("*.json")):
        read_json(path)
    if not re.fullmatch(r"\w+Tokenizer(Fast)?", class_name):  # another class would read weights
        raise ModelError(f"{folder}: model_index.json names a {class_name}, which is no tokenizer")
    with _one_line(folder), errors_only():
        tokenizer = getattr(transformers, class_name).from_pretrained(folder)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{folder} holds a tokenizer without words: copy or download its files again")
    longest = tokenizer.model_max_length
    if type(longest) is not int or not 0 < longest < 1_000_000:  # what transformers says where nothing is said
        raise ModelError(f"{folder / 'tokenizer_config.json'} does not say how long a text may be (model_max_length)")
    return tokenizer


def open_vae(name, family: Family, cache_dir=None):
    """{"vae": ComponentFiles} of a pipeline, a folder of its own, or either on the Hub. Raises ModelError."""
    path, component = Path(name), family.by_name.get("vae")
    if component is None:
        raise ModelError(f"{name} is an autoencoder, and a {family.pipeline} works on pixels: leave it out")
    if path.is_file():
        raise ModelError(f"{name} is a file: name the folder with its config.json, or a pipeline that has a vae")
    folder = path if path.is_dir() else _hub_folder(name, None, [None], cache_dir, {"vae", ""})
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    return {"vae": _component_files(str(name), component, folder, [None])}


# -- one reader for each kind ------------------------------------------------------------------------------------------


def _kind(name, path):
    if not path.exists() or (path / "model_index.json").is_file():
        return "pipeline"
    if (path / STATE).is_file():
        return "checkpoint"
    if path.is_file():
        return "original"
    if (path / "config.json").is_file():
        return "unet"
    raise ModelError(_not_a_model(name, path))


def _pipeline(name, folder, variants, asked, only, without_weights, relatives):
    index = pipeline_index(folder)
    family, class_name = _family(name, index, relatives)
    there = [one for one in components_of_index(index) if only is None or one in only]
    if missing := [one for one in there if not (folder / one).is_dir()]:
        raise ModelError(
            f"{name} lacks {first_few(missing)}, which its model_index.json names: fetch what is missing, or set the "
            "entry of a component that is not needed (safety_checker) to [null, null]"
        )
    components = {one.name: _component_files(name, one, folder / one.name, variants)
                  for one in family.components if one.name in there and one.name not in without_weights}  # fmt: skip
    for one in set(there) - components.keys() - set(without_weights):  # these are copied as they are
        refuse_pickles(folder / one)
        if (folder / one / "config.json").is_file() and not weights_by_variant(folder / one):
            raise ModelError(
                f"{name} lacks the weights of its {one}: fetch them, or set its entry in model_index.json to "
                "[null, null]; a pickle (.bin) is not read"
            )
    if asked and not any(one.variant == asked for one in components.values()):
        raise _no_variant(name, asked)
    scheduler = scheduler_config(folder) if (folder / "scheduler").is_dir() else {}
    return Source(name, "pipeline", family, class_name, folder, components, scheduler)


def _checkpoint(name, path, weights, base, options):
    """The trained components are the checkpoint's; the others are the base's, as the run loaded them."""
    args = read_json(path / STATE).get("args")
    args = args if isinstance(args, dict) else {}
    lent, warnings = (_lent(base, options), ()) if base else _model_of_run(name, args, options)
    family = lent.family if lent else DEFAULT_FAMILY
    folders = {one: of_checkpoint(path, one.name, weights) for one in family.components}
    if lent and not base and "vae" in lent.components:
        lent = lent.with_vae(args.get("pretrained_vae_model_name_or_path"), options["cache_dir"])
    components = dict(lent.components) if lent else {}
    for one, folder in folders.items():
        if folder.is_dir():
            components[one.name] = _component_files(name, one, folder, [None])
        elif one.name == family.denoiser:
            raise ModelError(f"{name} holds no trained {one.name}: it is not a whole checkpoint of a run")
    return _borrowing(name, "checkpoint", components, lent, warnings).trained_with(args)


def _model_of_run(name, args, options):
    """(Source of the model that a run started from, or None; warnings)."""
    try:
        if not args.get("pretrained_model_name_or_path"):
            raise ModelError(f"{STATE} does not name it")
        asked = {key: args.get(key) for key in ("revision", "variant")}
        options = options | {"cache_dir": options["cache_dir"] or args.get("cache_dir")}
        return open_source(args["pretrained_model_name_or_path"], **asked, **options, kinds=("pipeline",)), ()
    except ModelError as error:
        return None, (
            f"{name}: the model that the run started from cannot be opened, so what it did not train is missing; name "
            f"a pipeline that has it (--base; --layout_from of a merge): {error}",
        )


def _single_file(name, path, weights, lent):
    tensors, _ = tensor_references(path)
    if any(".base_layer." in key for key in tensors):
        check_weights(name, tensors)
    if _is_unet(tensors):
        return _unet(name, ComponentFiles(_config(lent, "unet"), (path,), None, tensors), lent)
    family = family_of_tensors(tensors)
    if any(map(is_lora_key, tensors)):
        raise _is_lora(name)
    if why := family.refusal(tensors):
        raise ModelError(f"{name}: {why}")
    if not is_original(tensors, family):
        raise ModelError(
            f"{name} is neither a single file (model.diffusion_model.*) nor a UNet of diffusers "
            f"(conv_in.weight); its tensors are named {first_few(sorted(tensors), 3) or '(there are none)'}"
        )
    check_weights(name, tensors)
    try:
        parts, strange = canonical_parts(tensors, family, weights)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    if family.denoiser not in parts:
        raise ModelError(f"{name} holds no UNet (model.diffusion_model.*)")
    warnings = [f"{name}: {len(strange)} tensors belong to no component of a {family.pipeline} and are left out: "
                f"{first_few(strange, 3)}"] if strange else []  # fmt: skip
    components = {one: ComponentFiles(_config(lent, one), (path,), None, own) for one, own in parts.items()}
    return _borrowing(name, "original", components, lent, tuple(warnings), family)


def _bare_unet(name, path, variants, asked, lent):
    component = DEFAULT_FAMILY.by_name["unet"]
    found = _component_files(name, component, path, variants)
    if asked and found.variant != asked:
        raise _no_variant(name, asked)
    if not _is_unet(found.tensors):
        raise ModelError(f"{name} is a component of a model, but not a UNet: name the folder of its pipeline")
    return _unet(name, found, lent)


def _unet(name, found, lent):
    check_weights(name, found.tensors)
    return _borrowing(name, "unet", {"unet": found}, lent, family=family_of_tensors(found.tensors))


def _borrowing(name, kind, components, lent, warnings=(), family=None):
    """A Source that takes from the pipeline `lent`, or None, whatever it lacks; `family` where its tensors tell."""
    family = family or (lent.family if lent else DEFAULT_FAMILY)
    if lent and lent.family is not family:
        raise ModelError(
            f"{name} is of {family.pipeline}, and {lent.given} is a {lent.class_name}: it does not go with it"
        )
    folder, scheduler = (lent.folder, lent.scheduler_config) if lent else (None, {})
    class_name = lent.class_name if lent else family.pipeline
    return Source(name, kind, family, class_name, folder, components, scheduler, warnings, lent)


def _is_unet(tensors):
    return "conv_in.weight" in tensors and any(key.startswith("down_blocks.") for key in tensors)


def cannot_sample(class_name, config):
    """Why a class of diffusers' schedulers cannot sample from a model with this configuration, in words, or None."""
    import diffusers

    known = inspect.signature(getattr(diffusers, str(class_name), object)).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        return "does not know rescale_betas_zero_snr"  # and would ignore it without a word
    if config.get("prediction_type") == "sample" and class_name in ("PNDMScheduler", "EulerAncestralDiscreteScheduler"):
        return "does not know models that predict the sample"
    return None


# -- files -------------------------------------------------------------------------------------------------------------


def _component_files(name, component, folder, variants):
    files, variant = weights_files(name, component.name, folder, variants)
    tensors, came_from = {}, {}
    for path in files:
        found, _ = tensor_references(path)
        check_weights(str(path), found)
        for key, reference in found.items():
            own = module_name(component, key)
            if own in tensors:
                raise ModelError(f"{path} has one tensor twice, as {came_from[own]} and as {key}: remove one")
            tensors[own], came_from[own] = reference, key
    return ComponentFiles(folder, tuple(files), variant, tensors)


def module_name(component, key):
    """What a component's module calls the tensor that its file calls `key`."""
    found = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", key)
    if found and component.class_name == "AutoencoderKL":
        return f"{found[1]}{OLD_VAE_ATTENTION[found[2]]}{found[3]}"
    return key.removeprefix(component.file_prefix)


def skeleton_of(component, folder):
    """The module of a component's folder without weights, on the meta device. Others get the same one: never change it.

    Raises ModelError.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("quantization_config"):
        raise ModelError(f"{path}: these weights are quantised; take those that they were made of, in fp32 or fp16")
    named = config.get("_class_name", component.class_name)
    if named != component.class_name:
        raise ModelError(f"{path} describes a {named}, where a {component.class_name} belongs")
    with _one_line(path):
        return _skeleton(component, folder, json.dumps(config))


@lru_cache(maxsize=32)
def _skeleton(component, folder, config):
    from transformers.initialization import no_init_weights

    with errors_only(), no_init_weights(), torch.device("meta"):
        if component.is_text_encoder:
            return component.cls(component.cls.config_class.from_pretrained(folder))
        return component.cls.from_config(json.loads(config))


def misfits(module, tensors):
    """Which of {key: tensor or TensorReference} are missing, unknown, or of another shape than a module's: in words."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    given = {key: tuple(one.shape) for key, one in tensors.items()}
    tied = getattr(module, "_tied_weights_keys", None) or ()  # transformers' other names of one tensor
    missing = [key for key in expected if key not in given and key not in tied]
    extra = [key for key in given if key not in expected and not KNOWN_EXTRAS.fullmatch(key)]
    shapes = [f"{key} {list(given[key])} instead of {list(expected[key])}"
              for key in expected if key in given and given[key] != expected[key]]  # fmt: skip
    return "; ".join(f"{len(keys)} {what}: {first_few(keys, 3)}" for keys, what in (
        (missing, "missing"), (extra, "unknown"), (shapes, "of another shape")) if keys)  # fmt: skip


def _filled(skeleton, tensors, dtype):
    """The module of a skeleton, with its weights."""
    with errors_only():
        if hasattr(skeleton, "load_config"):  # diffusers; its modules have no buffers
            module = copy.deepcopy(skeleton)
            module.load_state_dict(tensors, assign=True)
            return module
        # transformers, whose modules have buffers that no file holds
        return type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=tensors, dtype=dtype)


def _hub_folder(name, revision, variants, cache_dir, only, without_weights=()):
    """The Hub's files in the cache: configurations, tokenizers, and of every component the first variant that it has.

    "" among `only` takes weights that lie in no folder.
    """
    from huggingface_hub import snapshot_download

    if not HUB_NAME.fullmatch(str(name)) or Path(name).suffix in (".safetensors", *OTHER_FORMATS):
        raise ModelError(f"{name}: there is no such file or folder")
    alone = only is not None and "" in only
    configs = ["model_index.json", "*/*.json", "*/*.txt", "*/spiece.model", *(["config.json"] if alone else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=configs))
        if (folder / "model_index.json").is_file():
            lacking = [one for one in components_of_index(pipeline_index(folder))
                       if (only is None or one in only) and one not in without_weights]  # fmt: skip
        elif alone:
            lacking = [""]
        else:
            raise ModelError(f"{name} on the Hub has no model_index.json: it is not a diffusers pipeline")
        for variant in variants:
            ending = f".{variant}" if variant else ""
            wanted = [str(Path(one, f"{stem}{ending}{shard}.safetensors")) for one in lacking
                      for stem in ("diffusion_pytorch_model", "model") for shard in ("", "-*-of-*")]  # fmt: skip
            if wanted:
                snapshot_download(name, revision=folder.name, cache_dir=cache_dir, allow_patterns=wanted)
            lacking = [one for one in lacking if variant not in weights_by_variant(folder / one)]
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        where = f"{name} at revision {revision}" if revision else name
        raise ModelError(f"{where} is neither a file nor a folder, nor to be had from the Hub: {error}") from error
    return folder


def _lent(name, options):
    """The pipeline that goes with a model which is not whole, or None."""
    return name and open_source(name, **options, kinds=("pipeline",))


def _config(lent, component):
    return lent.folder / component if lent and (lent.folder / component).is_dir() else None


def _family(name, index, relatives):
    class_name = str(index.get("_class_name"))
    family = FAMILIES.get(RELATIVES.get(class_name, class_name))
    if why := family and family.refusal(key for key, value in index.items() if value):
        raise ModelError(f"{name}: {why}")
    if family is None or not (relatives or class_name in FAMILIES):
        usable = ", ".join([*FAMILIES, *(RELATIVES if relatives else ())])
        raise ModelError(f"{name} is a {class_name}; what can be used here is {usable}")
    return family, class_name


# -- what is refused ---------------------------------------------------------------------------------------------------


@contextmanager
def _one_line(path):
    """Whatever a library raises over a configuration is a ModelError that names the file: it may be anything."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def _refuse_what_is_no_model(name, path):
    if not str(name):
        raise ModelError("the name of a model is empty: give a folder, a file or a name on the Hub")
    if path.suffix in PICKLES and not path.is_dir():
        raise pickled(path)
    if is_lora_path(path):
        raise _is_lora(name)


def _no_variant(name, asked):
    return ModelError(f"{name} has no weights of the variant {asked} (*.{asked}.safetensors)")


def _is_lora(name):
    return ModelError(
        f"{name} is a LoRA, not a whole model: name the model that it was made for, and this with --lora; or make one "
        "model of both with `merge_checkpoints.py fuse`"
    )


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
