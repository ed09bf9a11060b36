"""Stanford Dogs' own schema: breed folders, XML without an ending, MATLAB split lists, three tars."""

import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from finetuning.conversion.stanford_dogs import StanfordDogsArgs
from finetuning.data.findings import DatasetError
from finetuning.data.samples import Member

CHIHUAHUA = "n02085620-Chihuahua/n02085620_7.jpg"
RETRIEVER = "n02099429-curly-coated_retriever/n02099429_121.jpg"
HOUND = "n02116738-African_hunting_dog/n02116738_1105.jpg"
ANNOTATION = """<annotation>
  <folder>02085620</folder>
  <filename>n02085620_7</filename>
  <size><width>20</width><height>10</height><depth>3</depth></size>
  <segment>0</segment>
  {objects}
</annotation>"""
OBJECT = """<object><name>Chihuahua</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
  <bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


@pytest.fixture
def annotate(dogs, lay):
    def annotate(image, *boxes):
        objects = "\n".join(OBJECT.format(*box) for box in boxes)
        lay(dogs, {f"Annotation/{image.removesuffix('.jpg')}": ANNOTATION.format(objects=objects)})

    return annotate


def write_list(path, *images):
    """As in lists.tar: cell arrays [images, 1] of names, and labels from 1."""
    cells = np.empty((len(images), 1), dtype=object)
    cells[:, 0] = images
    savemat(path, {"file_list": cells, "annotation_list": cells, "labels": np.ones((len(images), 1), np.uint8)})


@pytest.fixture
def dogs(tmp_path, lay):
    """Three unpacked images of 20 x 10, without annotations and lists."""
    return lay(tmp_path, {f"Images/{name}": Image.new("RGB", (20, 10)) for name in (RETRIEVER, CHIHUAHUA, HOUND)})


def tar(archive, root, *names):
    with tarfile.open(archive, "w") as tar:
        for name in names:
            tar.add(root / name, name)


@pytest.mark.parametrize(
    ("flags", "captions"),
    [
        # a breed is all after the first hyphen
        ({}, [("a photo of a Chihuahua",), ("a photo of a curly-coated retriever",),
              ("a photo of an African hunting dog",)]),
        ({"dog_captions": ["{name}", "the face of {a_name}, a dog"], "lower_case_breeds": True},
         [("chihuahua", "the face of a chihuahua, a dog"),
          ("curly-coated retriever", "the face of a curly-coated retriever, a dog"),
          ("african hunting dog", "the face of an african hunting dog, a dog")]),
    ],
)  # fmt: skip
def test_captions_name_the_breed(dogs, clean, flags, captions):
    found = clean("stanford-dogs", dogs, **flags)
    assert found.captions == list(zip((CHIHUAHUA, RETRIEVER, HOUND), captions, strict=True))
    assert {split for split, _ in found.places} == {None} and found[HOUND].image == dogs / "Images" / HOUND


def test_lists_say_the_split(dogs, clean):
    write_list(dogs / "train_list.mat", HOUND, CHIHUAHUA)
    write_list(dogs / "test_list.mat", RETRIEVER)
    assert clean("stanford-dogs", dogs).places == {("train", CHIHUAHUA), ("train", HOUND), ("test", RETRIEVER)}
    assert {split for split, _ in clean("stanford-dogs", dogs, use_lists=False).places} == {None}


def test_lists_and_images_that_do_not_fit_are_named(dogs, read_source):
    write_list(dogs / "train_list.mat", CHIHUAHUA, "n02085620-Chihuahua/gone.jpg")
    write_list(dogs / "test_list.mat", RETRIEVER, CHIHUAHUA)
    found = read_source("stanford-dogs", dogs)
    assert found.places == {("train", CHIHUAHUA), ("test", RETRIEVER)}
    assert found.errors == {
        "listed_not_there": ["train_list.mat: n02085620-Chihuahua/gone.jpg"],
        "in_both_lists": [CHIHUAHUA],
        "in_no_list": [HOUND],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no test_list\.mat: .*--no-use_lists"),
        (b"not MATLAB", r"test_list\.mat is no list of Stanford Dogs"),
        (b"", r"test_list\.mat is no list of Stanford Dogs"),
    ],
)
def test_a_list_that_is_missing_or_is_none_is_refused_by_name(dogs, read_source, content, message):
    write_list(dogs / "train_list.mat", CHIHUAHUA)
    if content is not None:
        (dogs / "test_list.mat").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_source("stanford-dogs", dogs)


def test_crop_to_the_box_around_all_dogs_inside_the_image(dogs, annotate, clean, read_source):
    annotate(CHIHUAHUA, (3, 1, 11, 9))
    annotate(RETRIEVER, (2, 3, 6, 8), (5, 1, 9, 4))
    annotate(HOUND, (-2, 4, 25, 12))
    found = read_source("stanford-dogs", dogs, crop_to_dogs=True)
    assert [sample.box for sample in found.samples] == [(3, 1, 11, 9), (2, 1, 9, 8), (0, 4, 20, 10)]
    assert (found.errors, found.warnings) == ({}, {"several_dogs": [RETRIEVER]})
    assert {sample.box for sample in clean("stanford-dogs", dogs).samples} == {None}


def test_annotations_that_give_no_box_are_named(dogs, annotate, read_source):
    annotate(RETRIEVER, (30, 1, 40, 9))
    annotate(HOUND)
    found = read_source("stanford-dogs", dogs, crop_to_dogs=True)
    assert found.samples == []
    assert found.errors.pop("bad_annotation")[0].startswith(HOUND.removesuffix(".jpg"))
    assert found.errors == {"no_annotation": [CHIHUAHUA], "empty_box": [f"{RETRIEVER} (30, 1, 20, 9)"]}


def test_the_tars_are_read_without_unpacking(dogs, annotate, clean, tmp_path_factory):
    for name in (CHIHUAHUA, RETRIEVER, HOUND):
        annotate(name, (1, 2, 3, 4))
    write_list(dogs / "train_list.mat", CHIHUAHUA, RETRIEVER)
    write_list(dogs / "test_list.mat", HOUND)
    packed = tmp_path_factory.mktemp("packed")
    tar(packed / "images.tar", dogs, "Images")
    tar(packed / "annotation.tar", dogs, "Annotation")
    tar(packed / "lists.tar", dogs, "train_list.mat", "test_list.mat")
    found, unpacked = (clean("stanford-dogs", root, crop_to_dogs=True) for root in (packed, dogs))
    facts = lambda found: [(one.key, one.captions, one.box) for one in found.samples]
    assert facts(found) == facts(unpacked)
    assert all(isinstance(sample.image, Member) for sample in found.samples)
    assert found[HOUND].image.read_bytes() == (dogs / "Images" / HOUND).read_bytes()


def test_unpacked_files_come_before_tars_and_that_is_a_warning(dogs, read_source):
    tar(dogs / "images.tar", dogs, "Images")
    found = read_source("stanford-dogs", dogs)
    assert found[CHIHUAHUA].image == dogs / "Images" / CHIHUAHUA
    assert sorted(found.warnings["there_twice"]) == [CHIHUAHUA, RETRIEVER, HOUND]


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
def test_templates_that_cannot_be_filled_in_are_refused_before_reading(problems_of, template, problem):
    (found,) = problems_of(StanfordDogsArgs, dog_captions=template)
    assert found.startswith("--dog_captions") and problem in found
