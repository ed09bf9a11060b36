"""DreamBooth's published folder: dataset/<subject>/NN.jpg and prompts_and_classes.txt."""

from dataclasses import dataclass

import pytest
from PIL import Image

from finetuning import cli
from finetuning.conversion import dreambooth
from finetuning.data.findings import DatasetError, Findings

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

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@dataclass
class Args(dreambooth.DreamBoothArgs):
    """Every flag that the reader looks at."""

    allow_outside_paths: bool = False


def images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)


@pytest.fixture
def published(tmp_path):
    """The repository's folder with three of its subjects."""
    images(tmp_path / "dataset", "bear_plushie/00.jpg", "dog/01.jpg", "dog/00.jpg", "dog2/00.jpg")
    (tmp_path / "dataset/prompts_and_classes.txt").write_text(TABLE)
    (tmp_path / "dataset/references_and_licenses.txt").write_text("dog: unsplash.com/...")
    return tmp_path


def read(root, **flags):
    findings = Findings()
    samples = dreambooth.read(str(root), Args(**flags), findings)
    return {sample.name: sample for sample in samples}, findings


@pytest.mark.parametrize("path", [".", "dataset"])
def test_captions_are_the_prompt_with_token_and_class(published, path):
    samples, findings = read(published / path, instance_prompt=["a photo of {token} {class}, {subject}"])
    assert {name: sample.captions for name, sample in samples.items()} == {
        "bear_plushie/00.jpg": ("a photo of sks stuffed animal, bear_plushie",),
        "dog/00.jpg": ("a photo of sks dog, dog",),
        "dog/01.jpg": ("a photo of sks dog, dog",),
        "dog2/00.jpg": ("a photo of sks dog, dog2",),
    }
    assert list(samples) == ["bear_plushie/00.jpg", "dog/00.jpg", "dog/01.jpg", "dog2/00.jpg"]
    assert findings.report() == "" and {sample.split for sample in samples.values()} == {"train"}
    assert samples["dog/01.jpg"].image == published / "dataset/dog/01.jpg"


def test_subjects_with_equal_captions_are_warnings(published):
    _, findings = read(published)
    assert list(findings.as_dict()["warnings"].values()) == [["dog, dog2"]]
    _, findings = read(published, subject=["dog", "bear_plushie"])
    assert not findings.warnings


def test_one_subject_folder_takes_its_class_from_the_table_beside_it(published):
    samples, _ = read(published / "dataset/bear_plushie")
    assert {name: sample.captions for name, sample in samples.items()} == {
        "bear_plushie/00.jpg": ("a photo of sks stuffed animal",)
    }


def test_a_folder_of_ones_own_needs_no_table_where_the_prompt_says_the_class(tmp_path):
    images(tmp_path / "mine", "b.jpg", "a.png")
    samples, findings = read(tmp_path / "mine", instance_prompt=["a photo of {token} cat"])
    assert {name: sample.captions for name, sample in samples.items()} == {
        "mine/a.png": ("a photo of sks cat",), "mine/b.jpg": ("a photo of sks cat",),
    }  # fmt: skip
    assert not findings.errors


def test_images_beside_the_subjects_are_named(published):
    images(published / "dataset", "loose.jpg")
    samples, findings = read(published)
    assert list(findings.as_dict()["errors"].values()) == [["loose.jpg"]]
    assert len(samples) == 4


def test_subjects_without_a_class_are_refused_together(published):
    images(published / "dataset", "cat9/00.jpg", "Prompts/00.jpg")
    with pytest.raises(DatasetError, match=r"prompts_and_classes\.txt says no class for Prompts, cat9: .*prompt"):
        read(published)
    assert len(read(published, instance_prompt=["{subject}"])[0]) == 6


def test_unknown_subjects_are_refused_with_those_there_are(published):
    with pytest.raises(DatasetError, match=r"--subject dog4 vase: .*only bear_plushie, dog, dog2"):
        read(published, subject=["dog4", "dog", "vase"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.replace("subject_name,class", "names"), r'no line "subject_name,class"'),
        (TABLE.replace("vase", "café").encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(published, table, message):
    path = published / "dataset/prompts_and_classes.txt"
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(cli.UserError, match=rf"prompts_and_classes\.txt .*{message}"):
        read(published)


def test_prompts_that_cannot_be_filled_in_are_refused_before_reading():
    _, problems = cli.read(Args, "", ["--instance_prompt", "a {token} {klass}"])
    assert problems == [
        "--instance_prompt 'a {token} {klass}' has {klass}: only {token}, {class}, {subject} are filled in"
    ]


def test_several_prompts_and_another_token(published):
    prompts = ["a photo of {token} {class}", "{token} {class}"]
    samples, _ = read(published, subject=["dog2"], instance_prompt=prompts, instance_token="ohwx")
    assert {name: sample.captions for name, sample in samples.items()} == {
        "dog2/00.jpg": ("a photo of ohwx dog", "ohwx dog")
    }
