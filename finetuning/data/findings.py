"""Everything that can be found wrong or odd in a dataset: a code and fields while it is found, sentences at the end.

    findings = Findings()
    findings.error("unreadable_image", "metadata.jsonl line 7", "image file is truncated")
    print(findings.report())

Code asks for codes (`"unreadable_image" in findings.errors`); people read what PROBLEMS says of them.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from finetuning.cli import UserError

PROBLEMS = {  # code: (what the examples are, what helps or happens, "" where that goes without saying)
    # Images
    "unreadable_image": ("images that cannot be read", ""),
    "animated": ("animated images", "the first frame is used"),
    "cmyk_without_profile": ("CMYK images without a colour profile", "their colours are a guess"),
    "unreadable_exif": ("images whose EXIF cannot be read", "it is ignored"),
    "image_too_small": ("images too small for any bucket, height x width", "raise --max_upscale or lower --min_side"),
    "buckets": ("buckets, height x width: rows", ""),
    "smaller_bucket": ("images too small for a bucket of --resolution, height x width", "a smaller one is used"),
    "enlarged": ("images enlarged to cover their bucket, by at most {most}", ""),
    "cropped": ("images cropped to their bucket, by {mean} on average and at most {most} of the area", ""),
    # Folders, links
    "dead_link": ("links that lead nowhere, and special files", ""),
    "link_outside": ("links that lead out of the folder", "--allow_outside_paths follows them"),
    "unreadable_folder": ("folders that cannot be read", ""),
    "unreadable_split": ("splits that cannot be read", ""),
    "beside_splits": ("images beside the folders of splits", "move them into one"),
    "beside_train": ("images beside {train}/", "only what is inside is trained on"),
    "unknown_split": ("splits whose names say neither train, validation nor test", "rename them"),
    # Rows of metadata
    "not_json": ("metadata lines that are not JSON objects", ""),
    "too_many_fields": ("metadata rows with more fields than columns", "a caption with a comma needs quotes"),
    "no_image_named": ("rows that name no image", ""),
    "image_missing": ("rows whose image is not there", ""),
    "outside": ("rows that reach outside the dataset's folder", "--allow_outside_paths permits it"),
    "not_an_image": ("rows that name a file that is not an image", ""),
    "hidden": ("rows whose image is hidden or outside the splits' folders", ""),
    "ambiguous_name": ("absolute file names that fit several images of this folder", "use relative names"),
    "moved": ("absolute file names of another machine", "read as the image of that name in this folder"),
    "unnamed_image": ("images that no metadata row names", ""),
    "named_twice": ("images named by more than one row", "all rows are kept"),
    # Captions
    "no_caption": ("rows with an empty caption", ""),
    "half_character": ("captions that are not valid text", "half a character"),
    "cut_caption": ("captions longer than {limit} tokens", "the end is not read"),
    "uncounted_captions": ("caption lengths are not counted", ""),
    "says_a_side": ("captions that say left or right, not mirrored", "--flip_captions swap mirrors both"),
    "several_lines": ("caption files with several lines", "each is a caption; or --caption_lines first or join"),
    "max_train_samples": ("--max_train_samples above the number of rows", "all are used"),
    # Caption files beside images
    "no_caption_file": ("images without a caption file, or with an empty one", ""),
    "caption_file_alone": ("caption files without an image", ""),
    "caption_not_utf8": ("captions that are not UTF-8", "save them again as UTF-8"),
    "unreadable_caption_file": ("caption files that cannot be read", ""),
    "shared_caption_file": ("images of one name in different formats, which share a caption file", ""),
    "second_caption_file": ("second caption files of an image, which are not read", ""),
    "repeats": ("folders that kohya repeats N times an epoch", "here every image counts once"),
    # Tars, Parquet files
    "tar_link": ("links and special files in a tar", "pack the files themselves"),
    "compressed_tar": ("compressed tars", "unpack with gunzip: in a plain tar every file has its place"),
    "damaged_tar": ("damaged tars", "what stands before the damage is taken"),
    "damaged_parquet": ("damaged Parquet files", "what stands before the damage is taken"),
    "shard_without_split": ("shards whose name says no split", "divided by content"),
    "no_ending": ("files that belong to no sample", "they have no ending"),
    "twice_in_shard": ("files that stand twice in a shard", "the first is taken"),
    "sample_without_image": ("samples without an image", ""),
    "several_images": ("samples with several images", "say which with --image_field"),
    "sample_without_caption": ("samples without a caption", "--caption_field"),
    "no_json_text": ("JSON files that have no text under {key!r}", "--json_key"),
    # Sources of conversions
    "image_not_here": ("rows whose image is not there", "--images DIR says where to look, --download fetches"),
    "not_fetched": ("images that could not be fetched", "the same command tries again"),
    "no_address": ("rows without an address", ""),
    "address_twice": ("addresses of more than one row", "one image, all its captions"),
    "ambiguous_address": ("images whose name fits several addresses", "--download fetches each by a name of its own"),
    "lines_not_utf8": ("lines that are not UTF-8", ""),
    "not_fetched_before": ("images that img2dataset could not fetch", ""),
    "no_photo_id": ("rows without a usable photo_id", ""),
    "listed_twice": ("photos listed again", "the first row counts"),
    "no_text": ("photos without {wanted}", "add another to --caption_from, the last may be none"),
    "bad_record": ("records without an id, or with a file_name outside the folder", ""),
    "shared_file_name": ("records whose file_name belongs to an earlier one", ""),
    "wrong_fields": ("rows with more or fewer fields than columns", ""),
    "in_no_list": ("images in neither list", "--no-use_lists splits by content"),
    "in_both_lists": ("images in both lists", ""),
    "listed_not_there": ("listed images that are not there", ""),
    "there_twice": ("files that are there twice", "unpacked ones come before tars"),
    "no_annotation": ("images without an annotation", "needed for --crop_to_dogs"),
    "bad_annotation": ("annotations that cannot be read", ""),
    "several_dogs": ("images of several dogs", "cut to the box around all of them"),
    "empty_box": ("boxes with nothing of the image in them", ""),
    "outside_subjects": ("images outside a subject's folder", "make a folder for each subject"),
    "equal_captions": ("subjects of equal captions, which blend", "--subject, or {{subject}} in the prompt"),
    # Changed copies
    "first_caption_kept": ("rows of which only the first caption is kept", ""),
    "nothing_left": ("rows of whose captions nothing is left", ""),
    "caption_lost": ("rows that lose a caption of which nothing is left", ""),
    "not_mirrored": ("images that are not mirrored: a caption says left or right", "--flip_captions swap does"),
    "copy_left_out": ("copies that would show an image of validation or test, or just the original", "left out"),
    # Captioning
    "name_not_utf8": ("images whose name is not UTF-8", "rename them"),
    "other_metadata": ("metadata files of another kind than .jsonl", "{advice}"),
    "absolute_name": ("rows with an absolute file name", "{advice}"),
    "not_text": ("rows whose {column!r} is no text", "name another key with --caption_column"),
    "foreign_row": ("metadata rows that name no image of this folder", "kept as they are"),
    "caption_file_beside": ("images with a caption file beside them", "{advice} gathers them, --overwrite passes over"),
    "no_first_caption": ("images without a caption to begin with", ""),
    "silent_model": ("images that the model says nothing about", "try another --prompt"),
    "perhaps_cut": ("captions as long as --max_length allows, so perhaps cut short", ""),
    # Images of an evaluation
    "first_caption_used": ("rows with several captions", "the first is used"),
    "fits_two_rows": ("names that are the numbers of some rows and the names of other rows' images", ""),
    "doubtful_order": ("names that come in another order as numbers than as text", "pad the numbers with zeros"),
    "image_without_row": ("images without a row", ""),
    "row_without_image": ("rows without an image", ""),
}  # fmt: skip


class DatasetError(UserError):
    """A dataset that cannot be read as it stands; the message says what to do."""


@dataclass(frozen=True)
class Finding:
    """One example of a problem: where it stands, why, and what else its sentence says."""

    where: str
    reason: str = ""
    fields: tuple = ()  # of (name, value), for the {name} in the text of its code

    def __str__(self):
        return f"{self.where} ({self.reason})" if self.reason else self.where


@dataclass
class Findings:
    """What is wrong (`errors`: the run stops, or skips it) and what is worth knowing (`warnings`): {code: findings}."""

    errors: dict = field(default_factory=lambda: defaultdict(list))
    warnings: dict = field(default_factory=lambda: defaultdict(list))

    def error(self, code, where, reason="", **fields):
        """One more example of an error."""
        self.errors[code].append(Finding(str(where), str(reason), tuple(fields.items())))

    def warn(self, code, where, reason="", **fields):
        """One more example of something that is worth knowing."""
        self.warnings[code].append(Finding(str(where), str(reason), tuple(fields.items())))

    def take(self, others, place):
        """Add other findings, which are in `place`."""
        for own, found in ((self.errors, others.errors), (self.warnings, others.warnings)):
            for code, examples in found.items():
                own[code] += [replace(one, where=f"{place}: {one.where}") for one in examples]

    def count(self):
        """How many errors there are."""
        return sum(map(len, self.errors.values()))

    def kinds(self):
        """Yield (level, code, sentence, advice, examples) of each kind, the errors first."""
        for level, found in (("error", self.errors), ("warning", self.warnings)):
            for code, examples in found.items():
                if examples:
                    fields = dict(examples[0].fields)
                    texts = [text.format(**fields) for text in PROBLEMS[code]] if code in PROBLEMS else [code, ""]
                    yield level, code, *texts, examples

    def report(self, shown=5):
        """Text: a line for each kind, the errors first."""
        lines = []
        for level, _, sentence, advice, examples in self.kinds():
            more = f"; and {len(examples) - shown} more" if len(examples) > shown else ""
            end = f"; {advice}" if advice else ""
            lines.append(f"  {level}: {sentence} ({len(examples)}): {'; '.join(map(str, examples[:shown]))}{more}{end}")
        return "\n".join(lines)

    def as_dict(self):
        """For JSON: {"errors": {code: ["where (reason)", ...]}, "warnings": {...}}."""
        texts = lambda found: {code: [*map(str, examples)] for code, examples in found.items() if examples}
        return {"errors": texts(self.errors), "warnings": texts(self.warnings)}

    def refuse(self, source, on_bad_rows="error", say=print, fix="correct them, or leave those rows out with"):
        """Say what was found. Raises DatasetError where there are errors and --on_bad_rows is error."""
        report = self.report()
        if self.count() and on_bad_rows == "error":
            raise DatasetError(f"{source} has {counted(self.count(), 'error')}:\n{report}\n  {fix} --on_bad_rows skip")
        if report:
            left_out = f", {self.count()} left out" if self.count() else ""
            say(f"{source}{left_out}:\n{report}")


def counted(number, noun):
    """ "1 row", "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
