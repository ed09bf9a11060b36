"""What a dataset is like before it is trained on: what a run would refuse, copies, leaks, bad images, odd captions.

An image is decoded once, for all measures; kept of it are its name, captions, sizes, hashes and 192 bytes of colour.
So memory is small for an image, but it is not flat: it grows with their number. Time grows with its square, in the
search for near copies, which compares the hashes of every pair.
"""

import inspect
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import xxhash
from PIL import Image, ImageStat
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, flag
from finetuning.data.buckets import BucketArgs, bucket_of, bucket_sizes
from finetuning.data.captions import CaptionArgs
from finetuning.data.checking import read_checked
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.reading import SPLIT_NAMES, DatasetError, Findings, read_folder
from finetuning.data.training_set import DataArgs

REDUCED = 512  # longest side in pixels at which images are measured, so that one threshold fits all of them
DARK, LIGHT, COVERED = 20, 235, 0.98  # grey levels 0..255, and the share of the image beyond them
FLAT = 4.0  # standard deviation of the most varied colour channel, of 255
ALIKE = 0.975  # correlation of two images as 8 x 8 colours; copies that were resized or made brighter keep it
ASPECTS = ((1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1))
SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
COMMON_WORDS = {
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to", "with",
}  # fmt: skip

SAME_LEAK = "the same image in several splits"
NEAR_LEAK = "near copies in several splits"
SAME_TWICE = "the same image more than once in a split"


@dataclass
class _TrainingArgs(BucketArgs, CaptionArgs, DataArgs):
    """The flags of a training run that decide what it takes and refuses."""


@dataclass
class AuditArgs(BucketArgs):
    """Audit"""

    path: str = flag(REQUIRED, "folder of the dataset; nothing in it is changed", positional=True)
    html: str | None = flag(None, "write the report with thumbnails as one page to this file, outside PATH")
    fix: str | None = flag(None, "write a corrected copy to this new folder: file_name and text of every row, no more")
    image_column: str = flag("image", "metadata key of the image, besides file_name")
    caption_column: str = flag("text", 'metadata key of the caption or list of captions; "none": no captions')
    allow_outside_paths: bool = flag(False, "let metadata and links reach images outside PATH")
    tokenizer: str | None = flag(
        None, "model or tokenizer (folder or Hub name) that captions will be read with; without it words are counted"
    )
    resolution: str = flag("512", "side of the training images in pixels, or HEIGHTxWIDTH")
    max_enlargement: float = flag(2.0, "an image that must be enlarged more than this to fill --resolution is tiny")
    near_bits: int = flag(10, "copies may differ in this many of the 64 bits of the perceptual hash; 0 to 24")
    blur_below: float = flag(20.0, "blurred: the variance of the Laplacian is less, at most 512 pixels on a side")
    workers: int | None = flag(None, "threads that decode (none: one for each core)")

    random_resized_crop_scale, check_images = None, "header"  # training flags that the buckets' own checks look at

    def training(self):
        """The flags of a training run on this folder."""
        return _TrainingArgs(
            **{name: getattr(self, name) for name in inspect.get_annotations(BucketArgs)},
            train_data_dir=self.path,
            image_column=self.image_column,
            caption_column=self.caption_column,
            allow_outside_paths=self.allow_outside_paths,
            resolution=self.resolution,
            check_images="header",  # each is decoded to its end below, where it is measured as well
        )

    def problems(self):
        if not Path(self.path).is_dir():
            yield f"PATH {self.path}: there is no such folder"
            return
        yield from DataArgs.problems(self.training())
        inside = Path(self.path).resolve()
        for name in ("html", "fix"):
            given = getattr(self, name)
            if given and inside in (Path(given).resolve(), *Path(given).resolve().parents):
                yield f"--{name} {given} lies in {self.path}, which is never changed: name a place outside it"
        if self.html and Path(self.html).is_dir():
            yield f"--html {self.html} is a folder: name a file"
        if self.max_enlargement < 1:
            yield f"--max_enlargement {self.max_enlargement} must be at least 1"
        if not 0 <= self.near_bits <= 24:
            yield f"--near_bits {self.near_bits} must lie in 0..24 (two different images differ in about 32)"
        if not self.blur_below >= 0:
            yield f"--blur_below {self.blur_below} must not be negative"
        if self.workers is not None and self.workers < 1:
            yield f"--workers {self.workers} must be at least 1"


@dataclass(frozen=True, slots=True)
class Measures:
    """What is kept of an image's pixels."""

    width: int
    height: int
    digest: bytes  # of size and pixels: equal for exact copies
    bits: int  # perceptual hash, 64 bits
    mirrored: int  # the same of the mirrored image
    colours: bytes  # [8, 8, 3] uint8
    sharpness: float  # variance of the Laplacian of the sharpest colour channel
    dark: float  # share of the pixels
    light: float
    spread: float  # standard deviation of the most varied colour channel, 0..255


@dataclass(frozen=True, slots=True)
class Seen:
    """An image, all that is said of it, and its measures."""

    split: str
    image: Path
    origin: str
    captions: tuple[str, ...]
    measures: Measures


@dataclass(frozen=True)
class Concern:
    """Images of which something is to be known; a group belongs together, most hold one image."""

    kind: str
    advice: str
    groups: list[tuple[Seen, ...]]


@dataclass
class Audit:
    """All that was found. `refusal`: why the folder cannot be read at all; nothing is measured then."""

    path: Path
    args: AuditArgs
    refusal: str | None = None
    findings: Findings = field(default_factory=Findings)  # train and validation: what a run itself would say
    test_findings: Findings = field(default_factory=Findings)
    seen: list[Seen] = field(default_factory=list)
    concerns: list[Concern] = field(default_factory=list)  # worst first
    lengths: list[int] = field(default_factory=list)  # of every caption, in `length_unit`
    length_unit: str = "words"
    words: Counter = field(default_factory=Counter)  # in how many captions each stands

    @property
    def accepted(self):
        """Whether a training run with its defaults would take the folder as it stands."""
        return not self.refusal and not self.findings.faults and any(one.split == "train" for one in self.seen)

    def shown(self, seen):
        """An image's name for people."""
        return str(seen.image.relative_to(self.path) if self.path in seen.image.parents else seen.image)


def examine(args: AuditArgs):
    """The Audit of a folder. Raises DatasetError where it is no image folder, or the tokenizer is not there."""
    audit = Audit(Path(args.path), args)
    tokenizer = _tokenizer(args.tokenizer)
    training = args.training()
    try:
        checked = read_checked(training, tokenizer, seed=0)
    except DatasetError as problem:
        audit.refusal = str(problem)
        return audit
    if checked.images is not None:
        raise DatasetError(f"{args.path} was written by `datasets`: convert it to an image folder first")
    audit.findings = checked.findings
    test = _test_rows(training, audit.test_findings)
    for split, rows, findings in (
        ("train", checked.rows, audit.findings),
        ("validation", checked.held_out, audit.findings),
        ("test", test, audit.test_findings),
    ):
        audit.seen += _look(split, rows or [], findings, args.workers)
    copies = _exact_copies(audit.seen)
    near = _near_copies(audit.seen, args.near_bits)
    audit.concerns = _concerns_of_images(audit.seen, copies, near, args)
    if args.caption_column != "none":
        _measure_captions(audit, tokenizer)
    audit.concerns = [concern for concern in audit.concerns if concern.groups]
    return audit


def measure(image):
    """The Measures of a PIL RGB image. All but its size and digest are taken from it at 512 pixels or fewer."""
    factor = min(1, REDUCED / max(image.size))
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
    grey = small.convert("L")
    levels = np.array(grey.histogram()) / (grey.width * grey.height)
    waves = dctn(np.asarray(grey.resize((32, 32), Image.Resampling.BOX), dtype=np.float32))[:8, :8]
    return Measures(
        width=image.width,
        height=image.height,
        digest=xxhash.xxh3_128_digest(f"{image.size}".encode() + image.tobytes()),
        bits=_bits(waves),
        mirrored=_bits(waves * np.where(np.arange(8) % 2, -1, 1)),  # a mirrored cosine of odd order changes its sign
        colours=small.resize((8, 8), Image.Resampling.BOX).tobytes(),
        sharpness=_sharpness(small),
        dark=levels[:DARK].sum(),
        light=levels[LIGHT + 1 :].sum(),
        spread=max(ImageStat.Stat(small).stddev),
    )


def tidy(text):
    """A caption in NFC, without control characters and doubled spaces, its encoding mended ("cafÃ©" -> "café")."""
    text = unicodedata.normalize("NFC", mended_encoding(text).replace("\ufeff", ""))
    text = " ".join(text.split())
    # Two invisible characters have a meaning of their own in Persian, in Indic scripts and in emoji.
    return "".join(c for c in text if c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")).strip()


def mended_encoding(text):
    """UTF-8 that was once read as Windows' encoding, read right; any other text as it is."""
    return re.sub(r"[^\x00-\x7f]+", _read_as_utf8, text)


def _read_as_utf8(match):
    try:
        return match[0].encode("cp1252").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return match[0]


def histograms(audit):
    """[(title, [(label, count), ...]), ...] of sizes, shapes, caption lengths and words; empty bins are left out."""
    sides, shapes = Counter(), Counter()
    for one in audit.seen:
        width, height = one.measures.width, one.measures.height
        sides[np.searchsorted(SIDES, min(width, height), side="right")] += 1
        shapes[min(ASPECTS, key=lambda a: abs(math.log(width / height) - math.log(a[0] / a[1])))] += 1
    labels = [f"below {SIDES[0]}", *(f"from {side}" for side in SIDES)]
    found = [
        ("shorter side, pixels", [(labels[i], sides[i]) for i in range(len(labels)) if sides[i]]),
        ("width : height, nearest", [(f"{w}:{h}", shapes[w, h]) for w, h in ASPECTS if shapes[w, h]]),
    ]
    if buckets := _buckets(audit):
        found.append((f"bucket of --aspect_buckets at {audit.args.resolution}, height x width", buckets))
    if audit.lengths:
        step = max(1, math.ceil((max(audit.lengths) + 1) / 12))
        bins = Counter(length // step for length in audit.lengths)
        named = [(f"{i * step}-{(i + 1) * step - 1}" if step > 1 else str(i), bins[i]) for i in sorted(bins)]
        found.append((f"caption length, {audit.length_unit}", named))
        found.append(("words in most captions", audit.words.most_common(15)))
    return found


def _buckets(audit):
    """[(bucket, count), ...], the fullest first; none where --resolution makes no buckets."""
    training = audit.args.training()
    if training.size[0] != training.size[1] or not bucket_sizes(training):
        return []
    fitting = cache(lambda size: bucket_of(training, size))
    counts = Counter(fitting((one.measures.height, one.measures.width)) for one in audit.seen).most_common()
    return [("x".join(map(str, size)) if size else "too small", count) for size, count in counts]


def _tokenizer(name):
    if name is None:
        return _Words()
    from transformers import CLIPTokenizer

    inside = (Path(name) / "tokenizer").is_dir() or (not Path(name).is_dir() and not Path(name).is_absolute())
    for subfolder in ("tokenizer", "") if inside else ("",):
        try:
            return CLIPTokenizer.from_pretrained(name, subfolder=subfolder)
        except (OSError, ValueError, TypeError) as error:
            reason = error
    raise DatasetError(f"--tokenizer {name} cannot be loaded: {reason}") from reason


class _Words:
    """Stands where no tokenizer is given: a caption's length is its words, and none is cut."""

    model_max_length = math.inf

    def __call__(self, texts, verbose=False):
        return SimpleNamespace(input_ids=[text.split() for text in texts])


def _test_rows(training, findings):
    """The rows of the test split, which no training run reads."""
    columns = (training.image_column, training.caption_column, training.allow_outside_paths, findings)
    try:
        return read_folder(training.train_data_dir, "test", *columns)
    except DatasetError as problem:
        findings.faults["splits that cannot be read"].append(str(problem))
        return None


def _look(split, rows, findings, workers):
    """The Seen of every image that the rows name; those that do not decode go into the findings."""
    of_image = defaultdict(list)
    for row in rows:
        of_image[row.image].append(row)

    def look(image):
        try:
            return measure(open_rgb(image))
        except (UnreadableImage, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        results = list(
            tqdm(pool.map(look, of_image), total=len(of_image), desc=f"measuring {split}", leave=False, delay=2)
        )
    found = []
    for (image, own), result in zip(of_image.items(), results, strict=True):
        if isinstance(result, str):
            findings.faults["images that cannot be read"] += [f"{row.origin} ({result})" for row in own]
        else:
            captions = tuple(dict.fromkeys(text for row in own for text in row.captions))
            found.append(Seen(split, image, own[0].origin, captions, result))
    return found


def _bits(waves):
    """64 bits: which of the [8, 8] lowest waves of an image are above their median."""
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big")


def _sharpness(image):
    """Variance of the Laplacian of the sharpest colour channel: edges may be of colour alone."""
    if min(image.size) < 3:
        return math.inf
    level = np.asarray(image, dtype=np.float32)
    around = level[:-2, 1:-1] + level[2:, 1:-1] + level[1:-1, :-2] + level[1:-1, 2:]
    return float((around - 4 * level[1:-1, 1:-1]).var((0, 1)).max())


def _exact_copies(seen):
    """Tuples of two and more images with the same pixels."""
    groups = defaultdict(list)
    for one in seen:
        groups[one.measures.digest].append(one)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _near_copies(seen, most_bits):
    """Tuples of images that look alike but differ; of exact copies in a split only one stands in them."""
    members = defaultdict(dict)
    for one in seen:
        if _looks_empty(one.measures) is None:  # the hash of a plain area is noise
            members[one.measures.digest].setdefault(one.split, one)
    groups = list(members.values())
    measured = [next(iter(group.values())).measures for group in groups]
    pairs = list(near_pairs(measured, most_bits))
    if not pairs:
        return []
    first, second = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(len(groups), len(groups)))
    together = defaultdict(list)
    for index, label in enumerate(connected_components(graph, directed=False)[1]):
        together[label].append(index)
    alike = (group for group in together.values() if len(group) > 1)
    return [tuple(one for index in group for one in groups[index].values()) for group in alike]


def near_pairs(measured, most_bits, block=256):
    """Yield index arrays [2, pairs] of Measures that look alike, as they are or one of them mirrored.

    The perceptual hashes differ in at most `most_bits` bits, and the 8 x 8 colours correlate by ALIKE or more.
    """
    bits = np.array([one.bits for one in measured], dtype=np.uint64)
    mirrored = np.array([one.mirrored for one in measured], dtype=np.uint64)
    colours = np.frombuffer(b"".join(one.colours for one in measured), dtype=np.uint8).reshape(-1, 8, 8, 3)
    for start in range(0, len(bits), block):
        rows = slice(start, start + block)
        own = _centred(colours[rows])
        for others, turned in ((bits, 1), (mirrored, -1)):
            close = np.bitwise_count(bits[rows, None] ^ others[None, start:]) <= most_bits
            columns = np.flatnonzero(close.any(0))
            alike = own @ _centred(colours[start + columns][:, :, ::turned]).T >= ALIKE
            i, j = np.nonzero(close[:, columns] & alike)
            i, j = start + i, start + columns[j]
            yield np.stack([i, j])[:, i < j]


def _centred(colours):
    """[n, 192] of zero mean and length 1, so that neither brightness nor contrast counts."""
    flat = colours.reshape(len(colours), 8 * 8 * 3).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _looks_empty(measures):
    if measures.dark >= COVERED:
        return "black"
    if measures.light >= COVERED:
        return "white"
    return "flat" if measures.spread < FLAT else None


def is_tiny(measures, args):
    """Whether the image has to be enlarged by more than --max_enlargement."""
    height, width = args.training().size
    return max(height / measures.height, width / measures.width) > args.max_enlargement


def _concerns_of_images(seen, copies, near, args):
    leaks = lambda groups: [group for group in groups if len({one.split for one in group}) > 1]
    within = lambda groups: [group for group in groups if max(Counter(one.split for one in group).values()) > 1]
    empty = defaultdict(list)
    for one in seen:
        kind = _looks_empty(one.measures)
        blurred = kind is None and one.measures.sharpness < args.blur_below
        empty["blurred" if blurred else kind].append((one,))
    covered = f"{COVERED:.0%} of the image"
    return [
        Concern(SAME_LEAK, "what is learned is also what is measured: --fix takes them from train", leaks(copies)),
        Concern(NEAR_LEAK, "resized, brighter or mirrored, they measure memory: --fix takes them from train",
                leaks(near)),
        Concern(SAME_TWICE, "they count double: --fix keeps the first", within(copies)),
        Concern("near copies within a split", "look at them, and keep the best one of each", within(near)),
        Concern("tiny images", f"more than {args.max_enlargement:g} x enlarged to fill {args.resolution}: "
                "--fix leaves them out", [(one,) for one in seen if is_tiny(one.measures, args)]),
        Concern("near-black images", f"{covered} is darker than {DARK} of 255", empty["black"]),
        Concern("near-white images", f"{covered} is lighter than {LIGHT} of 255", empty["white"]),
        Concern("flat images", f"no colour channel varies by {FLAT:g} of 255 (standard deviation)", empty["flat"]),
        Concern("blurred images", f"sharpness below {args.blur_below:g} (--blur_below)",
                sorted(empty["blurred"], key=lambda group: group[0].measures.sharpness)),
    ]  # fmt: skip


def _measure_captions(audit, tokenizer):
    """Fill lengths and words, and add what is odd about captions to the concerns."""
    found, of_text = defaultdict(list), defaultdict(list)
    limit = tokenizer.model_max_length
    for start in range(0, len(audit.seen), 1024):
        pairs = [(one, text) for one in audit.seen[start : start + 1024] for text in one.captions]
        lengths = [len(ids) for ids in tokenizer([text for _, text in pairs], verbose=False).input_ids] if pairs else []
        for (one, text), length in zip(pairs, lengths, strict=True):
            audit.lengths.append(length)
            audit.words.update({word for word in re.findall(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", text.casefold())}
                               - COMMON_WORDS)  # fmt: skip
            of_text[text.casefold()].append(one)
            for kind in _oddities(text, length > limit):
                if not found[kind] or found[kind][-1] != (one,):
                    found[kind].append((one,))
    audit.length_unit = "words (no --tokenizer given)" if math.isinf(limit) else f"tokens, cut at {limit}"
    repeated = sorted((tuple(ones) for ones in of_text.values() if len(ones) > 1), key=len, reverse=True)
    audit.concerns += [
        Concern(f"captions longer than {limit} tokens", "the end is not read: shorten them", found["cut"]),
        Concern("captions of a wrong encoding", "the file was not read as UTF-8 once: --fix mends what it can",
                found["encoding"]),
        Concern("captions with invisible or unusual characters", "control characters, doubled spaces, letters that "
                "are not in NFC: --fix writes them plainly", found["untidy"]),
        Concern("captions in other alphabets", "Stable Diffusion's text encoder learned English", found["alphabet"]),
        Concern("captions that stand with several images", "they tell those images not apart", repeated),
    ]  # fmt: skip


def _oddities(text, is_cut):
    mended = mended_encoding(text)
    if is_cut:
        yield "cut"
    if mended != text or "\ufffd" in text:
        yield "encoding"
    elif tidy(text) != text:
        yield "untidy"
    if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in mended if c > "\x7f"):
        yield "alphabet"


def report(audit, shown=3, bar=28):
    """The audit as text: the verdict, then what is wrong, worst first, then what the dataset is like."""
    verdict = "training would accept it" if audit.accepted else "training would REFUSE it"
    lines = [f"{audit.path}: {verdict}"]
    if audit.refusal:
        return printable("\n".join([*lines, f"  x {audit.refusal}"]))
    for title, findings in (("a training run says", audit.findings), ("the test split", audit.test_findings)):
        if text := findings.report():
            lines += ["", f"{title} (x: refused, -: noted)" if findings.faults else title, text]
    if audit.concerns:
        lines += ["", "worth a look"]
    for concern in audit.concerns:
        lines.append(f"  {len(concern.groups):>6} {concern.kind}: {concern.advice}")
        for group in concern.groups[:shown]:
            names = [audit.shown(one) for one in dict.fromkeys(group)]
            lines.append(f"           {' = '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else ""))
    lines += ["", "  split       images  captions   shorter side: least  median    most"]
    for split in SPLIT_NAMES:
        own = [one for one in audit.seen if one.split == split]
        sides = [min(one.measures.width, one.measures.height) for one in own] or [0]
        captions = sum(map(len, (one.captions for one in own)))
        lines.append(
            f"  {split:<11}{len(own):>9}{captions:>10}{min(sides):>22}{int(np.median(sides)):>8}{max(sides):>8}"
        )
    for title, counts in histograms(audit):
        most = max((count for _, count in counts), default=1)
        lines += ["", f"  {title}"]
        lines += [f"    {label:<14}{count:>7}  {'#' * max(1, round(bar * count / most))}" for label, count in counts]
    return printable("\n".join(lines))


def printable(text):
    """Text that any terminal and file takes: file names may hold bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
