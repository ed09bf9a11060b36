"""The merge writer: every byte where it belongs, whatever the chunks; nothing that is not finite; no thread left."""

import hashlib
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetuning.families.model_args import ModelError
from finetuning.families.tensors import tensor_references
from finetuning.merging import merge_writer
from finetuning.merging.merge_writer import MergeTask, NotFinite, OutputTensor, write_files

CHUNK = 64
SHAPES = {
    "empty": (0, 3),
    "one": (1,),
    "scalar": (),
    "chunk": (8, 8),
    "more": (65,),
    "less": (63,),
    "large": (7, 5, 11),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(merge_writer, "CHUNK", CHUNK)


@pytest.fixture(autouse=True)
def no_thread_stays():
    before, torch_threads = threading.active_count(), torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert (threading.active_count(), torch.get_num_threads()) == (before, 2)
    torch.set_num_threads(torch_threads)


@pytest.fixture
def model(tmp_path):
    """Make a file of random tensors; `changes` are put in place of them."""

    def make(name, dtype=torch.float32, **changes):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in SHAPES.items()}
        save_file(tensors | changes, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return make


def lerp(ratio):
    return lambda base, tuned, out: torch.lerp(base, tuned, ratio, out=out)


def tasks_of(files, outputs, **options):
    """One piece for each tensor; `outputs` are {path: (compute, dtype or None for the first input's)}."""
    models = [tensor_references(file)[0] for file in files]
    return [
        MergeTask(
            f"unet.{key}",
            tuple(one[key] for one in models),
            tuple(
                OutputTensor(path, key, dtype or first.dtype, first.shape, how)
                for path, (how, dtype) in outputs.items()
            ),
            **options,
        )
        for key, first in models[0].items()
    ]


def merge(files, outputs, metadata=lambda hashes: {}, hashed=(), advance=lambda count: None, **options):
    return write_files(tasks_of(files, outputs, **options), metadata, hashed, advance)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float64")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_chunks_give_what_whole_tensors_give_in_fp32_rounded_once(tmp_path, model, kinds, dtype):
    files = [model(name, getattr(torch, kind)) for name, kind in zip("ab", kinds, strict=True)]
    merge(files, {tmp_path / "out.safetensors": (lerp(0.3), dtype)})
    base, tuned, out = (load_file(path) for path in (*files, tmp_path / "out.safetensors"))
    assert out.keys() == SHAPES.keys()
    for key, value in out.items():
        assert value.dtype == dtype and value.shape == SHAPES[key]
        assert torch.equal(value, torch.lerp(base[key].float(), tuned[key].float(), 0.3).to(dtype))


def test_several_outputs_in_one_pass_are_those_of_single_runs(tmp_path, model):
    files = [model("a"), model("b", torch.float16)]
    ways = {"low": (lerp(0.1), None), "high": (lerp(0.9), torch.float16), "first": (0, None), "second": (1, None)}
    ways["second"] = (1, torch.float16)
    together = {tmp_path / f"{name}.safetensors": way for name, way in ways.items()}
    merge(files, together)
    for name, way in ways.items():
        alone = tmp_path / f"{name}-alone.safetensors"
        merge(files, {alone: way})
        assert alone.read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()


def test_a_copy_is_bytes_for_bytes(tmp_path, model):
    file = model("a", more=torch.full((65,), -0.0), one=torch.tensor([2**53 + 1]))
    merge([file], {tmp_path / "copy.safetensors": (0, None)})
    before, after = tensor_references(file)[0], tensor_references(tmp_path / "copy.safetensors")[0]
    for key in SHAPES:
        assert bytes(before[key].read().reshape(-1).view(torch.uint8)) == bytes(
            after[key].read().reshape(-1).view(torch.uint8)
        )
    merge([model("wide", torch.float64)], {tmp_path / "wide-copy.safetensors": (0, None)})
    assert all(
        torch.equal(value, load_file(tmp_path / "wide.safetensors")[key])
        for key, value in load_file(tmp_path / "wide-copy.safetensors").items()
    )


def test_whole_tensors_come_in_their_own_shape(tmp_path, model):
    seen = {}

    def centred(base, tuned, out):
        seen[base.shape] = (tuned.shape, out.shape)
        torch.sub(tuned, base.mean(), out=out)

    files = [model("a"), model("b", torch.float16)]
    out = tmp_path / "out.safetensors"
    merge(files, {out: (centred, torch.float32)}, whole=True)
    base, tuned = map(load_file, files)
    for key, value in load_file(out).items():
        assert torch.equal(value, tuned[key].float() - base[key].mean())
    assert seen == {shape: (shape, shape) for shape in map(torch.Size, SHAPES.values()) if shape.numel()}


def test_every_tensor_is_aligned_and_the_bytes_depend_on_the_content_alone(tmp_path, model):
    ids = {"one": torch.tensor([5]), "chunk": torch.zeros(8, 8, dtype=torch.float16), "less": torch.zeros(63).half()}
    file = model("a", **ids)
    for name, order in (("one", ("a", "b")), ("two", ("b", "a"))):
        path = tmp_path / f"{name}.safetensors"
        tasks = tasks_of([file], {path: (0, None)})[::-1]  # small elements first
        write_files(tasks, lambda hashes, path=path, order=order: {path: dict.fromkeys(order, "é")})
    assert digest(tmp_path / "one.safetensors") == digest(tmp_path / "two.safetensors")
    for one in tensor_references(tmp_path / "one.safetensors")[0].values():
        assert one.start % one.dtype.itemsize == 0
    with safe_open(tmp_path / "one.safetensors", "pt") as opened:
        assert opened.metadata() == {"a": "é", "b": "é"}


def test_hashes_are_those_of_the_files_and_stand_in_the_header(tmp_path, model):
    files, out, asked = (model("a"), model("b")), tmp_path / "out.safetensors", []

    def metadata(hashes):
        asked.append(dict(hashes))
        return {out: {"from": " ".join(hashes.values())}}

    written = []
    hashes, replaced = merge(files, {out: (lerp(0.5), None)}, metadata, files, written.append)
    assert hashes == {file: digest(file) for file in files} and replaced == []
    assert asked == [dict.fromkeys(files, "0" * 64), hashes]
    assert tensor_references(out)[1] == {"from": " ".join(hashes.values())}
    assert sum(written) == sum(one.nbytes for one in tensor_references(out)[0].values())


def test_metadata_of_another_length_is_an_error(tmp_path, model):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="changed its length"):
        merge([model("a")], {out: (0, None)}, lambda h: {out: {"n": "1" if "0" * 64 in h.values() else "12345678"}},
              [model("a")])  # fmt: skip


# -- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [lerp(0.3), 1])
def test_all_tensors_that_are_not_finite_are_named_with_their_file(tmp_path, model, value, how):
    large, less = torch.zeros(7, 5, 11), torch.zeros(63)
    large[6, 4, 10] = less[0] = value
    with pytest.raises(NotFinite) as problem:
        merge([model("a"), model("b", large=large, less=less)], {tmp_path / "out.safetensors": (how, None)})
    lines = str(problem.value).splitlines()[1:-1]
    assert [line.split(":")[0] for line in lines] == ["  - unet.large", "  - unet.less"]
    assert all("NaN or infinity in" in line and "b.safetensors" in line and "a.safeten" not in line for line in lines)


def test_a_number_too_large_for_the_outputs_dtype_has_its_own_words(tmp_path, model):
    file = model("a", one=torch.tensor([65519.0]), scalar=torch.tensor(65520.0))  # the first rounds down to 65504
    with pytest.raises(NotFinite, match=r"unet\.scalar: too large for F16.*--dtype") as problem:
        merge([file], {tmp_path / "out.safetensors": (0, torch.float16)})
    assert "unet.one" not in str(problem.value)


def test_each_output_has_its_own_reason(tmp_path, model):
    files = [model("a", one=torch.tensor([1e6])), model("b", one=torch.tensor([float("nan")]))]
    outputs = {tmp_path / "half.safetensors": (0, torch.float16), tmp_path / "sum.safetensors": (lerp(0.5), None)}
    with pytest.raises(NotFinite, match=r"unet\.one: NaN or infinity in .*b\.safetensors; too large for F16"):
        merge(files, outputs)


def test_a_method_that_makes_infinity_of_finite_numbers_is_told_apart(tmp_path, model):
    with pytest.raises(NotFinite, match=r"unet\.one: the method makes"):
        merge([model("a")], {tmp_path / "out.safetensors": (lambda base, out: torch.div(base, 0, out=out), None)})


def test_a_sum_that_overflows_is_no_reason(tmp_path, model):
    merge([model("a", chunk=torch.full((8, 8), 3e38))], {tmp_path / "out.safetensors": (0, None)})
    assert load_file(tmp_path / "out.safetensors")["chunk"].min() == torch.tensor(3e38)


@pytest.mark.parametrize("whole", [False, True])
def test_a_fallback_takes_the_whole_tensor_of_that_input(tmp_path, model, whole):
    large = torch.zeros(7, 5, 11)
    large[6, 4, 10] = float("nan")  # in the last chunk: the others are written by then
    files = [model("a", torch.float16), model("b", large=large)]
    low, second = tmp_path / "low.safetensors", tmp_path / "second.safetensors"
    _, replaced = merge(files, {low: (lerp(0.1), None), second: (1, torch.float32)}, fallback=0, whole=whole)
    base, tuned = map(load_file, files)
    assert replaced == ["unet.large"]
    for path in (low, second):
        assert torch.equal(load_file(path)["large"], base["large"].to(load_file(path)["large"].dtype))
    assert torch.equal(load_file(second)["more"], tuned["more"])
    assert torch.equal(load_file(low)["more"], torch.lerp(base["more"].float(), tuned["more"], 0.1).half())


def test_a_fallback_that_is_not_finite_itself_is_refused(tmp_path, model):
    nan = torch.tensor([float("nan")])
    files = [model("a", one=nan), model("b", one=nan, more=nan.expand(65).clone())]
    with pytest.raises(NotFinite, match=r"1 tensor.*\n.*unet\.one.*a\.safetensors and .*b\.safetensors"):
        merge(files, {tmp_path / "out.safetensors": (lerp(0.1), None)}, fallback=0)


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["method", "_hash", "_read"])
def test_an_exception_stops_all_and_is_raised(tmp_path, model, monkeypatch, by):
    done = []

    def slow(base, out):
        done.append(time.sleep(0.01))
        out.zero_()
        if by == "method" and len(done) == 3:
            raise InterruptedError("by method")

    def broken(*_, **__):
        raise InterruptedError(f"by {by}")

    if by != "method":
        monkeypatch.setattr(merge_writer, by, broken)
    file = model("a", large=torch.zeros(20 * CHUNK))
    with pytest.raises(InterruptedError, match=f"by {by}"):
        merge([file], {tmp_path / "out.safetensors": (slow, None)}, hashed=[file])
    assert len(done) < 30 and (by != "_read" or not done)


def test_a_file_that_was_cut_meanwhile_is_named(tmp_path, model):
    file = model("a")
    tasks = tasks_of([file], {tmp_path / "out.safetensors": (0, None)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"a\.safetensors is damaged: it ends"):
        write_files(tasks, lambda hashes: {})


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left.*out\.safetensors") as problem:
        merge([model("a")], {tmp_path / "out.safetensors": (0, None)})
    assert problem.value.errno == 28


def test_a_disk_that_is_full_while_it_is_written_is_named(tmp_path, model, monkeypatch):
    """/dev/full refuses every write, as a full disk does."""
    monkeypatch.setattr("os.posix_fallocate", lambda *_: None)
    monkeypatch.setattr(merge_writer, "open", lambda *_, **options: open("/dev/full", "wb", **options), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match="/dev/full") as problem:
        merge([model("a")], {tmp_path / "out.safetensors": (0, None)})
    assert problem.value.errno == 28


def test_an_output_that_is_there_already_is_not_touched(tmp_path, model):
    file = model("a")
    before = digest(file)
    with pytest.raises(FileExistsError):
        merge([file], {file: (0, None)})
    assert digest(file) == before


def test_two_tensors_of_one_name_are_refused_before_anything_is_written(tmp_path, model):
    reference = tensor_references(model("a"))[0]["one"]
    one = OutputTensor(tmp_path / "out.safetensors", "x", torch.float16, (1,), 0)
    with pytest.raises(ValueError, match="two tensors are called x"):
        write_files([MergeTask("x", (reference,), (one, one))], lambda hashes: {})
    assert not one.path.exists()
