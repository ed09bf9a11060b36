"""What a dataset is like before it is trained on: what a run would refuse, copies, leaks, bad images, odd captions."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

from tqdm.auto import tqdm

from finetuning.cli import REQUIRED, UserError, flag
from finetuning.conversion.caption_text import oddities
from finetuning.conversion.measures import (
    COVERED,
    DARK,
    FLAT,
    LIGHT,
    Measures,
    exact_copies,
    looks_empty,
    measure,
    near_copies,
)
from finetuning.data.buckets import BucketArgs
from finetuning.data.captions import CaptionArgs
from finetuning.data.checking import read_checked
from finetuning.data.findings import DatasetError, Findings, counted
from finetuning.data.folders import folder_problems
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.reading import read_folder
from finetuning.data.threads import in_order
from finetuning.data.training_set import DataArgs
from finetuning.files import overlap

COMMON_WORDS = {
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to", "with",
}  # fmt: skip
CONCERNS = {  # code: (what the images have in common, why it matters and what helps), worst first
    "same_leak": ("the same image in several splits", "they measure memory: --fix takes them from train"),
    "near_leak": ("near copies in several splits", "resized, brighter, mirrored: --fix takes them from train"),
    "same_twice": ("the same image more than once in a split", "they count double: --fix keeps the first"),
    "near_twice": ("near copies within a split", "look at them, and keep the best one of each"),
    "tiny": ("tiny images", "more than {max_enlargement:g} x enlarged to fill {resolution}: --fix leaves them out"),
    "black": ("near-black images", f"{COVERED:.0%} of the image is darker than {DARK} of 255"),
    "white": ("near-white images", f"{COVERED:.0%} of the image is lighter than {LIGHT} of 255"),
    "flat": ("flat images", f"no colour channel varies by {FLAT:g} of 255 (standard deviation)"),
    "blurred": ("blurred images", "sharpness below {blur_below:g} (--blur_below)"),
    "cut_caption": ("captions longer than {limit} tokens", "the end is not read: shorten them"),
    "wrong_encoding": ("captions of a wrong encoding", "once not read as UTF-8: --fix repairs what it can"),
    "untidy_caption": ("captions with invisible characters, doubled spaces, letters not in NFC", "--fix tidies them"),
    "other_alphabet": ("captions in other alphabets", "Stable Diffusion's text encoder learned English"),
    "repeated_caption": ("captions that stand with several images", "they cannot tell these images apart"),
}  # fmt: skip


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
    tokenizer: str | None = flag(None, "model or tokenizer that captions will be read with (none: words are counted)")
    resolution: str = flag("512", "side of the training images in pixels, or HEIGHTxWIDTH")
    max_enlargement: float = flag(2.0, "an image that must be enlarged more to fill --resolution is tiny", min=1)
    near_bits: int = flag(
        10, "copies may differ in so many of the 64 bits of their hash; different images do in about 32", min=0, max=24
    )
    blur_below: float = flag(20.0, "blurred: the variance of the Laplacian is less, at 512 pixels at most", min=0)
    workers: int | None = flag(None, "threads that decode (none: one for each core)", min=1)

    def training(self):
        """The flags of a training run on this folder."""
        shared = {one.name for one in fields(self)} & {one.name for one in fields(_TrainingArgs)}
        # only headers are checked: each image is decoded to its end below, where it is measured as well
        return _TrainingArgs(
            **{name: getattr(self, name) for name in shared}, train_data_dir=self.path, check_images="header"
        )

    def problems(self):
        if not Path(self.path).is_dir():
            yield from folder_problems("PATH", self.path)
            return
        yield from DataArgs.problems(self.training())
        if self.fix and overlap(self.fix, self.path):
            yield f"--fix {self.fix} and PATH lie one in the other: name a place outside it"
        if self.html and Path(self.path).resolve() in Path(self.html).resolve().parents:
            yield f"--html {self.html} lies in {self.path}, which is never changed: name a place outside it"
        if self.html and Path(self.html).is_dir():
            yield f"--html {self.html} is a folder: name a file"


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

    code: str
    title: str  # what they have in common
    advice: str  # why it matters, and what helps
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
        return not self.refusal and not self.findings.errors and any(one.split == "train" for one in self.seen)

    @property
    def flagged(self):
        """How many images some concern is about."""
        return len({(one.split, one.image) for concern in self.concerns for group in concern.groups for one in group})

    @property
    def verdict(self):
        """(level, sentence): "good", "doubtful" or "bad"."""
        if not self.accepted:
            return "bad", "training would REFUSE it"
        if self.flagged:
            worth = f"{self.flagged} of {counted(len(self.seen), 'image')}"
            return "doubtful", f"training would accept it; worth a look: {worth}"
        return "good", "training would accept it"

    def shown(self, seen):
        """An image's name for people."""
        return str(seen.image.relative_to(self.path) if self.path in seen.image.parents else seen.image)


def examine(args: AuditArgs):
    """The Audit of a folder. Raises DatasetError where it is no image folder, or the tokenizer is not there."""
    audit = Audit(Path(args.path), args)
    tokenizer = _tokenizer(args.tokenizer)
    training = args.training()
    try:
        checked = read_checked(training, [tokenizer], seed=0)
    except DatasetError as problem:
        audit.refusal = str(problem)
        return audit
    if checked.images is not None:
        raise DatasetError(f"{args.path} holds its images in tables: first `prepare_dataset.py convert hub`")
    audit.findings = checked.findings
    columns = (args.image_column, args.caption_column, args.allow_outside_paths, audit.test_findings)
    try:
        test = read_folder(args.path, "test", *columns)  # which no training run reads
    except DatasetError as problem:
        audit.test_findings.error("unreadable_split", problem)
        test = []
    for split, rows, findings in (
        ("train", checked.rows, audit.findings),
        ("validation", checked.held_out, audit.findings),
        ("test", test, audit.test_findings),
    ):
        audit.seen += _look(split, rows or [], findings, args.workers)
    found = _concerns_of_images(audit.seen, args)
    if args.caption_column != "none":
        found |= _measure_captions(audit, tokenizer)
    words = {name: getattr(args, name) for name in ("max_enlargement", "resolution", "blur_below")}
    words["limit"] = tokenizer.model_max_length
    audit.concerns = [
        Concern(code, *(text.format(**words) for text in texts), found[code])
        for code, texts in CONCERNS.items()
        if found.get(code)
    ]
    return audit


def _tokenizer(name):
    """The tokenizer in a folder, in a pipeline's folder, or of a Hub name. Raises DatasetError."""
    if name is None:
        return _Words()
    from transformers import CLIPTokenizer

    from finetuning.families.opening import open_source, open_tokenizer

    folder = Path(name)
    if folder.exists() or folder.is_absolute():
        try:
            if (folder / "model_index.json").is_file():
                return open_source(folder, only=(), kinds=("pipeline",), relatives=True).tokenizer()
            return open_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
        except UserError as error:
            raise DatasetError(f"--tokenizer {name} cannot be loaded: {error}") from error
    for subfolder in ("tokenizer", ""):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=subfolder)
            if len(tokenizer) > len(tokenizer.all_special_tokens):  # transformers returns an empty one for no files
                return tokenizer
            reason = "it has no vocabulary"
        except (OSError, ValueError, TypeError) as error:
            reason = error
    raise DatasetError(f"--tokenizer {name} cannot be loaded: {reason}")


class _Words:
    """Stands where no tokenizer is given: a caption's length is its words, and none is cut."""

    model_max_length = math.inf

    def __call__(self, texts, verbose=False):
        return SimpleNamespace(input_ids=[text.split() for text in texts])


def _look(split, rows, findings, workers):
    """The Seen of every image that the rows name; those that do not decode go into the findings."""
    of_image = defaultdict(list)
    for row in rows:
        of_image[row.image].append(row)

    found = []
    results = in_order(lambda image: measure(open_rgb(image)), of_image, workers, (UnreadableImage, OSError))
    for image, result in tqdm(results, f"measuring {split}", len(of_image), leave=False, delay=2):
        own = of_image[image]
        if isinstance(result, Exception):
            for row in own:
                findings.error("unreadable_image", row.origin, result)
        else:
            captions = tuple(dict.fromkeys(text for row in own for text in row.captions))
            found.append(Seen(split, image, own[0].origin, captions, result))
    return found


def is_tiny(measures, args):
    """Whether the image has to be enlarged by more than --max_enlargement."""
    height, width = args.training().size
    return max(height / measures.height, width / measures.width) > args.max_enlargement


def _concerns_of_images(seen, args):
    """{code: groups of Seen}."""
    copies, near = exact_copies(seen), near_copies(seen, args.near_bits)
    leaks = lambda groups: [group for group in groups if len({one.split for one in group}) > 1]
    within = lambda groups: [group for group in groups if max(Counter(one.split for one in group).values()) > 1]
    found = defaultdict(list)
    for one in seen:
        kind = looks_empty(one.measures)
        blurred = kind is None and one.measures.sharpness < args.blur_below
        if blurred or kind:
            found["blurred" if blurred else kind].append((one,))
    found["blurred"].sort(key=lambda group: group[0].measures.sharpness)
    tiny = [(one,) for one in seen if is_tiny(one.measures, args)]
    found |= {"same_leak": leaks(copies), "near_leak": leaks(near), "same_twice": within(copies)}
    return found | {"near_twice": within(near), "tiny": tiny}


def _measure_captions(audit, tokenizer):
    """Fill the audit's lengths and words; {code: groups of Seen}."""
    found, of_text = defaultdict(list), defaultdict(list)
    limit = tokenizer.model_max_length
    for start in range(0, len(audit.seen), 1024):
        pairs = [(one, text) for one in audit.seen[start : start + 1024] for text in one.captions]
        lengths = [len(ids) for ids in tokenizer([text for _, text in pairs], verbose=False).input_ids] if pairs else []
        for (one, text), length in zip(pairs, lengths, strict=True):
            audit.lengths.append(length)
            words = set(re.findall(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", text.casefold()))
            audit.words.update(sorted(words - COMMON_WORDS))  # sorted: words of one count in one order
            of_text[text.casefold()].append(one)
            for code in [*oddities(text), *(["cut_caption"] if length > limit else [])]:
                if not found[code] or found[code][-1] != (one,):
                    found[code].append((one,))
    audit.length_unit = "words (no --tokenizer given)" if math.isinf(limit) else f"tokens, cut at {limit}"
    repeated = sorted((tuple(ones) for ones in of_text.values() if len(ones) > 1), key=len, reverse=True)
    return found | {"repeated_caption": repeated}
