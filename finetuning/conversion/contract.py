"""What a reader of some source hands to the writer."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from finetuning.data.pictures import UnreadablePicture, open_rgb


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar: where its bytes are, so that nothing has to be unpacked."""

    archive: Path
    offset: int
    size: int

    def read(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Sample:
    """One picture of a source and what is said of it."""

    name: str  # unique in its split of the source, with the picture's ending: "n02085620-Chihuahua/7.jpg"
    picture: Path | Member
    captions: tuple[str, ...]
    origin: str  # where a person finds it, for messages
    split: str | None = None  # train, validation or test where the source says so; none: drawn from the content
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels: the part to keep

    @property
    def key(self):
        """Unique in the source."""
        return f"{self.split or ''}:{self.name}"

    def open(self):
        """The RGB picture. Raises UnreadablePicture."""
        if isinstance(self.picture, Path):
            return open_rgb(self.picture)
        try:
            return open_rgb(Image.open(io.BytesIO(self.picture.read())))
        except OSError as error:
            raise UnreadablePicture(f"{self.origin}: {error}") from error
