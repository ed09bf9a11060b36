"""SBU Captions in each way that it is kept, with its dead addresses and its names that are not unique."""

import json
import re
from dataclasses import dataclass

import pytest
from PIL import Image

from finetuning import cli
from finetuning.cli import flag
from finetuning.conversion.download import DownloadArgs, Fetcher
from finetuning.conversion.sbu import file_name, read
from finetuning.conversion.writer import WritingArgs
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import open_rgb

HOST = "http://static.flickr.com"
FIRST, SECOND, THIRD = f"{HOST}/2723/43_b0.jpg", f"{HOST}/1350/12_f6.jpg", f"{HOST}/55/77_aa.jpg"
TEXTS = ["Interior design of modern white and brown living room .", "The Egyptian cat statue", "Man sits in a boat"]


@dataclass
class Args(DownloadArgs, WritingArgs):
    """The flags that the reader reads."""

    allow_outside_paths: bool = flag(False, "as the script has it")


@pytest.fixture
def args(tmp_path):
    def make(*flags):
        args, problems = cli.read(Args, "", ["--output", f"{tmp_path}/out", *map(str, flags)])
        assert problems == []
        return args

    return make


def image(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)
    return path


def pairs(root, urls, captions, encoding="utf-8", end="\n"):
    folder = root / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("urls", urls), ("captions", captions)):
        text = "".join(line + end for line in lines)
        (folder / f"SBU_captioned_photo_dataset_{name}.txt").write_bytes(text.encode(encoding))
    return root


def columnar(root, urls, captions):
    root.mkdir(parents=True, exist_ok=True)
    content = {"image_urls": urls, "user_ids": ["33@N00"] * len(urls), "captions": captions}
    (root / "sbu-captions-all.json").write_text(json.dumps(content))
    return root


def records(root, urls, captions):
    root.mkdir(parents=True, exist_ok=True)
    rows = [{"image": url.split("/")[-1], "caption": c, "url": url} for url, c in zip(urls, captions, strict=True)]
    (root / "sbu.json").write_text(json.dumps(rows))
    return root


LISTS = [pairs, columnar, records]


def taken(path, args):
    """([(name, image, captions)], findings)."""
    findings = Findings()
    samples = list(read(path, args, findings))
    assert len({sample.key for sample in samples}) == len(samples)
    return [(sample.name, sample.image, sample.captions) for sample in samples], findings


@pytest.mark.parametrize("write", LISTS)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_images_have_the_last_part_of_their_address_for_a_name(tmp_path, args, write, by):
    root = write(tmp_path / "sbu", [FIRST, SECOND, THIRD], TEXTS)
    path = root if by == "folder" else next(iter(sorted(root.rglob("*.*"))))
    kept = [image(tmp_path / "images" / name) for name in ("43_b0.jpg", "12_f6.jpg")]
    rows, findings = taken(path, args("--images", tmp_path / "images"))
    assert rows == [("43_b0.jpg", kept[0], (TEXTS[0],)), ("12_f6.jpg", kept[1], (TEXTS[1],))]
    ((kind, (example,)),) = findings.as_dict()["errors"].items()
    assert kind == "image_not_here"
    assert re.fullmatch(r".* (line|record) 3 \(77_aa\.jpg\)", example)


@pytest.mark.parametrize(("encoding", "end"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", " \n")])
def test_lines_are_matched_by_number_whatever_ends_them(tmp_path, args, encoding, end):
    captions = ["a\u2028b\rc", "  second  ", "café"]  # these end a line for some, not here
    root = pairs(tmp_path, [FIRST, SECOND, THIRD], captions, encoding, end)
    for url in (FIRST, SECOND, THIRD):
        image(root / "dataset" / file_name(url))
    assert [row[2] for row in taken(root, args())[0]] == [("a\u2028b\rc",), ("second",), ("café",)]


def test_lists_of_different_length_are_refused(tmp_path, args):
    root = pairs(tmp_path, [FIRST, SECOND], TEXTS)
    with pytest.raises(DatasetError, match=r"has 2 lines and .*captions\.txt 3"):
        taken(root, args())


def test_lines_that_cannot_be_taken_are_named(tmp_path, args):
    root = pairs(tmp_path, [FIRST, "", SECOND, THIRD], [TEXTS[0], "b", "  ", "d"])
    captions = root / "dataset/SBU_captioned_photo_dataset_captions.txt"
    captions.write_bytes(captions.read_bytes().replace(b"\nd\n", b"\ncaf\xe9\n"))
    image(root / "dataset/43_b0.jpg")
    rows, findings = taken(root, args())
    assert len(rows) == 1
    assert {
        kind: [one.split(".txt ")[1] for one in examples] for kind, examples in findings.as_dict()["errors"].items()
    } == {"no_address": ["line 2"], "no_caption": ["line 3"], "lines_not_utf8": ["line 4"]}


@pytest.mark.parametrize("write", LISTS)
def test_an_address_of_several_rows_is_one_image_with_all_its_captions(tmp_path, args, write):
    root = write(tmp_path / "sbu", [FIRST, SECOND, FIRST, FIRST], ["one", "other", "two", "one"])
    for name in ("43_b0.jpg", "12_f6.jpg"):
        image(tmp_path / "images" / name)
    rows, findings = taken(root, args("--images", tmp_path / "images"))
    assert [(name, captions) for name, _, captions in rows] == [
        ("43_b0.jpg", ("one", "two")),
        ("12_f6.jpg", ("other",)),
    ]
    assert not findings.errors
    assert [len(examples) for examples in findings.as_dict()["warnings"].values()] == [2]


COLORS = {FIRST: (255, 0, 0), f"{HOST}/9/43_b0.jpg": (0, 255, 0), f"{HOST}/9/43_B0.jpg": (0, 0, 255)}


@pytest.fixture
def fetched(monkeypatch):
    """What is asked of the network; each address answers with its colour."""
    asked = []

    def fetch(self, url, target):
        asked.append(url)
        Image.new("RGB", (4, 4), COLORS.get(url, "white")).save(target, "PNG")

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    return asked


@pytest.mark.parametrize("write", LISTS)
@pytest.mark.parametrize("urls", [list(COLORS), list(COLORS)[::2]])  # the latter differ in case alone
def test_addresses_that_end_alike_are_not_confused(tmp_path, args, write, urls, fetched):
    root = write(tmp_path / "sbu", urls, [f"caption of {url}" for url in urls])
    image(tmp_path / "images/43_b0.jpg", "white")  # of one of them, by another program
    for download in ("--download", "--download", "--no-download"):
        rows, findings = taken(root, args("--images", tmp_path / "images", download))
        assert not findings.errors
        assert [captions for _, _, captions in rows] == [(f"caption of {url}",) for url in urls]
        assert [open_rgb(path).getpixel((0, 0)) for _, path, _ in rows] == [COLORS[url] for url in urls]
        assert len({path.name.lower() for _, path, _ in rows} - {"43_b0.jpg"}) == len(urls)
    assert sorted(fetched) == sorted(urls)  # threads fetch in any order


def test_an_image_that_could_be_of_two_addresses_is_not_guessed_at(tmp_path, args):
    root = pairs(tmp_path, list(COLORS), ["red", "green", "blue"])
    image(root / "dataset/43_b0.jpg")
    rows, findings = taken(root, args())
    assert rows == []
    fitting = "ambiguous_address"
    assert len(findings.as_dict()["errors"][fitting]) == 2  # 43_B0.jpg is another name on this disk, and not there
    assert sum(map(len, findings.as_dict()["errors"].values())) == 3


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


def test_a_record_may_not_name_an_image_elsewhere(tmp_path, args):
    rows = [{"image": "../../secret.jpg", "url": FIRST, "caption": "a"}, {"image": "sub/b.jpg", "caption": "b"}]
    (tmp_path / "sbu").mkdir()
    (tmp_path / "sbu/sbu.json").write_text(json.dumps(rows))
    below = image(tmp_path / "sbu/sub/b.jpg")
    rows, findings = taken(tmp_path / "sbu/sbu.json", args())
    assert rows == [("sub/b.jpg", below, ("b",))]
    assert list(findings.errors) == ["outside"]


def fetched_files(folder, key, caption="a photo", status="success", parts=("jpg", "txt", "json"), color="red"):
    """What img2dataset leaves of a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"url": FIRST, "caption": caption, "key": key, "status": status, "error_message": None, "width": 4}
    if status != "success":
        record["error_message"] = "HTTP Error 404: Not Found"
    if "jpg" in parts:
        image(folder / f"{key}.jpg", color)
    if "txt" in parts:
        (folder / f"{key}.txt").write_text(caption or "")
    if "json" in parts:
        (folder / f"{key}.json").write_text(json.dumps(record, indent=4))


@pytest.fixture
def shards(tmp_path):
    """Two folders of img2dataset, with its statistics and tables beside them."""
    root = tmp_path / "img2dataset"
    fetched_files(root / "00001", "000010000", "third")
    fetched_files(root / "00000", "000000001", "second")
    fetched_files(root / "00000", "000000000", "first ")
    (root / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 3, "failed_to_download": 1}))
    (root / "00000.parquet").write_bytes(b"PAR1")
    return root


def test_what_img2dataset_fetched_is_read_in_order(shards, args):
    rows, findings = taken(shards, args())
    assert [(name, captions) for name, _, captions in rows] == [
        ("00000/000000000.jpg", ("first",)),
        ("00000/000000001.jpg", ("second",)),
        ("00001/000010000.jpg", ("third",)),
    ]
    assert rows[0][1] == shards / "00000/000000000.jpg"
    assert not findings.errors and not findings.warnings
    assert [name for name, _, _ in taken(shards, args("--limit", 2))[0]] == [row[0] for row in rows[:2]]


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ({"status": "failed_to_download", "parts": ("json",)}, "not_fetched_before"),
        ({"status": "failed_to_resize"}, "not_fetched_before"),
        ({"parts": ("json", "txt")}, "fetched_caption_alone"),
        ({"parts": ("jpg",)}, "fetched_without_caption"),
        ({"caption": None}, "fetched_without_caption"),
    ],
)
def test_what_img2dataset_could_not_fetch_is_named(shards, args, sample, kind):
    fetched_files(shards / "00000", "000000002", **sample)
    rows, findings = taken(shards, args())
    assert len(rows) == 3
    ((told, (example,)),) = findings.as_dict()["errors"].items()
    assert told == kind
    assert example.startswith("00000/000000002")
    assert ("404" in example) == ("status" in sample)


def test_other_files_and_links_that_lead_out_are_no_data(shards, args, tmp_path):
    (shards / "00000/000000003.npz").write_bytes(b"features")
    (shards / "00000/000000004.jpg").symlink_to(image(tmp_path / "elsewhere.jpg"))
    (shards / "00002").symlink_to(tmp_path)
    rows, findings = taken(shards, args())
    assert len(rows) == 3
    assert list(findings.as_dict()["errors"].values()) == [["00002", "00000/000000004.jpg"]]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_broken_record_of_img2dataset_is_named(shards, args, content):
    (shards / "00000/000000001.json").write_bytes(content)
    rows, findings = taken(shards, args())
    assert len(rows) == 2
    (example,) = findings.as_dict()["errors"]["bad_fetched_caption"]
    assert example.startswith("00000/000000001 (")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds none of what SBU comes as"),
        ({"sbu.json": "{"}, "sbu.json cannot be read as JSON"),
        ({"sbu.json": "3"}, "must hold image_urls and captions, or a list"),
        ({"sbu-captions-all.json": '{"captions": []}'}, "must hold image_urls and captions, lists of one length"),
        ({"sbu-captions-all.json": '{"captions": [], "image_urls": [""]}'}, "lists of one length"),
        ({"sbu.json": "[]", "sbu-captions-all.json": "{}"}, "sbu-captions-all.json and sbu.json: name the file"),
        ({"SBU_captioned_photo_dataset_urls.txt": FIRST}, "captions.txt beside it"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(tmp_path, args, files, told):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=told):
        taken(tmp_path, args())
