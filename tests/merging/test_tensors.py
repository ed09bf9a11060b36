"""Where tensors lie in a safetensors file, and files that are not what they say."""

import json

import pytest
import torch
from safetensors.torch import save_file

from finetuning.families.model_args import ModelError
from finetuning.merging.tensors import stored_tensors


@pytest.fixture
def some_tensors():
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    tensors = {str(dtype): torch.randn(3, 5, generator=generator).to(dtype) for dtype in dtypes}
    return {**tensors, "ids": torch.arange(7), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


@pytest.fixture
def file(tmp_path, some_tensors):
    save_file(some_tensors, tmp_path / "some.safetensors", metadata={"made": "here"})
    return tmp_path / "some.safetensors"


def written(path, header, data=b""):
    """A file of that header (bytes or JSON) and data."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def test_every_tensor_is_read_as_safetensors_wrote_it(file, some_tensors):
    tensors, metadata = stored_tensors(file)
    assert metadata == {"made": "here"} and tensors.keys() == some_tensors.keys()
    for key, stored in tensors.items():
        value = stored.read()
        assert (value.dtype, value.shape) == (some_tensors[key].dtype, some_tensors[key].shape)
        assert torch.equal(value, some_tensors[key])
        assert (stored.numel, stored.nbytes) == (value.numel(), value.nbytes)


def test_rows_and_views_are_the_same_bytes(file, some_tensors):
    stored = stored_tensors(file)[0]["torch.float16"]
    expected = some_tensors["torch.float16"]
    assert torch.equal(stored.rows(1, 3).read(), expected[1:3])
    assert torch.equal(stored.rows(1, 3).rows(1, 2).read(), expected[2:3])
    assert torch.equal(stored.viewed((5, 3)).read(), expected.reshape(5, 3))
    for wrong in (lambda: stored.viewed((4, 4)), lambda: stored.rows(0, 4), lambda: stored.rows(2, 1)):
        with pytest.raises(ValueError, match=r"some\.safetensors"):
            wrong()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=rf"{name}.*weights_only=True"):
        stored_tensors(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.safetensors cannot be read"):
        stored_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 30])
def test_a_cut_header_is_named(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"some\.safetensors is broken: its header is cut"):
        stored_tensors(file)


def test_cut_and_overlong_files_are_named(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ModelError, match="ends before its last tensor"):
        stored_tensors(file)
    file.write_bytes(content + b"x")
    with pytest.raises(ModelError, match="1 bytes after its last tensor"):
        stored_tensors(file)


def test_a_file_that_becomes_shorter_is_named_when_it_is_read(file):
    last = max(stored_tensors(file)[0].values(), key=lambda stored: (stored.start, stored.numel))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ends before its last tensor"):
        last.read()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"{never closed", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([1, 2], "header is wrong"),
        ({"a": {"dtype": "F32"}}, "header is wrong"),
        ({"a": entry(offsets=(0, "8"))}, "header is wrong"),
        ({"a": entry(shape=(2.5,))}, "a F32"),
        ({"a": entry(shape=(-2,))}, "a F32"),
        ({"a": entry(shape=(3,))}, "cannot take bytes 0 to 8"),
        ({"a": entry(dtype="F4")}, "a is F4, which is not read"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "b overlaps"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, "belong to none"),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, "ends before"),
    ],
)
def test_a_header_that_is_wrong_is_named(tmp_path, header, told):
    with pytest.raises(ModelError, match=told) as problem:
        stored_tensors(written(tmp_path / "wrong.safetensors", header, bytes(8)))
    assert "wrong.safetensors" in str(problem.value)
