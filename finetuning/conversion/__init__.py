"""From the ways that people keep pictures and captions to one that training reads. A source is one file here."""

from finetuning.conversion import (
    dreambooth,
    hub,
    imagefolder,
    parallel,
    sbu,
    sidecar,
    stanford_dogs,
    unsplash,
    webdataset,
)

SOURCES = {
    "imagefolder": imagefolder.read,
    "sidecar": sidecar.read,
    "parallel": parallel.read,
    "unsplash-lite": unsplash.read,
    "sbu": sbu.read,
    "stanford-dogs": stanford_dogs.read,
    "dreambooth": dreambooth.read,
    "webdataset": webdataset.read,
    "hub": hub.read,
}
