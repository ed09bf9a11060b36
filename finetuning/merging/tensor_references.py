"""Tensors in safetensors files, by the place of their bytes: the header is read at once, a tensor when it is needed."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from finetuning.cli import first_few
from finetuning.families.model_args import ModelError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip
# What bitsandbytes, GPTQ, scaled fp8 and torchao store beside codes. The codes mean nothing without these, and an
# average of two tables of scales is the scale of nothing.
QUANTISED = re.compile(
    r"(^|\.)(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format|qweight|qzeros|g_idx"
    r"|scale_weight|weight_scale|scaled_fp8)$"
)
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorReference:
    """A tensor in a file: `start` is the offset of its first byte. Nothing is read until it is asked for."""

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
        """Rows first..last-1 of the first dimension. Raises ValueError."""
        if not (self.shape and 0 <= first <= last <= self.shape[0]):
            raise ValueError(f"{list(self.shape)} has no rows {first}..{last}: {self.path}")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(last - first, *self.shape[1:]), start=self.start + first * row_bytes)

    def read(self):
        """The tensor, in its own dtype and shape. Raises ModelError where the file has become shorter."""
        return self.read_elements(0, self.numel).reshape(self.shape)

    def read_elements(self, first, last):
        """Elements first..last-1 of the flattened tensor, [last - first] in its own dtype. Raises as `read`."""
        # A plain read: a mapped file would count as memory, and end the process where the file has become shorter.
        content = torch.empty(last - first, dtype=self.dtype)
        with open(self.path, "rb") as file:
            file.seek(self.start + first * self.dtype.itemsize)
            if file.readinto(content.view(torch.uint8).numpy()) < content.nbytes:
                raise _broken(self.path, "it ends before its last tensor")
        return content


def tensor_references(path):
    """({key: TensorReference}, metadata) of a .safetensors file.

    Raises ModelError, which names the file: broken, cut, something else, quantised, or saved with adapters in it.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path}: it is not a .safetensors file. A .ckpt, .pt, .pth or .bin is a pickle, which can run code when "
            "it is loaded. Look for its .safetensors, or convert it where it can do no harm: torch.load(path, "
            "weights_only=True), then safetensors.torch.save_file"
        )
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there")
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            with safe_open(path, framework="pt"):  # checks the header, and that every byte belongs to one tensor
                header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, MemoryError) as error:
        raise _broken(path, error) from error
    metadata = header.pop("__metadata__", None) or {}
    if strange := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise ModelError(f"{path} holds {', '.join(strange)}, which is not read; what is: {', '.join(DTYPES)}")
    tensors = {
        key: TensorReference(path, DTYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for key, one in header.items()
    }
    _refuse_what_cannot_be_merged(path, tensors)
    return tensors, metadata


def _refuse_what_cannot_be_merged(path, tensors):
    """Raises ModelError for weights that are no plain numbers, or that lie inside of adapters' wrappers."""
    codes = (torch.int8, torch.uint8)
    quantised = [
        key for key, one in tensors.items()
        if QUANTISED.search(key) or (one.dtype in codes and key.endswith("weight"))
    ]  # fmt: skip
    if quantised:
        raise ModelError(
            f"{path} holds quantised weights ({first_few(quantised, 3)}): they are codes and scales, not numbers to "
            "compute with. Take the model that it was made from, in fp32, fp16 or bf16"
        )
    if wrapped := [key for key in tensors if ".base_layer." in key]:
        raise ModelError(
            f"{path} was saved with adapters in it ({first_few(wrapped, 3)}): unload them first "
            "(pipeline.unload_lora_weights(), after pipeline.fuse_lora() where their effect is to stay), and save again"
        )


def _broken(path, why):
    return ModelError(f"{path} is broken: {why}. Copy or download it again")
