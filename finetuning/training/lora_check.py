"""Whether a LoRA file does, where it is loaded, what it was trained to do."""

from contextlib import contextmanager

import torch

from finetuning.families.lora_files import adaptable
from finetuning.families.model_args import ModelError
from finetuning.families.quiet import errors_only


def check_files(folder, written, fresh):
    """Load every LoRA file of `written` {name: layers} into a model opened afresh and compare what it does there.

    diffusers' own loader reads the file, and what it added to each weight is compared with the layers; then the
    denoiser's prediction for two captions with the one of the layers fused into the weights by the formula itself, as
    A1111 and ComfyUI fuse a LoRA. Raises ModelError where a file acts otherwise.
    """
    components = {one.name: fresh.components[one.name] for one in fresh.family.adaptable}
    with fresh.pipeline() as pipeline, errors_only():
        for name, layers in written.items():
            pipeline.load_lora_weights(str(folder), weight_name=name, adapter_name="lora")
            added = max(_distance(module.get_delta_weight("lora"), layers[key].delta())
                        for key, module in adapters_in(components).items())  # fmt: skip
            count, loaded = len(adapters_in(components)), fresh.prediction()
            pipeline.unload_lora_weights()
            with _fused(components, layers):
                off = _distance(loaded, fresh.prediction())
            if count != len(layers) or not max(added, off) < 1e-4:
                raise ModelError(
                    f"{name} does not do in a fresh pipeline what the adapters do here ({count} of {len(layers)} "
                    f"layers loaded, their weights differ by {added:.1e}, the prediction by {off:.1e}): nothing is "
                    "handed over. The last checkpoint holds the adapters"
                )


@contextmanager
def _fused(components, layers):
    """The layers as part of the weights, and out again after the block.

    In place, and back to rounding: a second copy of a large model's weights may not fit beside the training run.
    """
    weights = {name: module.weight.data for name, module in adaptable(components).items() if name in layers}
    stretches = {}
    for name, layer in layers.items():
        weights[name] += layer.delta()
        stretches[name] = layer.stretch(weights[name])
        weights[name] *= stretches[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            weights[name] /= stretches[name]
            weights[name] -= layer.delta()


def _distance(one, other):
    """Relative to the second; 0 for two that are nothing."""
    return ((one - other).norm() / other.norm().clamp_min(1e-30)).item() if not torch.equal(one, other) else 0.0


def adapters_in(components):
    """{layer name: PEFT's module around it} of {component: model}."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{component}.{name}": module
        for component, model in components.items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
