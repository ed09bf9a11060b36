"""Low-rank adapters on a frozen base: where they go, how they are trained, and the files that come of them.

`add_adapters` turns a Model into an `AdaptedModel`, which a run trains, saves and resumes with the same calls.
"""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from finetuning.families.lora_files import (
    DIFFUSERS_NAME,
    KOHYA_NAME,
    RAW_NAME,
    Layer,
    diffusers_tensors,
    for_kohya,
    magnitude_ending,
    read_lora,
    weights_hash,
    write_diffusers,
    write_diffusers_for_all,
    write_kohya,
)
from finetuning.families.model import Model, load_model
from finetuning.families.model_args import ModelError
from finetuning.rng import torch_generator
from finetuning.training.lora_check import adapters_in, check_files
from finetuning.training.lora_layout import Layout, LoraArgs
from finetuning.training.lora_metadata import adapter_facts, kohya_facts

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "default"


def add_adapters(args: LoraArgs, model, run):
    """Adapters on `model`, which is frozen and moved to the run's device. Raises ModelError.

    The adapters are fp32 whatever the base's precision, so a gradient scaler finds nothing in fp16 to unscale.
    """
    adaptable = {one.name: model.components[one.name] for one in model.family.adaptable}
    if problems := list(_family_problems(args, model)):
        raise ModelError("\n".join(problems))
    layout = Layout(args, model.family, model.trained_modules)
    start = read_lora(args.init_lora, adaptable, cache_dir=args.cache_dir) if args.init_lora else None
    problems = [*layout.problems(), *_precision_problems(args, run)]
    if start:
        problems += layout.problems_with_start(start)
    if problems:
        raise ModelError("\n".join(problems))
    denoiser = model.denoiser.denoiser
    parameters = sum(parameter.numel() for module in adaptable.values() for parameter in module.parameters())
    base = Base(args.pretrained_model_name_or_path, weights_hash(denoiser), parameters)
    if start and (note := start.note_on_base(base.name, base.hash)):
        run.say(f"--init_lora {note}")

    for module in adaptable.values():
        module.requires_grad_(False)
    if args.base_precision in ("int8", "nf4"):
        _quantize(denoiser, args.base_precision, run.weights_dtype, run.device)
    for name, module in model.trained_modules.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(args.seed, f"adapters of {name}").initial_seed())
            module.add_adapter(layout.config(name), adapter_name=ADAPTER)
    adapted = AdaptedModel.on(model, args, layout, base)
    if start:
        adapted.start_from(start)
    if args.save_kohya and (notice := for_kohya(adapted.adapters, model.family, adapted.components)[1]):
        run.say(notice)
    adapted.to_device(run.device, run.weights_dtype)
    return adapted


@dataclass(frozen=True)
class Base:
    """What the adapters stand on, before anything was done to it."""

    name: str
    hash: str
    parameters: int


class AdaptedModel(Model):
    """A frozen model and the adapters on it: what a run of train_lora.py trains."""

    hub_tags = ("lora", "stable-diffusion")

    @classmethod
    def on(cls, model, args, layout: Layout, base: Base):
        """The same components as `model`, whose trained ones carry the adapters of `layout`."""
        adapted = cls(**{field.name: getattr(model, field.name) for field in fields(model)})
        adapted.args, adapted.layout, adapted.base = args, layout, base
        adapted.adapters = adapters_in(adapted.trained_modules)
        return adapted

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

    def cast(self, name, frozen_dtype):
        """Also of the base, which has a precision of its own; adapters stay fp32."""
        if name not in [component.name for component in self.family.adaptable]:
            return super().cast(name, frozen_dtype)
        base_dtype = PRECISIONS.get(self.args.base_precision, frozen_dtype)
        for parameter in self.components[name].parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else base_dtype)

    # -- what a run needs ------------------------------------------------------------------------------------------

    def trained_parameters(self):
        """{name: parameter} of the adapters, named as in their files but for the component."""
        return {name.replace(f".{ADAPTER}", ""): value for name, value in super().trained_parameters().items()}

    def summary(self):
        """What is trained and what is frozen, in one line."""
        trained = sum(parameter.numel() for parameter in self.trained_parameters().values())
        precision = self.args.base_precision or "as the activations"
        ranks = sorted({module.r[ADAPTER] for module in self.adapters.values()})
        return (
            f"trained: adapters of rank {', '.join(map(str, ranks))} on {len(self.adapters)} layers of "
            f"{' and '.join(self.trained)}, {trained / 1e6:.3f} M parameters, "
            f"{trained / self.base.parameters:.2%} of the frozen {self.base.parameters / 1e6:.2f} M (base: {precision})"
        )

    def copied_bytes(self):
        """Nothing of the base goes into the finished files."""
        return 0

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def layers(self, weights):
        """{layer name: Layer} of the adapters, of `weights` by parameter name."""
        now, found = {name: value.detach() for name, value in weights.items()}, {}
        for name, module in self.adapters.items():
            magnitude = now.get(f"{name}.lora_magnitude_vector.weight")
            found[name] = Layer(
                down=now[f"{name}.lora_A.weight"].cpu(),
                up=now[f"{name}.lora_B.weight"].cpu(),
                alpha=module.scaling[ADAPTER] * module.r[ADAPTER],
                magnitude=None if magnitude is None else magnitude.cpu().reshape(-1),
            )
        return found

    def save_trained(self, folder, weights, suffix=""):
        """Write adapters of `weights`, by parameter name, into the folder lora plus `suffix`, in diffusers' format."""
        target = Path(folder) / f"lora{suffix}"
        target.mkdir(parents=True)
        write_diffusers(target / DIFFUSERS_NAME, self.layers(weights), self._base_facts(), self.family)

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
        from safetensors.torch import load_file

        stored, values = load_file(path), {}
        expected = {
            key: value.shape
            for key, value in diffusers_tensors(self.layers(self.trained_parameters()), self.family).items()
        }
        if expected != {key: value.shape for key, value in stored.items()}:
            raise ModelError(
                f"{folder.parent} holds other adapters than the flags ask for: give the same --rank, "
                "--lora_target_modules, --lora_rank_pattern, --use_dora, --train_text_encoder and --text_encoder_rank, "
                f"or start a new run from it with --init_lora {folder}"
            )
        for name, parameter in self.trained_parameters().items():
            component, rest = name.split(".", 1)
            component = self.family.by_name[component]
            key = component.lora_prefix + rest.replace(".lora_magnitude_vector.weight", magnitude_ending(component))
            values[name] = stored[key].reshape(parameter.shape)
        return values

    # -- the finished files ----------------------------------------------------------------------------------------

    def save_lora(self, folder, weights, average, facts):
        """Write the LoRA (averaged if there is an average, the raw one then beside it) and check every file.

        Each is loaded into a fresh pipeline and must act there as the adapters here. Raises ModelError if one does
        not. `weights` and `average` are by parameter name; `facts`: what else the metadata should say.
        """
        facts = {**facts, **self._base_facts(), **adapter_facts(self.args, self.layout)}
        exported, fresh = self.layers(weights if average is None else average), load_model(self.args)
        written = {DIFFUSERS_NAME: exported}
        write_diffusers_for_all(folder / DIFFUSERS_NAME, exported, facts, self.family)
        if average is not None:
            written[RAW_NAME] = self.layers(weights)
            write_diffusers_for_all(folder / RAW_NAME, written[RAW_NAME], facts, self.family)
        if self.args.save_kohya:
            written[KOHYA_NAME], _ = for_kohya(exported, self.family, fresh.components)
            facts |= kohya_facts(self.args, self.layout, facts, self.scheduler.config.prediction_type)
            write_kohya(folder / KOHYA_NAME, written[KOHYA_NAME], facts, self.family, fresh.components)
        check_files(folder, written, fresh)

    def _base_facts(self):
        return {"base_model": self.base.name, "base_model_hash": self.base.hash}


def _family_problems(args, model):
    """What a model's family has no adapters or files for, as text."""
    without = [name for name in model.trained if not model.family.by_name[name].lora_prefix]
    if without:
        yield f"--train_text_encoder: LoRAs of a {model.family.pipeline} have no {', '.join(without)}: leave it out"
    if args.save_kohya and not all(one.kohya_prefix for one in model.family.adaptable):
        yield f"--save_kohya: sd-scripts has no file for a {model.family.pipeline}: leave it out"


def _precision_problems(args, run):
    """Precisions of the base that cannot be multiplied with this run's activations, as text."""
    if PRECISIONS.get(args.base_precision, run.weights_dtype) not in (run.weights_dtype, torch.float32):
        now = next(name for name, dtype in PRECISIONS.items() if dtype == run.weights_dtype)
        yield (
            f"--base_precision {args.base_precision} goes with activations of the same precision, and this run has "
            f"{now}: add --mixed_precision {args.base_precision} (fp16 needs a GPU), or leave --base_precision out"
        )
    if run.is_sharded or run.zero_stage:
        yield "FSDP and DeepSpeed divide what is trained, and adapters are small: launch with accelerate_config.yaml"
    if args.weights_precision != "fp32":
        yield "--weights_precision bf16: adapters are small and stay fp32; --base_precision bf16 is for what is frozen"
    if args.base_precision == "int8" and args.use_dora and run.device.type == "cpu":
        yield "--base_precision int8 with --use_dora needs a GPU, PEFT loses the scales on a CPU: leave one of them out"


def _quantize(denoiser, precision, activations, device):
    """Put the attention blocks' linear layers into 8 or 4 bits (QLoRA, arXiv 2305.14314).

    The convolutions, for which bitsandbytes has nothing, stay: 589 M of the 860 M weights of an SD 1.5 UNet, counted on
    its config, where these layers are 242 M.
    """
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call that it rounds fp32 inputs
    # PEFT asks for these names before it takes its own layers for such a base
    denoiser.is_loaded_in_8bit, denoiser.is_loaded_in_4bit = precision == "int8", precision == "nf4"
    inside = [(n, m) for n, m in denoiser.named_modules() if "attentions." in n and isinstance(m, torch.nn.Linear)]
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
        denoiser.set_submodule(name, small.to(device))  # it is here that the weight is quantized
