"""The images of an evaluation: one for each caption, drawn by a model or found in a folder.

    rows = dataset_rows("datasets/shapes", "validation")
    images = draw("models/mini-sd", rows, "runs/report/original", DrawArgs(guidance_scale=3.0))  # {row number: path}

A row keeps its number, and its number is its file's name and the seed of its noise: every model starts the same row
from the same noise, whatever the batch size, and with however many other rows it is drawn.

Written by `draw`: 00000.png and so on, and settings.json with all that the images depend on. A folder that was
interrupted is gone on with; one of other settings is refused.
"""

import json
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from finetuning.cli import flag
from finetuning.data.images import EXTENSIONS, UnreadableImage, open_rgb
from finetuning.data.reading import (
    METADATA_NAMES,
    DatasetError,
    Findings,
    as_captions,
    named_image,
    read_records,
    read_split,
)
from finetuning.evaluation.denoising import chosen_rows
from finetuning.evaluation.metrics import EvaluationError
from finetuning.families.lora_files import adaptable_components, attach, detach, read_lora, set_scale, weights_hash
from finetuning.families.pipelines import SCHEDULERS, open_pipeline
from finetuning.files import sha256, write_json
from finetuning.rng import torch_generator

GENERAL_PROMPTS = Path(__file__).parent / "general_prompts.json"
SETTINGS = "settings.json"
NAMES = ("model", "lora")  # of settings.json: where the weights lie; what they are is in their hashes
PNG_END = b"IEND\xaeB`\x82"
SHOWN = 20  # faults of a kind that are listed


@dataclass(frozen=True)
class Row:
    """One caption to draw, and the true image of it where there is one."""

    number: int
    caption: str
    image: Path | None = None
    category: str | None = None


@dataclass
class DrawArgs:
    """Drawing the images"""

    guidance_scale: float = flag(7.5, "classifier-free guidance scale; 1 is none")
    num_inference_steps: int = flag(25, "sampling steps")
    scheduler: str | None = flag("dpm++", "sampler", choices=tuple(SCHEDULERS))
    size: str | None = flag(None, "side in pixels, or HEIGHTxWIDTH (none: the model's own)")
    seed: int = flag(0, "with the number of a row it gives the noise that its image starts from, for every model")
    batch_size: int = flag(4, "images drawn together")
    negative_prompt: str | None = flag(None, "what to keep away from")
    lora_scale: float = flag(1.0, "how strongly a LoRA acts; 0 is the model without it, to the last bit")
    overwrite: bool = flag(False, "draw again what is there with other settings, instead of stopping")

    @property
    def height_and_width(self):
        """(height, width) in pixels, or None for the model's own."""
        sides = [int(side) for side in self.size.split("x")] if self.size else []
        return (sides[0], sides[-1]) if sides else None

    def problems(self):
        if self.size and not re.fullmatch(r"\d+(x\d+)?", self.size):
            yield f"--size {self.size} must be one side in pixels or HEIGHTxWIDTH"
        elif self.size and any(int(side) % 8 or not int(side) for side in self.size.split("x")):
            yield f"--size {self.size} must be a multiple of 8"
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} must be at least 1"


# -- rows ----------------------------------------------------------------------------------------------------------


def dataset_rows(dataset, split=None, caption_column="text", most=None, seed=0, say=print):
    """The captioned images of a folder with metadata.jsonl, in the order of their paths: [Row, ...].

    split  "train", "validation" or "test"; none: test, or the folder itself where it has no splits
    most   how many rows at most, drawn with the seed; they keep the numbers that they have among all

    Of several captions of an image the first is taken. Every image is opened. Raises EvaluationError with all that
    is wrong.
    """
    findings = Findings()
    try:
        every = read_split(dataset, split, "test", caption_column, findings)
    except DatasetError as problem:
        raise EvaluationError(str(problem)) from problem
    chosen = range(len(every)) if most is None else chosen_rows(len(every), most, seed)
    taken = [(number, every[number]) for number in chosen]
    _open_all([(row.origin, row.image) for _, row in taken], findings)
    if findings.errors:
        raise EvaluationError(
            f"{dataset} has {findings.count()} faults (x): mend them, or leave those rows out of its metadata\n"
            f"{findings.report(SHOWN)}"
        )
    if not taken:
        raise EvaluationError(f"{dataset} has no rows")
    for _, row in taken:
        if len(row.captions) > 1:
            findings.warnings["rows with several captions (the first is used)"].append(row.origin)
    if findings.warnings:
        say(f"{dataset}, noted (-):\n{findings.report()}")
    return [Row(number, row.captions[0], row.image) for number, row in taken]


def general_rows(path=None):
    """Prompts of no dataset: [Row, ...] without images, numbered in their order.

    path  .txt with a prompt on each line, or .json with a list of {"caption", "category"}, the category may be left
          out; none: the 60 that come with the project, six of each of ten categories

    Raises EvaluationError with all that is wrong.
    """
    path = Path(path or GENERAL_PROMPTS)
    if path.suffix not in (".txt", ".json"):
        raise EvaluationError(f"--general_prompts {path} must be a .txt with a prompt on each line, or a .json list")
    try:
        text = path.read_text(encoding="utf-8-sig")
        listed = json.loads(text) if path.suffix == ".json" else [{"caption": line} for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--general_prompts {path} cannot be read: {error}") from error
    if path.suffix == ".json":
        _check_prompts(path, listed)
    asked = [(one["caption"].strip(), one.get("category")) for one in listed if one["caption"].strip()]
    if not asked:
        raise EvaluationError(f"--general_prompts {path} has no prompts in it")
    return [Row(number, caption, None, category) for number, (caption, category) in enumerate(asked)]


def _check_prompts(path, listed):
    """Raises EvaluationError unless it is a list of captions and their categories."""
    if not isinstance(listed, list):
        raise EvaluationError(f'--general_prompts {path} must be a list of {{"caption": ..., "category": ...}}')
    wrong = []
    for number, one in enumerate(listed, 1):
        caption, category = (one.get("caption"), one.get("category")) if isinstance(one, dict) else (None, None)
        if not (isinstance(caption, str) and caption.strip()):
            wrong.append(f"entry {number} must have a text as its caption")
        if not isinstance(category, str | None):
            wrong.append(f"the category of entry {number} must be text")
    if wrong:
        raise EvaluationError(f"--general_prompts {path}: {'; '.join(wrong)}")


def _open_all(places, findings):
    """Open images [(what to call it, path)] on all cores; those that cannot be read become faults."""

    def look(place):
        try:
            open_rgb(place[1])
        except UnreadableImage as error:
            return f"{place[0]} ({error})"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for fault in filter(None, pool.map(look, places)):
            findings.errors["images that cannot be read"].append(fault)


# -- drawing -------------------------------------------------------------------------------------------------------


def draw(
    source, rows, folder, args, *,
    lora=None, weights="ema", base=None, vae=None, device="cpu", dtype=torch.float32, say=tqdm.write,
):  # fmt: skip
    """A PNG for each row in `folder`, {row number: path}; images of these settings that are there stay.

    source              whatever open_pipeline opens, or an opened pipeline, which is used as it is: with its scheduler,
                        on its device, in its dtype
    args                DrawArgs
    lora                what read_lora reads, at args.lora_scale
    weights, base, vae  as for open_pipeline

    Raises EvaluationError where the folder holds images of other settings or of somebody else, or where what the
    model draws is not finite; ModelError where a model cannot be opened.
    """
    folder, pipeline, name = Path(folder), source, source
    if isinstance(source, str | Path):
        pipeline = open_pipeline(
            source, weights=weights, base=base, vae=vae, scheduler=args.scheduler, device=device, dtype=dtype
        )
    else:
        name = source.name_or_path
    adapter = read_lora(lora, adaptable_components(pipeline), weights) if lora else None
    settings = _settings(pipeline, adapter, args) | {"model": str(name), "lora": str(lora) if lora else None}
    note = adapter and adapter.note_on_base(name, settings["unet_sha256"])
    if note and settings["dtype"] != "bfloat16":  # which rounds the base
        say(note)
    _claim(folder, rows, settings, args.overwrite, say)
    paths = {row.number: _path(folder, row.number) for row in rows}
    with _with_lora(pipeline, adapter, args.lora_scale), tqdm(total=len(rows), desc=f"drawing {folder.name}") as bar:
        for start in range(0, len(rows), args.batch_size):
            part = rows[start : start + args.batch_size]
            missing = {row.number for row in part if not _is_whole(paths[row.number])}
            # What is drawn together is drawn together again: another number of rows may round otherwise
            drawn = _drawn(pipeline, part, settings, name) if missing else [None] * len(part)
            for row, image in zip(part, drawn, strict=True):
                if row.number in missing:
                    _write_whole(paths[row.number], image)
            bar.update(len(part))
    return paths


def _drawn(pipeline, rows, settings, name):
    """The PIL images of the rows. Raises EvaluationError where one has a value that is not finite."""
    height, width = settings["size"]
    negative = settings["negative_prompt"]
    values = pipeline(
        [row.caption for row in rows],
        negative_prompt=[negative] * len(rows) if negative else None,
        guidance_scale=settings["guidance_scale"],
        num_inference_steps=settings["num_inference_steps"],
        generator=[torch_generator(settings["seed"], "evaluation", row.number) for row in rows],
        height=height,
        width=width,
        output_type="np",  # [rows, height, width, 3]; as PIL images, NaN would be black
    ).images
    broken = [row for row, one in zip(rows, values, strict=True) if not np.isfinite(one).all()]
    if broken:
        told = ", ".join(f"row {row.number} ({row.caption})" for row in broken)
        dtype = settings["dtype"]
        fix = "its weights are broken" if dtype == "float32" else f"draw in fp32 instead of {dtype} (--dtype fp32)"
        raise EvaluationError(f"{name} draws values that are not finite numbers for {told}: {fix}")
    return pipeline.image_processor.numpy_to_pil(values)


def _settings(pipeline, adapter, args):
    """All that the images depend on but for their captions, ready for JSON."""
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    settings = {f"{part}_sha256": weights_hash(getattr(pipeline, part)) for part in ("unet", "text_encoder", "vae")}
    settings |= {"lora_sha256": sha256(adapter.path), "lora_scale": args.lora_scale} if adapter else {}
    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    settings |= {
        "seed": args.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": config,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "size": args.height_and_width or (own, own),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
    }
    return json.loads(json.dumps(settings))  # as they come back from the file: lists, not tuples


@contextmanager
def _with_lora(pipeline, adapter, scale):
    """Draw with the LoRA, if there is one; afterwards the pipeline is without it."""
    if adapter is None:
        yield
        return
    attach(pipeline, adapter)
    try:
        set_scale(pipeline, scale)
        yield
    finally:
        detach(pipeline)


def _claim(folder, rows, settings, overwrite, say):
    """Take the folder for these settings and rows: what does not belong to them is removed, or refused.

    Images go before settings.json says otherwise, so that a kill never leaves one that looks like another.
    """
    known, captions = _read_settings(folder)
    if known is None:
        raise EvaluationError(
            f"{folder / SETTINGS} is not of images of an evaluation: name another --output_dir, or move it away"
        )
    there = {path.stem: path for path in sorted(folder.glob("*.png")) if re.fullmatch(r"\d{5,}", path.stem)}
    foreign = [path.name for stem, path in there.items() if stem not in captions]
    if foreign:
        raise EvaluationError(
            f"{folder} holds images that were not drawn here ({', '.join(foreign[:5])}): name another --output_dir, "
            "or move them away"
        )
    names = [name for name in settings | known if name not in NAMES and settings.get(name) != known.get(name)]
    if there and names and not overwrite:
        told = "; ".join(_difference(name, known.get(name), settings.get(name)) for name in names)
        raise EvaluationError(
            f"{folder} holds images of other settings ({told}): name another --output_dir, or draw them again with "
            "--overwrite"
        )
    asked = {_path(folder, row.number).stem: row.caption for row in rows}
    if names:
        stale, captions = list(there.values()), {}
    else:
        stale = [path for stem, path in there.items() if asked.get(stem, captions[stem]) != captions[stem]]
    if stale:
        why = "settings" if names else "captions"
        say(f"{folder}: {len(stale)} images of other {why} are removed, to be drawn again")
    for path in stale:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{SETTINGS}.incomplete"
    write_json(aside, settings | {"captions": captions | asked})
    os.replace(aside, folder / SETTINGS)


def _read_settings(folder):
    """(settings, {file stem: caption}) of what was drawn before; empty where nothing was, None for what is not ours."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}, {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return known, dict(known.pop("captions"))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None, {}


def _difference(name, then, now):
    """What changed, in words; of nested settings the single ones."""
    if isinstance(then, dict) and isinstance(now, dict):
        changed = [key for key in then | now if then.get(key) != now.get(key)]
        return "; ".join(_difference(f"{name}.{key}", then.get(key), now.get(key)) for key in changed)
    if name.endswith("sha256"):
        then, now = (text and text[:12] for text in (then, now))
    return f"{name} {then}, now {now}"


def _path(folder, number):
    return Path(folder) / f"{number:05d}.png"


def _is_whole(path):
    """Whether a PNG is there to its end; a copy that was cut off is not."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(PNG_END)))
        return file.read() == PNG_END


def _write_whole(path, image):
    """A PNG that is whole or not there."""
    aside = path.with_name(f".{path.name}.incomplete")
    image.save(aside, format="PNG")
    os.replace(aside, path)


# -- ready images ------------------------------------------------------------------------------------------------


def images_in(folder, rows, *, by_order=False, caption_column="text"):
    """Images that somebody drew, paired with `rows`: {row number: path}.

    An image's row is the one whose number it is named by (00003.png or 3.png), or whose true image has the same
    name, or whose caption the folder's metadata gives it: whichever of these pairs all images with all rows. A
    image that is said to be of another caption is never paired. `rows` are all of the split, also where fewer will
    be measured.

    by_order  pair the names in their order with the rows in theirs, whatever the names are

    Raises EvaluationError that names every image and every row that stays alone, and what cannot be read.
    """
    folder, findings = Path(folder), Findings()
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}")
    images = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS and path.is_file()]
    images = [path for path in images if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not images:
        raise EvaluationError(f"there are no images in {folder} ({', '.join(sorted(EXTENSIONS))})")
    told = _told_captions(folder, images, caption_column, findings)
    captions = {row.number: row.caption for row in rows}
    agrees = lambda number, path: captions[number] in told.get(path, (captions[number],))
    ways = [_by_order(folder, images, rows, findings)] if by_order else _by_name(images, rows, told)
    ways = [{number: path for number, path in way.items() if agrees(number, path)} for way in ways]
    full = [way for way in ways if len(way) == len(rows) == len(images)]
    pairs = full[0] if full else max(ways, key=len)
    if any(way != pairs for way in full):
        kind = "names that are the numbers of some rows and the names of other rows' images (00003.png is row 3's)"
        doubtful = [path for number, path in pairs.items() if any(way[number] != path for way in full)]
        findings.errors[kind] += [str(path.relative_to(folder)) for path in doubtful]
    _note_unpaired(folder, images, rows, pairs, told, findings)
    _open_all([(path.relative_to(folder), path) for path in images], findings)
    if findings.errors:
        raise EvaluationError(
            f"{folder} does not fit the rows, {findings.count()} faults (x): name its images by the numbers of the "
            f"rows (00003.png) or as the true images, or write their captions into {METADATA_NAMES[0]}\n"
            f"{findings.report(SHOWN)}"
        )
    return pairs


def _by_name(images, rows, told):
    """The pairs {row number: path} by number, by the true image's name, and by caption."""
    return [
        _paired(images, rows, lambda path: int(path.stem) if path.stem.isdecimal() else None, lambda row: row.number),
        _paired(images, rows, lambda path: path.stem, lambda row: row.image and row.image.stem),
        _paired(images, rows, lambda path: next(iter(told.get(path, ())), None), lambda row: row.caption),
    ]


def _by_order(folder, images, rows, findings):
    """The pairs {row number: path} by order alone; empty where the order is in doubt or the counts differ."""
    numeric = sorted(images, key=lambda path: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", str(path))])
    if numeric != images:
        kind = "names that stand elsewhere as text than as numbers (pad them with zeros)"
        doubtful = [one for one, other in zip(images, numeric, strict=True) if one != other]
        findings.errors[kind] += [str(path.relative_to(folder)) for path in doubtful]
    if numeric != images or len(images) != len(rows):
        return {}
    return dict(zip(sorted(row.number for row in rows), images, strict=True))


def _paired(images, rows, key_of_image, key_of_row):
    """{row number: path} where exactly one image and exactly one row have a key; None is no key."""
    paths, numbers = defaultdict(list), defaultdict(list)
    for path in images:
        paths[key_of_image(path)].append(path)
    for row in rows:
        numbers[key_of_row(row)].append(row.number)
    keys = [key for key in numbers if key is not None and len(numbers[key]) == len(paths[key]) == 1]
    return {numbers[key][0]: paths[key][0] for key in keys}


def _told_captions(folder, images, caption_column, findings):
    """{path: captions} as the folder's metadata, or the settings.json of `draw`, has them."""
    told, there = {}, {*images}
    try:
        for path in (folder / name for name in METADATA_NAMES if (folder / name).is_file()):
            for where, record in read_records(path, folder, findings):
                name = named_image(record, "image")
                image = folder / os.path.normpath(name) if name else None
                if image not in there:
                    findings.errors["metadata rows whose image is not there"].append(f"{where} ({name})")
                elif captions := as_captions(record.get(caption_column), where, caption_column):
                    told[image] = captions
    except DatasetError as problem:
        raise EvaluationError(str(problem)) from problem
    if not told and (folder / SETTINGS).is_file():
        told = {folder / f"{stem}.png": (caption,) for stem, caption in _read_settings(folder)[1].items()}
    return told


def _note_unpaired(folder, images, rows, pairs, told, findings):
    """What stays alone on either side, as faults."""
    paired = {*pairs.values()}
    for path in images:
        if path not in paired:
            caption = f" ({told[path][0]})" if path in told else ""
            findings.errors["images without a row"].append(f"{path.relative_to(folder)}{caption}")
    for row in rows:
        if row.number not in pairs:
            findings.errors["rows without an image"].append(f"row {row.number} ({row.caption})")
