"""A report is written in four forms that say the same, or not at all."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import table
from finetuning.evaluation.notes import note
from finetuning.evaluation.report import IN_MARKDOWN, as_csv, as_markdown, write_report

TABLE = {name: asdict(metric) for name, metric in table(load_checker("finetuning.shapes.checker")).items()}
FILES = ["report.csv", "report.html", "report.json", "report.md"]


def estimate(value, room, **more):
    return {"value": value, "low": value - room, "high": value + room, "n": 3, **more}


@pytest.fixture
def report():
    """A report of three rows and three models, sides as numbers as a program has them."""
    values = {"lpips": {"original": 0.6, "tuned": 0.4}, "clip_score": {"original": 24.0, "tuned": 27.25}}
    return {
        "made": {"command": ["python", "evaluate_model.py"], "versions": {"torch": "2.9"}, "args": {"seed": 0}},
        "protocol": "clean", "policy": "The centre square, resized once.", "sides": [64], "reference": "original",
        "metrics": TABLE,
        "weights": [{"name": "inception", "origin": "a.safetensors", "sha256": "ab", "published": False}],
        "left_out": [note("no_truth", metric="clip_image", rows=[3], of=9)], "warnings": [note("few_images", images=3)],
        "models": [
            {"label": "original", "source": "models/mini-sd", "noise_floor": False},
            {"label": "tuned", "source": "build/a", "noise_floor": False},
            {"label": "original, seed 2", "source": "models/mini-sd", "noise_floor": True},
        ],
        "summary": {
            "kid": {64: {"original": estimate(0.2, 0.02), "tuned": estimate(0.1, 0.02)}},
            "lpips": {64: {"original": estimate(0.6, 0.04), "tuned": estimate(0.4, 0.04)}},
            "fid": {64: {"tuned": estimate(90.0, 12.0)}},
        },
        "differences": {
            "kid": {64: {"tuned": estimate(-0.1, 0.3, excludes_zero=False)}},
            "lpips": {64: {
                "tuned": estimate(-0.2, 0.05, excludes_zero=True),
                "original, seed 2": estimate(0.0, 0.4, excludes_zero=False),
            }},
        },
        "rows": [
            {
                "row": number, "caption": f"a circle, no. {number} | \"red\"", "truth": f"../set/{number}.png",
                "images": {"original": f"images/the original/{number}.png", "tuned": f"images/b/{number}.png"},
                "values": {metric: dict(of) for metric, of in values.items()},
            }
            for number in range(3)
        ],
        "forgetting": None,
        "curves": [],
    }  # fmt: skip


def with_forgetting(report):
    prompt = {"row": 0, "caption": "a cat", "category": "animals", "images": {}, "values": {}}
    report["forgetting"] = {
        "prompts": [prompt], "summary": {}, "learned": {"tuned": estimate(0.9, 0.05)},
        "kept": {"tuned": estimate(0.7, 0.05)}, "words": {"learned": "what is new", "kept": "what is left"},
        "warnings": [], "left_out": [],
    }  # fmt: skip
    return report


def test_four_files_are_written_and_the_page_is_told(report, tmp_path):
    assert write_report(tmp_path / "new/one", report) == tmp_path / "new/one/report.html"
    assert sorted(path.name for path in (tmp_path / "new/one").iterdir()) == FILES
    read = json.loads((tmp_path / "new/one/report.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(report)) and "64" in read["summary"]["kid"]
    assert (tmp_path / "new/one/report.csv").read_text() == as_csv(report)
    assert (tmp_path / "new/one/report.md").read_text() == as_markdown(read)
    assert "tuned against original" in (tmp_path / "new/one/report.html").read_text()
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
    report["summary"]["kid"][64]["tuned"]["value"] = value
    with pytest.raises((ValueError, TypeError)):
        write_report(tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["low", "high"])
def test_an_estimate_without_an_interval_may_have_nulls(report, tmp_path, key):
    report["summary"]["kid"][64]["tuned"][key] = None
    write_report(tmp_path, report)
    assert "0.1 (no interval)" in (tmp_path / "report.md").read_text()


# -- the forms -----------------------------------------------------------------------------------------------------


def test_the_csv_has_a_line_for_each_row_and_model_in_full_digits(report):
    report["rows"][1]["values"] = {"lpips": {"original": 1 / 3, "tuned": None}}
    report["rows"][2]["caption"] = 'two\nlines, "quoted"'
    lines = list(csv.DictReader(io.StringIO(as_csv(report), newline="")))
    assert list(lines[0]) == ["row", "caption", "model", "truth", "image", "clip_score", "lpips"]
    assert [(line["row"], line["model"]) for line in lines] == [
        (str(number), label) for number in range(3) for label in ("original", "tuned")
    ]
    assert lines[0]["image"] == "images/the original/0.png" and lines[0]["truth"] == "../set/0.png"
    assert float(lines[2]["lpips"]) == 1 / 3 and lines[2]["clip_score"] == lines[3]["lpips"] == ""
    assert lines[4]["caption"] == 'two\nlines, "quoted"'


def table(markdown, head):
    """Rows of the Markdown table whose first heading is `head`, as lists of cells."""
    lines = markdown.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture
def written(report, tmp_path):
    """Writes the report and reads its Markdown."""

    def write():
        return (write_report(tmp_path, report).parent / "report.md").read_text(encoding="utf-8")

    return write


def test_the_markdown_has_the_figures_with_n_and_intervals_kid_before_fid(written):
    rows = table(written(), "metric")
    assert rows[0] == ["metric", "n", "original", "tuned", "original, seed 2"]
    assert rows[2:] == [
        ["LPIPS, lower is better", "3", "0.600 (0.560 to 0.640)",
         "0.400 (0.360 to 0.440) **better**, within the noise floor", ""],
        ["KID, lower is better, **not comparable** (not the published weights)", "3", "0.200 (0.180 to 0.220)",
         "0.100 (0.080 to 0.120)", ""],
        ["FID, lower is better, **not comparable** (not the published weights)", "3", "", "90 (78 to 102)", ""],
    ]  # fmt: skip


def test_the_markdown_shows_images_by_relative_path_with_figures_below(written):
    rows = table(written(), "caption")
    assert rows[0] == ["caption", "ground truth", "original", "tuned"] and len(rows) == 5
    caption, truth, original, tuned = rows[2]
    assert caption == 'a circle, no. 0 &#124; "red"'
    assert truth == '<img src="../set/0.png" width="128" alt="ground truth">'
    assert original.startswith('<img src="images/the%20original/0.png" width="128" alt="original"><br>')
    assert original.endswith("<br>CLIP score 24.00<br>LPIPS 0.600") and tuned.endswith(
        "<br>CLIP score 27.25<br>LPIPS 0.400"
    )


def test_the_markdown_says_the_verdict_the_warnings_and_what_was_left_out(report, written):
    with_forgetting(report)["forgetting"]["kept"]["tuned"] = estimate(1.0, 0)
    report["left_out"].append(note("no_weights", metric="clip_score", network="clip", reason="not to be had"))
    text = written()
    assert text.startswith("**Against original, tuned has not measurably learned: it is better in LPIPS (0.400 against")
    assert "> **Note:** only 3 images" in text and "> **Note:** CLIP image was not measured: 1 of 9" in text
    assert "--clip_model names a local file\n" in text and "not to be had" not in text
    assert table(text, "model")[2:] == [["tuned", "0.900 (0.850 to 0.950), n 3", "1 (all of 3)"]]
    assert "Learned: what is new. Kept: what is left." in text
    assert "Protocol `clean`. The centre square, resized once." in text


def test_text_stays_text_in_a_table(report, written):
    report["rows"][0]["caption"] = "_a_ <b> | --flag_name *c* `d` [e]"
    assert table(written(), "caption")[2][0] == (
        "&#95;a&#95; &lt;b&gt; &#124; --flag_name &#42;c&#42; &#96;d&#96; &#91;e&#93;"
    )


def test_of_many_rows_the_markdown_shows_an_even_choice_and_says_so(report, written):
    report["rows"] = [report["rows"][0] | {"row": n, "caption": f"no {n}"} for n in range(3 * IN_MARKDOWN - 1)]
    text = written()
    assert [row[0] for row in table(text, "caption")[2:]] == [f"no {n}" for n in range(0, 3 * IN_MARKDOWN - 1, 3)]
    assert f"{IN_MARKDOWN} of {3 * IN_MARKDOWN - 1} rows; report.csv has the values of all." in text
