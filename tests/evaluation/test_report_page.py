"""The page of a report holds all that it shows, says what the figures say, and sorts in a real browser."""

import base64
import hashlib
import io
import json
import random
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from html import unescape
from xml.etree import ElementTree

import pytest
from PIL import Image

from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import table
from finetuning.evaluation.notes import note
from finetuning.evaluation.report_page import EMBEDDED, THUMBNAIL, chart, forest, page
from finetuning.evaluation.statistics import mean_of, paired_difference
from finetuning.evaluation.words import best_and_worst, verdict
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import draw_scene

TABLE = {name: asdict(metric) for name, metric in table(load_checker("finetuning.shapes.checker")).items()}
LABELS = ("original", "original, seed 2", "tuned", "merged")
ROW_METRICS = {"style": (0.0, 0.0, 0.93, 0.6), "clip_score": (24.1, 24.0, 27.3, 26.4), "lpips": (0.61, 0.6, 0.42, 0.5)}
SET_METRICS = {"kid": (0.214, 0.209, 0.038, 0.09), "fid": (181.2, 178.4, 92.6, 120.3)}
CATEGORIES = ("people", "animals", "food")


def with_verdict(estimate):
    return {**estimate.as_dict(), "excludes_zero": bool(estimate.excludes_zero)}


def around(value, share, n):
    return {"value": value, "low": value - share, "high": value + share, "n": n}


def row_values(rng, metrics=ROW_METRICS):
    spread = {"style": 0.1, "clip_score": 1.5, "lpips": 0.08}
    drawn = {
        name: {label: round(rng.gauss(m, spread[name]), 4) for label, m in zip(LABELS, means, strict=True)}
        for name, means in metrics.items()
    }
    if "style" in drawn:
        drawn["style"] = {label: float(min(1, max(0, value))) for label, value in drawn["style"].items()}
    return drawn


def example(folder, count=24, drawn=True):
    """A report as evaluate_model.py makes it, on scenes of the shapes world, with its images in `folder`."""
    rng = random.Random(7)
    rows, prompts = [], []
    for number_of in range(count):
        scene = draw_scene(rng, pair_share=0.3)
        names = {label: f"images/{label}/{number_of:05}.png" for label in LABELS}
        if drawn:
            styles = zip(LABELS, ("filled", "filled", "chalk", None), strict=True)
            images = {label: draw(scene, 100 + 9 * number_of + len(label), style) for label, style in styles if style}
            images["merged"] = Image.blend(images["original"], images["tuned"], 0.6)
            images["truth"] = draw(scene, number_of, "chalk")
            for label, name in {**names, "truth": f"truth/{number_of:05}.png"}.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                images[label].save(folder / name)
        rows.append({"row": number_of, "caption": scene.caption, "truth": f"truth/{number_of:05}.png",
                     "images": names, "values": row_values(rng)})  # fmt: skip
        if number_of < 9:
            values = row_values(rng, {"clip_score": (26.0, 26.1, 24.2, 25.3)})
            drift = {"drift_lpips": {label: round(rng.uniform(0.2, 0.6), 3) for label in LABELS[1:]}}
            prompts.append({"row": number_of, "caption": scene.caption, "category": CATEGORIES[number_of % 3],
                            "images": names, "values": values | drift})  # fmt: skip
    summary, differences = {}, {}
    for name in ROW_METRICS:
        of = {label: [row["values"][name][label] for row in rows] for label in LABELS}
        summary[name] = {"64": {label: mean_of(values).as_dict() for label, values in of.items()}}
        differences[name] = {
            "64": {label: with_verdict(paired_difference(of[label], of["original"])) for label in LABELS[1:]}
        }
    for name, values in SET_METRICS.items():
        wide = 0.08 * values[0]
        summary[name] = {"64": {label: around(v, wide, count) for label, v in zip(LABELS, values, strict=True)}}
        differences[name] = {
            "64": {
                label: {**around(v - values[0], wide, count), "excludes_zero": abs(v - values[0]) > wide}
                for label, v in zip(LABELS[1:], values[1:], strict=True)
            }
        }
    steps = (0, 250, 500, 1000, 1500, 2000)
    line = lambda label, ends, room: {
        "label": label,
        "points": [
            {"x": s, "y": y, "low": y - room, "high": y + room}
            for s in steps
            for y in [ends[0] + (ends[1] - ends[0]) * (1 - 0.998**s)]
        ],
    }
    return {
        "made": {
            "command": ["python", "evaluate_model.py", "--dataset", "datasets/shapes chalk", "--model", "tuned=a --b"],
            "versions": {"torch": "2.9.0", "diffusers": "0.36.0"},
            "args": {"dataset": "datasets/shapes chalk", "seed": 0, "resolutions": [64], "lora": None},
        },
        "protocol": "clean",
        "policy": "The centre square of each image is resized with PIL's antialiased bicubic filter.",
        "sides": [64],
        "metrics": TABLE,
        "reference": "original",
        "weights": [
            {"name": "inception", "origin": "random.safetensors", "sha256": "ab" * 32, "published": False},
            {"name": "lpips heads", "origin": "lpips 0.1.4", "sha256": "cd" * 32, "published": True},
            {"name": "clip", "origin": "models/clip", "sha256": "ef" * 32, "published": None},
        ],
        "left_out": [note("no_weights", metric="clip_image", network="clip", reason="no CLIP: --clip_model")],
        "warnings": [note("few_images", images=count)],
        "models": [
            {"label": "original", "source": "models/mini-sd", "noise_floor": False},
            {"label": "original, seed 2", "source": "models/mini-sd", "noise_floor": True},
            {"label": "tuned", "source": "build/full", "noise_floor": False},
            {"label": "merged", "source": "build/merged", "noise_floor": False},
        ],
        "summary": summary,
        "differences": differences,
        "rows": rows,
        "forgetting": {
            "prompts": prompts,
            "summary": {"clip_score": {label: around(26 - at, 0.6, 9) for at, label in enumerate(LABELS)}},
            "learned": {"tuned": around(0.93, 0.05, count), "merged": around(0.6, 0.06, count)},
            "kept": {"tuned": around(0.81, 0.07, 9), "merged": around(0.96, 0.06, 9)},
            "warnings": [], "left_out": [],
            "words": {"learned": "rise of the share of things in chalk", "kept": "CLIP score, divided by the reference",
                      "clip_score": "CLIP score on the general prompts"},
        },
        "curves": [
            {"title": "Learned and kept", "x_title": "step", "y_title": "share",
             "lines": [line("learned", (0.0, 0.93), 0.04), line("kept", (1.0, 0.81), 0.06)]},
            {"title": "Validation loss", "x_title": "step", "y_title": "loss",
             "lines": [line("chalk", (0.082, 0.055), 0.002)]},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(report, folder, text of its page); never change the report."""
    folder = tmp_path_factory.mktemp("report")
    report = example(folder)
    report["rows"][5]["values"]["lpips"]["tuned"] = None
    text = page(report, folder)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return report, folder, text


@pytest.fixture
def report(tmp_path):
    """A report of few rows without images, to be changed."""
    return example(tmp_path, 4, drawn=False)


def cells(text, head):
    """The rows of the table whose heading has the text `head`, as lists of text; a <br> or a tag is a space."""
    part = text[text.index(head) :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part[: part.index("</table>")], re.S)
    plain = lambda cell: " ".join(re.sub(r"<[^>]*>", " ", cell).split())
    return [[plain(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)] for row in rows]


# -- the page ------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_for_from_anywhere_and_only_its_own_script_may_run(shown, read_page):
    _, _, text = shown
    read = read_page(text)
    addresses = [value for _, key, value in read.attributes if key in ("src", "href", "action", "data", "poster")]
    assert len(addresses) > 100 and all(address.startswith("data:image/") for address in addresses)
    assert read.tags["link"] == read.tags["iframe"] == 0 and read.tags["script"] == 1
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    (policy,) = [value for tag, key, value in read.attributes if tag == "meta" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(read.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not [key for _, key, _ in read.attributes if key.startswith("on")]


EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes\' ALT'


@pytest.mark.parametrize("where", ["caption", "label", "warning", "command", "category", "curve", "reason", "args"])
def test_what_it_is_given_is_text_not_markup(report, tmp_path, where, read_page):
    if where == "label":
        report = json.loads(json.dumps(report).replace('"merged"', json.dumps(EVIL)))
    elif where == "caption":
        report["rows"][0]["caption"] = report["forgetting"]["prompts"][0]["caption"] = EVIL
    elif where == "category":
        report["forgetting"]["prompts"][0]["category"] = EVIL
    elif where == "reason":
        report["left_out"][0]["reason"] = EVIL
    elif where == "args":
        report["made"]["args"]["lora"] = EVIL
    elif where == "curve":
        report["curves"][0]["title"] = report["curves"][0]["lines"][0]["label"] = EVIL
    elif where == "warning":
        report["warnings"].append(note("not_published", name=EVIL, origin="a"))
    else:
        report["made"]["command"].append(EVIL)
    read = read_page(page(report, tmp_path))
    assert read.tags["script"] == 1 and read.tags["img"] == 0
    assert EVIL in read.text or (where == "command" and '<script>alert("x")</script>' in read.text)
    assert not [value for _, key, value in read.attributes if key.startswith("on")]


def test_the_metrics_stand_in_the_summary_with_interval_n_and_mark(shown):
    report, _, text = shown
    lines = cells(text, "<h2>Metrics</h2>")
    heads = [line[0] for line in lines if len(line) == 1]
    assert [head.split(" higher")[0].split(" lower")[0] for head in heads] == [
        TABLE[name]["title"] for name in TABLE if name in report["summary"]
    ]
    assert "not comparable" in heads[-1] and "not comparable" in heads[-2] and "not comparable" not in heads[0]
    assert all(TABLE[name]["means"] in " ".join(heads) for name in report["summary"])
    kid = next(index for index, line in enumerate(lines) if len(line) == 1 and line[0].startswith("KID"))
    assert lines[kid + 1] == ["original", "0.214 0.197 to 0.231", "24", "", "", "reference"]
    assert lines[kid + 2] == [
        "original, seed 2",
        "0.209 0.192 to 0.226",
        "24",
        "-0.005 -0.022 to +0.012",
        "",
        "noise floor",
    ]
    assert lines[kid + 3] == ["tuned", "0.038 0.021 to 0.055", "24", "-0.176 -0.193 to -0.159", "", "✓ better"]
    assert text.count('class="forest"') == 3 * len(report["summary"])
    ends = re.findall(r'class="bar" x1="([^"]*)" y1="15" x2="([^"]*)"', text)
    assert all(6 <= float(end) <= 194 for pair in ends for end in pair)  # those of a metric share a scale


def test_a_difference_inside_the_noise_floor_is_marked_so(report, tmp_path):
    report["differences"]["kid"]["64"]["original, seed 2"]["low"] = -0.5
    line = next(line for line in cells(page(report, tmp_path), "<strong>KID") if line and line[0] == "tuned")
    assert line[-1] == "✓ better within the noise floor"


def test_each_side_has_its_own_metrics_and_one_explanation(report, tmp_path):
    report["sides"] = [32, 64]
    report["summary"]["lpips"]["32"] = {"tuned": around(0.3, 0.1, 4)}
    text = page(report, tmp_path)
    heads = [line[0] for line in cells(text, "<h2>Metrics</h2>") if len(line) == 1 and "LPIPS" in line[0]]
    assert [head.split(" lower")[0] for head in heads] == ["LPIPS at 32 px", "LPIPS at 64 px"]
    assert TABLE["lpips"]["means"] in heads[0] and TABLE["lpips"]["means"] not in heads[1]


def test_the_verdict_and_short_notes_come_first_and_the_reasons_last(report, tmp_path):
    report["left_out"].append(
        note("no_weights", metric="lpips", network="lpips", reason="https://a.b/c.pth is not here")
    )
    report["forgetting"]["warnings"] = [note("cut_captions", captions=9, on="general prompts")]
    text = page(report, tmp_path)
    assert text.index(verdict(report)[0]) < text.index('class="warnings"') < text.index("<h2>Metrics</h2>")
    noted = text[text.index('class="warnings"') : text.index("</section>")]
    assert [" ".join(re.sub("<[^>]*>", "", one).split()[:3]) for one in re.findall(r"<li>(.*?)</li>", noted)] == [
        "only 4 images", "general prompts: 9", "CLIP image and", "20 images cannot",
    ]  # fmt: skip
    assert "<code>--clip_model</code> and <code>--lpips_trunk</code> name local files" in noted and "a.b" not in noted
    end = text[text.index("<h2>Reproduce it</h2>") :]
    assert [row[0] for row in cells(end, "Not measured, and why")] == ["CLIP image", "LPIPS"]
    assert "https://a.b/c.pth" in end


def test_all_that_makes_it_again_is_on_the_page(shown, read_page):
    report, _, text = shown
    read = read_page(text).text
    command = "python evaluate_model.py \\\n    --dataset 'datasets/shapes chalk' \\\n    --model 'tuned=a --b'"
    assert command in read and shlex.split(command.replace("\\\n", "")) == report["made"]["command"]
    for word in ("2.9.0", "build/merged", report["policy"], "clean", *(one["sha256"] for one in report["weights"])):
        assert word in read, word
    assert "not the published ones" in read and "not known whether published" in read


def test_learned_kept_and_categories_are_tables(shown):
    report, _, text = shown
    assert cells(text, "<h2>Learned and kept</h2>")[1] == [
        "tuned", "0.930 0.880 to 0.980 n 24", "0.810 0.740 to 0.880 n 9",
    ]  # fmt: skip
    lines = cells(text, "CLIP score by category</h3>")
    assert lines[0] == ["category", "n", *LABELS] and [line[0] for line in lines[1:]] == list(CATEGORIES)
    own = [one["values"]["clip_score"]["tuned"] for one in report["forgetting"]["prompts"] if one["category"] == "food"]
    assert lines[3][1] == "3" and float(lines[3][4].split()[0]) == pytest.approx(sum(own) / 3, abs=0.06)
    assert cells(text, "LPIPS drift by category</h3>")[0] == ["category", "n", *LABELS[1:]]


def test_one_category_alone_has_no_table_and_none_has_no_column(report, tmp_path):
    for prompt in report["forgetting"]["prompts"]:
        prompt["category"] = None
    text = page(report, tmp_path)
    assert "by category" not in text and 'data-key="category"' not in text
    assert cells(text, "General prompts one by one")[0] == ["row", "caption", *LABELS]


def test_a_share_of_all_says_so_and_a_difference_of_nothing_too(report, tmp_path):
    report["summary"]["shapes"] = {"64": {"original": around(1.0, 0, 4), "tuned": around(0.0, 0, 4)}}
    report["differences"]["shapes"] = {"64": {"tuned": {**around(0.0, 0, 4), "excludes_zero": False}}}
    report["forgetting"]["kept"]["merged"] = around(1.0, 0, 9)
    text = page(report, tmp_path)
    assert cells(text, "<strong>right shapes")[:2] == [
        ["original", "1 all of 4", "4", "", "", "reference"],
        ["tuned", "0 none of 4", "4", "0 none of 4", "", "no clear difference"],
    ]
    assert cells(text, "<h2>Learned and kept</h2>")[2][2] == "1 all of 9"


def test_curves_stand_under_their_titles_with_named_axes(shown):
    report, _, text = shown
    for curve in report["curves"]:
        part = text[text.index(f"<h3>{curve['title']}</h3>") :]
        part = part[: part.index("</svg>")]
        words = re.findall(r"<text[^>]*>([^<]*)</text>", part)
        assert {curve["x_title"], curve["y_title"], *(line["label"] for line in curve["lines"])} <= set(words)
        assert f'aria-label="{curve["title"]}' in part and "1970" not in part


@pytest.mark.parametrize("points", [[], [(0, 0.5, None, None)], [(3, 0.0, 0.0, 0.0)]], ids=["none", "one", "at zero"])
def test_a_curve_of_few_points_is_drawn_too(points):
    points = [dict(zip(("x", "y", "low", "high"), point, strict=True)) for point in points]
    text = chart({"title": "$a_", "x_title": "step", "y_title": "<i>", "lines": [{"label": "$x$", "points": points}]})
    assert text.startswith("<svg role") and "<i>" not in text and "$x$" in text


def test_a_difference_stands_on_its_side_of_0_and_the_noise_floor_around_it(report):
    put = lambda value, low, high: {"value": value, "low": low, "high": high, "n": 9}
    of = {"tuned": put(-0.2, -0.3, -0.1), "merged": put(0.5, 0.1, 0.6), LABELS[1]: put(0.0, -0.15, 0.15)}
    report["differences"]["kid"] = {"64": of}
    drawn = ElementTree.fromstring(forest(report, "kid", 64, "tuned"))
    middle = float(drawn.find("line[@class='zero']").get("x1"))
    bar, point, noise = drawn.find("line[@class='bar']"), drawn.find("circle"), drawn.find("rect")
    left, right = float(bar.get("x1")), float(bar.get("x2"))
    assert left < float(point.get("cx")) < right < middle == 100
    per_unit = (right - left) / 0.2
    assert middle + 0.6 * per_unit == pytest.approx(194, abs=0.5)  # the farthest end of all is just inside
    assert float(noise.get("width")) == pytest.approx(0.3 * per_unit, abs=0.1)
    of["tuned"]["low"] = None
    assert forest(report, "kid", 64, "tuned") == forest(report, "lpips", 64, "none") == ""


def test_every_row_stands_in_the_table_with_its_values(shown):
    report, _, text = shown
    table = text[text.index("<h2>Image by image</h2>") : text.index("<h2>General prompts")]
    lines = re.findall(r"<tr data-text=.*?</tr>", table, re.S)
    assert len(lines) == len(report["rows"])
    for line, row in zip(lines, report["rows"], strict=True):
        values = [float(value) if value else None for value in re.findall(r'data-value="([^"]*)"', line)]
        assert values == [
            row["row"],
            *(row["values"][m][label] for label in LABELS for m in TABLE if m in ROW_METRICS),
        ]
        assert row["caption"] in line and line.count("<img") == 1 + len(LABELS)


def test_images_are_small_copies_sharp_where_they_are_tiny(tmp_path, read_page):
    report = example(tmp_path, 4)
    Image.new("RGB", (800, 400), (200, 30, 30)).save(tmp_path / report["rows"][0]["truth"])
    attributes = read_page(page(report, tmp_path)).attributes
    sources = [value for _, key, value in attributes if key == "src"]
    opened = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    large = [one for one in opened if one.size != (64, 64)]
    assert {(one.size, one.format) for one in large} == {((THUMBNAIL, THUMBNAIL // 2), "JPEG")}
    assert {one.format for one in opened if one.size == (64, 64)} == {"PNG"}
    first = Image.open(tmp_path / report["rows"][0]["images"]["tuned"]).convert("RGB")
    assert any(one.size == first.size and one.convert("RGB").tobytes() == first.tobytes() for one in opened)


def test_of_many_rows_only_some_have_their_images_inside(tmp_path):
    count = EMBEDDED + 130
    report = example(tmp_path, count, drawn=False)
    report["forgetting"] = None
    image = tmp_path / "one.png"
    Image.new("RGB", (8, 8)).save(image)
    for row in report["rows"]:
        row["truth"] = None
        row["images"] = {"tuned": f"here/{row['row']}.png"}
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / row["images"]["tuned"]).symlink_to(image)
    text = page(report, tmp_path)
    table = text[text.index("<h2>Image by image</h2>") :]
    embedded = re.findall(r'<tr data-text="(\d+) [^>]*>(?:(?!</tr>).)*<img', table, re.S)
    assert EMBEDDED / 2 < len(embedded) <= EMBEDDED and table.count("<tr data-text") == count
    assert f"Of {count} rows, {len(embedded)} have their images inside this page" in text
    for row in best_and_worst(report, 40)[2] + best_and_worst(report, 40)[3]:
        assert str(row["row"]) in embedded
    without = next(row for row in report["rows"] if str(row["row"]) not in embedded)
    assert f'<span class="file">{without["images"]["tuned"]}</span>' in table


def test_an_image_that_cannot_be_shown_is_named(tmp_path, read_page):
    report = example(tmp_path, 4)
    (tmp_path / report["rows"][1]["images"]["tuned"]).write_bytes(b"no image")
    (tmp_path / report["rows"][2]["truth"]).unlink()
    text = read_page(page(report, tmp_path)).text
    assert "2 images cannot be shown" in text
    assert "images/tuned/00001.png (cannot identify" in text and "truth/00002.png ([Errno 2] No such file" in text
    assert str(tmp_path) not in text


def test_a_report_of_one_model_without_extras_has_a_page(report, tmp_path, read_page):
    report |= {"models": report["models"][:1], "differences": {}, "forgetting": None, "curves": [], "left_out": []}
    report |= {"warnings": [], "summary": {"kid": {"64": {"original": around(0.1, 0.02, 4)}}}}
    for row in report["rows"]:
        row["images"], row["values"], row["truth"] = {"original": "a.png"}, {"lpips": {"original": None}}, None
    text = page(report, tmp_path)
    read = read_page(text)
    assert "Evaluation of original" in read.text and "<h2>Best and worst</h2>" not in text
    assert 'class="verdict"' not in text and "4 rows" not in text


# -- in a browser --------------------------------------------------------------------------------------------------

FRAGMENT = "#sort=-lpips:tuned&filter=CIRCLE&prompts-sort=category"
HARNESS = """<!DOCTYPE html><body><pre id="out"></pre><iframe src="report.html FRAGMENT"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument, search = inside.querySelector("input");
  const found = {opened: inside.documentElement.outerHTML, clicked: []};
  const filter = text => { search.value = text; search.dispatchEvent(new Event("input")); };
  filter("");
  for (const key of ["clip_score:tuned", "clip_score:tuned", "lpips:tuned", "caption", "row"]) {
    inside.querySelector(`th[data-key="${key}"] button`).click();
    found.clicked.push([...inside.querySelector(".rows tbody").rows].map(row => Number(row.cells[0].textContent)));
  }
  filter("square");
  found.left = inside.querySelector("output").textContent;
  found.address = frame.contentWindow.location.hash;
  found.error = inside.documentElement.dataset.error || null;
  document.querySelector("#out").textContent = JSON.stringify(found);
};
</script></body>""".replace(" FRAGMENT", FRAGMENT)


@pytest.fixture(scope="module")
def browsed(shown, tmp_path_factory):
    """What a browser made of the page: opened at FRAGMENT, then clicked and typed into as HARNESS says."""
    program = shutil.which("chromium")
    if not program:
        pytest.skip("chromium is not installed: the page's script is not run")
    harness = shown[1] / "harness.html"
    harness.write_text(HARNESS, encoding="utf-8")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--allow-file-access-from-files", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
               "--virtual-time-budget=2000", "--dump-dom", harness.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)[1]))


def order(dom, heading):
    """(row numbers in their order, those hidden) of a table."""
    table = dom[dom.index(f"<h2>{heading}</h2>") :]
    rows = re.findall(r'<tr data-text="(\d+) ([^>]*)>', table[: table.index("</table>")])
    return [int(number) for number, _ in rows], {int(number) for number, rest in rows if "hidden" in rest}


def by(rows, metric, sign=1):
    """Row numbers in the order of a metric of the tuned model; those without a value come last."""
    value = lambda row: row["values"][metric]["tuned"]
    key = lambda row: (value(row) is None, sign * (value(row) or 0))
    return [row["row"] for row in sorted(rows, key=key)]


def test_a_browser_sorts_and_filters_by_the_fragment(shown, browsed):
    rows, dom = shown[0]["rows"], browsed["opened"]
    assert 'data-ready="yes"' in dom and "data-error" not in dom and browsed["error"] is None
    hidden = {row["row"] for row in rows if "circle" not in row["caption"]}
    assert 0 < len(hidden) < len(rows)
    assert order(dom, "Image by image") == (by(rows, "lpips", -1), hidden)
    assert re.findall(r'data-key="([^"]*)"[^>]*aria-sort="(\w+)"', dom) == [
        ("lpips:tuned", "descending"), ("category", "ascending"),
    ]  # fmt: skip
    assert f"{len(rows) - len(hidden)} of {len(rows)} rows" in dom
    by_category = sorted(shown[0]["forgetting"]["prompts"], key=lambda row: row["category"])
    assert order(dom, "General prompts one by one") == ([row["row"] for row in by_category], set())


def test_a_click_on_a_heading_sorts_and_a_second_turns_it_round(shown, browsed):
    rows = shown[0]["rows"]
    by_caption = [row["row"] for row in sorted(rows, key=lambda row: row["caption"])]
    assert browsed["clicked"] == [
        by(rows, "clip_score"), by(rows, "clip_score", -1), by(rows, "lpips"), by_caption, list(range(len(rows))),
    ]  # fmt: skip
    assert browsed["left"] == f"{sum('square' in row['caption'] for row in rows)} of {len(rows)} rows"
    assert browsed["address"] == "#sort=row&prompts-sort=category&filter=square"
