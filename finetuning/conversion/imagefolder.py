"""Any folder that training can read: metadata of all kinds, above or inside the splits, absolute names, links."""

from pathlib import Path

from finetuning.conversion.contract import Sample
from finetuning.data.reading import SPLIT_NAMES, read_folder


def read(path, args, findings):
    """The rows of every split; a folder without splits has its rows divided by content."""
    root = Path(path)
    has_splits = any((root / name).is_dir() for name in SPLIT_NAMES["train"])
    for split in SPLIT_NAMES if has_splits else ("train",):
        rows = read_folder(root, split, args.image_column, args.caption_column, args.allow_outside_paths, findings)
        for row in rows or []:
            inside = row.picture.relative_to(root) if root in row.picture.parents else Path(row.picture.name)
            parts = inside.parts[1:] if has_splits and len(inside.parts) > 1 else inside.parts
            yield Sample("/".join(parts), row.picture, row.captions, row.origin, split if has_splits else None)
