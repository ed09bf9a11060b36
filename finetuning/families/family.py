"""What a model is made of, and what a family of models has to say for itself.

A family is one subclass of `Family` in one file: which components it has, and how text, sizes and noisy latents
become a prediction. Opening, saving, LoRA files, merging, sampling and training read the rest from here; see
stable_diffusion.py for the shortest one, and table.py for the list.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Component:
    """A folder of a diffusers pipeline that holds weights."""

    name: str  # the folder's name, and the pipeline's attribute
    class_name: str  # in diffusers or transformers
    lora_prefix: str = ""  # what stands before a module's name in LoRA files of diffusers; "": takes no adapters
    kohya_prefix: str = ""  # the same in files of kohya's sd-scripts
    # What files put before each weight's name and the class does not. transformers 5's CLIPTextModel dropped its
    # "text_model.", which every file of every other version has; CLIPTextModelWithProjection kept it.
    file_prefix: str = ""
    original_prefixes: tuple[str, ...] = ()  # what stands before its tensors in single files; the first is written
    kohya_original: bool = False  # kohya's files call its modules as single files do

    @property
    def cls(self):
        """The class of its module; imports diffusers' or transformers' part that holds it."""
        return getattr(import_module("transformers" if self.is_text_encoder else "diffusers"), self.class_name)

    @property
    def is_text_encoder(self):
        return self.class_name.startswith(("CLIP", "T5"))

    @property
    def stem(self):
        """The name of its weights' file, without variant and ending."""
        return "model" if self.is_text_encoder else "diffusion_pytorch_model"


class Family:
    """A kind of pipeline. Its methods get modules and tensors; they keep nothing."""

    pipeline: str  # the class that model_index.json names
    components: tuple[Component, ...]
    denoiser = "unet"
    tokenizers: dict[str, str]  # {text encoder: folder of its tokenizer}
    schedulers: tuple[str, ...] = ("scheduler",)
    upcast: tuple[str, ...] = ()  # components that the pipeline keeps in fp32 where their config says force_upcast
    pipeline_options: dict = MappingProxyType({})  # what else the pipeline's class wants to be made of its components
    call_options: dict = MappingProxyType({})  # what else its call wants
    text_length: int | None = None  # tokens that are read of a caption; none: as its tokenizer says
    needs_image = False  # an upscaler: its pipeline takes the images that it enlarges
    kohya_kind = ("stable-diffusion", "sd_other")  # modelspec's and sd-scripts' words for it
    skips_weights = False  # whether `encode_text` has no use for some weights, which then get no gradient
    marks: tuple[str, ...] = ()  # how tensors begin that only this family's bare UNets and single files have

    @cached_property
    def by_name(self):
        """{name: Component}."""
        return {component.name: component for component in self.components}

    @property
    def folders(self):
        """The folders of its pipeline that are read."""
        return {*self.by_name, *self.tokenizers.values(), *self.schedulers}

    @property
    def adaptable(self):
        """The components that LoRAs are made for."""
        return tuple(component for component in self.components if component.lora_prefix)

    def components_of(self, pipeline):
        """{name: module} of an opened diffusers pipeline."""
        return {name: getattr(pipeline, name) for name in self.by_name}

    def side(self, components):
        """The side in pixels of the images that the model was made for, of {name: module}."""
        return components[self.denoiser].config.sample_size * self.codec(components).factor

    def clean(self, caption):
        """A caption as it is tokenized."""
        return caption

    def encode_text(self, encoders, tokens):
        """{name: [n, ...]} that `denoise` takes, of {text encoder: token ids [n, k]}."""
        raise NotImplementedError

    def extras(self, batch, settings):
        """What the denoiser is conditioned on besides text, {name: [n, ...]}: SDXL's sizes, say.

        settings   what model_index.json says of the pipeline
        """
        return {}

    def condition(self, batch, latents, model, seed):
        """(latents that are trained on, extras), where the extras are made of the latents themselves.

        model  the Model, for its conditioning_args and other schedules; random draws come from (seed, step, row)
        """
        return latents, self.extras(batch, model.settings)

    def denoise(self, denoiser, noisy, timesteps, text, extras):
        """The prediction [n, c, h, w] for noisy latents [n, c, h, w] at timesteps [n]."""
        raise NotImplementedError

    def codec(self, components):
        """How images become what is denoised: an autoencoder, by {name: module}."""
        return Autoencoder(components["vae"])

    def assemble(self, components, tokenizers, schedulers, settings):
        """A diffusers pipeline with its progress bar off.

        components {name: module}; tokenizers {text encoder: tokenizer}; schedulers {name: scheduler}; settings what
        model_index.json says besides
        """
        import diffusers

        kind = getattr(diffusers, self.pipeline)
        known = {key: settings[key] for key in inspect.signature(kind).parameters if key in settings}
        folders = {folder: tokenizers[name] for name, folder in self.tokenizers.items()}
        pipeline = kind(**components, **folders, **schedulers, **{**known, **self.pipeline_options})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def check_scheduler(self, scheduler):
        """Make a sampler's scheduler ready for this family. Raises ModelError where it cannot be used."""

    def refusal(self, names):
        """Why a model that looks like this family's is none of it, or None.

        names   of the tensors of a single file, or of what model_index.json sets
        """
        return None

    def problems(self, components):
        """Yield why components {name: module} do not go together."""
        return ()


class Autoencoder:
    """Images <-> latents by diffusers' AutoencoderKL, frozen."""

    def __init__(self, vae):
        self.vae = vae

    @property
    def factor(self):
        """Pixels to a latent along each side: images have to be a multiple of it."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self):
        return self.vae.config.latent_channels

    @property
    def dtype(self):
        """The precision that it works in."""
        return self.vae.dtype

    @property
    def identity(self):
        """What the latents of an image depend on; a codec with None has nothing that is worth a cache."""
        return identity_of({"vae": self.vae})

    @torch.no_grad()
    def posterior(self, pixels):
        """(mean, standard deviation), fp32 [n, c, H / factor, W / factor], of images [n, 3, H, W] in [-1, 1]."""
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()

    def scale(self, latents):
        """To the unit variance that the denoiser works in."""
        return latents * self.vae.config.scaling_factor


def identity_of(modules):
    """A hash of the classes, settings and weights, as they are in memory, of {name: module}."""
    import xxhash

    found = xxhash.xxh3_128()
    for name, module in sorted(modules.items()):
        settings = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        settings = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
        found.update(f"{name} {type(module).__name__} {sorted(settings.items())}".encode())
        for key, value in sorted(module.state_dict().items()):
            found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Pixels:
    """Images that are denoised as they are."""

    factor, channels = 1, 3

    def posterior(self, pixels):
        """(the images, no deviation)."""
        return pixels, torch.zeros_like(pixels)

    def scale(self, latents):
        return latents


class Tokenizers:
    """Captions -> {text encoder: token ids [n, k]}, cut and padded to what each encoder reads. Picklable: it runs in
    the loader's workers."""

    def __init__(self, tokenizers, family):
        self.tokenizers, self.family = tokenizers, family  # {text encoder: tokenizer}
        for tokenizer in tokenizers.values():
            tokenizer.model_max_length = family.text_length or tokenizer.model_max_length

    def __call__(self, captions):
        captions = [self.family.clean(caption) for caption in captions]
        return {
            name: tokenizer(
                captions,
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for name, tokenizer in self.tokenizers.items()
        }


class Denoiser(torch.nn.Module):
    """All that is trained, as the one module that a run wraps: the denoiser, and text encoders that are trained too.

    What is frozen stays outside: it can leave the GPU, and its output can be cached.
    """

    def __init__(self, family, denoiser, text_encoders):
        super().__init__()
        self.family, self.denoiser = family, denoiser
        self.text_encoders = torch.nn.ModuleDict(text_encoders)

    def forward(self, noisy, timesteps, text=None, tokens=None, extras=None):
        """[n, c, h, w], [n], and the text encoded {name: [n, ...]} or to be encoded here -> prediction [n, c, h, w]."""
        text = self.family.encode_text(self.text_encoders, tokens) if text is None else text
        return self.family.denoise(self.denoiser, noisy, timesteps, text, extras or {})
