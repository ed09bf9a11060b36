"""Low-rank adapters on a frozen base: where they go, how they are trained, and the files that come of them.

`add_adapters` turns a model into an `AdaptedModel`, which a run trains, saves and resumes with the same calls as a
model whose every weight is trained (see families.contract.Trained).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetuning.families.loading import load_model
from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    DIFFUSERS_PREFIX,
    KOHYA_NAME,
    MAGNITUDE_KEY,
    RAW_NAME,
    Layer,
    diffusers_tensors,
    read_lora,
    weights_hash,
    write_diffusers,
    write_diffusers_for_all,
    write_kohya,
)
from finetuning.families.model_args import ModelError
from finetuning.rng import keep_mask, torch_generator
from finetuning.training.lora_check import adapters_in, check_files
from finetuning.training.lora_layout import Layout, LoraArgs
from finetuning.training.lora_metadata import adapter_facts, kohya_facts

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "default"


def add_adapters(args: LoraArgs, model, run):
    """Adapters on `model`, which is frozen and moved to the run's device. Raises ModelError.

    The adapters are fp32 whatever the base's precision, so a gradient scaler finds nothing in fp16 to unscale.
    """
    both = {"unet": model.denoiser.unet, "text_encoder": model.denoiser.text_encoder}
    parts = both if args.train_text_encoder else {"unet": both["unet"]}
    layout = Layout(args, parts)
    start = read_lora(args.init_lora, both, cache_dir=args.cache_dir) if args.init_lora else None
    problems = [*layout.problems(), *_precision_problems(args, run)]
    if start:
        problems += layout.problems_with_start(start)
    if problems:
        raise ModelError("\n".join(problems))
    parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    base = Base(args.pretrained_model_name_or_path, weights_hash(both["unet"]), parameters)
    if start and (note := start.note_on_base(base.name, base.hash)):
        run.say(f"--init_lora {note}")

    for module in (model.denoiser.unet, model.denoiser.text_encoder):
        module.requires_grad_(False)
    if args.base_precision in ("int8", "nf4"):
        _quantize(model.denoiser.unet, args.base_precision, run.weights_dtype, run.device)
    for part, module in parts.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(args.seed, f"adapters of {part}").initial_seed())
            module.add_adapter(layout.config(part), adapter_name=ADAPTER)
    adapted = AdaptedModel(args, model, layout, base)
    if start:
        adapted.start_from(start)
    adapted.settle(run.device, run.weights_dtype)
    return adapted


@dataclass(frozen=True)
class Base:
    """What the adapters stand on, before anything was done to it."""

    name: str
    hash: str
    parameters: int


class AdaptedModel:
    """A frozen model and the adapters on it: what a run of train_lora.py trains."""

    def __init__(self, args, model, layout: Layout, base: Base):
        self.args, self.model, self.layout, self.base = args, model, layout, base
        self.parts = layout.parts
        self.tokenizer, self.vae, self.scheduler = model.tokenizer, model.vae, model.scheduler
        self.denoiser = model.denoiser
        self.adapters = adapters_in(self.parts)
        self.place = None  # (step, rows) of the batch in hand, for the dropout
        if args.lora_dropout:
            for name, module in self.adapters.items():
                module.lora_dropout[ADAPTER] = PositionalDropout(self, name, args.lora_dropout, args.seed)

    def start_from(self, lora):
        """Begin as another LoRA: what it adds to each weight is added here, whatever this run's rank and alpha.

        Rows that a larger rank brings stay as they were drawn, with nothing behind them yet.
        """
        with torch.no_grad():
            for name, layer in lora.layers.items():
                module = self.adapters[name]
                up = layer.up * (layer.alpha / layer.rank / module.scaling[ADAPTER])
                module.lora_A[ADAPTER].weight[: layer.rank] = layer.down
                module.lora_B[ADAPTER].weight[:, : layer.rank] = up
                if layer.magnitude is not None:
                    magnitude = module.lora_magnitude_vector[ADAPTER].weight
                    magnitude.copy_(layer.magnitude.reshape(magnitude.shape))

    def settle(self, device, activations):
        """Move everything; the autoencoder takes the activations' precision, the base its own, adapters stay fp32."""
        self.model.to(device, activations)
        base_dtype = PRECISIONS.get(self.args.base_precision, activations)
        for parameter in self.denoiser.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else base_dtype)

    def enter(self, batch):
        """Say which batch comes next: dropout draws from its step and rows, so that a resumed run drops the same."""
        self.place = (batch.step, batch.rows)

    # -- what a run needs ------------------------------------------------------------------------------------------

    @property
    def pixels_per_latent(self):
        return self.model.pixels_per_latent

    def posterior(self, pixels):
        return self.model.posterior(pixels)

    def scale_latents(self, latents):
        return self.model.scale_latents(latents)

    def pipeline(self):
        return self.model.pipeline()

    def trained_parameters(self):
        """{name: parameter} of the adapters, named as in their files but for the part."""
        return {
            f"{part}.{name}".replace(f".{ADAPTER}", ""): parameter
            for part, module in self.parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def parameter_groups(self, denoiser_lr, text_encoder_lr):
        """Optimizer groups, as lists: an iterator would be empty the second time, and nothing would be clipped."""
        rates = {"unet": denoiser_lr, "text_encoder": text_encoder_lr}
        return [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rates[part]}
            for part, module in self.parts.items()
        ]

    def summary(self):
        """What is trained and what is frozen, in one line."""
        trained = sum(parameter.numel() for parameter in self.trained_parameters().values())
        precision = self.args.base_precision or "as the activations"
        ranks = sorted({module.r[ADAPTER] for module in self.adapters.values()})
        return (
            f"trained: adapters of rank {', '.join(map(str, ranks))} on {len(self.adapters)} layers of "
            f"{' and '.join(self.parts)}, {trained / 1e6:.3f} M parameters, "
            f"{trained / self.base.parameters:.2%} of the frozen {self.base.parameters / 1e6:.2f} M (base: {precision})"
        )

    def copied_bytes(self):
        """Nothing of the base goes into the finished files."""
        return 0

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def layers(self, weights=None):
        """{layer name: Layer} of the adapters as they are now, or of `weights` by parameter name."""
        now = {name: value.detach() for name, value in self.trained_parameters().items()} | (weights or {})
        found = {}
        for name, module in self.adapters.items():
            magnitude = now.get(f"{name}.lora_magnitude_vector.weight")
            found[name] = Layer(
                down=now[f"{name}.lora_A.weight"].cpu(),
                up=now[f"{name}.lora_B.weight"].cpu(),
                alpha=module.scaling[ADAPTER] * module.r[ADAPTER],
                magnitude=None if magnitude is None else magnitude.cpu().reshape(-1),
            )
        return found

    def save_trained(self, folder, suffix="", weights=None):
        """Write the adapters as they are trained into the folder lora plus `suffix`, in diffusers' format."""
        target = Path(folder) / f"lora{suffix}"
        target.mkdir(parents=True)
        write_diffusers(target / DIFFUSERS_NAME, self.layers(weights), self._base_facts())

    def load_trained(self, folder, ema):
        """Take a checkpoint's adapters; with `ema`, return its averaged ones by parameter name, else None."""
        trained = self.trained_parameters()
        with torch.no_grad():
            for name, value in self._read(Path(folder) / "lora").items():
                trained[name].copy_(value)
        return self._read(Path(folder) / "lora_ema") if ema else None

    def _read(self, folder):
        """{parameter name: value} of a checkpoint's file."""
        path = folder / DIFFUSERS_NAME
        if not path.is_file():
            raise ModelError(f"{folder.parent} holds no adapters: it is not a checkpoint of train_lora.py")
        stored, values = load_file(path), {}
        expected = {key: value.shape for key, value in diffusers_tensors(self.layers()).items()}
        if expected != {key: value.shape for key, value in stored.items()}:
            raise ModelError(
                f"{folder.parent} holds other adapters than the flags ask for: give the same --rank, "
                "--lora_target_modules, --lora_rank_pattern, --use_dora, --train_text_encoder and --text_encoder_rank, "
                f"or start a new run from it with --init_lora {folder}"
            )
        for name, parameter in self.trained_parameters().items():
            part, rest = name.split(".", 1)
            key = DIFFUSERS_PREFIX[part] + rest.replace(".lora_magnitude_vector.weight", MAGNITUDE_KEY[part])
            values[name] = stored[key].reshape(parameter.shape)
        return values

    # -- the finished files ----------------------------------------------------------------------------------------

    def save_lora(self, folder, shadow, facts):
        """Write the LoRA (averaged if there is an average, the raw one then beside it) and check every file.

        Each is loaded into a fresh pipeline and must act there as the adapters here. Raises ModelError if one does
        not. `facts`: what else the metadata should say.
        """
        facts = {**facts, **self._base_facts(), **adapter_facts(self.args, self.layout)}
        exported = self.layers(shadow)
        written = {DIFFUSERS_NAME: exported}
        write_diffusers_for_all(folder / DIFFUSERS_NAME, exported, facts)
        if shadow is not None:
            written[RAW_NAME] = self.layers()
            write_diffusers_for_all(folder / RAW_NAME, written[RAW_NAME], facts)
        if self.args.save_kohya:
            written[KOHYA_NAME] = exported
            prediction = self.scheduler.config.prediction_type
            write_kohya(folder / KOHYA_NAME, exported, facts | kohya_facts(self.args, self.layout, facts, prediction))
        check_files(folder, written, load_model(self.args, None, self.args.seed))

    def _base_facts(self):
        return {"base_model": self.base.name, "base_model_hash": self.base.hash}


class PositionalDropout(torch.nn.Module):
    """Dropout whose mask comes from (seed, layer, step, row): the same after a resume, and for any micro-batch."""

    def __init__(self, adapted, layer, share, seed):
        super().__init__()
        self.where = lambda: adapted.place
        self.layer, self.share, self.seed = layer, share, seed

    @torch.compiler.disable  # the place is another at every step: compiled, it would be compiled anew each time
    def forward(self, inputs):
        """[batch, ...] -> the same shape."""
        if not self.training:
            return inputs
        step, rows = self.where()
        purpose = f"dropout in {self.layer}"
        keep = keep_mask(self.seed, purpose, step, rows, inputs.shape[1:], self.share, inputs.device)
        return inputs * keep / (1 - self.share)


def _precision_problems(args, run):
    """Precisions of the base that cannot be multiplied with this run's activations, as text."""
    if PRECISIONS.get(args.base_precision, run.weights_dtype) not in (run.weights_dtype, torch.float32):
        now = next(name for name, dtype in PRECISIONS.items() if dtype == run.weights_dtype)
        yield (
            f"--base_precision {args.base_precision} goes with activations of the same precision, and this run has "
            f"{now}: add --mixed_precision {args.base_precision} (fp16 needs a GPU), or leave --base_precision out"
        )
    if args.base_precision == "int8" and args.use_dora and run.device.type == "cpu":
        yield "--base_precision int8 with --use_dora needs a GPU, PEFT loses the scales on a CPU: leave one of them out"


def _quantize(unet, precision, activations, device):
    """Put the attention blocks' linear layers into 8 or 4 bits (QLoRA, arXiv 2305.14314).

    The convolutions, for which bitsandbytes has nothing, stay: 589 M of the 860 M weights of an SD 1.5 UNet, counted on
    its config, where these layers are 242 M.
    """
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call that it rounds fp32 inputs
    # PEFT asks for these names before it takes its own layers for such a base
    unet.is_loaded_in_8bit, unet.is_loaded_in_4bit = precision == "int8", precision == "nf4"
    inside = [(n, m) for n, m in unet.named_modules() if "attentions." in n and isinstance(m, torch.nn.Linear)]
    for name, linear in inside:
        sides = (linear.in_features, linear.out_features, linear.bias is not None)
        if precision == "nf4":
            small = bnb.nn.Linear4bit(*sides, compute_dtype=activations, quant_type="nf4")
            small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            small.support_avx512bf16_for_cpu = False  # on some CPUs it repacks the weights for drawing, and stays so
        else:
            small = bnb.nn.Linear8bitLt(*sides, has_fp16_weights=False)
            small.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        if linear.bias is not None:
            small.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
        unet.set_submodule(name, small.to(device))  # it is here that the weight is quantized
