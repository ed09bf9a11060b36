"""Copies of components: nothing that can run code, and the plain name where there is only a variant."""

import pytest

from finetuning.families.folders import copy_component
from finetuning.families.model_args import ModelError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD, INDEX = "diffusion_pytorch_model-00001-of-00002.safetensors", f"{WEIGHTS}.index.json"


@pytest.mark.parametrize(
    ("files", "weights", "expected"),
    [
        (("config.json", WEIGHTS, "diffusion_pytorch_model.bin", "model.onnx"), True, {"config.json", WEIGHTS}),
        (("config.json", "pytorch_model.bin"), True, "pytorch_model.bin"),
        (("config.json", "pytorch_model.bin"), False, {"config.json"}),
        (("model.fp16.safetensors",), True, {"model.safetensors"}),
        ((INDEX, SHARD, "config.json"), True, {INDEX, SHARD, "config.json"}),
        ((INDEX, SHARD, "config.json"), False, {"config.json"}),
    ],
)
def test_a_component_is_copied_without_pickles(tmp_path, files, weights, expected):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in files:
        (source / name).write_text(name)
    if isinstance(expected, str):
        with pytest.raises(ModelError, match=expected):
            copy_component(source, target, weights)
    else:
        copy_component(source, target, weights)
        assert {path.name for path in target.iterdir()} == expected
