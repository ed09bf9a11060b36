"""WebDataset shards as img2dataset, tar and people's own scripts write them."""

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import UnreadableImage
from finetuning.data.tars import WebDatasetArgs, read_shards


@dataclass
class Args(WebDatasetArgs):
    """Every flag that the reader looks at."""

    allow_outside_paths: bool = False


def encoded(side=4, kind="JPEG"):
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, kind)
    return content.getvalue()


IMAGE = encoded()


def pack(path, files, mode="w", **options):
    """A tar of {name: bytes, text, or a record for JSON}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in files.items():
            content = json.dumps(content) if isinstance(content, dict | list) else content
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def read(path, **flags):
    """({name: sample}, findings)"""
    findings = Findings()
    samples = list(read_shards(str(path), Args(**flags), findings))
    by_name = {sample.name: sample for sample in samples}
    assert len(by_name) == len(samples)
    return by_name, findings


def clean(path, **flags):
    samples, findings = read(path, **flags)
    assert findings.report() == ""
    return samples


def captions(samples):
    return {name: sample.captions for name, sample in samples.items()}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_of_img2dataset(tmp_path, kind):
    long = "x" * 150  # needs an entry of its own in the newer formats
    key = "000000012" if kind == tarfile.USTAR_FORMAT else f"000000012{long}"
    record = {"caption": "a dog", "url": "https://example.org/1.jpg", "key": key, "status": "success"}
    shard = pack(
        tmp_path / "00000.tar", {f"{key}.jpg": IMAGE, f"{key}.json": record, f"{key}.txt": "a dog"}, format=kind
    )
    samples = clean(shard)
    assert captions(samples) == {f"00000/{key}.jpg": ("a dog",)}
    (sample,) = samples.values()
    assert sample.image.read_bytes() == IMAGE
    assert sample.open().size == (4, 4)
    assert sample.split is None and sample.origin == f"{shard}/{key}.jpg"


def test_samples_keep_the_order_of_the_tar_and_their_own_bytes(tmp_path):
    files = {}
    for number in (2, 0, 1):
        files |= {f"{number}.png": encoded(number + 1, "PNG"), f"{number}.txt": f"number {number}"}
    samples = clean(pack(tmp_path / "a.tar", files))
    assert captions(samples) == {f"a/{number}.png": (f"number {number}",) for number in (2, 0, 1)}
    assert [sample.open().width for sample in samples.values()] == [3, 1, 2]


def test_equal_keys_in_two_shards_and_in_two_folders_are_kept_apart(tmp_path):
    files = {"0.jpg": IMAGE, "0.txt": "outer", "in/0.jpg": IMAGE, "in/0.txt": "inner"}
    pack(tmp_path / "x/00000.tar", files)
    pack(tmp_path / "y/00000.tar", files)
    assert captions(clean(tmp_path)) == {
        "x/00000/0.jpg": ("outer",), "x/00000/in/0.jpg": ("inner",),
        "y/00000/0.jpg": ("outer",), "y/00000/in/0.jpg": ("inner",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("{00000..00002}.tar", ["00000", "00001", "00002"]),
        ("{00001..00002}.tar", ["00001", "00002"]),
        ("0000{0,2}.tar", ["00000", "00002"]),
        ("0000{1..2}.tar", ["00001", "00002"]),
        ("{0..00002}.tar", ["00000", "00001", "00002"]),
        ("0000?.tar", ["00000", "00001", "00002"]),
        ("*/../0000{2..2}.tar", []),
        ("{00000..00000}*", ["00000"]),
    ],
)
def test_patterns(tmp_path, pattern, shards):
    for number in range(3):
        pack(tmp_path / f"{number:05}.tar", {"0.jpg": IMAGE, "0.txt": "x"})
    if shards:
        assert list(clean(tmp_path / pattern)) == [f"{shard}/0.jpg" for shard in shards]
    else:
        with pytest.raises(DatasetError, match="there is no"):
            read(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("path", [".", "gone", "gone-*.tar"])
def test_a_path_without_shards_is_refused(tmp_path, path):
    with pytest.raises(DatasetError, match=r"there (are no shards|is no .*gone)"):
        read(tmp_path / path)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/0", "val/0", "test/0"], ["test", "train", "validation"]),
        (["cc-train-0", "cc-validation-0"], ["train", "validation"]),
        (["my_test_room", "plain"], [None, None]),
    ],
)
def test_names_of_shards_and_folders_say_the_split_where_one_says_train(tmp_path, names, splits):
    for name in names:
        pack(tmp_path / f"{name}.tar", {"0.jpg": IMAGE, "0.txt": name})
    assert [sample.split for sample in clean(tmp_path).values()] == splits


def test_a_shard_without_a_split_beside_others_is_a_warning(tmp_path):
    for name in ("train-0", "extra-0"):
        pack(tmp_path / f"{name}.tar", {"0.jpg": IMAGE, "0.txt": name})
    samples, findings = read(tmp_path)
    assert [sample.split for sample in samples.values()] == [None, "train"]
    assert list(findings.as_dict()["warnings"].values()) == [[str(tmp_path / "extra-0.tar")]]


# Keys, fields and captions


def test_keys_with_dots_are_images_with_a_caption_each(tmp_path):
    files = {"room.1.jpg": IMAGE, "room.1.txt": "one", "room.2.jpg": IMAGE, "room.2.txt": "two"}
    assert captions(clean(pack(tmp_path / "s.tar", files))) == {"s/room.1.jpg": ("one",), "s/room.2.jpg": ("two",)}


@pytest.mark.parametrize(
    "fields", [{"jpg": IMAGE, "seg.png": IMAGE, "txt": "x"}, {"jpg": IMAGE, "png": IMAGE, "txt": "x"}]
)
def test_of_several_images_none_is_taken_until_one_is_named(tmp_path, fields):
    shard = pack(tmp_path / "s.tar", {f"0.{field}": content for field, content in fields.items()})
    samples, findings = read(shard)
    assert samples == {}
    ((kind, examples),) = findings.as_dict()["errors"].items()
    assert kind == "several_images" and examples == [f"{shard}/0 ({', '.join(list(fields)[:2])})"]
    wanted = list(fields)[1]
    assert captions(clean(shard, image_field=wanted)) == {f"s/0.{wanted}": ("x",)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("from txt",)),
        ({"caption_field": "json"}, ("from json",)),
        ({"caption_field": "json", "json_key": "tags"}, ("a", "b")),
        ({"caption_field": "blip.txt"}, ("from blip", "twice")),
        ({"caption_field": "blip.txt", "caption_lines": "first"}, ("from blip",)),
    ],
)
def test_where_the_caption_comes_from(tmp_path, flags, expected):
    record = {"caption": " from json ", "tags": ["a", None, "b "]}
    files = {"0.jpg": IMAGE, "0.json": record, "0.txt": "from txt\n", "0.blip.txt": "from blip\n\ntwice"}
    assert captions(read(pack(tmp_path / "s.tar", files), **flags)[0]) == {"s/0.jpg": expected}


def test_faults_of_samples_are_named_and_the_rest_is_taken(tmp_path):
    files = {
        "alone.txt": "of nothing", "bare.jpg": IMAGE, "bare.cls": "3", "latin.jpg": IMAGE,
        "latin.txt": "café".encode("latin-1"), "empty.jpg": IMAGE, "empty.txt": " \n", "cut.jpg": IMAGE,
        "cut.json": '{"caption": "a', "other.jpg": IMAGE, "other.json": {"text": "x", "url": "y"},
        "number.jpg": IMAGE, "number.json": {"caption": 3}, "list.jpg": IMAGE, "list.json": ["x"],
        "fine.jpg": IMAGE, "fine.txt": "fine", "README": "about", "._fine.jpg": b"of a Mac",
    }  # fmt: skip
    shard = pack(tmp_path / "s.tar", files)
    samples, findings = read(shard)
    assert captions(samples) == {"s/fine.jpg": ("fine",)}
    errors = findings.as_dict()["errors"]
    of_json = errors.pop("no_json_text")
    assert errors == {
        "sample_without_image": [f"{shard}/alone (it has txt)"],
        "sample_without_caption": [f"{shard}/bare (it has jpg, cls)"],
        "caption_not_utf8": [f"{shard}/latin.txt"],
        "no_caption": [f"{shard}/empty.txt"],
    }
    assert [one.removeprefix(f"{shard}/").split(" ")[0] for one in of_json] == [
        "cut.json", "other.json", "number.json", "list.json",
    ]  # fmt: skip
    assert "it has text, url" in of_json[1] and "it has 3" in of_json[2]
    assert list(findings.as_dict()["warnings"].values()) == [[f"{shard}/README"]]


def test_a_file_that_stands_twice_is_named(tmp_path):
    shard = pack(tmp_path / "s.tar", {"0.jpg": encoded(3), "0.txt": "first"})
    pack(shard, {"0.jpg": encoded(5), "1.jpg": IMAGE, "1.txt": "x"}, mode="a")
    samples, findings = read(shard)
    assert samples["s/0.jpg"].open().width == 3 and "s/1.jpg" in samples
    assert list(findings.as_dict()["errors"].values()) == [[f"{shard}/0.jpg"]]


def test_links_in_a_tar_are_named(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(IMAGE)
    os.link(path, tmp_path / "b.jpg")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(path, "0.jpg")
        tar.add(tmp_path / "b.jpg", "1.jpg")  # tar stores the second name of a file as a link to the first
        for name in ("0.txt", "1.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    _, findings = read(tmp_path / "s.tar")
    assert findings.as_dict()["errors"]["tar_link"] == [f"{tmp_path / 's.tar'}/1.jpg"]


# Shards that are not whole


def three(path):
    files = {}
    for number in range(3):
        files |= {f"{number}.jpg": IMAGE, f"{number}.txt": "x"}
    return pack(path, files)


def offsets(path):
    with tarfile.open(path) as tar:
        return {entry.name: (entry.offset, entry.offset_data) for entry in tar}


@pytest.mark.parametrize(
    ("member", "part", "beyond", "whole", "half"),
    [
        ("2.jpg", 1, 100, 2, False),  # in a file's content
        ("2.jpg", 0, 100, 2, False),  # in a header: tarfile says nothing
        ("2.jpg", 0, 0, 2, False),  # exactly between two files: only the end mark is missing
        ("2.txt", 1, 0, 2, True),  # a file of one byte that has none
    ],
)
def test_a_cut_shard_is_named_and_what_stands_before_the_cut_is_taken(tmp_path, member, part, beyond, whole, half):
    shard = three(tmp_path / "s.tar")
    os.truncate(shard, offsets(shard)[member][part] + beyond)
    pack(tmp_path / "t.tar", {"0.jpg": IMAGE, "0.txt": "x"})
    samples, findings = read(tmp_path)
    assert list(samples) == [*(f"s/{number}.jpg" for number in range(whole)), "t/0.jpg"]
    ((example,),) = (v for kind, v in findings.as_dict()["errors"].items() if kind == "damaged_tar")
    assert example.startswith(f"{shard} (")
    assert len(findings.errors) == 1 + half  # the image whose caption is lost is named too


def test_a_damaged_header_in_the_middle_is_named(tmp_path):
    shard = three(tmp_path / "s.tar")
    content = bytearray(shard.read_bytes())
    place = offsets(shard)["1.jpg"][0]
    content[place : place + 512] = b"\xaa" * 512
    shard.write_bytes(content)
    samples, findings = read(shard)
    assert list(samples) == ["s/0.jpg"]
    ((kind, (example,)),) = findings.as_dict()["errors"].items()
    assert kind == "damaged_tar" and str(place) in example


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("b.tgz", "w:gz"), ("c.tar", "w:bz2"), ("d.tar", "w:xz")]
)
def test_compressed_shards_are_refused_with_the_fix(tmp_path, name, mode):
    shard = pack(tmp_path / name, {"0.jpg": IMAGE, "0.txt": "x"}, mode)
    for path in (tmp_path, shard):
        samples, findings = read(path)
        assert samples == {}
        ((kind, examples),) = findings.as_dict()["errors"].items()
        assert kind == "compressed_tar" and examples == [str(shard)]


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>" * 100])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    samples, findings = read(tmp_path)
    assert samples == {}
    assert str(tmp_path / "s.tar") in findings.report()


def test_a_broken_image_is_told_with_its_place(tmp_path):
    noise = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(noise, "PNG")
    files = {"0.jpg": b"<html>", "0.txt": "x", "1.png": noise.getvalue()[:-200], "1.txt": "x"}
    shard = pack(tmp_path / "s.tar", files)
    for name, sample in clean(shard).items():
        with pytest.raises(UnreadableImage) as caught:
            sample.open()
        assert str(caught.value).startswith(f"{shard}/{Path(name).name}: ")
