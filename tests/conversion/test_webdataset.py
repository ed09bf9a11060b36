"""WebDataset shards as img2dataset, tar and people's own scripts write them."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from finetuning.data.findings import DatasetError
from finetuning.data.images import UnreadableImage


@pytest.fixture
def read(read_source):
    return lambda path, **flags: read_source("webdataset", path, **flags)


@pytest.fixture
def captions(clean):
    """{name: captions} of shards in which nothing is wrong."""
    return lambda path, **flags: dict(clean("webdataset", path, **flags).captions)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_of_img2dataset(tmp_path, pack, clean, kind):
    key = "000000012" + ("" if kind == tarfile.USTAR_FORMAT else "x" * 150)  # which needs an entry of its own
    record = {"caption": "a dog", "url": "https://example.org/1.jpg", "key": key, "status": "success"}
    shard = pack(tmp_path / "00000.tar", {f"{key}.jpg": 9, f"{key}.json": record, f"{key}.txt": "a dog"}, format=kind)
    (sample,) = clean("webdataset", shard).samples
    assert (sample.name, sample.captions, sample.split) == (f"00000/{key}.jpg", ("a dog",), None)
    assert sample.origin == f"{shard}/{key}.jpg" and sample.open().getpixel((0, 0)) == (9, 0, 0)


def test_samples_keep_the_order_of_the_tar_and_their_own_bytes(tmp_path, pack, clean):
    files = {f"{n}.{end}": n if end == "png" else f"number {n}" for n in (2, 0, 1) for end in ("png", "txt")}
    found = clean("webdataset", pack(tmp_path / "a.tar", files))
    assert found.captions == [(f"a/{number}.png", (f"number {number}",)) for number in (2, 0, 1)]
    assert [sample.open().getpixel((0, 0))[0] for sample in found.samples] == [2, 0, 1]


def test_equal_keys_in_two_shards_and_in_two_folders_are_kept_apart(tmp_path, pack, captions):
    for folder in "xy":
        pack(tmp_path / f"{folder}/00000.tar", {"0.jpg": 1, "0.txt": "outer", "in/0.jpg": 2, "in/0.txt": "inner"})
    assert captions(tmp_path) == {
        f"{folder}/00000/{name}": (text,)
        for folder in "xy"
        for name, text in (("0.jpg", "outer"), ("in/0.jpg", "inner"))
    }


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("{00000..00002}.tar", [0, 1, 2]),
        ("{00001..00002}.tar", [1, 2]),
        ("0000{0,2}.tar", [0, 2]),
        ("0000{1..2}.tar", [1, 2]),
        ("{0..00002}.tar", [0, 1, 2]),
        ("0000?.tar", [0, 1, 2]),
        ("{00000..00000}*", [0]),
    ],
)
def test_patterns(tmp_path, pack, captions, pattern, shards):
    for number in range(3):
        pack(tmp_path / f"{number:05}.tar", {"0.jpg": 1, "0.txt": "x"})
    assert list(captions(tmp_path / pattern)) == [f"{shard:05}/0.jpg" for shard in shards]


@pytest.mark.parametrize("path", [".", "gone", "gone-*.tar", "*/../gone{2..2}.tar"])
def test_a_path_without_shards_is_refused(tmp_path, read, path):
    with pytest.raises(DatasetError, match=r"there (are no shards|is no .*gone)"):
        read(f"{tmp_path}/{path}")


@pytest.mark.parametrize(
    ("names", "splits", "warned"),
    [
        (["train/0", "val/0", "test/0"], ["test", "train", "validation"], []),
        (["cc-train-0", "cc-validation-0"], ["train", "validation"], []),
        (["my_test_room", "plain"], [None, None], []),  # none says train
        (["train-0", "extra-0"], [None, "train"], ["extra-0"]),
    ],
)
def test_names_of_shards_and_folders_say_the_split_where_one_says_train(tmp_path, pack, read, names, splits, warned):
    for name in names:
        pack(tmp_path / f"{name}.tar", {"0.jpg": 1, "0.txt": name})
    found = read(tmp_path)
    assert [sample.split for sample in found.samples] == splits and not found.errors
    assert found.warnings.get("shard_without_split", []) == [str(tmp_path / f"{name}.tar") for name in warned]


# Keys, fields and captions


def test_keys_with_dots_are_images_with_a_caption_each(tmp_path, pack, captions):
    files = {"room.1.jpg": 1, "room.1.txt": "one", "room.2.jpg": 2, "room.2.txt": "two"}
    assert captions(pack(tmp_path / "s.tar", files)) == {"s/room.1.jpg": ("one",), "s/room.2.jpg": ("two",)}


@pytest.mark.parametrize("other", ["seg.png", "png"])
def test_of_several_images_none_is_taken_until_one_is_named(tmp_path, pack, read, captions, other):
    shard = pack(tmp_path / "s.tar", {"0.jpg": 1, f"0.{other}": 2, "0.txt": "x"})
    found = read(shard)
    assert found.samples == [] and found.errors == {"several_images": [f"{shard}/0 (jpg, {other})"]}
    assert captions(shard, image_field=other) == {f"s/0.{other}": ("x",)}


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
def test_where_the_caption_comes_from(tmp_path, pack, read, flags, expected):
    record = {"caption": " from json ", "tags": ["a", None, "b "]}
    files = {"0.jpg": 1, "0.json": record, "0.txt": "from txt\n", "0.blip.txt": "from blip\n\ntwice"}
    assert read(pack(tmp_path / "s.tar", files), **flags).captions == [("s/0.jpg", expected)]


def test_faults_of_samples_are_named_and_the_rest_is_taken(tmp_path, pack, read):
    files = {
        "alone.txt": "of nothing", "bare.jpg": 1, "bare.cls": "3", "latin.jpg": 1, "latin.txt": b"caf\xe9",
        "empty.jpg": 1, "empty.txt": " \n", "cut.jpg": 1, "cut.json": '{"caption": "a', "other.jpg": 1,
        "other.json": {"text": "x", "url": "y"}, "number.jpg": 1, "number.json": {"caption": 3}, "list.jpg": 1,
        "list.json": ["x"], "fine.jpg": 1, "fine.txt": "fine", "README": "about", "._fine.jpg": b"of a Mac",
    }  # fmt: skip
    shard = pack(tmp_path / "s.tar", files)
    found = read(shard)
    assert found.captions == [("s/fine.jpg", ("fine",))]
    of_json = found.errors.pop("no_json_text")
    assert found.errors == {
        "sample_without_image": [f"{shard}/alone (it has txt)"],
        "sample_without_caption": [f"{shard}/bare (it has jpg, cls)"],
        "caption_not_utf8": [f"{shard}/latin.txt"],
        "no_caption": [f"{shard}/empty.txt"],
    }
    assert [one.removeprefix(f"{shard}/").split(" ")[0] for one in of_json] == [
        "cut.json", "other.json", "number.json", "list.json",
    ]  # fmt: skip
    assert "it has text, url" in of_json[1] and "it has 3" in of_json[2]
    assert found.warnings == {"no_ending": [f"{shard}/README"]}


def test_a_file_that_stands_twice_is_named(tmp_path, pack, read):
    shard = pack(tmp_path / "s.tar", {"0.jpg": 3, "0.txt": "first"})
    pack(shard, {"0.jpg": 5, "1.jpg": 1, "1.txt": "x"}, mode="a")
    found = read(shard)
    assert found["s/0.jpg"].open().getpixel((0, 0))[0] == 3 and len(found.samples) == 2
    assert found.errors == {"twice_in_shard": [f"{shard}/0.jpg"]}


def test_links_in_a_tar_are_named(tmp_path, lay, read):
    lay(tmp_path, ["a.jpg"])
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "0.jpg")
        tar.add(tmp_path / "b.jpg", "1.jpg")  # tar stores the second name of a file as a link to the first
        for name in ("0.txt", "1.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert read(tmp_path / "s.tar").errors["tar_link"] == [f"{tmp_path / 's.tar'}/1.jpg"]


# Shards that are not whole


@pytest.fixture
def three(tmp_path, pack):
    """A shard of three samples, and {name: (where its header, where its content begins)}."""
    shard = pack(
        tmp_path / "s.tar", {f"{n}.{end}": 1 if end == "jpg" else "x" for n in range(3) for end in ("jpg", "txt")}
    )
    with tarfile.open(shard) as tar:
        return shard, {entry.name: (entry.offset, entry.offset_data) for entry in tar}


@pytest.mark.parametrize(
    ("member", "part", "beyond", "half"),
    [
        ("2.jpg", 1, 50, False),  # in a file's content
        ("2.jpg", 0, 100, False),  # in a header: tarfile says nothing
        ("2.jpg", 0, 0, False),  # exactly between two files: only the end mark is missing
        ("2.txt", 1, 0, True),  # a file of one byte that has none
    ],
)
def test_a_cut_shard_is_named_and_what_stands_before_the_cut_is_taken(
    tmp_path, three, pack, read, member, part, beyond, half
):
    shard, offsets = three
    os.truncate(shard, offsets[member][part] + beyond)
    pack(tmp_path / "t.tar", {"0.jpg": 1, "0.txt": "x"})
    found = read(tmp_path)
    assert [name for name, _ in found.captions] == ["s/0.jpg", "s/1.jpg", "t/0.jpg"]
    (example,) = found.errors["damaged_tar"]
    assert example.startswith(f"{shard} (")
    assert len(found.errors) == 1 + half  # the image whose caption is lost is named too


def test_a_damaged_header_in_the_middle_is_named(three, read):
    shard, offsets = three
    place, _ = offsets["1.jpg"]
    content = bytearray(shard.read_bytes())
    content[place : place + 512] = b"\xaa" * 512
    shard.write_bytes(content)
    found = read(shard)
    assert found.captions == [("s/0.jpg", ("x",))]
    ((kind, (example,)),) = found.errors.items()
    assert kind == "damaged_tar" and str(place) in example


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("b.tgz", "w:gz"), ("c.tar", "w:bz2"), ("d.tar", "w:xz")]
)
def test_compressed_shards_are_refused_with_the_fix(tmp_path, pack, read, name, mode):
    shard = pack(tmp_path / name, {"0.jpg": 1, "0.txt": "x"}, mode)
    for path in (tmp_path, shard):
        found = read(path)
        assert (found.samples, found.errors) == ([], {"compressed_tar": [str(shard)]})


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>" * 100])
def test_a_file_that_is_no_tar_is_named(tmp_path, read, content):
    (tmp_path / "s.tar").write_bytes(content)
    found = read(tmp_path)
    assert found.samples == [] and str(tmp_path / "s.tar") in str(found.errors)


def test_a_broken_image_is_told_with_its_place(tmp_path, pack, clean, encoded_noise):
    files = {"0.jpg": b"<html>", "0.txt": "x", "1.png": encoded_noise[:-200], "1.txt": "x"}
    shard = pack(tmp_path / "s.tar", files)
    for sample in clean("webdataset", shard).samples:
        with pytest.raises(UnreadableImage) as caught:
            sample.open()
        assert str(caught.value).startswith(f"{shard}/{Path(sample.name).name}: ")


@pytest.fixture
def encoded_noise():
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "PNG")
    return file.getvalue()
