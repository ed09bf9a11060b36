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
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip
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
    transposed: bool = False  # the file holds the transpose of this matrix

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

    def flipped(self):
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def read(self):
        """The tensor, in its own dtype and shape. Raises ModelError where the file has become shorter."""
        return self.read_elements(0, self.numel).reshape(self.shape)

    def read_elements(self, first, last):
        """Elements first to last - 1 of the flattened tensor, [last - first] in its own dtype. Raises as `read`."""
        if self.transposed:
            return self.flipped().read().T.reshape(-1)[first:last]
        # A plain read: a mapped file would count as memory, and end the process where the file has become shorter.
        content = torch.empty(last - first, dtype=self.dtype)
        with open(self.path, "rb") as file:
            file.seek(self.start + first * self.dtype.itemsize)
            if file.readinto(content.view(torch.uint8).numpy()) < content.nbytes:
                raise _damaged(self.path, "it ends before its last tensor")
        return content


def tensor_references(path):
    """({key: TensorReference}, metadata) of a .safetensors file. Raises ModelError: damaged, or something else."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix in PICKLES:
        raise pickled(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not a .safetensors file, the only kind of weights that is read")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise lfs_pointer(path)
            if not start:
                raise _damaged(path, "it is empty")
            with safe_open(path, framework="pt"):  # checks the header, and that every byte belongs to one tensor
                length = int.from_bytes(start[:8], "little")
                file.seek(8)
                header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, MemoryError) as error:
        raise _damaged(path, error) from error
    metadata = header.pop("__metadata__", None) or {}
    if strange := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise ModelError(f"{path} holds {', '.join(strange)}, which is not read; what is: {', '.join(DTYPES)}")
    data = 8 + length
    return {
        key: TensorReference(path, DTYPES[one["dtype"]], tuple(one["shape"]), data + one["data_offsets"][0])
        for key, one in header.items()
    }, metadata


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
    refuse_quantised(what, tensors)


def refuse_quantised(what, tensors):
    """Raises ModelError where {key: TensorReference or tensor} are codes and scales; see check_weights."""
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


def refuse_not_finite(tensors, path):
    """Raises ModelError where {key: tensor} of a file are not all finite numbers."""
    if key := first_not_finite(tensors):
        raise ModelError(
            f"{path} holds NaN or infinite values ({key}): what made it went wrong, and has to make it again"
        )


def lfs_pointer(path):
    """The ModelError for what a clone holds in place of a large file."""
    return ModelError(f"{path} is a pointer of git LFS, not the file itself: run `git lfs pull` where you cloned it")


def pickled(path, target=None):
    """The ModelError for a pickle, with the command that makes `target` of it."""
    return ModelError(CONVERT.format(path=path, target=target or Path(path).with_suffix(".safetensors")))


def _damaged(path, why):
    return ModelError(f"{path} is damaged: {why}. Copy or download it again")
