"""A report is written in four forms that say the same, or not at all; its page sorts in a real browser."""

import base64
import csv
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
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import table
from finetuning.evaluation.report import (
    EMBEDDED,
    IN_MARKDOWN,
    THUMBNAIL,
    as_csv,
    as_markdown,
    chart,
    forest,
    page,
    write_report,
)
from finetuning.evaluation.statistics import mean_of, paired_difference
from finetuning.evaluation.words import best_and_worst, note, verdict
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import draw_scene

TABLE = {name: asdict(metric) for name, metric in table(load_checker("finetuning.shapes.checker")).items()}
FILES = ["report.csv", "report.html", "report.json", "report.md"]
LABELS = ("original", "original, seed 2", "tuned", "merged")
ROW_METRICS = {  # (mean, spread) of each model
    "style": ((0.0, 0.0, 0.93, 0.6), 0.1), "clip_score": ((24.1, 24.0, 27.3, 26.4), 1.5),
    "lpips": ((0.61, 0.6, 0.42, 0.5), 0.08),
}  # fmt: skip
SET_METRICS = {"kid": (0.214, 0.209, 0.038, 0.09), "fid": (181.2, 178.4, 92.6, 120.3)}
CATEGORIES = ("people", "animals", "food")


def around(value, room, n, **more):
    return {"value": value, "low": value - room, "high": value + room, "n": n, **more}


def example(folder, count=12, drawn=True):
    """A report as evaluate_model.py makes it, on scenes of the shapes world, with its images in `folder`."""
    rng = random.Random(7)
    values_of = lambda name, means, spread: {
        label: min(1.0, max(0.0, value)) if name == "style" else value
        for label, value in zip(LABELS, (round(rng.gauss(mean, spread), 4) for mean in means), strict=True)
    }
    rows, prompts = [], []
    for number in range(count):
        scene = draw_scene(rng, pair_share=0.3)
        names = {label: f"images/{label}/{number:05}.png" for label in LABELS}
        if drawn:
            styles = {"original": "filled", "original, seed 2": "filled", "tuned": "chalk"}
            images = {label: draw(scene, 100 + 9 * number + len(label), style) for label, style in styles.items()}
            images["merged"] = Image.blend(images["original"], images["tuned"], 0.6)
            images["truth"] = draw(scene, number, "chalk")
            for label, name in {**names, "truth": f"truth/{number:05}.png"}.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                images[label].save(folder / name)
        row = {"row": number, "caption": scene.caption, "truth": f"truth/{number:05}.png", "images": names}
        rows.append(row | {"values": {name: values_of(name, *how) for name, how in ROW_METRICS.items()}})
        if number < 9:
            values = {"clip_score": values_of("clip_score", (26.0, 26.1, 24.2, 25.3), 1.5)}
            values["drift_lpips"] = {label: round(rng.uniform(0.2, 0.6), 3) for label in LABELS[1:]}
            prompts.append({"row": number, "caption": scene.caption, "category": CATEGORIES[number % 3],
                            "images": names, "values": values})  # fmt: skip
    summary, differences = {}, {}
    for name in ROW_METRICS:
        of = {label: [row["values"][name][label] for row in rows] for label in LABELS}
        summary[name] = {"64": {label: mean_of(values).as_dict() for label, values in of.items()}}
        found = {label: paired_difference(of[label], of["original"]) for label in LABELS[1:]}
        differences[name] = {"64": {label: one.as_dict() | {"excludes_zero": bool(one.excludes_zero)}
                                    for label, one in found.items()}}  # fmt: skip
    for name, values in SET_METRICS.items():
        wide = 0.08 * values[0]
        summary[name] = {"64": {label: around(v, wide, count) for label, v in zip(LABELS, values, strict=True)}}
        differences[name] = {"64": {
            label: around(v - values[0], wide, count, excludes_zero=abs(v - values[0]) > wide)
            for label, v in zip(LABELS[1:], values[1:], strict=True)
        }}  # fmt: skip
    curve = lambda start, end, room: [
        {"x": step, "y": y, "low": y - room, "high": y + room}
        for step in (0, 250, 500, 1000, 2000)
        for y in [start + (end - start) * (1 - 0.998**step)]
    ]
    return {
        "made": {
            "command": ["python", "evaluate_model.py", "--dataset", "datasets/shapes chalk", "--model", "tuned=a --b"],
            "versions": {"torch": "2.9.0", "diffusers": "0.36.0"},
            "args": {"dataset": "datasets/shapes chalk", "seed": 0, "resolutions": [64], "lora": None},
        },
        "protocol": "clean", "policy": "The centre square, resized once.", "sides": [64], "metrics": TABLE,
        "reference": "original",
        "weights": [
            {"name": "inception", "origin": "random.safetensors", "sha256": "ab" * 32, "published": False},
            {"name": "lpips heads", "origin": "lpips 0.1.4", "sha256": "cd" * 32, "published": True},
            {"name": "clip", "origin": "models/clip", "sha256": "ef" * 32, "published": None},
        ],
        "left_out": [note("no_weights", metric="clip_image", network="clip", reason="no CLIP: --clip_model")],
        "warnings": [note("few_images", images=count)],
        "models": [
            {"label": label, "source": f"models/{label}", "noise_floor": label.endswith("seed 2")} for label in LABELS
        ],
        "summary": summary, "differences": differences, "rows": rows,
        "forgetting": {
            "prompts": prompts,
            "summary": {"clip_score": {label: around(26 - at, 0.6, 9) for at, label in enumerate(LABELS)}},
            "learned": {"tuned": around(0.93, 0.05, count), "merged": around(0.6, 0.06, count)},
            "kept": {"tuned": around(0.81, 0.07, 9), "merged": around(0.96, 0.06, 9)},
            "warnings": [], "left_out": [],
            "words": {"learned": "what is new", "kept": "what is left", "clip_score": "CLIP score on the prompts"},
        },
        "curves": [
            {"title": "Learned and kept", "x_title": "step", "y_title": "share", "lines": [
                {"label": "learned", "points": curve(0.0, 0.93, 0.04)},
                {"label": "kept", "points": curve(1.0, 0.81, 0.06)},
            ]},
            {"title": "Validation loss", "x_title": "step", "y_title": "loss",
             "lines": [{"label": "chalk", "points": curve(0.082, 0.055, 0.002)}]},
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
    """A report of few rows without images and curves, to be changed."""
    return example(tmp_path, 4, drawn=False) | {"curves": []}


def cells(text, head):
    """The rows of the table whose heading has the text `head`, as lists of text; a <br> or a tag is a space."""
    part = text[text.index(head) :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part[: part.index("</table>")], re.S)
    plain = lambda cell: " ".join(re.sub(r"<[^>]*>", " ", cell).split())
    return [[plain(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)] for row in rows]


# -- the files -----------------------------------------------------------------------------------------------------


def test_four_files_are_written_and_the_page_is_told(report, tmp_path):
    report["summary"]["kid"] = {64: report["summary"]["kid"]["64"]}  # as a program has it
    assert write_report(tmp_path / "new/one", report) == tmp_path / "new/one/report.html"
    assert sorted(path.name for path in (tmp_path / "new/one").iterdir()) == FILES
    read = json.loads((tmp_path / "new/one/report.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(report)) and "64" in read["summary"]["kid"]
    assert (tmp_path / "new/one/report.csv").read_text() == as_csv(report)
    assert (tmp_path / "new/one/report.md").read_text() == as_markdown(read)
    assert "tuned and merged against original" in (tmp_path / "new/one/report.html").read_text()
    write_report(tmp_path / "again", read)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new/one" / name).read_bytes()


def test_names_that_are_no_characters_do_not_stop_it(report, tmp_path):
    report["rows"][0]["images"]["tuned"] = "images/\udce9.png"
    write_report(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"][0]["images"]["tuned"]
    assert "images/%E9.png" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [float("nan"), Path("a.png")])
def test_what_is_no_json_is_refused_and_nothing_is_written(report, tmp_path, value):
    report["summary"]["kid"]["64"]["tuned"]["value"] = value
    with pytest.raises((ValueError, TypeError)):
        write_report(tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["low", "high"])
def test_an_estimate_without_an_interval_may_have_nulls(report, tmp_path, key):
    report["summary"]["kid"]["64"]["tuned"][key] = None
    write_report(tmp_path, report)
    assert "0.038 (no interval)" in (tmp_path / "report.md").read_text()


def test_the_csv_has_a_line_for_each_row_and_model_in_full_digits(report):
    report["rows"][1]["values"] = {"lpips": {"original": 1 / 3, "tuned": None}}
    report["rows"][2] |= {"caption": 'two\nlines, "quoted"', "images": {}}
    for row in report["rows"]:
        row["images"] = {label: name for label, name in row["images"].items() if label != "merged"}
    lines = list(csv.DictReader(io.StringIO(as_csv(report), newline="")))
    assert list(lines[0]) == ["row", "caption", "model", "truth", "image", "style", "clip_score", "lpips"]
    assert [line["model"] for line in lines] == [*LABELS, *LABELS[:3], *LABELS, *LABELS]
    assert lines[0]["image"] == "images/original/00000.png" and lines[0]["truth"] == "truth/00000.png"
    assert float(lines[4]["lpips"]) == 1 / 3 and lines[4]["clip_score"] == lines[6]["lpips"] == ""
    assert lines[7]["caption"] == 'two\nlines, "quoted"' and lines[7]["image"] == ""


def markdown_table(text, head):
    """Rows of the Markdown table whose first heading is `head`, as lists of cells."""
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_markdown_has_the_metrics_with_n_and_intervals_kid_before_fid(report):
    report["summary"] = {name: report["summary"][name] for name in ("kid", "fid", "lpips")}
    report["summary"]["lpips"]["64"] = {"original": around(0.6, 0.04, 3), "tuned": around(0.4, 0.04, 4)}
    report["differences"]["lpips"]["64"] = {
        "tuned": around(-0.2, 0.05, 3, excludes_zero=True), LABELS[1]: around(0, 0.4, 3, excludes_zero=False),
    }  # fmt: skip
    rows = markdown_table(as_markdown(report), "metric")
    assert rows[0] == ["metric", "n", *LABELS]
    assert rows[2] == ["LPIPS, lower is better", "3 / 4", "0.600 (0.560 to 0.640)", "",
                       "0.400 (0.360 to 0.440) **better**, within the noise floor", ""]  # fmt: skip
    assert rows[3][0] == "KID, lower is better, **not comparable** (not the published weights)"
    assert rows[3][4] == "0.038 (0.021 to 0.055) **better**" and rows[4][0].startswith("FID")
    assert rows[3][3] == "0.209 (0.192 to 0.226)"  # the noise floor is never better


def test_the_markdown_shows_images_by_relative_path_with_values_below(report):
    report["rows"][0] |= {"caption": "_a_ <b> | --flag_name *c* `d` [e]", "truth": "../set/0 0.png"}
    for label, value in zip(LABELS, (0.61, 0.5, 0.42, None), strict=True):
        report["rows"][0]["values"] = {"lpips": dict(report["rows"][0]["values"]["lpips"]) | {label: value}}
    rows = markdown_table(as_markdown(report), "caption")
    assert rows[0] == ["caption", "ground truth", *LABELS] and len(rows) == 2 + len(report["rows"])
    assert rows[2][0] == "&#95;a&#95; &lt;b&gt; &#124; --flag_name &#42;c&#42; &#96;d&#96; &#91;e&#93;"
    assert rows[2][1] == '<img src="../set/0%200.png" width="128" alt="ground truth">'
    assert rows[2][2] == '<img src="images/original/00000.png" width="128" alt="original"><br>LPIPS 0.610'
    assert rows[2][5] == '<img src="images/merged/00000.png" width="128" alt="merged">'


def test_the_markdown_says_the_verdict_the_warnings_and_what_was_left_out(report):
    report["forgetting"]["kept"]["tuned"] = around(1.0, 0, 3)
    report["left_out"] = [note("no_truth", metric="clip_image", rows=[3], of=9), *report["left_out"]]
    text = as_markdown(report)
    assert text.startswith("**Against original, tuned has learned")
    assert "> **Note:** only 4 images" in text and "> **Note:** CLIP image not measured: 1 of 9" in text
    assert "--clip_model\n" in text and "no CLIP" not in text
    assert markdown_table(text, "model")[2] == ["tuned", "0.930 (0.880 to 0.980), n 4", "1 (all of 3)"]
    assert "Learned: what is new. Kept: what is left." in text
    assert "Protocol `clean`. The centre square, resized once." in text


def test_of_many_rows_the_markdown_shows_an_even_choice_and_says_so(report):
    report["rows"] = [report["rows"][0] | {"row": n, "caption": f"no {n}"} for n in range(3 * IN_MARKDOWN - 1)]
    text = as_markdown(report)
    assert [row[0] for row in markdown_table(text, "caption")[2:]] == [
        f"no {n}" for n in range(0, 3 * IN_MARKDOWN - 1, 3)
    ]
    assert f"{IN_MARKDOWN} of {3 * IN_MARKDOWN - 1} rows; report.csv has the values of all." in text


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


def test_what_it_is_given_is_text_not_markup(report, tmp_path, read_page):
    report = json.loads(json.dumps(report).replace('"merged"', json.dumps(f"{EVIL} label")))
    prompt, points = report["forgetting"]["prompts"][0], [{"x": 0, "y": 0.5, "low": None, "high": None}]
    report["rows"][0]["caption"], prompt["category"] = f"{EVIL} caption", f"{EVIL} category"
    report["left_out"][0]["reason"], report["made"]["args"]["lora"] = f"{EVIL} reason", f"{EVIL} args"
    report["curves"] = [{"title": f"{EVIL} curve", "x_title": "x", "y_title": "y", "lines": [
        {"label": f"{EVIL} line", "points": points},
    ]}]  # fmt: skip
    report["warnings"].append(note("not_published", name=f"{EVIL} warning", origin="a"))
    report["made"]["command"].append(f"{EVIL} command")
    read = read_page(page(report, tmp_path))
    assert read.tags["script"] == 1 and read.tags["img"] == 0
    for where in ("caption", "label", "warning", "category", "curve", "line", "reason", "args"):
        assert f"{EVIL} {where}" in read.text, where
    assert shlex.quote(f"{EVIL} command") in read.text
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
    assert lines[kid + 1] == ["original", "0.214 0.197 to 0.231", "12", "", "", "reference"]
    assert lines[kid + 2] == [
        "original, seed 2",
        "0.209 0.192 to 0.226",
        "12",
        "-0.005 -0.022 to +0.012",
        "",
        "noise floor",
    ]
    assert lines[kid + 3] == ["tuned", "0.038 0.021 to 0.055", "12", "-0.176 -0.193 to -0.159", "", "✓ better"]
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
    assert "<code>--clip_model</code> and <code>--lpips_trunk</code>" in noted and "a.b" not in noted
    end = text[text.index("<h2>Reproduce it</h2>") :]
    assert [row[0] for row in cells(end, "Not measured, and why")] == ["CLIP image", "LPIPS"]
    assert "https://a.b/c.pth" in end


def test_all_that_makes_it_again_is_on_the_page(shown, read_page):
    report, _, text = shown
    read = read_page(text).text
    command = "python evaluate_model.py \\\n    --dataset 'datasets/shapes chalk' \\\n    --model 'tuned=a --b'"
    assert command in read and shlex.split(command.replace("\\\n", "")) == report["made"]["command"]
    for word in ("2.9.0", "models/merged", report["policy"], "clean", *(one["sha256"] for one in report["weights"])):
        assert word in read, word
    assert "not the published ones" in read and "not known whether published" in read


def test_learned_kept_and_categories_are_tables(shown):
    report, _, text = shown
    assert cells(text, "<h2>Learned and kept</h2>")[1] == [
        "tuned", "0.930 0.880 to 0.980 n 12", "0.810 0.740 to 0.880 n 9",
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
        assert values == [row["row"], *(row["values"][m][label] for label in LABELS for m in TABLE if m in ROW_METRICS)]
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
