"""Write captions for a folder of images with a model that sees.

    python caption_images.py photos/ --captioner blip
    python caption_images.py photos/ --captioner florence2 --prompt "<MORE_DETAILED_CAPTION>" --max_length 200 --add
    python caption_images.py photos/ --captioner blip --top_p 0.9 --seed 1 --add        another caption for each
    python caption_images.py photos/ --captioner image-text-to-text --model HuggingFaceTB/SmolVLM-500M-Instruct
    python caption_images.py photos/ --captioner clip-interrogator --from_captions --overwrite

Reads   a folder of images, flat or in train/, validation/ and test/, with or without metadata.jsonl; a Hub model or
        a local folder, safetensors only.
Writes  metadata.jsonl beside the images: {"file_name": ..., "text": ..., "text_origin": "blip:MODEL"} a line, which
        training reads as it is. Images that have a caption are left alone, unless --add or --overwrite.
Go on   after an interruption: the same command again; until the end the captions stand in .captions.jsonl.
An image's caption is the same whatever else is in its batch.
"""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from finetuning.captioning.folder import CaptionedFolder, FolderArgs, Journal
from finetuning.captioning.interrogator import Interrogator, InterrogatorArgs
from finetuning.captioning.kinds import CAPTIONERS, GenerationArgs
from finetuning.cli import REQUIRED, as_dict, flag, flags_without_effect, run_script
from finetuning.data.findings import Findings, counted
from finetuning.data.folders import folder_problems
from finetuning.data.images import MAX_PIXELS_TO_SHRINK, UnreadableImage, open_rgb
from finetuning.data.threads import in_order


@dataclass
class CaptionerArgs:
    """Images and captioner"""

    dir: str = flag(REQUIRED, "folder of images", positional=True, affects_result=False)
    captioner: str = flag(REQUIRED, "kind of model", choices=tuple(CAPTIONERS))
    model: str | None = flag(None, "folder or Hub name (none: a usual one of its kind, see finetuning/captioning/)")

    def problems(self):
        yield from folder_problems("DIR", self.dir)


@dataclass
class Args(InterrogatorArgs, FolderArgs, GenerationArgs, CaptionerArgs):
    """Every flag of this script."""

    def problems(self):
        kind = CAPTIONERS[self.captioner]
        if kind.prompts and self.prompt not in (None, *kind.prompts):
            yield f"--prompt {self.prompt}: {self.captioner} only knows {', '.join(kind.prompts)}"
        if self.from_captions and not (self.add or self.overwrite):
            yield "--from_captions begins with captions that are there: also give --add or --overwrite"


def caption(args):
    """Caption every image that wants it, and write the folder at the end; returns the exit status."""
    findings = Findings()
    entries = CaptionedFolder(args.dir, args, findings).todo()
    if args.from_captions:
        for entry in entries:
            if not entry.captions:
                findings.error("no_first_caption", entry.name)
        entries = [entry for entry in entries if entry.captions]
    harmless = flags_without_effect(Args)
    journal = Journal(args.dir, {name: value for name, value in as_dict(args).items() if name not in harmless})
    caption_all(entries, journal, args, findings)

    folder = CaptionedFolder(args.dir, args, Findings())  # as it is now: a person may have written captions meanwhile
    captioned = [entry for entry in folder.entries if entry.name in journal.done]
    new = [entry for entry in captioned if folder.put(entry, journal.done[entry.name], origin(args))]
    folder.write()
    journal.remove()
    for entry in new[:3]:
        print(f"  {entry.name}: {journal.done[entry.name]}")
    print(f"{args.dir}: {counted(len(new), 'image')} captioned, {len(folder.entries) - len(new)} others as they were")
    findings.refuse(args.dir, "skip", say=lambda text: print(text, file=sys.stderr))
    return 1 if findings.count() and args.on_bad_rows == "error" else 0


def caption_all(entries, journal, args, findings):
    """A caption for each entry into the journal, but for those that it holds already."""
    waiting = [entry for entry in entries if entry.name not in journal.done]
    if not waiting:
        return
    captioner = open_captioner(args, findings)
    with tqdm(total=len(entries), initial=len(entries) - len(waiting), desc="captioning", unit="image") as bar:
        for batch in _batches(_decoded(waiting, args, findings, bar), args.batch_size):
            some, images = map(list, zip(*batch, strict=True))
            for entry, text in zip(some, captioner(images, some), strict=True):
                if text:
                    journal.add(entry.name, text)
                else:
                    findings.error("silent_model", entry.name)
            bar.update(len(some))


def open_captioner(args, findings):
    """A function: (RGB images, their entries) -> captions. Raises ModelError."""
    from accelerate import PartialState

    from finetuning.captioning.captioner import Captioner
    from finetuning.families.generation import inference_dtype

    device = PartialState().device
    _, precision = inference_dtype(args.dtype, device)
    if args.from_captions:
        first = lambda images, entries: [entry.captions[0][0] for entry in entries]
    else:
        captioner = Captioner(CAPTIONERS[args.captioner], args, findings, args.model, device, precision)
        first = lambda images, entries: captioner(images, [entry.name for entry in entries])
    if args.captioner != "clip-interrogator":
        return first
    interrogator = Interrogator(args, device, precision)
    return lambda images, entries: interrogator(images, first(images, entries))


def origin(args):
    """What is written beside a caption: the kind of captioner and the model's name, without the place on this disk."""
    model = args.clip_model if args.from_captions else args.model or CAPTIONERS[args.captioner].default_model
    return f"{args.captioner}:{Path(model).resolve().name if Path(model).is_dir() else model}"


def _decoded(entries, args, findings, bar):
    """(entry, RGB image) in order, decoded ahead on other cores; what cannot be read goes into the findings."""
    opened = lambda entry: _opened(entry.image, args.max_side)
    for entry, image in in_order(opened, entries, errors=UnreadableImage, window=2 * args.batch_size):
        if isinstance(image, UnreadableImage):
            findings.error("unreadable_image", entry.name, image)
            bar.update()
        else:
            yield entry, image


def _opened(path, max_side):
    image = open_rgb(path, MAX_PIXELS_TO_SHRINK)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)  # leaves smaller ones as they are
    return image


def _batches(items, size):
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def main(argv=None):
    """Caption the folder, and return the exit status."""
    return run_script(Args, __doc__, caption, argv)


if __name__ == "__main__":
    sys.exit(main())
