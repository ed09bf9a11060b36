"""Tensors in .safetensors files, by reference: what the header says of them, read when they are asked for.

Whatever can be wrong with such a file is found here and becomes one line that names it.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetuning.cli import first_few
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
LFS_POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONVERT = (
    "{path} is a pickle, which can run any code when it is loaded: it is not read. This makes a safetensors file of "
    "it, loading nothing but tensors:\n"
    "    python -c \"import torch; from safetensors.torch import save_file; found = torch.load('{path}', 'cpu', "
    "weights_only=True); save_file({{key: value.clone().contiguous() for key, value in found.get('state_dict', found)"
    ".items() if torch.is_tensor(value)}}, '{target}')\"\n"
    'See "Pickled checkpoints" in docs/troubleshooting.md where torch refuses it'
)

# What bitsandbytes (4 and 8 bits), quanto, torchao, GPTQ and scaled fp8 store beside or instead of a weight.
QUANTISED_KEY = re.compile(
    r"\.(absmax|quant_map|nested_\w+|quant_state\..*|SCB|CB|weight_format|_data|_scale|input_scale|output_scale"
    r"|weight_scale\w*|scale_weight|qweight|qzeros|g_idx)$|^scaled_fp8$"
)
ADAPTER_KEY = re.compile(r"\.base_layer\.|\.lora_(A|B|magnitude_vector|embedding_[AB])\.|\.ia3_l\.|\.hada_w\d")


@dataclass(frozen=True)
class TensorReference:
    """A tensor in a .safetensors file: where its bytes lie. Nothing is read until it is asked for."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file

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
                    raise truncated(self.path)
                done += count
        return content.view(self.dtype).reshape(self.shape)


def read_header(path):
    """({key: TensorReference}, metadata) of a .safetensors file. Raises ModelError: damaged, or something else."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise pickled(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not a .safetensors file, the only kind of weights that is read")
    try:
        with open(path, "rb") as file:
            size, start = path.stat().st_size, file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise lfs_pointer(path)
            if not size:
                raise _damaged(path, "it is empty")
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise _damaged(path, "its header is cut, or it is not a safetensors file at all")
            file.seek(8)
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise error if isinstance(error, ModelError) else _damaged(path, "its header is not JSON") from error
    try:
        metadata = header.pop("__metadata__", None) or {}
        tensors = {key: _reference(path, key, entry, 8 + length) for key, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, ModelError) else _damaged(path, f"its header is wrong ({error!r})") from error
    _check_places(path, tensors, 8 + length, size)
    return tensors, metadata


def read_json(path):
    """The object in a JSON file. Raises ModelError, which names the file and, where it can, the place in it."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if content.startswith(LFS_POINTER):
            raise lfs_pointer(path)
        found = json.loads(content)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not JSON ({error}): copy or download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} does not hold what its name says: it is no JSON object")
    return found


def check_weights(what, tensors):
    """Raises ModelError unless {key: TensorReference or tensor} are plain weights: not quantised, and no adapters.

    what   how the message names them: a file, or a component of a model
    """
    if adapters := [key for key in tensors if ADAPTER_KEY.search(key)]:
        raise ModelError(
            f"{what} was saved with adapters in it ({first_few(adapters, 2)}): load it again, call "
            "pipeline.fuse_lora() and pipeline.unload_lora_weights() (in PEFT: model.merge_and_unload()), and save that"
        )
    if quantised := [key for key, one in tensors.items() if _is_quantised(key, one)]:
        raise ModelError(
            f"{what} is quantised ({first_few(quantised, 2)}): its numbers are codes, with which nothing can be "
            "computed here. Take the weights that it was made of, in fp32, bf16 or fp16"
        )


def _is_quantised(key, one):
    return QUANTISED_KEY.search(key) or (key.endswith((".weight", ".bias")) and not one.dtype.is_floating_point)


def first_not_finite(tensors):
    """The first key of {key: tensor} whose values are not all finite, or None."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float32)):
            continue  # one pass, without a copy
        if not torch.isfinite(tensor.float()).all():  # else the sum has overflowed
            return key
    return None


def truncated(path):
    """The ModelError for a file that ends before its tensors do."""
    return _damaged(path, "it ends before its last tensor")


def lfs_pointer(path):
    """The ModelError for what a clone holds in place of a large file."""
    return ModelError(f"{path} is a pointer of git LFS, not the file itself: run `git lfs pull` where you cloned it")


def pickled(path, target=None):
    """The ModelError for a pickle, with the command that makes `target` of it."""
    return ModelError(CONVERT.format(path=path, target=target or Path(path).with_suffix(".safetensors")))


def _damaged(path, why):
    return ModelError(f"{path} is damaged: {why}. Copy or download it again")


def _reference(path, key, entry, data):
    if entry["dtype"] not in DTYPES:
        raise ModelError(f"{path}: {key} is {entry['dtype']}, which is not read; what is: {', '.join(DTYPES)}")
    first, last = entry["data_offsets"]
    found = TensorReference(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data + first)
    if any(type(side) is not int or side < 0 for side in (first, *found.shape)) or last - first != found.nbytes:
        raise _damaged(path, f"{key} {entry['dtype']} {entry['shape']} cannot take bytes {first} to {last}")
    return found


def _check_places(path, tensors, data, size):
    """Every byte after the header belongs to one tensor."""
    end = data
    for key, one in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if one.start != end:
            raise _damaged(path, f"{key} overlaps another tensor, or bytes before it belong to none")
        end = one.start + one.nbytes
    if end > size:
        raise truncated(path)
    if end < size:
        raise _damaged(path, f"{size - end} bytes after its last tensor belong to none")
