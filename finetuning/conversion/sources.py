"""The table of sources."""

from finetuning.conversion import dreambooth, generated, hub, imagefolder, sbu, sidecar, stanford_dogs, unsplash
from finetuning.conversion.download import DownloadArgs
from finetuning.conversion.imagefolder import ColumnArgs
from finetuning.data import tars

# {name: (reader, (path, args, findings) -> Samples in an order that never changes; the groups of flags it knows)}
SOURCES = {
    "imagefolder": (imagefolder.read, (ColumnArgs,)),
    "sidecar": (sidecar.read, (sidecar.SidecarArgs,)),
    "parallel": (sidecar.read_parallel, (sidecar.ParallelArgs,)),
    "unsplash-lite": (unsplash.read, (DownloadArgs, unsplash.UnsplashArgs)),
    "sbu": (sbu.read, (DownloadArgs,)),
    "stanford-dogs": (stanford_dogs.read, (stanford_dogs.StanfordDogsArgs,)),
    "dreambooth": (dreambooth.read, (dreambooth.DreamBoothArgs,)),
    "webdataset": (tars.read_shards, (tars.WebDatasetArgs,)),
    "generated": (generated.read, ()),
    "hub": (hub.read, (hub.HubArgs, ColumnArgs)),
}
FLAGS = tuple(dict.fromkeys(group for _, groups in SOURCES.values() for group in groups))
