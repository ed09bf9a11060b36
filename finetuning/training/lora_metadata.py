"""What a LoRA file says of itself, in safetensors metadata: how it was made, and for which base."""

import json
import shlex
from pathlib import Path

# The kind of base by the width of its text, which is what Stable Diffusion 1 and 2 differ in, and by what it predicts.
# Others are of their family's kind (Family.kohya_kind).
KINDS = {
    (768, "epsilon"): ("stable-diffusion-v1", "sd_v1"),
    (768, "v_prediction"): ("stable-diffusion-v1", "sd_v1"),
    (1024, "epsilon"): ("stable-diffusion-v2-512", "sd_v2"),
    (1024, "v_prediction"): ("stable-diffusion-v2-768-v", "sd_v2"),
}


def adapter_facts(args, layout):
    """Rank, alpha and targets, as they were trained: the file itself may hold alpha = rank."""
    ranks = sorted({rank for own in layout.ranks.values() for rank in own.values()})
    alphas = sorted({layout.alpha(part) for part in layout.components} | set(layout.alpha_pattern.values()))
    return {
        "rank": ", ".join(map(str, ranks)),
        "alpha": ", ".join(f"{alpha:g}" for alpha in alphas),
        "target_modules": shlex.join(args.lora_target_modules),
        "parts": ", ".join(layout.components),
        "use_dora": args.use_dora,
        "use_rslora": args.use_rslora,
    }


def kohya_facts(args, layout, facts, prediction_type):
    """The names under which sd-scripts, A1111 and ComfyUI look for the same, and Stability's model specification."""
    unet = layout.components[layout.denoiser]
    kind, version = KINDS.get((unet.config.cross_attention_dim, prediction_type), layout.kohya_kind)
    modules = dict(unet.named_modules())
    has_convolutions = any(modules[name].base_layer.weight.ndim == 4 for name in layout.ranks[layout.denoiser])
    dimensions = {"conv_dim": str(layout.rank(layout.denoiser)), "conv_alpha": str(layout.alpha(layout.denoiser))}
    values = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": layout.rank(layout.denoiser),
        "ss_network_alpha": layout.alpha(layout.denoiser),
        "ss_network_args": json.dumps(dimensions if has_convolutions else {}),
        "ss_network_dropout": args.lora_dropout,
        "ss_base_model_version": version,
        "ss_v2": version == "sd_v2",
        "ss_sd_model_name": Path(facts["base_model"]).name,
        "ss_output_name": Path(args.output_dir).name,
        "ss_learning_rate": args.learning_rate,
        "ss_text_encoder_lr": args.text_encoder_lr,
        "ss_optimizer": args.optimizer,
        "ss_lr_scheduler": args.lr_scheduler,
        "ss_steps": facts["steps"],
        "ss_num_train_images": facts["images"],
        "ss_batch_size_per_device": args.train_batch_size,
        "ss_gradient_accumulation_steps": args.gradient_accumulation_steps,
        "ss_resolution": str(tuple(reversed(args.size))),
        "ss_enable_bucket": args.aspect_buckets,
        "ss_bucket_no_upscale": args.max_upscale == 1,
        "ss_seed": args.seed,
        "ss_min_snr_gamma": args.snr_gamma,
        "ss_noise_offset": args.noise_offset,
        "ss_zero_terminal_snr": args.rescale_betas_zero_snr,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{kind}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": facts["caption_prefix"],
        "modelspec.title": Path(args.output_dir).name,
        "modelspec.resolution": "x".join(map(str, reversed(args.size))),
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
    return {name: value for name, value in values.items() if value is not None}  # of a stream the images are not known
