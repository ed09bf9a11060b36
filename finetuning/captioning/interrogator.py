"""A caption and the terms that fit the image best in the judgement of CLIP: the idea of CLIP Interrogator.

Stable Diffusion reads prompts through CLIP, so words that CLIP finds in an image are words that move the model. The
terms stand in terms/*.txt, a file for each kind: medium, style, light, colours, camera, composition, mood.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from finetuning.cli import flag
from finetuning.files import read_text

TERMS = Path(__file__).parent / "terms"


@dataclass
class InterrogatorArgs:
    """CLIP Interrogator"""

    clip_model: str = flag("openai/clip-vit-large-patch14", "CLIP that judges; this one is Stable Diffusion 1.x's own")
    terms: str | None = flag(None, "folder of your own term lists, .txt with a term a line (none: this project's)")
    max_terms: int = flag(6, "most terms added to a caption; fewer where no more would fit the image better", min=0)
    from_captions: bool = flag(False, "begin with an image's own caption", requires="captioner=clip-interrogator")

    def problems(self):
        if self.terms is not None and not read_terms(self.terms):
            yield f"--terms {self.terms} must be a folder with .txt files, a term a line"


def read_terms(folder):
    """Every term once, in the order of the files' names and lines."""
    lines = [line for path in sorted(Path(folder).glob("*.txt")) for line in read_text(path).splitlines()]
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


class Interrogator:
    """CLIP and the embedded terms. Opening it raises ModelError."""

    def __init__(self, args: InterrogatorArgs, device, dtype, shortlist=48):
        from finetuning.captioning.captioner import open_model  # which loads transformers

        self.max_terms, self.shortlist, self.device, self.dtype = args.max_terms, shortlist, device, dtype
        self.processor, self.model = open_model("CLIPModel", args.clip_model, device, dtype)
        self.longest = self.model.config.text_config.max_position_embeddings  # 77
        self.terms = read_terms(args.terms or TERMS)
        self.embedded = self.embed_texts(self.terms)

    def __call__(self, images, captions):
        """[caption, term, term ...] for each RGB image; an empty caption stays empty."""
        pairs = zip(self.embed_images(images), captions, strict=True)
        return [self._with_terms(image, text) if text else "" for image, text in pairs]

    def _with_terms(self, image, text):
        """Add the term with which the whole text is most like the image, as long as that makes it more so."""
        best = self.embed_texts([text])[0] @ image
        likely = (self.embedded @ image).topk(min(self.shortlist, len(self.terms))).indices.tolist()
        for _ in range(self.max_terms):
            says = lambda term, text=text: re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text, re.IGNORECASE)
            tried = [f"{text}, {self.terms[i]}" for i in likely if not says(self.terms[i])]
            lengths = map(len, self.processor.tokenizer(tried, verbose=False).input_ids) if tried else ()
            tried = [longer for longer, length in zip(tried, lengths, strict=True) if length <= self.longest]
            if not tried:
                break
            likeness = self.embed_texts(tried) @ image
            if likeness.max() <= best:
                break
            best, text = likeness.max(), tried[likeness.argmax()]
        return text

    @torch.inference_mode()
    def embed_texts(self, texts):
        """Unit vectors [texts, width], fp32; what CLIP does not read is cut off."""
        parts = []
        for start in range(0, len(texts), 256):
            inputs = self.processor.tokenizer(
                texts[start : start + 256], padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
            )
            parts.append(self.model.get_text_features(**inputs.to(self.device)).pooler_output.float())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images):
        """Unit vectors [images, width], fp32."""
        inputs = self.processor.image_processor(images=images, return_tensors="pt").to(self.device, self.dtype)
        return torch.nn.functional.normalize(self.model.get_image_features(**inputs).pooler_output.float(), dim=-1)
