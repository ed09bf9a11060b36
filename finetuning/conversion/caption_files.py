"""`prepare_dataset.py captions`: the same images under rewritten captions, in all splits alike.

The changes are made in this order, whatever the order of the flags: drop, replace, template, keyword, prefix, suffix.
"""

import re
from dataclasses import dataclass, replace

from finetuning.cli import flag
from finetuning.conversion import copying
from finetuning.conversion.copying import CopyArgs
from finetuning.data.captions import with_prefix
from finetuning.data.findings import Findings
from finetuning.data.rows import Rows


@dataclass
class RewriteArgs(CopyArgs):
    """Captions"""

    output: str | None = flag(None, "folder of the new dataset; it appears when all of it is written")
    drop: list[str] | None = flag(None, "words or phrases to take out, in any case, as whole words: arafed")
    drop_regex: list[str] | None = flag(None, "regular expressions; what they match is taken out")
    replace: list[str] | None = flag(None, "pairs OLD NEW [OLD NEW ...]: OLD in any case, as whole words, becomes NEW")
    template: str | None = flag(None, 'a text with {caption} in it, as "a photo of {caption}"')
    keyword: list[str] | None = flag(None, "put in front, with a comma, of every caption that does not say it yet")
    prefix: str | None = flag(None, "put before every caption, with a space")
    suffix: str | None = flag(None, "put after every caption, with a space unless it begins with a punctuation mark")
    first: bool = flag(False, "keep only the first caption of a row that lists several")
    only: str | None = flag(None, "rewrite only captions in which this regular expression is found")
    dry_run: bool = flag(False, "say what would change and write nothing")

    def problems(self):
        if not self.output and not self.dry_run:
            yield "--output is required: folder of the new dataset (or look first with --dry_run)"
        if self.caption_column == "none":
            yield "--caption_column none leaves no captions to rewrite"
        changes = (self.drop, self.drop_regex, self.replace, self.template, self.keyword, self.prefix, self.suffix)
        if not any(changes) and not self.first:
            yield "say what to do: --drop, --drop_regex, --replace, --template, --keyword, --prefix, --suffix, --first"
        if len(self.replace or []) % 2:
            yield f"--replace takes pairs OLD NEW; {self.replace[-1]!r} has no second half"
        if self.template is not None and "{caption}" not in self.template:
            yield f"--template {self.template!r} has no {{caption}}, so that every caption would be the same"
        for name, pattern in [("drop_regex", one) for one in self.drop_regex or []] + [("only", self.only or "")]:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"--{name} {pattern!r} is not a regular expression: {error}"
        for name in ("drop", "replace", "keyword"):
            words = getattr(self, name) or []
            if not all(word.strip() for word in (words[::2] if name == "replace" else words)):
                yield f"--{name} has an empty word"


def rewrite(args: RewriteArgs, say=print):
    """Write the copy unless --dry_run, say what changed with three examples; returns how many captions changed."""
    findings, changes = Findings(), []
    splits = {
        split: Rows.of(_rewritten_rows(rows, args, changes, findings))
        for split, rows in copying.read_splits(args, findings).items()
    }
    copying.accept(splits, args, findings, say)
    if not args.dry_run:
        with copying.new_folder(args.output) as folder:
            names = {split: copying.new_names(rows, split, args) for split, rows in splits.items()}
            copying.fill(folder, splits, names, args)
    verb = "would change" if args.dry_run else "changed"
    changed = [pair for pair in changes if pair[0] != pair[1]]
    say(f"{args.output or args.path}: {len(changed)} of {len(changes)} captions {verb}")
    for before, after in changed[:3]:
        say(f"  - {before}\n  + {after or '(nothing is left of it)'}")
    return len(changed)


def rewritten(caption, args: RewriteArgs):
    """The caption with every change that the flags ask for; "" where nothing is left of it."""
    if args.only and not re.search(args.only, caption):
        return caption
    text = caption
    for pattern in [*map(_phrase, args.drop or []), *map(re.compile, args.drop_regex or [])]:
        text = pattern.sub("", text)
    pairs = args.replace or []
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        text = _phrase(old).sub(lambda _, new=new: new, text)  # a function, so that a backslash in NEW stays one
    text = _without_gaps(text) if text != caption else text
    if not text:
        return ""
    if args.template:
        text = args.template.replace("{caption}", text)
    missing = [word for word in args.keyword or [] if not _phrase(word).search(text)]
    text = with_prefix(", ".join([*missing, text]), args.prefix or "")
    if args.suffix:
        suffix = args.suffix.strip()
        text = text.rstrip() + ("" if suffix.startswith(tuple(",.;:!?")) else " ") + suffix
    return text.strip()


def _rewritten_rows(rows, args, changes, findings):
    """The rows with their new captions, where any is left; "" for each that goes. (before, after) go into `changes`."""
    for row in rows:
        before = row.captions[:1] if args.first else row.captions
        others = row.captions[len(before) :]
        if others:
            findings.warn("first_caption_kept", row.origin)
        after = [rewritten(caption, args) for caption in before]
        changes += zip(before, after, strict=True)
        if not any(after):
            findings.error("nothing_left", row.origin)
            continue
        if not all(after):
            findings.warn("caption_lost", row.origin)
        yield replace(row, captions=(*after, *("" for _ in others)))


def _phrase(text):
    """Whole words in any case; any gap between them."""
    words = r"\s+".join(map(re.escape, text.split()))
    start, end = (r"(?<!\w)" if text.strip()[0].isalnum() else ""), (r"(?!\w)" if text.strip()[-1].isalnum() else "")
    return re.compile(start + words + end, re.IGNORECASE)


def _without_gaps(text):
    """What is left when words are taken out: no double spaces, no commas in a row, at the start or at the end."""
    text = re.sub(r"\s+(?=[,.;:!?])", "", text)
    text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" ,;")
