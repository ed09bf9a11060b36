"""Say in words what is in an image. A kind of captioner is one file here."""

from finetuning.captioning import blip, blip2, florence2, git, image_text

CAPTIONERS = {
    "blip": blip.KIND,
    "blip2": blip2.BLIP2,
    "instructblip": blip2.INSTRUCTBLIP,
    "git": git.KIND,
    "florence2": florence2.KIND,
    "image-text-to-text": image_text.KIND,
    "clip-interrogator": blip.KIND,  # whose caption interrogator.py goes on with
}
