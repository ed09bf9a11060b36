"""WebDataset shards (see finetuning/data/tars.py): a shard, a folder of shards, or a pattern in quotes.

"laion/{00000..00012}.tar", "laion/*.tar". Where one of the shards has train in its name or folder, such names are the
splits.
"""

import os
from pathlib import Path

from finetuning.data.tars import find_shards, read_shard, split_of


def read(path, args, findings):
    """The samples of every shard, in the tars' order. Shards are apart: two may have the same keys."""
    shards = find_shards(path, args, findings)
    top = Path(os.path.commonpath([shard.parent for shard in shards] or [path]))
    splits = {shard: split_of(shard.relative_to(top)) for shard in shards}
    if "train" not in splits.values():
        splits = dict.fromkeys(shards)
    for shard in shards:
        if not splits[shard] and any(splits.values()):
            findings.warn("shard_without_split", shard)
        yield from read_shard(shard, args, findings, f"{shard.relative_to(top).with_suffix('')}/", splits[shard])
