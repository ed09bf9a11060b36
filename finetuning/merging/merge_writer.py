"""Merged tensors into safetensors files: a thread reads the next chunk while this one computes and writes.

A chunk of every input comes in, and one of every output goes out, so memory does not depend on the model. Two more
threads hash the inputs at the same pace, so that each is read from the disk once.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetuning.data.threads import in_order
from finetuning.families.model_args import ModelError
from finetuning.families.tensors import DTYPES, TensorReference

CHUNK = 1 << 19  # elements
PACE = 1 << 26  # bytes written between two looks at how far the hashes are
UNKNOWN = "0" * 64  # stands for a hash until it is known
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an output file, or the part of one that begins at its element `first`.

    `compute(*inputs, out=buffer)` gets fp32 tensors and fills the fp32 `out`; an int is a copy of that input.
    A `transposed` matrix is written as its transpose; its MergeTask is `whole`.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable | int
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class MergeTask:
    """One tensor of a model: what it is made of, and what is made of it, all of equally many elements.

    name      "unet.conv_in.weight": for messages
    whole     compute gets whole tensors in their own shapes, and `out` in that of the first; else chunks [n] of them
    fallback  index of the input that is taken as it is where an output is not finite; None refuses
    """

    name: str
    inputs: tuple[TensorReference, ...]
    outputs: tuple[OutputTensor, ...]
    whole: bool = False
    fallback: int | None = None


class NotFinite(ModelError):
    """Tensors with NaN or infinity, or too large for the output's dtype; the message names all of them."""

    def __init__(self, reasons):
        lines = [f"  - {name}: {'; '.join(sorted(why))}" for name, why in reasons.items()]
        fix = "Take a model that is not broken; a merge has --on_mismatch, which says whose tensors are taken there"
        super().__init__("\n".join([f"{len(reasons)} tensor(s) cannot be written:", *lines, fix]))


def write_files(tasks, metadata, hashed=(), advance=lambda count: None):
    """Make the files of all outputs in one pass over the inputs.

    metadata  hashes {path: sha256} -> {output path: {key: text}}; asked twice, first with hashes of zeros to know the
              size of the headers: with the true ones its texts must be as long
    hashed    input files whose sha256 is wanted
    advance   called with the number of bytes that were written

    Returns ({path: sha256} of `hashed`, [names of the tasks that took their fallback]). Arithmetic is fp32 and is
    rounded once; a copy in the input's dtype is its bytes. Integers are only copied. Outputs must not be there yet;
    after an exception the caller removes what there is of them. Raises NotFinite, OSError with the path (a full disk:
    before the work starts), ModelError for an input that has become shorter.
    """
    layouts, hashed = _layouts(tasks), tuple(dict.fromkeys(hashed))
    texts = metadata(dict.fromkeys(hashed, UNKNOWN))
    headers = {path: _header(layout, texts.get(path)) for path, layout in layouts.items()}
    with ExitStack() as stack:
        stack.enter_context(_one_torch_thread())
        hashing = _Hashing(hashed, sum(map(_size, layouts.values())), stack.enter_context(ThreadPoolExecutor(2)))
        files = {path: stack.enter_context(open(path, "xb", buffering=0)) for path in layouts}
        for path, layout in layouts.items():
            with _naming(path):
                os.posix_fallocate(files[path].fileno(), 0, len(headers[path]) + _size(layout))

        def write(output, first, content):
            start = len(headers[output.path]) + layouts[output.path][output.key]["data_offsets"][0]
            _write(files[output.path], start + (output.first + first) * output.dtype.itemsize, content)
            hashing.follow(len(content))
            advance(len(content))

        # The tensors; those that are not finite are written again from their fallback
        bad, again = _write_tensors(tasks, write), []
        for task in tasks:
            if task.name in bad and task.fallback is not None:
                outputs = (replace(task.outputs[number], compute=task.fallback) for number in sorted(bad[task.name]))
                again.append(replace(task, outputs=tuple(outputs), fallback=None))
        worse = _write_tensors(again, write)
        replaced = [task.name for task in again]
        if refused := {name: bad[name] for name in bad if name not in replaced or name in worse}:
            raise NotFinite({name: set().union(*why.values(), *worse[name].values()) for name, why in refused.items()})

        # The headers
        hashes = hashing.result()
        texts = metadata(hashes)
        for path, layout in layouts.items():
            header = _header(layout, texts.get(path))
            if len(header) != len(headers[path]):
                raise ValueError(f"the metadata of {path} changed its length with the hashes")
            _write(files[path], 0, header)
        return hashes, replaced


# -- tensors -------------------------------------------------------------------------------------------------------


def _write_tensors(tasks, write):
    """Compute and write all outputs; {name of a task: {index of an output: {why it is not finite}}}."""
    bad = defaultdict(lambda: defaultdict(set))
    with closing(in_order(_read, _jobs(tasks), threads=1, window=2)) as jobs:  # the next one is read meanwhile
        for (task, first, _), inputs in jobs:
            values = {number: one.float() for number, one in inputs.items() if one.is_floating_point()}
            for number, output in enumerate(task.outputs):
                if callable(output.compute):
                    result, made_of = _computed(task, output.compute, list(values.values())), values
                else:
                    result = inputs[output.compute]
                    made_of = {i: one for i, one in values.items() if i == output.compute}
                if made_of and not _fits(result, output.dtype):
                    bad[task.name][number].add(_reason(task, made_of, result, output.dtype))
                if output.transposed:
                    result = result.view(output.shape[::-1]).T.reshape(-1)
                write(output, first, memoryview(result.to(output.dtype).view(torch.uint8).numpy()))
    return bad


def _jobs(tasks):
    """(task, first element, end) of each chunk."""
    for task in tasks:
        numel = task.inputs[0].numel
        step = max(numel, 1) if task.whole else CHUNK
        for first in range(0, numel, step):
            yield task, first, min(first + step, numel)


def _read(job):
    """{index of an input: its elements} that a chunk needs."""
    task, first, last = job
    needed = {output.compute for output in task.outputs}
    if any(map(callable, needed)):
        needed = range(len(task.inputs))
    return {number: task.inputs[number].read_elements(first, last) for number in needed}


@torch.no_grad()
def _computed(task, compute, values):
    result = torch.empty(len(values[0]))
    if task.whole:
        values = [one.view(reference.shape) for one, reference in zip(values, task.inputs, strict=True)]
    compute(*values, out=result.view(values[0].shape))
    return result


def _fits(values, dtype):
    """Whether all are finite in `dtype`: the lowest and the highest tell, and NaN is both."""
    values = values.float() if values.dtype.itemsize == 1 else values  # torch has no extremes of 8-bit floats
    return bool(torch.stack(torch.aminmax(values)).to(dtype).double().isfinite().all())


def _reason(task, made_of, result, dtype):
    broken = sorted({str(task.inputs[number].path) for number, one in made_of.items() if not _fits(one, one.dtype)})
    if broken:
        return f"NaN or infinity in {' and '.join(broken)}"
    if _fits(result, result.dtype):
        return f"too large for {NAMES[dtype]}: write it with --dtype bf16 or fp32"
    return "the method makes NaN or infinity of finite numbers"


@contextmanager
def _one_torch_thread():
    """The same sums on any number of cores; others are busy reading and hashing anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Hashing:
    """sha256 of input files, as far along as the outputs are: what one reads of them, the other finds in memory."""

    def __init__(self, paths, to_write, pool):
        self.to_write, self.pool, self.written, self.share, self.underway = to_write, pool, 0, 0, []
        self.inputs = [(path, os.stat(path).st_size, hashlib.sha256()) for path in paths]

    def follow(self, count):
        """Another `count` bytes are written."""
        self.written += count
        if self.written >= self.share * self.to_write + PACE:
            self._go_on(min(1, self.written / self.to_write))

    def result(self):
        """{path: sha256}."""
        for _ in range(2):  # what is left of them, and the wait for it
            self._go_on(1)
        return {path: digest.hexdigest() for path, _, digest in self.inputs}

    def _go_on(self, share):
        """Wait for the share before, and have the next one hashed."""
        for one in self.underway:
            one.result()
        self.underway = [
            self.pool.submit(_hash, path, digest, int(self.share * size), int(share * size))
            for path, size, digest in self.inputs
        ]
        self.share = share


def _hash(path, digest, first, last):
    with open(path, "rb", buffering=0) as file:
        file.seek(first)
        while block := file.read(min(1 << 20, last - file.tell())):
            digest.update(block)


# -- files ---------------------------------------------------------------------------------------------------------


def _layouts(tasks):
    """{path: {key: its entry in the header}}: large elements first, so that every tensor is aligned."""
    layouts, placed = defaultdict(dict), set()
    for one in sorted((output for task in tasks for output in task.outputs), key=lambda one: -one.dtype.itemsize):
        layout = layouts[one.path]
        if (one.path, one.key, one.first) in placed:
            raise ValueError(f"{one.path}: two tensors are called {one.key}")
        placed.add((one.path, one.key, one.first))
        if one.key not in layout:
            first = _size(layout)
            places = [first, first + math.prod(one.shape) * one.dtype.itemsize]
            layout[one.key] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": places}
        elif layout[one.key]["dtype"] != NAMES[one.dtype]:
            raise ModelError(f"{one.key} is made of tensors of several precisions: say which one with --dtype")
    return layouts


def _size(layout):
    """Bytes of a file's tensors."""
    return next(reversed(layout.values()))["data_offsets"][1] if layout else 0


def _header(layout, metadata):
    """Length and JSON; its size is a multiple of 8, and its order depends on nothing but the content."""
    metadata = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**metadata, **layout}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file, start, content):
    left = memoryview(content)
    with _naming(file.name):
        file.seek(start)
        while left:
            left = left[file.write(left) :]


@contextmanager
def _naming(path):
    """An OSError of an open file gets its path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
