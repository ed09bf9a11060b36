"""Merged files, streamed: chunks of all inputs in, chunks of all outputs out, in memory that no model's size changes.

A few workers each take the next chunk, read it, compute and write, so that reading, computing and writing overlap.
Their buffers are made once. Beside them others hash the inputs, from the page cache or ahead of the workers.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock

import torch

from finetuning.families.model_args import ModelError
from finetuning.merging.tensors import DTYPES, Stored, cut

CHUNK = 1 << 20  # elements; at most this many of a tensor are in a worker's memory at once
WORKERS = 3  # while one computes, the others wait for the disk
HASHERS = 2  # how many files are hashed beside that
HASHED_AT_ONCE = 1 << 20  # bytes
ZEROS = "0" * 64  # stands for a hash until it is known
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """A tensor of an output file.

    `compute(*inputs, out=buffer)` gets fp32 tensors and fills the fp32 `out`; an int is a copy of that input.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable | int


@dataclass(frozen=True)
class Piece:
    """One tensor of a model: what it is made of, and what is made of it.

    Inputs and outputs have equally many elements.

    name      "unet.conv_in.weight": for messages
    whole     compute gets whole tensors in their own shapes, and `out` in that of the first; else chunks [n] of them
    fallback  index of the input that is taken as it is where an output is not finite; None refuses
    """

    name: str
    inputs: tuple[Stored, ...]
    outputs: tuple[Written, ...]
    whole: bool = False
    fallback: int | None = None


@dataclass(frozen=True)
class Report:
    """sha256 of the inputs that were to be hashed, and of the outputs; names of the pieces that took their fallback."""

    hashes: dict[Path, str]
    written: dict[Path, str]
    replaced: tuple[str, ...]


class NotFinite(ModelError):
    """Tensors with NaN or infinity, or too large for the output's dtype; the message names all of them."""

    def __init__(self, reasons):
        lines = [f"  - {name}: {'; '.join(sorted(why))}" for name, why in reasons.items()]
        fix = "Take a model that is not broken, or say with --on_mismatch base or tuned whose tensors are taken there"
        super().__init__("\n".join([f"{len(reasons)} tensor(s) cannot be written:", *lines, fix]))


def write_files(pieces, metadata, hashed=(), advance=None):
    """Stream `pieces` into their files, in one pass over the inputs; returns a Report.

    metadata  hashes {path: sha256} -> {output path: {key: text}}; asked twice, first with hashes of zeros to know the
              size of the headers: with the true ones its texts must be as long
    hashed    input files whose sha256 is wanted
    advance   called with the number of bytes that were written, by one thread at a time

    Arithmetic is fp32 and is rounded once; a copy in the input's dtype is its bytes. Integers are only copied. Outputs
    must not be there yet and are synced at the end; after an exception the caller removes what there is of them. Raises
    NotFinite, OSError with the path (a full disk: before the work starts), ModelError for an input that has become
    shorter.
    """
    _check(pieces)
    hashed = tuple(dict.fromkeys(hashed))
    layouts = _layouts(pieces)
    zeros = metadata(dict.fromkeys(hashed, ZEROS))
    headers = {path: _header(layout, zeros.get(path)) for path, layout in layouts.items()}
    stop = Event()
    with ExitStack() as stack:
        stack.enter_context(_one_torch_thread())
        files = {}
        for path in dict.fromkeys(stored.path for piece in pieces for stored in piece.inputs):
            files[path] = stack.enter_context(_opened(path, os.O_RDONLY))
        for path, layout in layouts.items():
            files[path] = stack.enter_context(_opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            _reserve(files[path], path, len(headers[path]) + _size(layout))
        starts = {
            (path, key): len(headers[path]) + entry["data_offsets"][0]
            for path, layout in layouts.items()
            for key, entry in layout.items()
        }
        # -- the work
        stream = _Stream(pieces, files, starts, stop, advance)
        hashing = [partial(_sha256, path, stop) for path in hashed]
        results = _together([stream.work] * WORKERS + hashing, WORKERS + min(len(hashed), HASHERS), stop)
        hashes = dict(zip(hashed, results[WORKERS:], strict=True))
        # -- tensors that are not finite
        bad = {index: stream.bad[index] for index in sorted(stream.bad)}
        mended = [index for index in bad if pieces[index].fallback is not None]
        second = _Stream([_fallback(pieces[index], bad[index]) for index in mended], files, starts, stop, None)
        _together([second.work] * WORKERS, WORKERS, stop)
        still_bad = {mended[place]: found for place, found in second.bad.items()}
        refused = [index for index in bad if index not in mended or index in still_bad]
        if refused:
            raise NotFinite({pieces[index].name: _all(bad[index], still_bad.get(index, {})) for index in refused})
        # -- headers, and to the disk
        texts = metadata(hashes)
        for path, layout in layouts.items():
            header = _header(layout, texts.get(path))
            if len(header) != len(headers[path]):
                raise ValueError(f"the metadata of {path} changed its length with the hashes")
            _write(files[path], path, header, 0)
        finishing = [partial(_sync, path, files[path]) for path in layouts]
        finishing += [partial(_sha256, path, stop) for path in layouts]
        results = _together(finishing, 2 * len(layouts), stop)
        written = dict(zip(layouts, results[len(layouts) :], strict=True))
    return Report(hashes, written, tuple(pieces[index].name for index in mended))


# -- the workers -----------------------------------------------------------------------------------------------------


class _Stream:
    """Pieces that several workers share; `bad` is {index of the piece: {index of the output: {reason}}}."""

    def __init__(self, pieces, files, starts, stop, advance):
        self.files, self.starts, self.stop, self.advance = files, starts, stop, advance or (lambda count: None)
        self.bad = defaultdict(lambda: defaultdict(set))
        self.lock, self.one_at_a_time = Lock(), Lock()
        self.jobs = _jobs(pieces)

    def work(self):
        """One worker: do what is left to do, chunk by chunk."""
        buffers = {}
        with torch.no_grad():
            while not self.stop.is_set():
                with self.lock:
                    job = next(self.jobs, None)
                if job is None:
                    return
                index, piece, first, last = job
                # Larger than a chunk: memory for one such tensor, not for one a worker
                with self.one_at_a_time if last - first > CHUNK else nullcontext():
                    self._do(index, piece, first, last, buffers)

    def _do(self, index, piece, first, last, buffers):
        used = {written.compute for written in piece.outputs if isinstance(written.compute, int)}
        if any(callable(written.compute) for written in piece.outputs):
            used = range(len(piece.inputs))
        raw = {i: self._read(piece.inputs[i], first, last, buffers, i) for i in used}
        values = {i: _as_fp32(one, buffers, i) for i, one in raw.items() if one.is_floating_point()}
        for place, written in enumerate(piece.outputs):
            if callable(written.compute):
                result = _taken(buffers, "result", last - first, torch.float32)
                if piece.whole:
                    shaped = [values[i].view(stored.shape) for i, stored in enumerate(piece.inputs)]
                    written.compute(*shaped, out=result.view(piece.inputs[0].shape))
                else:
                    written.compute(*values.values(), out=result)
                made_of = values
            else:
                result, made_of = raw[written.compute], {i: one for i, one in values.items() if i == written.compute}
            if made_of and not _fits(result, written.dtype):
                with self.lock:
                    self.bad[index][place].add(_reason(piece, made_of, result, written.dtype))
            if result.dtype != written.dtype:
                result = _taken(buffers, "rounded", last - first, written.dtype).copy_(result)
            content = _bytes(result)
            start = self.starts[written.path, written.key] + first * written.dtype.itemsize
            _write(self.files[written.path], written.path, content, start)
            with self.lock:
                self.advance(len(content))

    def _read(self, stored, first, last, buffers, name):
        raw = _taken(buffers, f"raw {name}", last - first, stored.dtype)
        left, offset = _bytes(raw), stored.start + first * stored.dtype.itemsize
        while left:
            count = os.preadv(self.files[stored.path], [left], offset)
            if not count:
                raise cut(stored.path)
            left, offset = left[count:], offset + count
        return raw


def _jobs(pieces):
    """(index, piece, first element, end) of all that is to be done, in the order of the pieces."""
    for index, piece in enumerate(pieces):
        numel = piece.inputs[0].numel
        step = max(numel, 1) if piece.whole else CHUNK
        for first in range(0, numel, step):
            yield index, piece, first, min(first + step, numel)


def _taken(buffers, name, numel, dtype):
    """[numel] of a worker's buffer of that name. Pages that nobody writes to take no memory."""
    if numel > CHUNK:
        return torch.empty(numel, dtype=dtype)
    if name not in buffers:
        buffers[name] = torch.empty(CHUNK * torch.float64.itemsize, dtype=torch.uint8)
    return buffers[name][: numel * dtype.itemsize].view(dtype)


def _as_fp32(raw, buffers, name):
    return raw if raw.dtype == torch.float32 else _taken(buffers, f"fp32 {name}", len(raw), torch.float32).copy_(raw)


def _bytes(tensor):
    return memoryview(tensor.view(torch.uint8).numpy())


def _fits(values, dtype):
    """Whether all are finite in `dtype`: the lowest and the highest tell, and NaN is both."""
    values = values.float() if values.dtype.itemsize == 1 else values  # torch has no extremes of 8-bit floats
    return bool(torch.stack(torch.aminmax(values)).to(dtype).double().isfinite().all())


def _reason(piece, made_of, result, dtype):
    broken = sorted({str(piece.inputs[i].path) for i, one in made_of.items() if not _fits(one, one.dtype)})
    if broken:
        return f"NaN or infinity in {' and '.join(broken)}"
    if _fits(result, result.dtype):
        return f"too large for {NAMES[dtype]}: write it with --dtype bf16 or fp32"
    return "the method makes NaN or infinity of finite numbers"


def _fallback(piece, bad):
    """The piece that copies its fallback into those outputs that are bad."""
    copies = tuple(replace(piece.outputs[place], compute=piece.fallback) for place in sorted(bad))
    return replace(piece, outputs=copies, whole=False, fallback=None)


def _all(*found):
    """Reasons of all outputs together."""
    return set().union(*(reasons for outputs in found for reasons in outputs.values()))


# -- threads ---------------------------------------------------------------------------------------------------------


def _together(tasks, threads, stop):
    """Results of tasks that run beside each other; the first exception stops the others and is raised."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            raise
        return [future.result() for future in futures]


@contextmanager
def _one_torch_thread():
    """Each worker computes on its own; threads inside threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sha256(path, stop):
    digest, buffer = sha256(), bytearray(HASHED_AT_ONCE)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while not stop.is_set() and (count := file.readinto(buffer)):
            digest.update(view[:count])
    return digest.hexdigest()


# -- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path, flags):
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _layouts(pieces):
    """{path: {key: entry of its header}}: large elements first, so that every tensor is aligned."""
    layouts = {}
    for piece in pieces:
        for written in piece.outputs:
            layouts.setdefault(written.path, []).append(written)
    return {path: _entries(sorted(all_of, key=lambda one: -one.dtype.itemsize)) for path, all_of in layouts.items()}


def _entries(written):
    entries, end = {}, 0
    for one in written:
        if one.key in entries:
            raise ValueError(f"{one.path}: two tensors are called {one.key}")
        first, end = end, end + math.prod(one.shape) * one.dtype.itemsize
        entries[one.key] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [first, end]}
    return entries


def _size(layout):
    """Bytes of its tensors."""
    return max(entry["data_offsets"][1] for entry in layout.values())


def _header(layout, metadata):
    """Length and JSON; its size is a multiple of 8, and its order depends on nothing but the content."""
    told = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**told, **layout}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _reserve(descriptor, path, size):
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(descriptor, path, content, offset):
    left = memoryview(content)
    try:
        while left:
            count = os.pwrite(descriptor, left, offset)
            left, offset = left[count:], offset + count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path, descriptor):
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# -- what is asked for -----------------------------------------------------------------------------------------------


def _check(pieces):
    """Mistakes of the caller, before anything is written. Raises ValueError."""
    for piece in pieces:
        sizes = {math.prod(one.shape) for one in (*piece.inputs, *piece.outputs)}
        if len(sizes) > 1:
            raise ValueError(f"{piece.name}: inputs and outputs have {sorted(sizes)} elements")
        for written in piece.outputs:
            sources = piece.inputs if callable(written.compute) else [piece.inputs[written.compute]]
            exact = not callable(written.compute) and sources[0].dtype == written.dtype
            if not exact and not all(one.dtype.is_floating_point for one in (*sources, written)):
                raise ValueError(f"{piece.name}: integers can only be copied as they are")
