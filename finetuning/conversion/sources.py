"""The table of sources."""

from collections.abc import Callable
from dataclasses import dataclass

from finetuning.conversion import dreambooth, hub, imagefolder, sbu, sidecar, stanford_dogs, unsplash
from finetuning.conversion.download import DownloadArgs
from finetuning.conversion.imagefolder import ColumnArgs
from finetuning.data import tars


@dataclass(frozen=True)
class Source:
    """A reader, (path, args, findings) -> Samples in an order that never changes, and the groups of flags it knows."""

    read: Callable
    flags: tuple = ()


SOURCES = {
    "imagefolder": Source(imagefolder.read, (ColumnArgs,)),
    "sidecar": Source(sidecar.read, (sidecar.SidecarArgs,)),
    "parallel": Source(sidecar.read_parallel, (sidecar.ParallelArgs,)),
    "unsplash-lite": Source(unsplash.read, (DownloadArgs, unsplash.UnsplashArgs)),
    "sbu": Source(sbu.read, (DownloadArgs,)),
    "stanford-dogs": Source(stanford_dogs.read, (stanford_dogs.StanfordDogsArgs,)),
    "dreambooth": Source(dreambooth.read, (dreambooth.DreamBoothArgs,)),
    "webdataset": Source(tars.read_shards, (tars.WebDatasetArgs,)),
    "hub": Source(hub.read, (hub.HubArgs, ColumnArgs)),
}
FLAGS = tuple(dict.fromkeys(group for source in SOURCES.values() for group in source.flags))
