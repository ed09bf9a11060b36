"""A captioner at work: images in, captions out."""

from pathlib import Path

import torch

from finetuning.captioning.kinds import GenerationArgs, Kind
from finetuning.cli import first_few
from finetuning.data.findings import Findings
from finetuning.families.folders import check_weights_files
from finetuning.families.model_args import ModelError
from finetuning.families.opening import HUB_NAME
from finetuning.families.quiet import errors_only
from finetuning.families.tensors import refuse_not_finite
from finetuning.rng import torch_generator


class Captioner:
    """A model with its processor. Opening it raises ModelError. Captions that may be cut short go into `findings`."""

    def __init__(self, kind: Kind, args: GenerationArgs, findings: Findings, model, device, dtype):
        self.kind, self.args, self.findings, self.device, self.dtype = kind, args, findings, device, dtype
        self.prompt = kind.default_prompt if args.prompt is None else args.prompt
        self.processor, self.model = open_model(kind.model_class, model or kind.default_model, device, dtype)
        kind.prepare(self.model, self.processor)
        # A decoder goes on from the last token: where prompts differ in length they are filled up before the first.
        self.processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def __call__(self, images, names):
        """[caption] of RGB images; the names, of the images in their dataset, are what nucleus draws depend on."""
        inputs, before = self.kind.encode(self.model, self.processor, images, self.prompt)
        with errors_only():  # of limits in the checkpoint's own settings, which those here replace
            tokens = self.model.generate(**inputs.to(self.device, self.dtype), **self._settings(names))
        tokens = tokens[:, before:]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if tokens.shape[1] >= self.args.max_length:  # some models force an end token onto the last place
            last = self.processor.tokenizer.batch_decode(tokens[:, -2:], skip_special_tokens=True)
            for name, text in zip(names, last, strict=True):
                if text.strip():  # the caption has no end of its own
                    self.findings.warn("perhaps_cut", name)
        return [without_prompt(" ".join(text.split()), self.prompt) for text in texts]

    def _settings(self, names):
        args = self.args
        settings = {"min_new_tokens": args.min_length, "max_new_tokens": args.max_length, "do_sample": False}
        if args.top_p is None:
            return settings | {"num_beams": args.num_beams or self.kind.num_beams}
        generators = [torch_generator(args.seed, "caption", name) for name in names]
        sampling = SeededNucleus(args.top_p, args.temperature, generators)
        return settings | {"num_beams": 1, "logits_processor": [sampling]}


class SeededNucleus:
    """A logits processor: nucleus sampling that greedy search carries out, with draws of each image's own.

    The largest of log p + Gumbel noise is a draw from p (the Gumbel-max trick), so that the noise alone decides, and it
    comes from a generator for each row of the batch: what else is in the batch does not matter.
    """

    def __init__(self, top_p, temperature, generators):
        from transformers import TopPLogitsWarper

        self.nucleus = TopPLogitsWarper(top_p)
        self.temperature, self.generators = temperature, generators

    def __call__(self, input_ids, scores):
        """Scores [batch, vocabulary] -> those of the nucleus with noise added, the others -inf."""
        scores = self.nucleus(input_ids, scores.float() / self.temperature)
        noise = [-torch.empty(scores.shape[1]).exponential_(generator=own).log() for own in self.generators]
        return scores + torch.stack(noise).to(scores.device)


def open_model(model_class, name, device, dtype):
    """(processor, model) of a folder or a Hub name, never from a pickle. Raises ModelError.

    model_class  its name in transformers
    """
    import transformers

    model_class = getattr(transformers, model_class)
    try:
        if Path(name).is_dir():
            check_weights_files(Path(name))
        elif not HUB_NAME.fullmatch(str(name)):
            raise ModelError(f"{name}: there is no such folder")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_kind(model_class, name, config)
        with errors_only():
            processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model, loading = model_class.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except ModelError:
        raise
    except Exception as error:  # on broken folders the libraries also raise AttributeError, TypeError, ...
        fix = "name a folder or a Hub model in safetensors with --model"
        raise ModelError(f"{name} cannot be opened: {error}\n  {fix}") from error
    if missing := sorted(loading["missing_keys"]):
        lacking = f"{name} lacks {len(missing)} of its weights ({first_few(missing, 3)})"
        raise ModelError(f"{lacking}: it is not whole, or made for other code than transformers'; take another --model")
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{name} has no vocabulary: its tokenizer's files are missing; download them again")
    refuse_not_finite(model.state_dict(), name)
    return processor, model.to(device).eval()


def without_prompt(text, prompt):
    """A caption that does not begin with the prompt's words; a prompt of one word may well be part of it."""
    words, start = text.split(), prompt.split()
    repeats = [word.lower() for word in words[: len(start)]] == [word.lower() for word in start]
    return " ".join(words[len(start) :]) if len(start) > 1 and repeats else text


def _check_kind(model_class, name, config):
    wanted = getattr(model_class, "config_class", None)  # an Auto class takes what it knows, and says so
    if wanted is not None and config.model_type != wanted.model_type:
        raise ModelError(
            f"{name} is a {config.model_type} model, not {wanted.model_type}: give the --captioner that goes with it "
            "(image-text-to-text takes every kind that has a chat template)"
        )
