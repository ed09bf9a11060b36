"""Stanford Dogs' own schema: breed folders, XML without an ending, MATLAB split lists, three tars."""

import tarfile
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from finetuning import cli
from finetuning.conversion import stanford_dogs
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.samples import Member

CHIHUAHUA = "n02085620-Chihuahua/n02085620_7.jpg"
RETRIEVER = "n02099429-curly-coated_retriever/n02099429_121.jpg"
HOUND = "n02116738-African_hunting_dog/n02116738_1105.jpg"
ANNOTATION = """<annotation>
  <folder>02085620</folder>
  <filename>n02085620_7</filename>
  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>
  <segment>0</segment>
  {objects}
</annotation>"""
OBJECT = """<object><name>Chihuahua</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
  <bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


@dataclass
class Args(stanford_dogs.StanfordDogsArgs):
    """Every flag that the reader looks at."""

    allow_outside_paths: bool = False


def annotate(root, image, *boxes, size=(20, 10)):
    path = (root / "Annotation" / image).with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "\n".join(OBJECT.format(*box) for box in boxes)
    path.write_text(ANNOTATION.format(width=size[0], height=size[1], objects=objects))


def write_list(path, *images):
    """As in lists.tar: cell arrays [images, 1] of names, and labels from 1."""
    cells = np.empty((len(images), 1), dtype=object)
    cells[:, 0] = images
    savemat(path, {"file_list": cells, "annotation_list": cells, "labels": np.ones((len(images), 1), np.uint8)})


@pytest.fixture
def dogs(tmp_path):
    """Three unpacked images of 20 x 10, without annotations and lists."""
    for image in (RETRIEVER, CHIHUAHUA, HOUND):
        path = tmp_path / "Images" / image
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(path)
    return tmp_path


def read(root, **flags):
    findings = Findings()
    return {sample.name: sample for sample in stanford_dogs.read(str(root), Args(**flags), findings)}, findings


def clean(root, **flags):
    samples, findings = read(root, **flags)
    assert findings.report() == ""
    return samples


def pack(archive, root, *names):
    with tarfile.open(archive, "w") as tar:
        for name in names:
            tar.add(root / name, name)


def test_a_breed_is_all_after_the_first_hyphen(dogs):
    samples = clean(dogs)
    assert list(samples) == [CHIHUAHUA, RETRIEVER, HOUND]
    assert [sample.captions for sample in samples.values()] == [
        ("a photo of a Chihuahua",), ("a photo of a curly-coated retriever",), ("a photo of an African hunting dog",),
    ]  # fmt: skip
    assert {sample.split for sample in samples.values()} == {None}
    assert samples[HOUND].image == dogs / "Images" / HOUND


def test_templates_and_small_letters(dogs):
    templates = ["{name}", "the face of {a_name}, a dog"]
    samples = clean(dogs, dog_captions=templates, lower_case_breeds=True)
    assert samples[HOUND].captions == ("african hunting dog", "the face of an african hunting dog, a dog")


def test_lists_say_the_split(dogs):
    write_list(dogs / "train_list.mat", HOUND, CHIHUAHUA)
    write_list(dogs / "test_list.mat", RETRIEVER)
    assert [sample.split for sample in clean(dogs).values()] == ["train", "test", "train"]
    assert {sample.split for sample in clean(dogs, use_lists=False).values()} == {None}


def test_lists_and_images_that_do_not_fit_are_named(dogs):
    write_list(dogs / "train_list.mat", CHIHUAHUA, "n02085620-Chihuahua/gone.jpg")
    write_list(dogs / "test_list.mat", RETRIEVER, CHIHUAHUA)
    samples, findings = read(dogs)
    assert {name: sample.split for name, sample in samples.items()} == {CHIHUAHUA: "train", RETRIEVER: "test"}
    assert findings.as_dict()["errors"] == {
        "listed_not_there": ["train_list.mat: n02085620-Chihuahua/gone.jpg"],
        "in_both_lists": [CHIHUAHUA],
        "in_no_list": [HOUND],
    }


def test_one_list_without_the_other_is_refused(dogs):
    write_list(dogs / "train_list.mat", CHIHUAHUA)
    with pytest.raises(DatasetError, match=r"no test_list\.mat: .*--no-use_lists"):
        read(dogs)


@pytest.mark.parametrize("content", [b"not MATLAB", b""])
def test_a_list_that_is_none_is_refused_by_name(dogs, content):
    write_list(dogs / "train_list.mat", CHIHUAHUA)
    (dogs / "test_list.mat").write_bytes(content)
    with pytest.raises(DatasetError, match=r"test_list\.mat is no list of Stanford Dogs"):
        read(dogs)


def test_crop_to_the_box_around_all_dogs_inside_the_image(dogs):
    annotate(dogs, CHIHUAHUA, (3, 1, 11, 9))
    annotate(dogs, RETRIEVER, (2, 3, 6, 8), (5, 1, 9, 4))
    annotate(dogs, HOUND, (-2, 4, 25, 12))
    samples, findings = read(dogs, crop_to_dogs=True)
    assert [sample.box for sample in samples.values()] == [(3, 1, 11, 9), (2, 1, 9, 8), (0, 4, 20, 10)]
    assert not findings.errors
    assert list(findings.as_dict()["warnings"].values()) == [[RETRIEVER]]
    assert {sample.box for sample in clean(dogs).values()} == {None}


def test_annotations_that_give_no_box_are_named(dogs):
    annotate(dogs, RETRIEVER, (30, 1, 40, 9))
    annotate(dogs, HOUND)
    samples, findings = read(dogs, crop_to_dogs=True)
    assert samples == {}
    errors = findings.as_dict()["errors"]
    assert errors.pop("bad_annotation")[0].startswith(HOUND.removesuffix(".jpg"))
    assert errors == {"no_annotation": [CHIHUAHUA], "empty_box": [f"{RETRIEVER} (30, 1, 20, 9)"]}


def test_the_tars_are_read_without_unpacking(dogs, tmp_path_factory):
    for name in (CHIHUAHUA, RETRIEVER, HOUND):
        annotate(dogs, name, (1, 2, 3, 4))
    write_list(dogs / "train_list.mat", CHIHUAHUA, RETRIEVER)
    write_list(dogs / "test_list.mat", HOUND)
    packed = tmp_path_factory.mktemp("packed")
    pack(packed / "images.tar", dogs, "Images")
    pack(packed / "annotation.tar", dogs, "Annotation")
    pack(packed / "lists.tar", dogs, "train_list.mat", "test_list.mat")
    samples = clean(packed, crop_to_dogs=True)
    unpacked = clean(dogs, crop_to_dogs=True)
    assert [(s.key, s.captions, s.box) for s in samples.values()] == [
        (s.key, s.captions, s.box) for s in unpacked.values()
    ]
    assert all(isinstance(sample.image, Member) for sample in samples.values())
    assert samples[HOUND].image.read() == (dogs / "Images" / HOUND).read_bytes()


def test_unpacked_files_come_before_tars_and_that_is_a_warning(dogs):
    pack(dogs / "images.tar", dogs, "Images")
    samples, findings = read(dogs)
    assert samples[CHIHUAHUA].image == dogs / "Images" / CHIHUAHUA
    assert sorted(*findings.as_dict()["warnings"].values()) == [CHIHUAHUA, RETRIEVER, HOUND]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("a photo of {breed}", "{breed}: only {name}, {a_name} are filled in"),
        ("a {}", "{}: only"),
        ("a {name", "expected '}'"),
        ("{name:d}", "format"),
        (" ", "empty caption"),
    ],
)
def test_templates_that_cannot_be_filled_in_are_refused_before_reading(template, problem):
    _, problems = cli.read(Args, "", ["--dog_captions", "{name}", template])
    assert len(problems) == 1 and problems[0].startswith("--dog_captions") and problem in problems[0]
