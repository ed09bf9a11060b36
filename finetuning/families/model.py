"""The model that a run trains: an opened pipeline, what of it is trained, and how that is saved and read again."""

import inspect
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

from finetuning.diffusion.objective import NoiseArgs
from finetuning.diffusion.schedule import NoiseSchedule
from finetuning.families.family import Denoiser, Family, Tokenizers, identity_of
from finetuning.families.folders import (
    components_of_index,
    copy_component,
    pipeline_index,
    weights_name,
    write_scheduler,
)
from finetuning.families.model_args import ModelArgs, ModelError, StartArgs, UpscalingArgs
from finetuning.families.opening import misfits, open_source
from finetuning.families.quiet import errors_only
from finetuning.families.sharding import like
from finetuning.families.table import family_of
from finetuning.files import read_text, writing
from finetuning.rng import torch_generator


@dataclass
class Model:
    """The components of one pipeline, where they came from, and which of them are trained, every weight."""

    family: Family
    folder: Path | None  # the pipeline it came from, whose other files go with it
    components: dict  # {name: module}: the denoiser, the text encoders, the autoencoder
    tokenize: Tokenizers
    scheduler: object  # diffusers' scheduler, as the pipeline has it
    trained: tuple[str, ...] = ()  # names of the components that are trained
    other_schedulers: dict = field(default_factory=dict)  # {name: scheduler} that its pipeline has besides
    conditioning_args: UpscalingArgs = field(default_factory=UpscalingArgs)
    settings: dict = field(default_factory=dict)  # what else model_index.json says of the pipeline
    ema_start: dict | None = field(default=None, repr=False)  # EMA weights loaded apart, by parameter name
    folders: dict = field(default_factory=dict)  # {name: folder} that components came from
    scheduler_config: dict = field(default_factory=dict)  # of the finished pipeline
    hub_tags = ()  # of its model card

    def __post_init__(self):
        family, trained = self.family, self.trained
        encoders = {name: self.components[name] for name in family.tokenizers}
        self.codec = family.codec(self.components)
        self.schedule = NoiseSchedule.of(self.scheduler)
        self.schedules = {name: NoiseSchedule.of(scheduler) for name, scheduler in self.other_schedulers.items()}
        self.frozen_encoders = {name: module for name, module in encoders.items() if name not in trained}
        own = {name: module for name, module in encoders.items() if name in trained}
        self.denoiser = Denoiser(family, self.components[family.denoiser], own)
        self.offloaded = {}  # {name: device that it comes back to}

    @classmethod
    def of_pipeline(cls, pipeline):
        """The components of an opened diffusers pipeline, to measure with: nothing is trained or saved."""
        family = family_of(pipeline)
        components = family.components_of(pipeline)
        tokenizers = {name: getattr(pipeline, folder) for name, folder in family.tokenizers.items()}
        others = {name: getattr(pipeline, name) for name in family.schedulers if name != "scheduler"}
        model = cls(
            family, None, components, Tokenizers(tokenizers, family), pipeline.scheduler, other_schedulers=others,
            settings=dict(pipeline.config),
        )  # fmt: skip
        model.denoiser.eval()
        return model

    # -- what a run needs ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, tokens):
        """What the frozen text encoders make of {text encoder: token ids [n, k]}: {name: [n, ...]}."""
        return self.family.encode_text(self.frozen_encoders, tokens)

    @torch.no_grad()
    def prediction(self):
        """The denoiser's output [2, c, h, w] for two captions at two timesteps, at the smallest size that it takes."""
        side = 2 ** len(self.denoiser.denoiser.config.block_out_channels)
        noisy = torch.randn(2, self.codec.channels, side, side, generator=torch_generator(0, "a prediction"))
        captions = ["a photo of a dog", "a red circle"]
        batch = SimpleNamespace(
            captions=captions, tokens=self.tokenize(captions), sizes=torch.zeros(2, 6), step=0, rows=[0, 1]
        )
        noisy, conditioning = self.condition(batch, noisy)
        return self.denoiser(noisy, torch.tensor([200, 700]), **conditioning)

    def condition(self, batch, latents, seed=0, text=None):
        """(latents that are trained on, what the denoiser is called with besides them and the timesteps): text,
        encoded here where its encoders are frozen and it is not given, and the family's extras."""
        latents, extras = self.family.condition(batch, latents, self, seed)
        if not self.frozen_encoders:
            return latents, {"tokens": batch.tokens, "extras": extras}
        return latents, {"text": self.encode_text(batch.tokens) if text is None else text, "extras": extras}

    @property
    def text_identity(self):
        """What, besides token ids, `encode_text` depends on."""
        return identity_of(self.frozen_encoders)

    @property
    def codec_components(self):
        """The names of the components that images are encoded with."""
        return [name for name in self.components if name not in (self.family.denoiser, *self.family.tokenizers)]

    def offload(self, names):
        """Let frozen components lie on the CPU from here on; `loaded` brings them back."""
        for name in names:
            device = next(self.components[name].parameters()).device
            self.offloaded.setdefault(name, device)
            self.components[name].to("cpu")

    @contextmanager
    def loaded(self):
        """All components on the device, for as long as this lasts."""
        away, self.offloaded = self.offloaded, {}
        try:
            for name, device in away.items():
                self.components[name].to(device)
            yield
        finally:
            self.offload(away)
            self.offloaded = away

    @property
    def learns_variance(self):
        """Whether the denoiser answers with a variance beside its prediction."""
        return self.denoiser.denoiser.config.out_channels == 2 * self.codec.channels

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

    def parameter_groups(self, denoiser_lr, text_encoder_lrs):
        """Optimizer groups; the list of parameters is made once, an iterator would be empty the second time.

        text_encoder_lrs   one for all text encoders, or one for each. Raises ModelError: another number
        """
        encoders = list(self.family.tokenizers)
        rates = text_encoder_lrs * len(encoders) if len(text_encoder_lrs) == 1 else text_encoder_lrs
        if len(rates) != len(encoders):
            raise ModelError(
                f"--text_encoder_lr has {len(rates)} numbers, and a {self.family.pipeline} has {len(encoders)} text "
                f"encoder(s): {', '.join(encoders)}"
            )
        rates = dict(zip(encoders, rates, strict=True)) | {self.family.denoiser: denoiser_lr}
        return [
            {
                "params": [parameter for parameter in module.parameters() if parameter.requires_grad],
                "lr": rates[name],
            }
            for name, module in self.trained_modules.items()
        ]

    def take_ema_start(self):
        """EMA weights that were loaded apart from the trained ones, by parameter name, or None; let go of them here."""
        start, self.ema_start = self.ema_start, None
        return start

    def to_device(self, device, frozen_dtype):
        """Move everything; what is not trained is kept in `frozen_dtype`. Files are never written from these."""
        self.schedule = self.schedule.to(device)
        self.schedules = {name: schedule.to(device) for name, schedule in self.schedules.items()}
        for name, module in self.components.items():
            self.cast(name, frozen_dtype)
            module.to(device)  # after it: a GPU never holds in fp32 what is frozen

    def cast(self, name, frozen_dtype):
        """Put a component that is not trained into `frozen_dtype`.

        An autoencoder that overflows in fp16 stays fp32, where the family's pipeline asks for that (force_upcast).
        """
        module = self.components[name]
        if frozen_dtype == torch.float16 and self._overflows(name):
            _in_fp32(module, "decode")
        elif name not in self.trained:
            with errors_only():  # diffusers asks not to cast modules that have to be fp32: see below
                module.to(frozen_dtype)
                for part, layer in module.named_modules():  # T5's, whose sums leave fp16's range
                    if part.rpartition(".")[2] in (getattr(module, "_keep_in_fp32_modules", None) or ()):
                        _in_fp32(layer.float(), "forward")

    def _overflows(self, name):
        """Whether the component overflows in fp16: its family's pipeline keeps it in fp32 then."""
        return name in self.family.upcast and self.components[name].config.force_upcast

    @contextmanager
    def encodes_in_fp32(self):
        """What overflows in fp16 and was opened in it, with a whole pipeline, is fp32 for as long as this lasts."""
        small = [one for name, one in self.components.items() if self._overflows(name) and one.dtype == torch.float16]
        try:
            for module in small:
                module.float()
            yield
        finally:
            for module in small:
                module.half()

    @contextmanager
    def pipeline(self):
        """A diffusers pipeline of the weights as they are now, in evaluation mode for as long as it is used."""
        import diffusers

        was_training = self.denoiser.training
        self.denoiser.eval()
        sampler = diffusers.DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        self.family.check_scheduler(sampler)
        try:
            schedulers = {"scheduler": sampler, **self.other_schedulers}
            with self.loaded():
                yield self.family.assemble(self.components, self.tokenize.tokenizers, schedulers, self.settings)
        finally:
            self.denoiser.train(was_training)

    def summary(self):
        """What is trained and what is frozen, in one line."""
        counted = lambda names: " + ".join(f"{name} {millions(self.components[name])}" for name in names)
        frozen = counted(name for name in self.components if name not in self.trained)
        return f"trained: {counted(self.trained)}; frozen: {frozen}"

    def copied_bytes(self):
        """Size of the base's components that the finished pipeline takes over."""
        names = set(components_of_index(pipeline_index(self.folder))) - set(self.trained)
        files = (path for name in names for path in (self.folder / name).rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_trained(self, folder, weights, suffix=""):
        """Write `weights`, by parameter name, of each trained component into its folder plus `suffix`."""
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
                how = "by train_lora.py" if name == self.family.denoiser else "without --train_text_encoder"
                raise ModelError(f"{folder} holds no trained {name}: it was made {how}")
            weights = self._read_weights(name, path)
            if problems := misfits(module, weights):
                raise ModelError(f"{path} holds the weights of another {name} than this run's. Tensors: {problems}")
            tied = getattr(module, "_tied_weights_keys", None) or {}
            weights |= {key: weights[source] for key, source in tied.items()}
            now = module.state_dict()
            module.load_state_dict({key: like(now[key], value) for key, value in weights.items()})
        if not ema:
            return None
        return {
            f"{name}.{key}": value
            for name in self.trained
            for key, value in self._read_weights(name, Path(folder) / f"{name}_ema").items()
        }

    # -- the finished pipeline -------------------------------------------------------------------------------------

    def save_pipeline(self, folder, weights, average):
        """Write a pipeline that from_pretrained loads: averaged weights, and the raw ones beside them as `non_ema`.

        `weights` and `average` are those of the trained components, by parameter name; without an average, None, the
        raw ones are written alone. Components that were not trained are copied from the base byte for byte.
        """
        folder = Path(folder)
        index = pipeline_index(self.folder)
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for name in components_of_index(index):
            if name not in (*self.trained, "scheduler"):
                copy_component(self.folders.get(name, self.folder / name), folder / name)
        write_scheduler(self.folder, folder, self.scheduler_config)
        self.save_trained(folder, weights if average is None else average)
        if average is not None:
            for name in self.trained:
                self._write_weights(name, folder / name, weights, "non_ema")

    def _write_weights(self, name, target, chosen, variant=None):
        from safetensors.torch import save_file

        component, module = self.family.by_name[name], self.components[name]
        tied = getattr(module, "_tied_weights_keys", None) or ()  # transformers' other names of what is written once
        weights = {
            key: chosen.get(f"{name}.{key}", value) for key, value in module.state_dict().items() if key not in tied
        }
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


def load_model(args: ModelArgs, noise: NoiseArgs | None = None, seed=0, start: StartArgs | None = None):
    """The Model that the flags name, its components in fp32 on the CPU. Raises ModelError.

    Without `noise` the scheduler is the base's own; `seed` makes the weights of --from_scratch; without `start` the
    weights are the base's own.
    """
    start = start or StartArgs()
    source = open_source(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
        kinds=("pipeline",), without_weights=("unet",) if start.from_scratch else (),
    ).with_vae(args.pretrained_vae_model_name_or_path, args.cache_dir)  # fmt: skip
    source = source.trained_with(vars(noise)) if noise else source
    family = source.family
    frozen = {name: source.open(name) for name in family.by_name if name != family.denoiser}
    components = {family.denoiser: _denoiser(args, start, source, seed)} | frozen
    if problems := list(family.problems(components)):
        raise ModelError("\n".join(problems))
    ema_start = None
    if start.non_ema_revision or start.non_ema_variant:
        main = source.open(family.denoiser)
        ema_start = {f"{family.denoiser}.{name}": value for name, value in main.state_dict().items()}
    scheduler = source.scheduler(class_name="DDPMScheduler")
    trained = (family.denoiser, *(family.tokenizers if args.train_text_encoder else ()))
    for name, module in components.items():
        module.requires_grad_(name in trained).train(name in trained)
        if args.gradient_checkpointing and name in trained:
            _recompute_activations(module)
    folders = {name: files.config for name, files in source.components.items()}
    schedulers = {name: source.scheduler(name) for name in family.schedulers if name != "scheduler"}
    model = Model(
        family, source.folder, components, Tokenizers(source.tokenizers(), family), scheduler, trained, schedulers,
        args if isinstance(args, UpscalingArgs) else UpscalingArgs(), source.settings(), ema_start, folders,
        source.scheduler_config,
    )  # fmt: skip
    if start.unet_config:
        _try(model, start.unet_config)
    return model


def _try(model, overrides):
    """Raises ModelError where the denoiser that --unet_config describes can be built and not be used."""
    try:
        found, side = model.prediction(), 2 ** len(model.denoiser.denoiser.config.block_out_channels)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"--unet_config {overrides}: such a model cannot be used here: {error}") from error
    if found.shape[-2:] != (side, side):
        raise ModelError(f"--unet_config {overrides}: of {side} x {side} it makes {tuple(found.shape[-2:])}")


def _in_fp32(module, name):
    """Keep autocast out of a method that gives what fp16 overflows with: an autoencoder's images, T5's sums."""
    method = getattr(module, name)

    def in_fp32(values, *args, **options):
        with torch.autocast(values.device.type, enabled=False):
            return method(values.float(), *args, **options)

    setattr(module, name, in_fp32)


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
        numbers = [(name, one) for name, value in changes.items() for one in (value if type(value) is list else [value])
                   if type(one) is int]  # fmt: skip
        if few := [f"{name} {number}" for name, number in numbers if number < (name == "layers_per_block")]:
            raise ModelError(f"--unet_config: {', '.join(few)} is too little")
        config |= changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return component.cls.from_config(config)
        except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise ModelError(f"--unet_config {overrides}: {error}") from error
