"""Where tensors lie in a safetensors file, and files that are not what they say."""

import json

import pytest
import torch
from safetensors.torch import save_file

from finetuning.families.model_args import ModelError
from finetuning.families.tensors import check_weights, tensor_references


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
    tensors, metadata = tensor_references(file)
    assert metadata == {"made": "here"} and tensors.keys() == some_tensors.keys()
    for key, reference in tensors.items():
        value = reference.read()
        assert (value.dtype, value.shape) == (some_tensors[key].dtype, some_tensors[key].shape)
        assert torch.equal(value, some_tensors[key])
        assert (reference.numel, reference.nbytes) == (value.numel(), value.nbytes)


def test_rows_and_views_are_the_same_bytes(file, some_tensors):
    reference = tensor_references(file)[0]["torch.float16"]
    expected = some_tensors["torch.float16"]
    assert torch.equal(reference.rows(1, 3).read(), expected[1:3])
    assert torch.equal(reference.rows(1, 3).rows(1, 2).read(), expected[2:3])
    assert torch.equal(reference.viewed((5, 3)).read(), expected.reshape(5, 3))
    for wrong in (lambda: reference.viewed((4, 4)), lambda: reference.rows(0, 4), lambda: reference.rows(2, 1)):
        with pytest.raises(ValueError, match=r"some\.safetensors"):
            wrong()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.safetensors cannot be read"):
        tensor_references(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change", [lambda c: c[:0], lambda c: c[:5], lambda c: c[:30], lambda c: c[:-1], lambda c: c + b"x"]
)
def test_a_cut_or_overlong_file_is_named(file, change):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ModelError, match=r"some\.safetensors is damaged"):
        tensor_references(file)


def test_a_file_that_becomes_shorter_is_named_when_it_is_read(file):
    last = max(tensor_references(file)[0].values(), key=lambda reference: (reference.start, reference.numel))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"some\.safetensors is damaged"):
        last.read()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"{never closed",
        b"\xff\xfe",
        [1, 2],
        {"a": {"dtype": "F32"}},
        {"a": entry(offsets=(0, "8"))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(3,))},
        {"a": entry(dtype="F4")},
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"a": entry(), "b": entry(offsets=(12, 20))},
        {"a": entry(), "b": entry(offsets=(8, 16))},
    ],
)
def test_a_header_that_is_wrong_is_named(tmp_path, header):
    with pytest.raises(ModelError, match=r"wrong\.safetensors"):
        tensor_references(written(tmp_path / "wrong.safetensors", header, bytes(8)))


# -- what cannot be merged -------------------------------------------------------------------------------------------


CODES = torch.zeros(3, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight": CODES, "a.weight.absmax": torch.ones(1), "a.weight.quant_map": torch.ones(16)},  # nf4
        {"a.weight.quant_state.bitsandbytes__nf4": CODES},
        {"a.weight": CODES.to(torch.int8), "a.SCB": torch.ones(3)},  # int8
        {"a.weight_format": CODES},
        {"a.weight": CODES.to(torch.int8)},
        {"a.weight": torch.ones(2).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)},  # scaled fp8
        {"a.qweight": torch.zeros(2, dtype=torch.int32)},  # GPTQ
    ],
)
def test_quantised_weights_are_refused_by_name(tensors):
    with pytest.raises(ModelError, match=r"the model is quantised \(a\."):
        check_weights("the model", {"conv_in.weight": torch.ones(1), **tensors})


def test_integers_that_are_no_weights_and_8_bit_floats_are_sound():
    tensors = {"embeddings.position_ids": torch.arange(3), "mask": CODES}
    check_weights("the model", tensors | {"a.weight": torch.ones(2).to(torch.float8_e5m2)})
