"""SBU Captions in each way that it is kept, with its dead addresses and its names that are not unique."""

import re

import pytest
from PIL import Image

from finetuning.conversion.download import Fetcher
from finetuning.conversion.sbu import file_name
from finetuning.data.findings import DatasetError

HOST = "http://static.flickr.com"
FIRST, SECOND, THIRD = f"{HOST}/2723/43_b0.jpg", f"{HOST}/1350/12_f6.jpg", f"{HOST}/55/77_aa.jpg"
TEXTS = ["Interior design of modern white and brown living room .", "The Egyptian cat statue", "Man sits in a boat"]
URLS, CAPTIONS = (f"SBU_captioned_photo_dataset_{name}.txt" for name in ("urls", "captions"))


def pairs(urls, captions, encoding="utf-8", end="\n"):
    text = lambda lines: "".join(line + end for line in lines).encode(encoding)
    return {f"dataset/{URLS}": text(urls), f"dataset/{CAPTIONS}": text(captions)}


def columnar(urls, captions):
    content = {"image_urls": urls, "user_ids": ["33@N00"] * len(urls), "captions": captions}
    return {"sbu-captions-all.json": content}


def records(urls, captions):
    rows = [{"image": url.split("/")[-1], "caption": c, "url": url} for url, c in zip(urls, captions, strict=True)]
    return {"sbu.json": rows}


in_every_list = pytest.mark.parametrize("write", [pairs, columnar, records])


@pytest.fixture
def taken(read_source):
    """The Reading of a source; `images`: where its images are."""

    def taken(path, images=None, **flags):
        return read_source("sbu", path, images=images and str(images), **flags)

    return taken


@in_every_list
@pytest.mark.parametrize("by", ["folder", "file"])
def test_images_have_the_last_part_of_their_address_for_a_name(tmp_path, lay, taken, write, by):
    root = lay(tmp_path / "sbu", write([FIRST, SECOND, THIRD], TEXTS))
    path = root if by == "folder" else next(iter(sorted(root.rglob("*.*"))))
    images = lay(tmp_path / "images", ["43_b0.jpg", "12_f6.jpg"])
    found = taken(path, images)
    assert found.captions == [("43_b0.jpg", (TEXTS[0],)), ("12_f6.jpg", (TEXTS[1],))]
    assert all(sample.image == images / sample.name for sample in found.samples)
    ((kind, (example,)),) = found.errors.items()
    assert kind == "image_not_here" and re.fullmatch(r".* (line|record) 3 \(77_aa\.jpg\)", example)


@pytest.mark.parametrize(("encoding", "end"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", " \n")])
def test_lines_are_matched_by_number_whatever_ends_them(tmp_path, lay, taken, encoding, end):
    captions = ["a\u2028b\rc", "  second  ", "café"]  # these end a line for some, not here
    lay(tmp_path, pairs([FIRST, SECOND, THIRD], captions, encoding, end))
    lay(tmp_path / "dataset", [file_name(url) for url in (FIRST, SECOND, THIRD)])
    assert [texts for _, texts in taken(tmp_path).captions] == [("a\u2028b\rc",), ("second",), ("café",)]


def test_lines_that_cannot_be_taken_are_named(tmp_path, lay, taken):
    files = pairs([FIRST, "", SECOND, THIRD], [TEXTS[0], "b", "  ", "d"])
    files[f"dataset/{CAPTIONS}"] = files[f"dataset/{CAPTIONS}"].replace(b"\nd\n", b"\ncaf\xe9\n")
    lay(tmp_path, {**files, "dataset/43_b0.jpg": 1})
    found = taken(tmp_path)
    assert len(found.samples) == 1
    assert {kind: [one.split(".txt ")[1] for one in examples] for kind, examples in found.errors.items()} == {
        "no_address": ["line 2"], "no_caption": ["line 3"], "lines_not_utf8": ["line 4"],
    }  # fmt: skip


@in_every_list
def test_an_address_of_several_rows_is_one_image_with_all_its_captions(tmp_path, lay, taken, write):
    lay(tmp_path / "sbu", write([FIRST, SECOND, FIRST, FIRST], ["one", "other", "two", "one"]))
    found = taken(tmp_path / "sbu", lay(tmp_path / "images", ["43_b0.jpg", "12_f6.jpg"]))
    assert found.captions == [("43_b0.jpg", ("one", "two")), ("12_f6.jpg", ("other",))]
    assert not found.errors and len(found.warnings["address_twice"]) == 2


COLORS = {FIRST: 1, f"{HOST}/9/43_b0.jpg": 2, f"{HOST}/9/43_B0.jpg": 3}  # the red of each address's image


@in_every_list
@pytest.mark.parametrize("urls", [list(COLORS), list(COLORS)[::2]])  # the latter differ in case alone
def test_addresses_that_end_alike_are_not_confused(tmp_path, lay, taken, write, urls, monkeypatch):
    asked = []

    def fetch(self, url, target):
        asked.append(url)
        Image.new("RGB", (4, 4), (COLORS[url], 0, 0)).save(target, "PNG")

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    root = lay(tmp_path / "sbu", write(urls, [f"caption of {url}" for url in urls]))
    images = lay(tmp_path / "images", {"43_b0.jpg": 9})  # of one of them, by another program
    for download in (True, True, False):
        found = taken(root, images, download=download)
        assert not found.errors
        assert [texts for _, texts in found.captions] == [(f"caption of {url}",) for url in urls]
        assert [sample.open().getpixel((0, 0))[0] for sample in found.samples] == [COLORS[url] for url in urls]
        assert len({sample.image.name.lower() for sample in found.samples} - {"43_b0.jpg"}) == len(urls)
    assert sorted(asked) == sorted(urls)  # threads fetch in any order


def test_an_image_that_could_be_of_two_addresses_is_not_guessed_at(tmp_path, lay, taken):
    found = taken(lay(tmp_path, {**pairs(list(COLORS), ["red", "green", "blue"]), "dataset/43_b0.jpg": 1}))
    assert found.samples == []
    assert len(found.errors["ambiguous_address"]) == 2  # 43_B0.jpg is another name on this disk, and not there
    assert sum(map(len, found.errors.values())) == 3


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (FIRST, "43_b0.jpg"),
        (f"{FIRST}?zz=1#top", "43_b0.jpg"),
        (f"{HOST}/a%20b c.PNG", "a_20b_c.PNG"),
        (f"{HOST}/photo", "photo.jpg"),
        (f"{HOST}/photo.php", "photo.php.jpg"),
        (f"{HOST}/.hidden.jpg", "hidden.jpg"),
        (f"{HOST}/..", None),
        (f"{HOST}/", None),
        (f"{HOST}/{'x' * 300}.jpg", None),
    ],
)
def test_names_of_files_are_fit_for_a_disk(url, name):
    assert re.fullmatch(re.escape(name) if name else r"[0-9a-f]{12}\.jpg", file_name(url))


def test_a_record_may_not_name_an_image_elsewhere(tmp_path, lay, taken):
    rows = [{"image": "../../secret.jpg", "url": FIRST, "caption": "a"}, {"image": "sub/b.jpg", "caption": "b"}]
    lay(tmp_path / "sbu", {"sbu.json": rows, "sub/b.jpg": 1})
    found = taken(tmp_path / "sbu/sbu.json")
    assert found.captions == [("sub/b.jpg", ("b",))] and list(found.errors) == ["outside"]


def fetched_files(key, caption="a photo", status="success", parts=("jpg", "txt", "json")):
    """What img2dataset leaves of a sample."""
    record = {"url": FIRST, "caption": caption, "key": key, "status": status, "error_message": None, "width": 4}
    if status != "success":
        record["error_message"] = "HTTP Error 404: Not Found"
    files = {"jpg": 1, "txt": caption or "", "json": record}
    return {f"{key}.{part}": files[part] for part in parts}


@pytest.fixture
def shards(tmp_path, lay):
    """Two folders of img2dataset, with its statistics and tables beside them."""
    root = tmp_path / "img2dataset"
    lay(root / "00001", fetched_files("000010000", "third"))
    lay(root / "00000", fetched_files("000000001", "second") | fetched_files("000000000", "first "))
    return lay(root, {"00000_stats.json": {"count": 4, "successes": 3, "failed_to_download": 1}, "00000.parquet": b"P"})


def test_what_img2dataset_fetched_is_read_in_order(shards, taken):
    rows = [("00000/000000000", "first"), ("00000/000000001", "second"), ("00001/000010000", "third")]
    found = taken(shards)
    assert found.captions == [(f"{name}.jpg", (text,)) for name, text in rows]
    assert found.samples[0].image == shards / "00000/000000000.jpg"
    assert not found.errors and not found.warnings
    assert taken(shards, limit=2).captions == found.captions[:2]


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ({"status": "failed_to_download", "parts": ("json",)}, "not_fetched_before"),
        ({"status": "failed_to_resize"}, "not_fetched_before"),
        ({"parts": ("json", "txt")}, "sample_without_image"),
        ({"parts": ("jpg",)}, "sample_without_caption"),
        ({"caption": None}, "no_caption"),
    ],
)
def test_what_img2dataset_could_not_fetch_is_named(shards, lay, taken, sample, kind):
    lay(shards / "00000", fetched_files("000000002", **sample))
    found = taken(shards)
    assert len(found.samples) == 3 and list(found.errors) == [kind]
    (example,) = found.errors[kind]
    assert example.startswith("00000/000000002") and ("404" in example) == ("status" in sample)


def test_other_files_and_links_that_lead_out_are_no_data(shards, lay, taken, tmp_path):
    lay(shards / "00000", {"000000003.npz": b"features"})
    (shards / "00000/000000004.jpg").symlink_to(lay(tmp_path, ["elsewhere.jpg"]) / "elsewhere.jpg")
    (shards / "00002").symlink_to(tmp_path)
    found = taken(shards)
    assert len(found.samples) == 3 and found.errors == {"link_outside": ["00002", "00000/000000004.jpg"]}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_broken_record_of_img2dataset_is_named(shards, taken, content):
    (shards / "00000/000000001.json").write_bytes(content)
    found = taken(shards)
    (example,) = found.errors["no_json_text"]
    assert len(found.samples) == 2 and example.startswith("00000/000000001 (")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds none of what SBU comes as"),
        ({"sbu.json": "{"}, "sbu.json cannot be read as JSON"),
        ({"sbu.json": "3"}, "must hold image_urls and captions, or a list"),
        ({"sbu-captions-all.json": '{"captions": []}'}, "must hold image_urls and captions, lists of one length"),
        ({"sbu-captions-all.json": '{"captions": [], "image_urls": [""]}'}, "lists of one length"),
        ({"sbu.json": "[]", "sbu-captions-all.json": "{}"}, "sbu-captions-all.json and sbu.json: name the file"),
        ({URLS: FIRST}, "captions.txt beside it"),
        (pairs([FIRST, SECOND], TEXTS), r"has 2 lines and .*captions\.txt 3"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(tmp_path, lay, taken, files, told):
    with pytest.raises(DatasetError, match=told):
        taken(lay(tmp_path, files))
