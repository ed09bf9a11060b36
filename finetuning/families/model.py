"""The model that a run trains: an opened pipeline, what of it is trained, and how that is saved and read again."""

import inspect
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from finetuning.diffusion.schedule import NoiseSchedule
from finetuning.families.family import Denoiser, Family, Tokenizers
from finetuning.families.folders import (
    components_of_index,
    copy_component,
    pipeline_index,
    weights_name,
    write_scheduler,
)
from finetuning.families.model_args import ModelArgs, ModelError, StartArgs
from finetuning.families.opening import open_source
from finetuning.families.quiet import errors_only
from finetuning.families.table import family_of
from finetuning.files import read_text, writing


@dataclass
class Model:
    """The components of one pipeline, where they came from, and which of them are trained, every weight."""

    family: Family
    folder: Path | None  # the pipeline it came from, whose other files go with it
    components: dict  # {name: module}: the denoiser, the text encoders, the autoencoder
    tokenize: Tokenizers
    scheduler: object  # diffusers' scheduler, as the pipeline has it
    trained: tuple[str, ...] = ()  # names of the components that are trained
    settings: dict = field(default_factory=dict)  # what else model_index.json says of the pipeline
    ema_start: dict | None = field(default=None, repr=False)  # EMA weights loaded apart, by parameter name
    hub_tags = ()  # of its model card

    def __post_init__(self):
        family, trained = self.family, self.trained
        encoders = {name: self.components[name] for name in family.tokenizers}
        self.codec = family.codec(self.components)
        self.schedule = NoiseSchedule.of(self.scheduler)
        self.frozen_encoders = {name: module for name, module in encoders.items() if name not in trained}
        own = {name: module for name, module in encoders.items() if name in trained}
        self.denoiser = Denoiser(family, self.components[family.denoiser], own)

    @classmethod
    def of_pipeline(cls, pipeline):
        """The components of an opened diffusers pipeline, to measure with: nothing is trained or saved."""
        family = family_of(type(pipeline).__name__)
        components = {one.name: getattr(pipeline, one.name) for one in family.components}
        tokenizers = {name: getattr(pipeline, folder) for name, folder in family.tokenizers.items()}
        model = cls(family, None, components, Tokenizers(tokenizers), pipeline.scheduler)
        model.denoiser.eval()
        return model

    # -- what a run needs ------------------------------------------------------------------------------------------

    def conditioning(self, batch):
        """What the denoiser is called with besides latents and timesteps: text, encoded here where its encoders are
        frozen, and the family's extras."""
        extras = self.family.extras(batch)
        if not self.frozen_encoders:
            return {"tokens": batch.tokens, "extras": extras}
        with torch.no_grad():
            return {"text": self.family.encode_text(self.frozen_encoders, batch.tokens), "extras": extras}

    @property
    def trained_modules(self):
        """{name: module} of the components that are trained."""
        return {name: self.components[name] for name in self.trained}

    def trained_parameters(self):
        """{name: parameter} of all that is trained, in a fixed order."""
        return {
            f"{component}.{name}": parameter
            for component, module in self.trained_modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def parameter_groups(self, denoiser_lr, text_encoder_lr):
        """Optimizer groups; the list of parameters is made once, an iterator would be empty the second time."""
        return [
            {
                "params": [parameter for parameter in module.parameters() if parameter.requires_grad],
                "lr": denoiser_lr if name == self.family.denoiser else text_encoder_lr,
            }
            for name, module in self.trained_modules.items()
        ]

    def take_ema_start(self):
        """EMA weights that were loaded apart from the trained ones, by parameter name, or None; let go of them here."""
        start, self.ema_start = self.ema_start, None
        return start

    def to_device(self, device, frozen_dtype):
        """Move everything; what is not trained is kept in `frozen_dtype`. Files are never written from these."""
        for name, module in self.components.items():
            module.to(device)
            if name not in self.trained:
                with errors_only():  # diffusers asks not to cast modules that have to be fp32: there are none
                    module.to(frozen_dtype)

    @contextmanager
    def pipeline(self):
        """A diffusers pipeline of the weights as they are now, in evaluation mode for as long as it is used."""
        import diffusers

        was_training = self.denoiser.training
        self.denoiser.eval()
        sampler = diffusers.DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        try:
            yield self.family.assemble(self.components, self.tokenize.tokenizers, sampler, self.settings)
        finally:
            self.denoiser.train(was_training)

    def summary(self):
        """What is trained and what is frozen, in one line."""
        counted = lambda names: " + ".join(f"{name} {millions(self.components[name])}" for name in names)
        frozen = counted(name for name in self.components if name not in self.trained)
        return f"trained: {counted(self.trained)}; frozen: {frozen}"

    def copied_bytes(self):
        """Size of the base's components, most of which the finished pipeline takes over."""
        index = pipeline_index(self.folder)
        files = (path for name in components_of_index(index) for path in (self.folder / name).rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_trained(self, folder, suffix="", weights=None):
        """Write each trained component into its folder plus `suffix`: as it is now, or `weights` by parameter name."""
        for name, module in self.trained_modules.items():
            target = Path(folder) / f"{name}{suffix}"
            target.mkdir(parents=True)
            if self.family.by_name[name].is_text_encoder and (self.folder / name / "config.json").is_file():
                shutil.copyfile(self.folder / name / "config.json", target / "config.json")
            else:
                module.save_config(target)
            self._write_weights(name, target, weights)

    def load_trained(self, folder, ema):
        """Take a checkpoint's trained weights; with `ema`, return its averaged ones by parameter name, else None."""
        for name, module in self.trained_modules.items():
            path = Path(folder) / name
            if not path.is_dir():
                raise ModelError(f"{folder} holds no trained {name}: it was made without --train_text_encoder")
            try:
                module.load_state_dict(self._read_weights(name, path))
            except RuntimeError as error:  # keys or shapes
                raise ModelError(f"{path} holds the weights of another {name} than this run's: {error}") from error
        if not ema:
            return None
        return {
            f"{name}.{key}": value
            for name in self.trained
            for key, value in self._read_weights(name, Path(folder) / f"{name}_ema").items()
        }

    # -- the finished pipeline -------------------------------------------------------------------------------------

    def save_pipeline(self, folder, shadow):
        """Write a pipeline that from_pretrained loads: averaged weights, and the raw ones beside them as `non_ema`.

        `shadow` are the averaged weights by parameter name; None writes the raw ones alone. Components that were not
        trained are copied from the base byte for byte.
        """
        folder = Path(folder)
        index = pipeline_index(self.folder)
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for name in components_of_index(index):
            if name not in (*self.trained, "scheduler"):
                copy_component(self.folder / name, folder / name)
        prediction_type = self.scheduler.config.prediction_type
        write_scheduler(self.folder / "scheduler", folder / "scheduler", prediction_type)
        self.save_trained(folder, weights=shadow)
        if shadow is not None:
            for name in self.trained:
                self._write_weights(name, folder / name, None, "non_ema")

    def _write_weights(self, name, target, chosen, variant=None):
        from safetensors.torch import save_file

        chosen, component = chosen or {}, self.family.by_name[name]
        weights = {key: chosen.get(f"{name}.{key}", value) for key, value in self.components[name].state_dict().items()}
        weights = {component.file_prefix + key: value.detach().contiguous() for key, value in weights.items()}
        path = target / weights_name(component, variant)
        with writing(path):
            save_file(weights, path, metadata={"format": "pt"})

    def _read_weights(self, name, folder):
        from safetensors.torch import load_file

        prefix, path = self.family.by_name[name].file_prefix, next(folder.glob("*.safetensors"))
        return {key.removeprefix(prefix): value for key, value in load_file(path).items()}


def millions(module):
    """Its parameters, counted and named."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


# -- opening -----------------------------------------------------------------------------------------------------------


def load_model(args: ModelArgs, prediction_type=None, seed=0, start: StartArgs | None = None):
    """The Model that the flags name, its components in fp32 on the CPU. Raises ModelError.

    `prediction_type` None keeps the base's; `seed` makes the weights of --from_scratch; without `start` the weights
    are the base's own.
    """
    start = start or StartArgs()
    source = open_source(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
        kinds=("pipeline",), without_weights=("unet",) if start.from_scratch else (),
    )  # fmt: skip
    family = source.family
    components = {one.name: source.open(one.name) for one in family.components if one.name != family.denoiser}
    components = {family.denoiser: _denoiser(args, start, source, seed)} | components
    if problems := list(family.problems(components)):
        raise ModelError("\n".join(problems))
    ema_start = None
    if start.non_ema_revision or start.non_ema_variant:
        main = source.open(family.denoiser)
        ema_start = {f"{family.denoiser}.{name}": value for name, value in main.state_dict().items()}
    scheduler = source.scheduler("DDPMScheduler")
    if prediction_type:
        scheduler.register_to_config(prediction_type=prediction_type)
    trained = (family.denoiser, *(family.tokenizers if args.train_text_encoder else ()))
    for name, module in components.items():
        module.requires_grad_(name in trained).train(name in trained)
        if args.gradient_checkpointing and name in trained:
            _recompute_activations(module)
    tokenizers = {name: source.tokenizer(folder) for name, folder in family.tokenizers.items()}
    return Model(
        family, source.folder, components, Tokenizers(tokenizers), scheduler, trained, source.settings(), ema_start
    )


def _recompute_activations(module):
    # diffusers' name for it, then transformers'
    enable = getattr(module, "enable_gradient_checkpointing", None) or module.activation_checkpointing_enable
    enable()


def _denoiser(args, start, source, seed):
    """The denoiser that is trained: the base's own, another revision's or variant's, or a new one."""
    component = source.family.by_name[source.family.denoiser]
    if start.from_scratch:
        return _new_denoiser(component, source.folder, start.unet_config, seed)
    if not (start.non_ema_revision or start.non_ema_variant):
        return source.open(component.name)
    if start.non_ema_revision and Path(args.pretrained_model_name_or_path).is_dir():
        raise ModelError(
            f"--non_ema_revision {start.non_ema_revision}: {args.pretrained_model_name_or_path} is a folder and has "
            "no revisions; name the files with --non_ema_variant "
            f"({component.name}/{component.stem}.VARIANT.safetensors)"
        )
    try:
        apart = open_source(
            args.pretrained_model_name_or_path, revision=start.non_ema_revision or args.revision,
            variant=start.non_ema_variant, cache_dir=args.cache_dir, kinds=("pipeline",), only=(component.name,),
        )  # fmt: skip
        return apart.open(component.name)
    except ModelError as error:
        flags = [f"--{name} {getattr(start, name)}" for name in ("non_ema_revision", "non_ema_variant")
                 if getattr(start, name)]  # fmt: skip
        raise ModelError(f"{' '.join(flags)}: {error}") from error


def _new_denoiser(component, folder, overrides, seed):
    """A denoiser of random weights: the base's own layout, changed by --unet_config."""
    config = {
        name: value
        for name, value in component.cls.load_config(folder / component.name).items()
        if not name.startswith("_")
    }
    if overrides:
        # os.path, because Path.is_file raises where a long text cannot be the name of a file
        text = read_text(overrides) if os.path.isfile(overrides) else overrides
        try:
            changes = yaml.safe_load(text)  # JSON is YAML too
        except yaml.YAMLError as error:
            raise ModelError(f"--unet_config {overrides}: {error}") from error
        if not isinstance(changes, dict):
            raise ModelError(f"--unet_config {overrides} is neither a file nor {{key: value, ...}}")
        if changes.get("dropout"):
            raise ModelError("--unet_config: dropout draws from a generator that no checkpoint keeps: leave it at 0")
        if unknown := changes.keys() - inspect.signature(component.cls.__init__).parameters.keys():
            raise ModelError(f"--unet_config: a {component.class_name} has no setting {', '.join(sorted(unknown))}")
        config |= changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return component.cls.from_config(config)
        except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ModelError(f"--unet_config {overrides}: {error}") from error
