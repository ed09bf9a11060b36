"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet over latents of 4 channels, an autoencoder."""

import inspect
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from finetuning.families.folders import copy_part, parts_of_index, pipeline_index, weights_name, write_scheduler
from finetuning.families.model_args import ModelArgs, ModelError, StartArgs
from finetuning.families.quiet import errors_only


def millions(module):
    """Its parameters, counted and named."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


class Denoiser(torch.nn.Module):
    """Text and noisy latents in, prediction out: one module, so that one wrapper serves all that is trained."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def train(self, mode=True):
        """A frozen text encoder stays in evaluation mode: what it says of a caption must not be random."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self

    def forward(self, noisy, timesteps, input_ids):
        """[batch, 4, h, w], [batch], [batch, tokens] -> [batch, 4, h, w]."""
        text = self.text_encoder(input_ids, return_dict=False)[0]
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


class StableDiffusion:
    """The parts of one model, where they came from, and how they are saved."""

    def __init__(self, folder, tokenizer, vae, scheduler, denoiser, ema_start, trains_text_encoder):
        self.folder, self.tokenizer, self.vae, self.scheduler = folder, tokenizer, vae, scheduler
        self.denoiser, self.ema_start, self.trains_text_encoder = denoiser, ema_start, trains_text_encoder

    @classmethod
    def of_pipeline(cls, pipeline):
        """The parts of an opened pipeline, to measure with: nothing is trained or saved."""
        denoiser = Denoiser(pipeline.unet, pipeline.text_encoder).eval()
        return cls(None, pipeline.tokenizer, pipeline.vae, pipeline.scheduler, denoiser, None, False)

    # -- what a run needs ------------------------------------------------------------------------------------------

    @property
    def pixels_per_latent(self):
        """8 for every Stable Diffusion: images have to be a multiple of it."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def trained_modules(self):
        """The parts that are trained, by the name of their folder."""
        modules = {"unet": self.denoiser.unet}
        if self.trains_text_encoder:
            modules["text_encoder"] = self.denoiser.text_encoder
        return modules

    def trained_parameters(self):
        """{name: parameter} of all that is trained, in a fixed order."""
        return {
            f"{part}.{name}": parameter
            for part, module in self.trained_modules.items()
            for name, parameter in module.named_parameters()
        }

    def parameter_groups(self, denoiser_lr, text_encoder_lr):
        """Optimizer groups; the list of parameters is made once, an iterator would be empty the second time."""
        rates = {"unet": denoiser_lr, "text_encoder": text_encoder_lr}
        return [{"params": list(m.parameters()), "lr": rates[part]} for part, m in self.trained_modules.items()]

    def take_ema_start(self):
        """EMA weights that were loaded apart from the trained ones, by parameter name, or None; let go of them here."""
        start, self.ema_start = self.ema_start, None
        return start

    def to(self, device, frozen_dtype):
        """Move everything; what is not trained is kept in `frozen_dtype`. Files are never written from these."""
        self.denoiser.to(device)
        with (
            errors_only()
        ):  # diffusers asks not to cast those modules of an autoencoder that have to be fp32: it has none
            self.vae.to(device, frozen_dtype)
        if not self.trains_text_encoder:
            self.denoiser.text_encoder.to(frozen_dtype)

    @torch.no_grad()
    def posterior(self, pixels):
        """(mean, standard deviation), fp32 [batch, 4, H/8, W/8], of the latents of images [batch, 3, H, W]."""
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()

    def scale_latents(self, latents):
        """To the unit variance that the denoiser works in."""
        return latents * self.vae.config.scaling_factor

    @contextmanager
    def pipeline(self):
        """A diffusers pipeline of the weights as they are now, in evaluation mode for as long as it is used."""
        was_training = self.denoiser.training
        self.denoiser.eval()
        sampler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        pipeline = StableDiffusionPipeline(
            self.vae, self.denoiser.text_encoder, self.tokenizer, self.denoiser.unet, sampler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        try:
            yield pipeline
        finally:
            self.denoiser.train(was_training)

    def summary(self):
        """What is trained and what is frozen, in one line."""
        parts = " + ".join(f"{name} {millions(module)}" for name, module in self.trained_modules.items())
        frozen = "" if self.trains_text_encoder else f"; text encoder {millions(self.denoiser.text_encoder)} frozen"
        return f"trained: {parts}{frozen}; autoencoder {millions(self.vae)} frozen"

    def copied_bytes(self):
        """Size of the base's parts, most of which the finished pipeline takes over."""
        index = pipeline_index(self.folder)
        files = (path for part in parts_of_index(index) for path in (self.folder / part).rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_trained(self, folder, suffix="", weights=None):
        """Write each trained part into its folder plus `suffix`: as it is now, or `weights` by parameter name."""
        for part, module in self.trained_modules.items():
            self._write_part(part, module, Path(folder) / f"{part}{suffix}", weights)

    def load_trained(self, folder, ema):
        """Take a checkpoint's trained weights; with `ema`, return its averaged ones by parameter name, else None."""
        for part, module in self.trained_modules.items():
            path = Path(folder) / part
            if not path.is_dir():
                raise ModelError(f"{folder} holds no trained {part}: it was made without --train_text_encoder")
            module.load_state_dict(_read_part(path))
        if not ema:
            return None
        return {
            f"{part}.{name}": value
            for part in self.trained_modules
            for name, value in _read_part(Path(folder) / f"{part}_ema").items()
        }

    # -- the finished pipeline -------------------------------------------------------------------------------------

    def save_pipeline(self, folder, shadow):
        """Write a pipeline that from_pretrained loads: averaged weights, and the raw ones beside them as `non_ema`.

        `shadow` are the averaged weights by parameter name; None writes the raw ones alone.

        Parts that were not trained are copied from the base byte for byte.
        """
        folder = Path(folder)
        index = pipeline_index(self.folder)
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for part in parts_of_index(index):
            if part not in (*self.trained_modules, "scheduler"):
                copy_part(self.folder / part, folder / part)
        prediction_type = self.scheduler.config.prediction_type
        write_scheduler(self.folder / "scheduler", folder / "scheduler", prediction_type)
        self.save_trained(folder, weights=shadow)
        if shadow is not None:
            for part, module in self.trained_modules.items():
                self._write_weights(part, module, folder / part, None, "non_ema")

    def _write_part(self, part, module, target, weights):
        target.mkdir(parents=True)
        if part == "text_encoder" and (self.folder / part / "config.json").is_file():
            shutil.copyfile(self.folder / part / "config.json", target / "config.json")
        else:
            module.save_config(target)
        self._write_weights(part, module, target, weights)

    def _write_weights(self, part, module, target, chosen, variant=None):
        chosen = chosen or {}
        weights = {name: chosen.get(f"{part}.{name}", value) for name, value in module.state_dict().items()}
        weights = {name: value.detach().contiguous() for name, value in weights.items()}
        if part == "text_encoder":
            # The names that transformers 4, A1111 and every file of SD 1.x have; transformers 5 writes them without.
            weights = {f"text_model.{name}": value for name, value in weights.items()}
        save_file(weights, target / weights_name(part, variant), metadata={"format": "pt"})


def load(folder, index, args: ModelArgs, prediction_type, seed, start: StartArgs):
    """The model in `folder`, whose model_index.json is `index`, as the flags ask for it (see families.load_model)."""
    missing = [part for part in parts_of_index(index) if not (folder / part).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}, which its model_index.json names: fetch what is missing, or set the "
            "entry of a part that is not needed (safety_checker) to [null, null]"
        )
    if args.variant and not any(any((folder / part).glob(f"*.{args.variant}.*")) for part in parts_of_index(index)):
        raise ModelError(f"--variant {args.variant}: no part of {folder} has files of that name (*.{args.variant}.*)")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", **_how(folder, "text_encoder", args.variant))
    vae = AutoencoderKL.from_pretrained(folder / "vae", **_how(folder, "vae", args.variant))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if prediction_type:
        scheduler.register_to_config(prediction_type=prediction_type)

    ema_start = None
    if start.from_scratch:
        unet = _new_unet(folder, start.unet_config, seed)
    elif start.non_ema_revision or start.non_ema_variant:
        unet = _separate_unet(args, start, folder)
        main = UNet2DConditionModel.from_pretrained(folder / "unet", **_how(folder, "unet", args.variant))
        ema_start = {f"unet.{name}": value for name, value in main.state_dict().items()}
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **_how(folder, "unet", args.variant))
    _check_fit(unet, text_encoder, vae)

    vae.requires_grad_(False)
    text_encoder.requires_grad_(args.train_text_encoder)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            text_encoder.activation_checkpointing_enable()
    denoiser = Denoiser(unet, text_encoder)
    denoiser.train()
    vae.eval()
    return StableDiffusion(folder, tokenizer, vae, scheduler, denoiser, ema_start, args.train_text_encoder)


def _how(folder, part, variant):
    """from_pretrained's options: fp32, and the variant where the part has files of it (not every part has)."""
    has_variant = variant and any((folder / part).glob(f"*.{variant}.*"))
    return {"dtype": torch.float32, "variant": variant if has_variant else None}


def _separate_unet(args, start, folder):
    """The UNet to train, when it is not the one that the average starts from."""
    if Path(args.pretrained_model_name_or_path).is_dir():
        if start.non_ema_revision:
            raise ModelError(
                f"--non_ema_revision {start.non_ema_revision}: {args.pretrained_model_name_or_path} is a folder and "
                "has no revisions; name the files with --non_ema_variant "
                "(unet/diffusion_pytorch_model.VARIANT.safetensors)"
            )
        if not any((folder / "unet").glob(f"*.{start.non_ema_variant}.*")):
            raise ModelError(f"--non_ema_variant {start.non_ema_variant}: no such weights in {folder / 'unet'}")
    try:
        return UNet2DConditionModel.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="unet", revision=start.non_ema_revision or args.revision,
            variant=start.non_ema_variant, cache_dir=args.cache_dir, dtype=torch.float32,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        flags = f"--non_ema_revision {start.non_ema_revision} --non_ema_variant {start.non_ema_variant}"
        raise ModelError(f"{flags}: no UNet to be had there: {error}") from error


def _new_unet(folder, overrides, seed):
    """A UNet of random weights: the base's own layout, changed by --unet_config."""
    config = UNet2DConditionModel.load_config(folder / "unet")
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if overrides:
        # os.path, because Path.is_file raises where a long text cannot be the name of a file
        text = Path(overrides).read_text(encoding="utf-8") if os.path.isfile(overrides) else overrides
        try:
            changes = yaml.safe_load(text)  # JSON is YAML too
        except yaml.YAMLError as error:
            raise ModelError(f"--unet_config {overrides}: {error}") from error
        if not isinstance(changes, dict):
            raise ModelError(f"--unet_config {overrides} is neither a file nor {{key: value, ...}}")
        if changes.get("dropout"):
            raise ModelError("--unet_config: dropout draws from a generator that no checkpoint keeps: leave it at 0")
        unknown = changes.keys() - inspect.signature(UNet2DConditionModel.__init__).parameters.keys()
        if unknown:
            raise ModelError(f"--unet_config: a UNet has no setting named {', '.join(sorted(unknown))}")
        config |= changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return UNet2DConditionModel.from_config(config)
        except (TypeError, ValueError) as error:
            raise ModelError(f"--unet_config {overrides}: {error}") from error


def _check_fit(unet, text_encoder, vae):
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"the UNet takes {unet.config.in_channels} channels and the autoencoder gives "
            f"{vae.config.latent_channels}: an inpainting or upscaling model is not trained by this script"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise ModelError(
            f"the UNet expects text of width {unet.config.cross_attention_dim} and the text encoder gives "
            f"{text_encoder.config.hidden_size}: set cross_attention_dim in --unet_config"
        )


def _read_part(folder):
    path = next(folder.glob("*.safetensors"))
    return {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
