"""The tables of the Unsplash Lite dataset, and a scraper's manifest, become captioned images."""

import csv

import pytest
from PIL import Image

from finetuning.conversion.download import Fetcher
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.reading import read_folder
from prepare_dataset import main as prepare_dataset

PHOTOS = [
    "photo_id", "photo_url", "photo_image_url", "photo_submitted_at", "photo_featured", "photo_width",
    "photo_height", "photo_aspect_ratio", "photo_description", "photographer_username", "photographer_first_name",
    "photographer_last_name", "exif_camera_make", "exif_camera_model", "exif_iso", "exif_aperture_value",
    "exif_focal_length", "exif_exposure_time", "photo_location_name", "photo_location_latitude",
    "photo_location_longitude", "photo_location_country", "photo_location_city", "stats_views", "stats_downloads",
    "ai_description", "ai_primary_landmark_name", "ai_primary_landmark_latitude", "ai_primary_landmark_longitude",
    "ai_primary_landmark_confidence", "blur_hash",
]  # fmt: skip
KEYWORDS = ["photo_id", "keyword", "ai_service_1_confidence", "ai_service_2_confidence", "suggested_by_user"]
LATER_KEYWORDS = [*KEYWORDS, "user_suggestion_source", "suggested_by_ai_service_3", "confirmed_by_ai_service_3"]
DUNE, LAKE, WOOD, CITY = "XMyPniM9LF0", "rDLBArZUl1c", "-0_8aTVZ-nk", "c7OrOMxrurA"
RAW = "https://images.unsplash.com/photo-1422493757035-1e5e03968f95"


def table(path, columns, *rows, delimiter="\t", encoding="utf-8"):
    """As PostgreSQL's COPY ... CSV writes it: quotes where they are needed, doubled inside."""
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def photo(photo_id, description="", ai_description="", width=4000, height=3000, url=RAW):
    return {
        "photo_id": photo_id, "photo_image_url": url, "photo_width": width, "photo_height": height,
        "photo_description": description, "ai_description": ai_description, "photo_featured": "t",
    }  # fmt: skip


def keyword(photo_id, word, first="", second="", by_user="f"):
    confidences = {"ai_service_1_confidence": first, "ai_service_2_confidence": second}
    return {"photo_id": photo_id, "keyword": word, "suggested_by_user": by_user} | confidences


@pytest.fixture
def root(tmp_path, lay):
    """An unpacked dataset of three photos, and their images."""
    root = lay(tmp_path / "lite", [])
    table(
        root / "photos.tsv000",
        PHOTOS,
        photo(DUNE, "My dune", "brown sand dunes"),
        photo(LAKE, 'A "lake",\nseen\tfrom  above\r\n', "blue lake"),
        photo(WOOD, "", "green trees"),
    )
    lay(tmp_path / "images", [f"{name}.jpg" for name in (DUNE, LAKE, WOOD)])
    return root


@pytest.fixture
def taken(tmp_path, read_source):
    """The Reading of a source whose images stand in images/."""
    return lambda path, **flags: read_source("unsplash-lite", path, **{"images": str(tmp_path / "images"), **flags})


@pytest.fixture
def captions(taken):
    """{photo_id: its caption} of a source without errors."""

    def captions(path, **flags):
        found = taken(path, **flags)
        assert not found.errors and not found.warnings
        return {name.rpartition(".")[0]: text for name, (text,) in found.captions}

    return captions


def test_captions_are_the_ai_descriptions_unless_told(root, captions):
    texts = {DUNE: "brown sand dunes", LAKE: "blue lake", WOOD: "green trees"}
    assert list(captions(root).items()) == list(texts.items())


def test_a_description_is_one_line_whatever_quotes_and_breaks_it_has(root, taken):
    found = taken(root, caption_from=["description"])
    assert found.captions == [(f"{DUNE}.jpg", ("My dune",)), (f"{LAKE}.jpg", ('A "lake", seen from above',))]
    assert found.errors == {"no_text": [f"photos.tsv000 line 6 ({WOOD})"]}  # the lake's takes lines of its own


@pytest.mark.parametrize(("second", "of_wood"), [("ai_description", "green trees"), ("none", ""), ("keywords", "moss")])
def test_of_several_sources_of_captions_the_first_counts_that_a_photo_has(root, captions, second, of_wood):
    table(root / "keywords.tsv000", KEYWORDS, keyword(WOOD, "moss", "90"), keyword(DUNE, "sand", "90"))
    found = captions(root, caption_from=["description", second, "none"][: 3 if second == "keywords" else 2])
    assert (found[DUNE], found[WOOD]) == ("My dune", of_wood)


def test_without_captions_the_dataset_waits_for_a_captioner(root, tmp_path, lines):
    output, images = tmp_path / "out", tmp_path / "images"
    command = ["convert", "unsplash-lite", root, "--output", output, "--images", images, "--caption_from", "none"]
    assert prepare_dataset([*map(str, command), "--validation_fraction", "0", "--test_fraction", "0"]) == 0
    assert [row["text"] for row in lines(output / "train/metadata.jsonl")] == ["", "", ""]
    findings = Findings()
    assert len(read_folder(output, "train", "image", "none", False, findings)) == 3 and not findings.errors
    assert read_folder(output, "train", "image", "text", False, findings) == []
    assert len(findings.errors["no_caption"]) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "dune, sky, sand, wave"),  # dune is a person's word; sand and wave are equally sure
        ({"keyword_confidence": 80}, "dune, sky"),
        ({"keyword_confidence": 0, "keyword_count": 9}, "dune, sky, sand, wave, ocean"),
        ({"keyword_count": 2}, "dune, sky"),
    ],
)
@pytest.mark.parametrize("columns", [KEYWORDS, LATER_KEYWORDS])
def test_keywords_are_those_that_are_sure_enough(root, taken, flags, words, columns):
    table(
        root / "keywords.tsv000",
        columns,
        keyword(DUNE, "wave", "60.5"),
        keyword(DUNE, "ocean", "49.9", "12"),
        keyword(DUNE, "sky", "20", "99.1"),
        keyword(LAKE, "water", "99"),
    )
    table(root / "keywords.tsv001", columns, keyword(DUNE, "sand", "", "60.5"), keyword(DUNE, "dune", by_user="t"))
    found = taken(root, caption_from=["keywords"], **flags)
    assert found.captions == [(f"{DUNE}.jpg", (words,)), (f"{LAKE}.jpg", ("water",))]
    assert list(found.errors) == ["no_text"]  # the wood has none


@pytest.mark.parametrize("suffix", ["tsv000", "csv000", "tsv", "csv", "csv.part-1"])
@pytest.mark.parametrize(("delimiter", "encoding"), [("\t", "utf-8"), ("\t", "utf-8-sig"), (",", "utf-8")])
def test_every_release_is_read_by_column_name(root, captions, suffix, delimiter, encoding):
    (root / "photos.tsv000").unlink()
    shuffled = ["photo_id", "a_column_of_tomorrow", *reversed(PHOTOS[1:])]
    table(root / f"photos.{suffix}", shuffled, photo(DUNE, "", "brown, dry"), delimiter=delimiter, encoding=encoding)
    assert captions(root) == {DUNE: "brown, dry"}


def test_all_shards_are_read_in_order_and_a_photo_once(root, lay, taken, tmp_path):
    table(root / "photos.tsv001", PHOTOS, photo(CITY, "", "tall houses"), photo(DUNE, "", "another text"))
    lay(tmp_path / "images", [f"{CITY}.jpg"])
    found = taken(root)
    assert [name for name, _ in found.captions] == [f"{name}.jpg" for name in (DUNE, LAKE, WOOD, CITY)]
    assert found[f"{DUNE}.jpg"].captions == ("brown sand dunes",)
    assert found.warnings == {"listed_twice": [f"photos.tsv001 line 3 ({DUNE})"]}


@pytest.mark.parametrize(
    "name", [f"{WOOD}.jpg", f"{WOOD}.PNG", f"deep/er/{WOOD}.webp", f"jane-doe-{WOOD}-unsplash.jpg"]
)
def test_images_are_found_by_photo_id(root, lay, taken, tmp_path, name):
    (tmp_path / "images" / f"{WOOD}.jpg").unlink()
    # the second is what macOS puts beside images
    images = lay(tmp_path / "images", [name, f"._jane-doe-{WOOD}-unsplash.jpg"])
    found = taken(root)
    assert len(found.samples) == 3 and found.samples[2].image == images / name


@pytest.fixture
def fetched(monkeypatch):
    """What is asked of the network; each address answers with an image."""
    asked = []

    def fetch(self, url, target):
        asked.append(url)
        Image.new("RGB", (4, 4)).save(target)

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    return asked


@pytest.mark.parametrize(
    ("size", "url", "side", "query"),
    [
        ((4000, 3000), RAW, 512, "w=683&fit=max"),
        ((3000, 4000), RAW, 512, "w=512&fit=max"),
        ((3000, 3000), RAW, 1024, "w=1024&fit=max"),
        ((9000, 3000), f"{RAW}?ixlib=rb-4.0.3&w=80", 512, "ixlib=rb-4.0.3&w=1536&fit=max"),
        (("", ""), RAW, 512, "w=512&fit=max"),
        ((4000, 3000), RAW, 0, None),
    ],
)
def test_photos_are_asked_for_with_a_shorter_side(root, captions, fetched, size, url, side, query):
    table(root / "photos.tsv000", PHOTOS, photo(CITY, "", "tall houses", *size, url))
    assert captions(root, download=True, download_side=side) == {CITY: "tall houses"}
    assert fetched == [f"{RAW}?{query}" if query else RAW]


def test_only_what_is_missing_and_has_a_caption_is_fetched(root, taken, tmp_path, fetched):
    table(root / "photos.tsv001", PHOTOS, photo(CITY, "", "tall houses"), photo("abcdefghijk"))
    found = taken(root, download=True)
    assert [name for name, _ in found.captions] == [f"{name}.jpg" for name in (DUNE, LAKE, WOOD, CITY)]
    assert len(fetched) == 1 and (tmp_path / "images" / f"{CITY}.jpg").is_file() and len(found.errors) == 1


def test_rows_that_are_not_rows_are_named(root, taken):
    with open(root / "photos.tsv000", "a", encoding="utf-8") as file:
        file.write("cut\toff\n")
        file.write("\t".join(["../x", *[""] * (len(PHOTOS) - 1)]) + "\n")
        file.write("\t".join(["x"] * (len(PHOTOS) + 1)) + "\n")
    found = taken(root)
    assert len(found.samples) == 3
    assert found.errors == {
        "wrong_fields": ["photos.tsv000 line 7", "photos.tsv000 line 9"],
        "no_photo_id": ["photos.tsv000 line 8"],
    }


def spoil(root, how):
    photos = root / "photos.tsv000"
    if how == "no photos":
        photos.unlink()
    elif how == "no column":
        table(photos, ["photo_id", "blur_hash"], {"photo_id": DUNE})
    elif how == "empty":
        photos.write_bytes(b"")
    elif how == "not text":
        photos.write_bytes(b"photo_id\tai_description\n\x1f\x8b\x08\x00\xff")
    elif how == "open quote":
        photos.write_text('photo_id\tai_description\nx\t"' + "word " * 40000)
    return root / "nowhere" if how == "no folder" else root


@pytest.mark.parametrize(
    ("how", "flags", "told"),
    [
        ("no photos", {}, "has no photos.tsv or .csv"),
        ("no folder", {}, "there is no such folder"),
        ("no column", {}, "photos.tsv000 has no column ai_description, only photo_id, blur_hash"),
        (
            "no column",
            {"download": True},
            "no column ai_description or photo_height or photo_image_url",
        ),
        ("empty", {}, "has no column"),
        ("not text", {}, "photos.tsv000 is not UTF-8 text"),
        ("open quote", {}, "photos.tsv000 cannot be read: .*quote"),
        ("", {"caption_from": ["keywords"]}, "has no keywords.tsv or .csv"),
        ("", {"caption_from": ["query"]}, "query is for a manifest"),
    ],
)
def test_a_dataset_that_cannot_be_read_says_why(root, taken, how, flags, told):
    with pytest.raises(DatasetError, match=told):
        taken(spoil(root, how), **flags)


# A scraper's manifest

RECORD = {"id": DUNE, "url": f"{RAW}?w=1080", "file_name": "dune.jpg", "query": "desert", "alt_description": "a dune"}


@pytest.mark.parametrize(
    ("choice", "caption"),
    [(["ai_description"], "a dune"), (["query"], "desert"), (["description", "query"], "desert"), (["none"], "")],
)
@pytest.mark.parametrize("file", ["", "manifest.json"])
def test_a_manifest_has_its_images_beside_it(tmp_path, lay, taken, choice, caption, file):
    lay(tmp_path, {"manifest.json": [RECORD], "dune.jpg": 1})
    (sample,) = taken(tmp_path / file, images=None, caption_from=choice).samples
    assert (sample.name, sample.image, sample.captions) == ("dune.jpg", tmp_path / "dune.jpg", (caption,))
    assert sample.origin == "manifest.json record 1"


def test_records_that_cannot_be_taken_are_named(tmp_path, lay, taken):
    records = [
        RECORD,
        RECORD | {"id": LAKE, "alt_description": None},
        RECORD | {"id": WOOD, "file_name": "../outside.jpg"},
        RECORD | {"id": ""},
        RECORD | {"alt_description": "the same again"},
        RECORD | {"id": CITY, "alt_description": "tall houses"},
    ]
    found = taken(lay(tmp_path, {"manifest.json": records, "dune.jpg": 1}), images=None)
    assert found.captions == [("dune.jpg", ("a dune",))]
    assert found.errors == {
        "shared_file_name": ["manifest.json record 2 (dune.jpg)", "manifest.json record 6 (dune.jpg)"],
        "bad_record": ["manifest.json record 3 (../outside.jpg)", "manifest.json record 4 (dune.jpg)"],
    }
    assert found.warnings == {"listed_twice": [f"manifest.json record 5 ({DUNE})"]}


@pytest.mark.parametrize(
    ("content", "told"), [(b"{", "JSON"), ({}, "list of records"), ([1], "list of records"), (b"\xff", "JSON")]
)
def test_a_manifest_that_cannot_be_read_says_why(tmp_path, lay, taken, content, told):
    with pytest.raises(DatasetError, match=told):
        taken(lay(tmp_path, {"manifest.json": content}))


def test_a_manifests_images_are_fetched_as_it_names_them(tmp_path, lay, taken, fetched):
    lay(tmp_path, {"manifest.json": [RECORD | {"file_name": "sub/dune.jpg"}]})
    (sample,) = taken(tmp_path, download=True).samples
    assert (sample.name, sample.image) == ("sub/dune.jpg", tmp_path / "images/sub/dune.jpg")
    assert fetched == [RECORD["url"]]
