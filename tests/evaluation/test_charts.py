"""A drawing shows every point where its figures are, and its interval around it."""

import re
from xml.etree import ElementTree

import pytest

from finetuning.evaluation.charts import LINES, chart, forest


def line(label, *points):
    return {"label": label, "points": [dict(zip(("x", "y", "low", "high"), point, strict=True)) for point in points]}


def curve(*lines):
    return {"title": "Learned & kept", "x_title": "step", "y_title": "share", "lines": list(lines)}


LEARNED = line("learned", (0, 0.0, 0.0, 0.0), (1000, 0.6, 0.5, 0.7), (2000, 0.9, 0.85, 0.95), (500, 0.3, 0.2, 0.4))
KEPT = line("kept", (0, 1.0, 1.0, 1.0), (2000, 0.8, 0.7, 0.9))


def drawing(text):
    (svg,) = re.findall(r'<svg class="(?:chart|forest)".*?</svg>', text, re.S)
    return ElementTree.fromstring(svg)


def places(element):
    return [tuple(map(float, place.split(","))) for place in element.get("points").split()]


def test_every_point_stands_where_its_figures_are_in_the_order_of_x():
    drawn = drawing(chart(curve(LEARNED, KEPT)))
    paths = [places(one) for one in drawn.iter("polyline")]
    assert list(map(len, paths)) == [4, 2] and len(list(drawn.iter("circle"))) == 6
    xs, ys = zip(*paths[0], *paths[1], strict=True)
    for found, values in ((xs, [0, 500, 1000, 2000, 0, 2000]), (ys, [0, 0.3, 0.6, 0.9, 1, 0.8])):
        per_unit = (found[3] - found[0]) / (values[3] - values[0])
        assert found == pytest.approx([found[0] + per_unit * value for value in values], abs=0.2)
    assert xs[3] > xs[0] and ys[3] < ys[0]  # y grows downwards


def test_the_interval_is_a_band_around_its_line():
    band = places(next(drawing(chart(curve(LEARNED))).iter("polygon")))
    path = places(next(drawing(chart(curve(LEARNED))).iter("polyline")))
    upper, lower = band[:4], band[:3:-1]
    assert [x for x, _ in upper] == [x for x, _ in lower] == [x for x, _ in path]
    assert all(up[1] < at[1] < down[1] for up, at, down in zip(upper[1:], path[1:], lower[1:], strict=True))
    assert upper[0] == lower[0] == path[0]


def test_axes_and_lines_are_named_and_points_tell_their_figures():
    text = chart(curve(LEARNED, KEPT))
    words = [one.text for one in drawing(text).iter("text")]
    assert {"step", "share", "0", "1000", "2000", "0.8"} <= set(words)
    assert re.findall(r"</svg>([^<]*)</li>", text) == ["learned", "kept"]
    told = [one.text for one in drawing(text).iter("title")]
    assert told[:2] == ["learned at 0: 0", "learned at 500: 0.30 (0.20 to 0.40)"]
    assert drawing(text).get("aria-label") == "Learned & kept: share over step"


def test_lines_differ_in_color_and_dashes():
    pens = re.findall(r"<polyline [^>]*style=\"([^\"]*)\"", chart(curve(*[LEARNED] * LINES)))
    assert len(set(pens)) == LINES and len({pen.split("dasharray:")[1] for pen in pens}) == 4


@pytest.mark.parametrize("points", [[], [(0, 0.5, None, None)], [(3, 0.0, 0.0, 0.0)]], ids=["none", "one", "at zero"])
def test_a_curve_of_few_points_is_drawn_too(points):
    text = chart(curve(line("a", *points)))
    assert text.count("<circle") == len(points) and "nan" not in text
    assert ("no points" in text) == (not points)


def test_names_are_text_not_markup():
    text = chart({**curve(line("<b>", (0, 1.0, 0.5, 1.5))), "title": "<i>", "x_title": "<u>", "y_title": "<s>"})
    assert not re.search("<[bius]>", text) and "&lt;b&gt;" in text


def difference(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 9}


def test_a_difference_stands_on_its_side_of_0_and_the_noise_floor_around_it():
    own, other = difference(-0.2, -0.3, -0.1), difference(0.5, 0.1, 0.6)
    drawn = drawing(forest(own, [own, other], 0.15))
    middle = float(drawn.find("line[@class='zero']").get("x1"))
    bar, point, noise = drawn.find("line[@class='bar']"), drawn.find("circle"), drawn.find("rect")
    left, right = float(bar.get("x1")), float(bar.get("x2"))
    assert left < float(point.get("cx")) < right < middle == 100
    per_unit = (right - left) / 0.2
    assert middle + 0.6 * per_unit == pytest.approx(194, abs=0.5)  # the farthest end of all is just inside
    assert float(noise.get("x")) == pytest.approx(middle - 0.15 * per_unit, abs=0.1)
    assert float(noise.get("width")) == pytest.approx(0.3 * per_unit, abs=0.1)
    assert drawn.get("aria-label") == "-0.20 (-0.30 to -0.10)"


def test_the_noise_floor_may_be_the_widest_or_missing():
    own = difference(0.1, 0.05, 0.15)
    assert float(drawing(forest(own, [own], 0.3)).find("rect").get("width")) == 188
    assert float(drawing(forest(own, [own], None)).find("rect").get("width")) == 0
    none = difference(0.0, 0.0, 0.0)
    assert float(drawing(forest(none, [none], None)).find("circle").get("cx")) == 100


@pytest.mark.parametrize("estimate", [None, difference(0.1, None, 0.2), difference(0.1, 0.0, None)])
def test_without_an_interval_there_is_no_drawing(estimate):
    assert forest(estimate, [], 0.1) == ""
