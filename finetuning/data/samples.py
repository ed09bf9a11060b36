"""One image of a source with what is said of it, wherever its bytes are: in a file, a tar, a table; caption files."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from finetuning.cli import flag
from finetuning.data.images import MAX_PIXELS, UnreadableImage, open_rgb


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar: where its bytes are, so that nothing has to be unpacked."""

    archive: Path
    offset: int
    size: int

    def read_bytes(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Cell:
    """An image inside a Hugging Face dataset: its encoded bytes come from the memory-mapped table when asked for."""

    column: object  # a column of Image(decode=False): {"bytes": ..., "path": ...} for each row
    row: int
    folders: tuple[Path, ...]  # where a row that is only a path may lead; empty: anywhere on this machine

    def read_bytes(self):
        """Raises UnreadableImage where there is none, or where it is outside the folders."""
        value = self.column[self.row] or {}
        if value.get("bytes"):
            return value["bytes"]
        if not value.get("path"):
            raise UnreadableImage("the row has no image")
        path = Path(value["path"]).resolve()
        if self.folders and not any(folder in path.parents for folder in self.folders):
            permission = "--allow_outside_paths permits it for a file of this machine"
            raise UnreadableImage(f"{value['path']} is outside the dataset ({permission})")
        return path.read_bytes()


@dataclass(frozen=True)
class Sample:
    """One image of a source and what is said of it."""

    name: str  # unique in its split of the source, with the image's ending if known: "n02085620-Chihuahua/7.jpg"
    image: Path | Member | Cell  # all have read_bytes()
    captions: tuple[str, ...]
    origin: str  # where a person finds it, for messages
    split: str | None = None  # train, validation or test where the source says so; none: drawn from the content
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels: the part to keep
    is_prior = False  # as of a data.rows.Row; what is read as it comes has no --prior_data_dir

    @property
    def key(self):
        """Unique in the source; bytes, as a name may be no text."""
        return f"{self.split or ''}:{self.name}".encode("utf-8", "surrogatepass")

    def open(self, max_pixels=MAX_PIXELS):
        """The RGB image. Raises UnreadableImage."""
        if isinstance(self.image, Path):
            return open_rgb(self.image, max_pixels)
        try:
            image = Image.open(io.BytesIO(self.image.read_bytes()))
        except Exception as error:  # on broken files the decoders raise more than OSError
            raise UnreadableImage(f"{self.origin}: {error}") from error
        image.filename = self.origin  # so that an error while decoding names it
        return open_rgb(image, max_pixels)


@dataclass
class CaptionFileArgs:
    """Caption files"""

    caption_lines: str = flag(
        "all", "of a caption file with several lines: each is a caption, or only the first, or all are joined to one",
        choices=("all", "first", "join"),
    )  # fmt: skip


def caption_lines(content, which, where, findings):
    """The captions in a text file's bytes, as --caption_lines says. Raises UnicodeDecodeError."""
    # not splitlines(), which also splits at characters that may stand inside a caption, such as U+2028
    lines = tuple(line.strip() for line in content.decode("utf-8-sig").split("\n") if line.strip())
    if which == "all" and len(lines) > 1:
        findings.warn("several_lines", where)
    if which == "join":
        return (" ".join(lines),) if lines else ()
    return lines[:1] if which == "first" else lines
