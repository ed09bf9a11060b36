"""Low-rank adapters on a frozen base: where they go, how they are trained, and the files that come of them.

`add_adapters` turns a model into an `AdaptedModel`, which a run trains, saves and resumes with the same calls as a
model whose every weight is trained (see families.contract.Trained).
"""

import re
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from finetuning.cli import flag
from finetuning.draws import keep_mask, torch_generator
from finetuning.families import load_model
from finetuning.families.contract import ModelProblem
from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    DIFFUSERS_PREFIX,
    KOHYA_NAME,
    MAGNITUDE_KEY,
    RAW_NAME,
    Layer,
    adaptable,
    attach,
    diffusers_tensors,
    parts_of,
    read_lora,
    weights_hash,
    write_diffusers,
    write_diffusers_for_all,
    write_kohya,
)
from finetuning.families.quiet import errors_only

ATTENTION = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj")}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "default"


@dataclass
class LoraArgs:
    """Adapters (LoRA)"""

    rank: int = flag(4, "rank of the adapters: their capacity and their size")
    lora_alpha: float | None = flag(None, "the adapters' output is scaled by alpha / rank (none: alpha = rank)")
    lora_dropout: float = flag(0.0, "share of an adapter's inputs that is dropped in training")
    lora_target_modules: list[str] = flag(
        ["attention"], "layers of the UNet that get an adapter: attention (its projections), all-linear, conv (with "
        "all-linear: LoCon), or ends of module names, e.g. to_q ff.net.2 mid_block.attentions.0.proj_in",
    )  # fmt: skip
    use_dora: bool = flag(False, "DoRA (arXiv 2402.09353): also learn each output's magnitude; slower, more memory")
    use_rslora: bool = flag(False, "rank-stabilised LoRA (arXiv 2312.03732): scale by alpha / sqrt(rank)")
    lora_rank_pattern: list[str] | None = flag(
        None, "other ranks for some layers, PATTERN=RANK: the end of a module's name, or a regular expression for it, "
        "e.g. attn2.to_k=16 'mid_block.*=32'",
    )  # fmt: skip
    lora_alpha_pattern: list[str] | None = flag(None, "other alphas for some layers, PATTERN=ALPHA, likewise")
    text_encoder_rank: int | None = flag(
        None, "with --train_text_encoder: rank of the adapters on its attention projections (none: --rank)"
    )
    base_precision: str | None = flag(
        None, "precision of the frozen base (none: as the activations); int8 and nf4, by bitsandbytes, need far less memory",
        choices=("fp32", "fp16", "bf16", "int8", "nf4"),
    )  # fmt: skip
    init_lora: str | None = flag(
        None, "LoRA to go on from: a file of diffusers, kohya or PEFT, or a run's folder; --rank may be larger than its"
    )
    save_kohya: bool = flag(False, f"also write {KOHYA_NAME}, for A1111 and ComfyUI")

    def problems(self):
        if self.rank < 1 or (self.text_encoder_rank is not None and self.text_encoder_rank < 1):
            yield "--rank and --text_encoder_rank must be at least 1"
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            yield f"--lora_alpha {self.lora_alpha} must be above 0"
        if not 0 <= self.lora_dropout < 1:
            yield f"--lora_dropout {self.lora_dropout} must be at least 0 and below 1"
        if self.text_encoder_rank is not None and not getattr(self, "train_text_encoder", True):
            yield "--text_encoder_rank does nothing without --train_text_encoder"
        for name, least in (("lora_rank_pattern", 1), ("lora_alpha_pattern", 0)):
            for text in getattr(self, name) or []:
                pattern, _, number = text.rpartition("=")
                if not pattern or not _is_number(number, whole=name == "lora_rank_pattern") or float(number) < least:
                    yield f"--{name} {text} must look like PATTERN=NUMBER, e.g. mid_block.*=8"
                elif not _is_pattern(pattern):
                    yield f"--{name} {text}: {pattern} is not a regular expression"


def add_adapters(args: LoraArgs, model, run):
    """Adapters on `model`, which is frozen and moved to the run's device. Raises ModelProblem.

    The adapters are fp32 whatever the base's precision, so a gradient scaler finds nothing in fp16 to unscale.
    """
    both = {"unet": model.denoiser.unet, "text_encoder": model.denoiser.text_encoder}
    parts = both if args.train_text_encoder else {"unet": both["unet"]}
    targets, problems = _targets(args, parts)
    problems += _precision_problems(args, run)
    start = read_lora(args.init_lora, both) if args.init_lora else None
    if start:
        problems += _start_problems(args, start, targets)
    if problems:
        raise ModelProblem("\n".join(problems))
    base = Base(args.pretrained_model_name_or_path, weights_hash(both["unet"]), _count(model.denoiser))
    if start and (note := start.note_on_base(base.name, base.hash)):
        run.say(f"--init_lora {note}")

    for module in (model.denoiser.unet, model.denoiser.text_encoder):
        module.requires_grad_(False)
    if args.base_precision in ("int8", "nf4"):
        _quantize(model.denoiser.unet, args.base_precision, run.weights_dtype, run.device)
    for part, module in parts.items():
        config = LoraConfig(
            r=_rank_of(args, part), lora_alpha=_alpha_of(args, part), target_modules=list(targets[part]),
            rank_pattern=_numbers(args.lora_rank_pattern, int), alpha_pattern=_numbers(args.lora_alpha_pattern, float),
            use_dora=args.use_dora, use_rslora=args.use_rslora, init_lora_weights="gaussian",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(args.seed, f"adapters of {part}").initial_seed())
            module.add_adapter(config, adapter_name=ADAPTER)
    adapted = AdaptedModel(args, model, parts, base)
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

    def __init__(self, args, model, parts, base: Base):
        self.args, self.model, self.parts, self.base = args, model, parts, base
        self.tokenizer, self.vae, self.scheduler = model.tokenizer, model.vae, model.scheduler
        self.denoiser = model.denoiser
        self.adapters = adapters_in(parts)
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
            raise ModelProblem(f"{folder.parent} holds no adapters: it is not a checkpoint of train_lora.py")
        stored, values = load_file(path), {}
        expected = {key: value.shape for key, value in diffusers_tensors(self.layers()).items()}
        if expected != {key: value.shape for key, value in stored.items()}:
            raise ModelProblem(
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

        Each is loaded into a fresh pipeline and must act there as the adapters here. Raises ModelProblem if one does
        not. `facts`: what else the metadata should say.
        """
        facts = {**facts, **self._base_facts(), **self._adapter_facts()}
        exported = self.layers(shadow)
        written = {DIFFUSERS_NAME: exported}
        write_diffusers_for_all(folder / DIFFUSERS_NAME, exported, facts)
        if shadow is not None:
            written[RAW_NAME] = self.layers()
            write_diffusers_for_all(folder / RAW_NAME, written[RAW_NAME], facts)
        if self.args.save_kohya:
            written[KOHYA_NAME] = exported
            write_kohya(folder / KOHYA_NAME, exported, facts | self._kohya_facts(facts))
        check_files(folder, written, load_model(self.args, None, self.args.seed))

    def _base_facts(self):
        return {"base_model": self.base.name, "base_model_hash": self.base.hash}

    def _adapter_facts(self):
        args = self.args
        alphas = sorted({module.lora_alpha[ADAPTER] for module in self.adapters.values()})
        ranks = sorted({module.r[ADAPTER] for module in self.adapters.values()})
        return {
            "rank": ", ".join(map(str, ranks)),
            "alpha": ", ".join(f"{alpha:g}" for alpha in alphas),
            "target_modules": shlex.join(args.lora_target_modules),
            "parts": ", ".join(self.parts),
            "use_dora": args.use_dora,
            "use_rslora": args.use_rslora,
        }

    def _kohya_facts(self, facts):
        """The names under which sd-scripts, A1111 and ComfyUI look for the same facts, and the model specification."""
        args, width = self.args, self.denoiser.unet.config.cross_attention_dim
        kind = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "stable-diffusion")
        convolutions = any(module.base_layer.weight.ndim == 4 for module in self.adapters.values())
        arguments = {"conv_dim": str(args.rank), "conv_alpha": str(_alpha_of(args, "unet"))} if convolutions else {}
        return {
            "ss_network_module": "lycoris.kohya" if args.use_dora else "networks.lora",
            "ss_network_dim": args.rank,
            "ss_network_alpha": _alpha_of(args, "unet"),
            "ss_network_args": str(arguments).replace("'", '"'),
            "ss_base_model_version": {768: "sd_v1", 1024: "sd_v2"}.get(width, "sd_other"),
            "ss_v2": width == 1024,
            "ss_sd_model_name": Path(self.base.name).name,
            "ss_sd_model_hash": self.base.hash,
            "ss_output_name": Path(args.output_dir).name,
            "ss_learning_rate": args.learning_rate,
            "ss_text_encoder_lr": args.text_encoder_lr if "text_encoder" in self.parts else None,
            "ss_optimizer": args.optimizer,
            "ss_lr_scheduler": args.lr_scheduler,
            "ss_steps": facts["steps"],
            "ss_num_train_images": facts["pictures"],
            "ss_batch_size_per_device": args.train_batch_size,
            "ss_gradient_accumulation_steps": args.gradient_accumulation_steps,
            "ss_resolution": str(tuple(reversed(args.size))),
            "ss_seed": args.seed,
            "ss_min_snr_gamma": args.snr_gamma,
            "ss_noise_offset": args.noise_offset,
            "ss_network_dropout": args.lora_dropout,
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{kind}/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": Path(args.output_dir).name,
            "modelspec.resolution": "x".join(map(str, reversed(args.size))),
            "modelspec.prediction_type": {"v_prediction": "v"}.get(self.scheduler.config.prediction_type, "epsilon"),
        }


def adapters_in(parts):
    """{layer name: PEFT's module around it}."""
    return {
        f"{part}.{name}": module
        for part, model in parts.items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


class PositionalDropout(torch.nn.Module):
    """Dropout whose mask comes from (seed, layer, step, row): the same after a resume, and for any micro-batch."""

    def __init__(self, adapted, layer, share, seed):
        super().__init__()
        self.where = lambda: adapted.place
        self.layer, self.share, self.seed = layer, share, seed

    def forward(self, inputs):
        """[batch, ...] -> the same shape."""
        if not self.training:
            return inputs
        step, rows = self.where()
        purpose = f"dropout in {self.layer}"
        keep = keep_mask(self.seed, purpose, step, rows, inputs.shape[1:], self.share, inputs.device)
        return inputs * keep / (1 - self.share)


# -- checking what was written -------------------------------------------------------------------------------------


def check_files(folder, written, fresh):
    """Load every LoRA file of `written` {name: layers} into a model opened afresh and compare what it does there.

    diffusers' own loader reads the file, and what it added to each weight is compared with the layers; then the
    denoiser's prediction for two captions with the one of the layers folded into the weights by the formula itself, as
    A1111 and ComfyUI fold them. Raises ModelProblem where a file acts otherwise.
    """
    with fresh.pipeline() as pipeline, errors_only():
        for name, layers in written.items():
            if name == KOHYA_NAME and any(layer.magnitude is not None for layer in layers.values()):
                attach(pipeline, read_lora(folder / name, parts_of(pipeline)))  # diffusers drops these magnitudes
            else:
                pipeline.load_lora_weights(str(folder), weight_name=name, adapter_name="lora")
            added = max(_distance(module.get_delta_weight("lora"), layers[key].delta())
                        for key, module in adapters_in(parts_of(pipeline)).items())  # fmt: skip
            count, loaded = len(adapters_in(parts_of(pipeline))), _prediction(pipeline)
            pipeline.unload_lora_weights()
            with _folded(pipeline, layers):
                off = _distance(loaded, _prediction(pipeline))
            if count != len(layers) or not max(added, off) < 1e-4:
                raise ModelProblem(
                    f"{name} does not do in a fresh pipeline what the adapters do here ({count} of {len(layers)} "
                    f"layers loaded, their weights differ by {added:.1e}, the prediction by {off:.1e}): nothing is handed "
                    "over. The last checkpoint holds the adapters"
                )


@torch.no_grad()
def _prediction(pipeline):
    """The denoiser's output for two captions at two timesteps, at the smallest size that the UNet takes."""
    unet, tokenizer = pipeline.unet, pipeline.tokenizer
    side = 2 ** len(unet.config.block_out_channels)
    noisy = torch.randn(2, unet.config.in_channels, side, side, generator=torch_generator(0, "check of a LoRA file"))
    ids = tokenizer(
        ["a photo of a dog", "a red circle"], padding="max_length", max_length=tokenizer.model_max_length,
        truncation=True, return_tensors="pt",
    ).input_ids  # fmt: skip
    text = pipeline.text_encoder(ids, return_dict=False)[0]
    return unet(noisy, torch.tensor([200, 700]), text, return_dict=False)[0]


@contextmanager
def _folded(pipeline, layers):
    """The layers as part of the weights; the weights come back after the block."""
    modules = adaptable(parts_of(pipeline))
    kept = {name: modules[name].weight.data for name in layers}
    for name, layer in layers.items():
        modules[name].weight.data = layer.folded(kept[name])
    try:
        yield
    finally:
        for name, weight in kept.items():
            modules[name].weight.data = weight


def _distance(one, other):
    """Relative to the second; 0 for two that are nothing."""
    return ((one - other).norm() / other.norm().clamp_min(1e-30)).item() if not torch.equal(one, other) else 0.0


# -- where adapters go ---------------------------------------------------------------------------------------------


def _targets(args, parts):
    """{part: names of the layers that get an adapter}, and a list of what does not fit."""
    chosen = {"unet": _chosen(args.lora_target_modules, parts["unet"])}
    problems = []
    if not all(chosen["unet"].values()):
        nothing = " ".join(word for word, names in chosen["unet"].items() if not names)
        ends = sorted({re.search(r"\w+(\.\d+)?$", name)[0] for name in adaptable({"unet": parts["unet"]})})
        problems.append(
            f"--lora_target_modules {nothing} matches no layer of the UNet. There are attention, all-linear, conv, and "
            f"module names that end in: {', '.join(ends)}"
        )
    found = {"unet": sorted(set().union(*chosen["unet"].values()))}
    if "text_encoder" in parts:
        words = ATTENTION["text_encoder"] + (("fc1", "fc2") if "all-linear" in args.lora_target_modules else ())
        found["text_encoder"] = sorted(set().union(*_chosen(words, parts["text_encoder"]).values()))

    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in _numbers(getattr(args, name), float):
            everywhere = [module for modules in found.values() for module in modules]
            if not any(pattern in (module, get_pattern_key([pattern], module)) for module in everywhere):
                problems.append(f"--{name} {pattern} matches none of the layers that get an adapter")
    return found, problems + list(_ranks_too_large(args, parts, found))


def _chosen(words, model):
    """{word: names of the model's layers that it means}."""
    layers = {name.split(".", 1)[1]: module for name, module in adaptable({"model": model}).items()}
    found = {}
    for word in words:
        if word == "attention":
            found[word] = [name for name in layers if name.endswith(tuple(f".{end}" for end in ATTENTION["unet"]))]
        elif word == "all-linear":
            found[word] = [name for name, module in layers.items() if isinstance(module, torch.nn.Linear)]
        elif word == "conv":  # as LoCon has it: within the blocks, so without the first and the last layer
            inside = {name: module for name, module in layers.items() if "blocks." in name or "block." in name}
            found[word] = [name for name, module in inside.items() if isinstance(module, torch.nn.Conv2d)]
        else:
            found[word] = [name for name in layers if name == word or name.endswith(f".{word}")]
    return found


def _ranks_too_large(args, parts, targets):
    """A matrix cannot have a rank above its smaller side: what lies above would be memory for nothing."""
    layers = adaptable(parts)
    patterns = _numbers(args.lora_rank_pattern, int)
    widths = {}
    for part, names in targets.items():
        for name in names:
            rank = _rank_at(args, patterns, part, name)
            weight = layers[f"{part}.{name}"].weight
            width = min(weight.shape[0], weight[0].numel())
            if rank > width:
                widths.setdefault((rank, width), []).append(f"{part}.{name}")
    for (rank, width), names in sorted(widths.items()):
        yield (
            f"rank {rank} is above the width {width} of {len(names)} layers, e.g. {names[0]}: lower --rank or "
            f"--text_encoder_rank, or give these a smaller one with --lora_rank_pattern"
        )


def _start_problems(args, start, targets):
    """Why the LoRA to start from does not fit into the adapters that the flags ask for."""
    wanted = {f"{part}.{name}" for part, names in targets.items() for name in names}
    if outside := sorted(start.layers.keys() - wanted):
        yield (
            f"--init_lora {start.path} has {len(outside)} layers that the flags give no adapter, e.g. {outside[0]}: "
            "widen --lora_target_modules (all-linear conv takes in nearly all), or add --train_text_encoder"
        )
    patterns = _numbers(args.lora_rank_pattern, int)
    ranks = {name: _rank_at(args, patterns, *name.split(".", 1)) for name in sorted(start.layers.keys() & wanted)}
    if small := [name for name, rank in ranks.items() if start.layers[name].rank > rank]:
        yield (
            f"--init_lora {start.path} has rank {start.layers[small[0]].rank} at {small[0]} and the flags ask for "
            f"{ranks[small[0]]} ({len(small)} such layers): raise --rank, --text_encoder_rank or --lora_rank_pattern"
        )
    if start.is_dora != args.use_dora:
        said = "is a DoRA: add" if start.is_dora else "is no DoRA: leave out"
        yield f"--init_lora {start.path} {said} --use_dora"


def _precision_problems(args, run):
    """Layers whose weights and inputs have two half precisions cannot be multiplied."""
    if PRECISIONS.get(args.base_precision, run.weights_dtype) not in (run.weights_dtype, torch.float32):
        now = next(name for name, dtype in PRECISIONS.items() if dtype == run.weights_dtype)
        yield (
            f"--base_precision {args.base_precision} goes with activations of the same precision, and this run has "
            f"{now}: add --mixed_precision {args.base_precision} (fp16 needs a GPU), or leave --base_precision out"
        )


def _quantize(unet, precision, activations, device):
    """Put the transformers' linear layers into 8 or 4 bits (QLoRA, arXiv 2305.14314); what remains is a small part."""
    import bitsandbytes as bnb

    inside = [(n, m) for n, m in unet.named_modules() if "attentions." in n and isinstance(m, torch.nn.Linear)]
    for name, linear in inside:
        sides = (linear.in_features, linear.out_features, linear.bias is not None)
        if precision == "nf4":
            small = bnb.nn.Linear4bit(*sides, compute_dtype=activations, quant_type="nf4")
            small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            small = bnb.nn.Linear8bitLt(*sides, has_fp16_weights=False)
            small.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        if linear.bias is not None:
            small.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
        unet.set_submodule(name, small.to(device))  # it is here that the weight is quantized


def _rank_of(args, part):
    return args.rank if part == "unet" or args.text_encoder_rank is None else args.text_encoder_rank


def _rank_at(args, patterns, part, module):
    return patterns.get(get_pattern_key(patterns, module), _rank_of(args, part))


def _alpha_of(args, part):
    alpha = _rank_of(args, part) if args.lora_alpha is None else args.lora_alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _numbers(texts, kind):
    """["a=1"] -> {"a": 1}."""
    pairs = (text.rpartition("=") for text in texts or [])
    return {pattern: kind(number) for pattern, _, number in pairs}


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _is_number(text, whole):
    return bool(re.fullmatch(r"\d+" if whole else r"\d+(\.\d*)?", text))


def _is_pattern(text):
    try:
        return bool(re.compile(text))
    except re.error:
        return False
