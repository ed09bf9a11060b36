"""The page of an audit holds all that it shows, and shows what it is given as text."""

import base64
import io

import pytest
from PIL import Image

from finetuning.conversion.audit import AuditArgs, examine
from finetuning.conversion.audit_report import GROUPS, OF_A_GROUP, SAMPLE, page


@pytest.fixture
def audit(tmp_path, write_split):
    """Makes a dataset of (name, image, caption), ... and examines it."""

    def audit(*rows):
        write_split(tmp_path / "set/train", *rows)
        return examine(AuditArgs(path=str(tmp_path / "set"), workers=1, resolution="32"))

    return audit


def test_captions_and_names_are_text_not_markup(audit, read_page, photo):
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'
    name = "<b>&.png"
    shown = read_page(page(audit((name, photo(0), evil), ("b.png", photo(0), "plain"), ("<i>.png", None, "gone"))))
    assert shown.tags["script"] == shown.tags["b"] == shown.tags["i"] == 0
    assert evil in shown.text and name in shown.text and "<i>.png" in shown.text
    assert not [value for _, key, value in shown.attributes if key.startswith("on")]


def test_nothing_is_asked_for_from_anywhere(audit, read_page, photo):
    text = page(audit(*((f"{n}.png", photo(n), f"http://example.com/x.png room {n}") for n in range(3))))
    shown = read_page(text)
    addresses = [value for _, key, value in shown.attributes if key in ("src", "href", "action", "data", "poster")]
    assert len(addresses) == 3 and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert shown.tags["link"] == shown.tags["script"] == 0
    assert "url(" not in text and "@import" not in text
    (policy,) = [value for tag, key, value in shown.attributes if tag == "meta" and "default-src" in value]
    assert policy.startswith("default-src 'none'")


def test_thumbnails_are_small_and_show_the_image_upright(audit, read_page, photo):
    image = Image.new("RGB", (400, 200), (255, 0, 0))
    image.paste((0, 0, 255), (200, 0, 400, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = audit(("a.png", None, "two colours"), ("b.png", photo(1), "noise"))
    image.save(found.path / "train/a.png", exif=exif)
    found = examine(found.args)
    sources = [value for tag, key, value in read_page(page(found)).attributes if tag == "img" and key == "src"]
    first = Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1])))
    assert first.size == (72, 144)
    top, bottom = first.getpixel((36, 20)), first.getpixel((36, 120))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]


def test_the_verdict_findings_and_concerns_are_on_the_page(audit, read_page, photo):
    found = audit(("a.png", photo(0), "one"), ("b.png", photo(0), "two"), ("gone.png", None, "three"))
    text = read_page(page(found)).text
    assert "Training would REFUSE it." in text
    assert "rows whose image is not there (1)" in text and "metadata.jsonl line 3 (gone.png)" in text
    assert "The same image more than once in a split (1)" in text
    (found.path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    (found.path / "train/b.png").unlink()
    assert "Training would accept it." in read_page(page(examine(found.args))).text


def test_of_many_a_few_are_shown_and_the_rest_is_counted(audit, read_page, photo):
    copies = [(f"copy{n:02}.png", photo(0), f"copy {n}") for n in range(6)]
    flat = [(f"flat{n:02}.png", Image.new("RGB", (40, 30), (9 * n, 99, 99)), f"flat {n}") for n in range(20)]
    found = audit(*copies, *flat)
    shown = read_page(page(found))
    sample = len(found.seen[:: -(-26 // SAMPLE)])
    assert shown.tags["img"] == GROUPS + OF_A_GROUP + sample
    assert "and 8 more" in shown.text and "and 2 more" in shown.text


def test_an_image_that_went_away_meanwhile_leaves_its_name(audit, read_page, photo):
    found = audit(("a.png", photo(0), "one"), ("b.png", photo(1), "two"))
    (found.path / "train/a.png").unlink()
    shown = read_page(page(found))
    assert shown.tags["img"] == 1 and "train/a.png" in shown.text
