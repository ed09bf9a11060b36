"""DreamBooth's published folder: dataset/<subject>/NN.jpg and prompts_and_classes.txt."""

import pytest

from finetuning import cli
from finetuning.conversion.dreambooth import DreamBoothArgs
from finetuning.data.findings import DatasetError

TABLE = """Classes

subject_name,class
bear_plushie,stuffed animal
dog,dog
dog2,dog
vase,vase

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""
IMAGES = ["bear_plushie/00.jpg", "dog/00.jpg", "dog/01.jpg", "dog2/00.jpg"]


@pytest.fixture
def published(tmp_path, lay):
    """The repository's folder with three of its subjects."""
    lay(tmp_path / "dataset", reversed(IMAGES))
    lay(
        tmp_path / "dataset", {"prompts_and_classes.txt": TABLE, "references_and_licenses.txt": "dog: unsplash.com/..."}
    )
    return tmp_path


@pytest.mark.parametrize("path", [".", "dataset"])
def test_captions_are_the_prompt_with_token_and_class(published, clean, path):
    found = clean("dreambooth", published / path, instance_prompt=["a photo of {token} {class}, {subject}"])
    assert found.captions == [
        ("bear_plushie/00.jpg", ("a photo of sks stuffed animal, bear_plushie",)),
        ("dog/00.jpg", ("a photo of sks dog, dog",)),
        ("dog/01.jpg", ("a photo of sks dog, dog",)),
        ("dog2/00.jpg", ("a photo of sks dog, dog2",)),
    ]
    assert {split for split, _ in found.places} == {"train"}
    assert found["dog/01.jpg"].image == published / "dataset/dog/01.jpg"


def test_subjects_with_equal_captions_are_warnings(published, read_source):
    assert read_source("dreambooth", published).warnings == {"equal_captions": ["dog, dog2"]}
    assert read_source("dreambooth", published, subject=["dog", "bear_plushie"]).warnings == {}


@pytest.mark.parametrize(
    ("path", "flags", "captions"),
    [
        # the class from the table beside the folder
        ("dataset/bear_plushie", {}, [("bear_plushie/00.jpg", ("a photo of sks stuffed animal",))]),
        # no table is needed where the prompt says the class
        (
            "mine",
            {"instance_prompt": ["a {token} cat"]},
            [(f"mine/{name}", ("a sks cat",)) for name in ("a.png", "b.jpg")],
        ),
        (
            ".",
            {
                "subject": ["dog2"],
                "instance_prompt": ["a {token} {class}", "{token} {class}"],
                "instance_token": "ohwx",
            },
            [("dog2/00.jpg", ("a ohwx dog", "ohwx dog"))],
        ),
    ],
)
def test_one_subject_alone_and_several_prompts(published, lay, read_source, path, flags, captions):
    lay(published / "mine", ["b.jpg", "a.png"])
    found = read_source("dreambooth", published / path, **flags)
    assert found.captions == captions and not found.errors


def test_images_beside_the_subjects_are_named(published, lay, read_source):
    lay(published / "dataset", ["loose.jpg"])
    found = read_source("dreambooth", published)
    assert found.errors == {"outside_subjects": ["loose.jpg"]} and [name for name, _ in found.captions] == IMAGES


def test_subjects_without_a_class_are_refused_together(published, lay, read_source):
    lay(published / "dataset", ["cat9/00.jpg", "Prompts/00.jpg"])
    with pytest.raises(DatasetError, match=r"prompts_and_classes\.txt says no class for Prompts, cat9: .*prompt"):
        read_source("dreambooth", published)
    assert len(read_source("dreambooth", published, instance_prompt=["{subject}"]).samples) == 6


def test_unknown_subjects_are_refused_with_those_there_are(published, read_source):
    with pytest.raises(DatasetError, match=r"--subject dog4 vase: .*only bear_plushie, dog, dog2"):
        read_source("dreambooth", published, subject=["dog4", "dog", "vase"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.replace("subject_name,class", "names").encode(), r'no line "subject_name,class"'),
        (TABLE.replace("vase", "café").encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(published, read_source, table, message):
    (published / "dataset/prompts_and_classes.txt").write_bytes(table)
    with pytest.raises(cli.UserError, match=rf"prompts_and_classes\.txt .*{message}"):
        read_source("dreambooth", published)


def test_prompts_that_cannot_be_filled_in_are_refused_before_reading(problems_of):
    (problem,) = problems_of(DreamBoothArgs, instance_prompt="a {token} {klass}")
    assert problem.startswith("--instance_prompt 'a {token} {klass}' has {klass}: only {token}, {class}, {subject}")
