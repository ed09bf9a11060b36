"""Where the tensors of a safetensors file lie, read from its header alone."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetuning.families.model_args import ModelError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library reads
PICKLE = (
    "it is not a .safetensors file. A .ckpt, .pt, .pth or .bin is a pickle, which can run code when it is loaded. Look "
    "for its .safetensors, or convert it where nothing can be harmed: torch.load(path, weights_only=True), then "
    "safetensors.torch.save_file"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: where its bytes lie. Nothing is read until it is asked for.

    `start` is the offset of its first byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize

    def viewed(self, shape):
        """The same bytes in another shape of as many elements. Raises ValueError."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"{list(self.shape)} cannot be seen as {list(shape)}: {self.path}")
        return replace(self, shape=tuple(shape))

    def rows(self, first, last):
        """Rows first to last - 1 of dimension 0. Raises ValueError."""
        if not self.shape or not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"{list(self.shape)} has no rows {first} to {last}: {self.path}")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(last - first, *self.shape[1:]), start=self.start + first * row_bytes)

    def read(self):
        """The tensor, in its own dtype and shape. Raises ModelError where the file has become shorter."""
        content = torch.empty(self.nbytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            view, done = memoryview(content.numpy()), 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise cut(self.path)
                done += count
        return content.view(self.dtype).reshape(self.shape)


def stored_tensors(path):
    """({key: Stored}, metadata) of a .safetensors file. Raises ModelError: broken, cut, or something else."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: {PICKLE}")
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise _broken(path, "its header is cut, or it is not a safetensors file at all")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise error if isinstance(error, ModelError) else _broken(path, "its header is not JSON") from error
    try:
        metadata = header.pop("__metadata__", None) or {}
        tensors = {key: _stored(path, key, entry, 8 + length) for key, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, ModelError) else _broken(path, f"its header is wrong ({error!r})") from error
    _check_places(path, tensors, 8 + length, size)
    return tensors, metadata


def cut(path):
    """What is wrong with a file that ends before its tensors do."""
    return _broken(path, "it ends before its last tensor")


def _broken(path, why):
    return ModelError(f"{path} is broken: {why}. Copy or download it again")


def _stored(path, key, entry, data):
    if entry["dtype"] not in DTYPES:
        raise ModelError(f"{path}: {key} is {entry['dtype']}, which is not read; what is: {', '.join(DTYPES)}")
    first, last = entry["data_offsets"]
    stored = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data + first)
    if any(type(side) is not int or side < 0 for side in (first, *stored.shape)) or last - first != stored.nbytes:
        raise _broken(path, f"{key} {entry['dtype']} {entry['shape']} cannot take bytes {first} to {last}")
    return stored


def _check_places(path, tensors, data, size):
    """Every byte after the header belongs to one tensor."""
    end = data
    for key, stored in sorted(tensors.items(), key=lambda one: (one[1].start, one[1].nbytes)):
        if stored.start != end:
            raise _broken(path, f"{key} overlaps another tensor, or bytes before it belong to none")
        end = stored.start + stored.nbytes
    if end > size:
        raise cut(path)
    if end < size:
        raise _broken(path, f"{size - end} bytes after its last tensor belong to none")
