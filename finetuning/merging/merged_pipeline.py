"""Merged weights in memory: models mixed into the parameters of one pipeline, at any ratio, again and again."""

import torch

from finetuning.cli import first_few
from finetuning.families.model_args import ModelError
from finetuning.families.pipelines import open_pipeline, sampler
from finetuning.merging.methods import bound
from finetuning.merging.ratios import block_ratios
from finetuning.merging.tensor_matching import is_copied


class MergedPipeline:
    """The tensors in which the models differ, each in its own precision, and the pipeline that they are mixed into.

    `warnings` are lines to print. Raises ModelError where the models do not fit together or are not finite.
    """

    def __init__(self, args, sources, scheduler=None, device="cpu", dtype=torch.float32):
        self.args = args
        matches, self.warnings = args.match(sources)
        self.blocks = block_ratios(args.block_ratios, matches)
        self.pipeline = _base_pipeline(sources[0], args.variant, scheduler, device, dtype)
        self.components = list(sources[0].tensors)
        targets = self.targets
        _check_places(matches, targets)
        self.mixed = self._take([one for one in matches if one.name in targets], targets)
        self.ratio = None

    @torch.no_grad()
    def set(self, ratio):
        """Put the weights of a ratio into the pipeline: mixed in fp32, rounded once to the pipeline's precision."""
        if self.ratio == ratio:
            return
        self.ratio, broken, targets = ratio, [], self.targets
        for one, tensors in self.mixed:
            compute = bound(self.args, one.name, self.blocks.get(one.name, ratio))
            if isinstance(compute, int):
                result = tensors[compute]
            else:
                result = compute(*(tensor.float() for tensor in tensors), out=torch.empty(tensors[0].shape))
            target = targets[one.name]
            target.copy_(result)
            if not target.isfinite().all():
                broken.append(one.name)
        if broken:
            self.ratio = None
            raise ModelError(f"ratio {ratio:g} is too much for {self.pipeline.dtype}: {_listed(broken)} overflow")

    @property
    def targets(self):
        """{canonical name: tensor} of the pipeline's components; what is copied into these, the pipeline has. Asked for
        anew each time: a pipeline that decodes in fp32 moves its autoencoder's weights elsewhere and back."""
        modules = {component: getattr(self.pipeline, component) for component in self.components}
        return {
            f"{component}.{key}": tensor
            for component, module in modules.items()
            for key, tensor in module.state_dict().items()
            if key not in (getattr(module, "_tied_weights_keys", None) or ())  # other names of what is there already
        }

    @torch.no_grad()
    def _take(self, matches, targets):
        """[(match, its tensors)] of what depends on the ratio; all else goes into the pipeline once and for all."""
        mixed, broken = [], []
        for one in matches:
            inputs, tensors = one.inputs, [reference.read() for reference in one.inputs]
            if not _all_finite(tensors) and not one.is_copy and self.args.fallback is not None:
                self.warnings.append(f"{one.name} is not finite: {self.args.on_mismatch}'s is taken")
                inputs, tensors = ([items[self.args.fallback]] for items in (inputs, tensors))
            if not _all_finite(tensors):
                pairs = zip(inputs, tensors, strict=True)
                broken += [f"{one.name} of {made_of.path}" for made_of, tensor in pairs if not _all_finite([tensor])]
            elif all(_same_bytes(tensors[0], tensor) for tensor in tensors):
                targets[one.name].copy_(tensors[0])
            else:
                mixed.append((one, tensors))
        if broken:
            raise ModelError(f"NaN or infinity in {_listed(broken)}; --on_mismatch base or tuned says whose to take")
        return mixed


def _base_pipeline(base, variant, scheduler, device, dtype):
    """A pipeline of the base's layout; its weights are still to be put in."""
    made = sampler(base, scheduler)  # refuses a base without a pipeline around it
    pipeline = open_pipeline(str(base.folder), variant=variant, scheduler=scheduler, device=device, dtype=dtype)
    pipeline.scheduler = made
    return pipeline


def _check_places(matches, targets):
    """Raises ModelError unless every weight has its place in the pipeline, and every place its weight."""
    weights = [one for one in matches if not is_copied(one.key, one.inputs[0])]
    odd = [one.name for one in weights if one.name not in targets or targets[one.name].shape != one.inputs[0].shape]
    odd += sorted(targets.keys() - {one.name for one in matches})
    if odd:
        raise ModelError(f"{_listed(odd)} do not fit the configuration of the base")


def _all_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors)


def _same_bytes(one, other):
    """Equal to the last bit: 0.0 and -0.0 are not."""
    return one.dtype == other.dtype and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other)))


def _listed(names):
    return f"{len(names)} tensor(s) ({first_few(names)})"
