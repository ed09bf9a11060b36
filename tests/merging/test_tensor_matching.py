"""Which tensors belong together, what is said where they do not, and whose are taken then. No file is read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetuning.families.model_args import ModelError
from finetuning.families.opening import ComponentFiles, Source
from finetuning.families.table import FAMILIES
from finetuning.families.tensors import TensorReference
from finetuning.merging.tensor_matching import is_copied, match


def reference(*shape, dtype=torch.float32, path="a.safetensors"):
    return TensorReference(Path(path), dtype, shape, 0)


def model(name, prediction_type=None, **components):
    """A Source of {component: {key: shape or TensorReference}}; its tensors lie in a file of its name."""
    made = lambda value: value if isinstance(value, TensorReference) else reference(*value, path=name)
    found = {
        component: ComponentFiles(None, (Path(name),), None, {key: made(value) for key, value in own.items()})
        for component, own in components.items()
    }
    family = FAMILIES["StableDiffusionPipeline"]
    return Source(name, "pipeline", family, family.pipeline, None, found, {"prediction_type": prediction_type})


def taken(matches):
    """{name: the models whose tensors go in}."""
    return {one.name: [str(reference.path) for reference in one.inputs] for one in matches}


BASE = model("base", unet={"a": (2, 3), "b": (4,)}, text_encoder={"c": (5,)}, vae={"d": (6,)})
TUNED = model("tuned", unet={"b": (4,), "a": (2, 3)}, text_encoder={"c": (5,)}, vae={"d": (7,)})


def test_unet_and_text_encoder_are_merged_and_the_rest_is_the_base_s():
    matches, warnings = match([BASE, TUNED])
    both = ["base", "tuned"]
    assert taken(matches) == {"unet.a": both, "unet.b": both, "text_encoder.c": both, "vae.d": ["base"]}
    assert [one.name for one in matches if one.is_copy] == ["vae.d"]
    assert warnings == []


def test_others_follow_in_the_order_in_which_they_were_given():
    third = model("third", unet=dict(TUNED.tensors["unet"]) | {"a": (2, 3)}, text_encoder={"c": (5,)})
    matches, _ = match([BASE, TUNED, third], ["unet"])
    assert taken(matches)["unet.a"] == ["base", "tuned", "third"]


def test_part_that_one_model_lacks_is_not_merged_unless_it_is_asked_for():
    bare = model("bare", unet={"a": (2, 3), "b": (4,)})
    for sources, lone in (([BASE, bare], True), ([bare, BASE], False)):
        matches, _ = match(sources)
        assert [one.name for one in matches if not one.is_copy] == ["unet.a", "unet.b"]
        assert ("text_encoder.c" in taken(matches)) == lone
        with pytest.raises(ModelError, match="bare has no text_encoder; bare has no vae"):
            match(sources, ["text_encoder", "vae"])


def test_integers_and_position_ids_are_the_base_s_and_never_a_mismatch():
    ids = {"x.position_ids": reference(1, 77, dtype=torch.float16), "steps": reference(1, dtype=torch.int64)}
    base, tuned = model("base", unet={"a": (2,)} | ids), model("tuned", unet={"a": (2,), "steps": (9,)})
    for on_mismatch in (None, "base", "tuned"):
        matches, warnings = match([base, tuned], None, on_mismatch)
        assert {one.name for one in matches if one.is_copy} == {"unet.x.position_ids", "unet.steps"}
        assert all(one.inputs == (base.tensors["unet"][one.key],) for one in matches if one.is_copy)
        assert warnings == []
        matches, warnings = match([tuned, base], ["unet"], on_mismatch) if on_mismatch else ([], [])
        assert "unet.x.position_ids" not in taken(matches)


@pytest.mark.parametrize(("key", "dtype", "copied"), [
    ("embeddings.position_ids", torch.float16, True),
    ("embeddings.position_embedding.weight", torch.float16, False), ("mask", torch.bool, True),
    ("a", torch.float8_e4m3fn, False),
])  # fmt: skip
def test_only_integers_and_position_ids_are_no_weights(key, dtype, copied):
    assert is_copied(key, reference(2, dtype=dtype)) == copied


DIFFERENT = model(
    "other", unet={"a": (2, 4), "more": (1,)}, text_encoder={"c": reference(5, dtype=torch.int8, path="other")}
)


def test_all_that_differs_is_refused_in_one_message():
    with pytest.raises(ModelError) as refusal:
        match([BASE, DIFFERENT])
    lines = [line.strip() for line in str(refusal.value).splitlines()]
    assert lines == [
        "the models do not fit together:",
        "other lacks 1 tensor(s) of the unet: b",
        "unlike other, base lacks 1 tensor(s) of the unet: more",
        "shapes differ in other, 1 tensor(s) of the unet: a [2, 3] and [2, 4]",
        "other has only integers for 1 tensor(s) of the text_encoder: c",
        "--on_mismatch base or tuned says whose tensors to take there",
    ]


@pytest.mark.parametrize(("on_mismatch", "expected"), [
    ("base", {"unet.a": "base", "unet.b": "base", "text_encoder.c": "base", "vae.d": "base"}),
    (
        "tuned",
        {"unet.a": "other", "unet.b": "base", "text_encoder.c": "other", "vae.d": "base", "unet.more": "other"},
    ),
])  # fmt: skip
def test_on_mismatch_says_whose_tensors_are_taken_and_it_is_told(on_mismatch, expected):
    matches, warnings = match([BASE, DIFFERENT], None, on_mismatch)
    assert taken(matches) == {name: [source] for name, source in expected.items()}
    assert all(one.is_copy for one in matches)
    assert len(warnings) == 4 and all(warning.startswith(f"--on_mismatch {on_mismatch}: ") for warning in warnings)


def test_mismatch_with_one_of_several_takes_that_tensor_from_one_model_alone():
    for sources, expected in (([BASE, TUNED, DIFFERENT], "tuned"), ([BASE, DIFFERENT, TUNED], "other")):
        matches, _ = match(sources, ["unet"], "tuned")
        assert taken(matches)["unet.a"] == [expected]
        matches, _ = match(sources, ["unet"], "base")
        assert taken(matches)["unet.a"] == ["base"]


def test_part_that_is_not_merged_may_differ():
    assert match([BASE, TUNED], ["text_encoder"])[1] == []  # their autoencoders have other shapes


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def test_schedules_that_differ_are_refused_by_name():
    rescaled = replace(model("new", "v_prediction", unet={"a": (1,)}), scheduler_config=ZERO_SNR)
    with pytest.raises(ModelError, match=r"old: v_prediction, new: v_prediction with rescale_betas_zero_snr"):
        match([model("old", "v_prediction", unet={"a": (1,)}), rescaled])


@pytest.mark.parametrize("on_mismatch", [None, "base", "tuned"])
def test_models_that_predict_different_things_are_always_refused(on_mismatch):
    sources = [model(kind or "unknown", kind, unet={"a": (1,)}) for kind in ("epsilon", None, "v_prediction")]
    with pytest.raises(ModelError, match=r"\(epsilon: epsilon, v_prediction: v_prediction\)") as refusal:
        match(sources, None, on_mismatch)
    assert "--on_mismatch" not in str(refusal.value)
    assert match(sources[:2])[1] == match(sources[1:])[1] == []  # a single file does not say what it predicts
