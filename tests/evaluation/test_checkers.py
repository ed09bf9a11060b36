"""A checker is a module with METRICS and scores(): loaded by name or by file, its faults named together."""

import numpy as np
import pytest
from PIL import Image

from finetuning.evaluation.checkers import load_checker
from finetuning.evaluation.metrics import METRICS, EvaluationError, dataset_metrics, table
from finetuning.evaluation.retention import retention_measure
from finetuning.shapes.drawing import draw
from finetuning.shapes.scenes import parse

SHAPES = "finetuning.shapes.checker"
CAPTION = "a small red circle on a white background"
REDNESS = """
from finetuning.evaluation.metrics import Metric
METRICS = {"red": Metric("redness", "share of red in the mean colour", role="learned")}

def scores(image, caption):
    red, green, blue = image.resize((1, 1)).getpixel((0, 0))
    return {"red": red / max(1, red + green + blue)}
"""


@pytest.fixture
def written(tmp_path):
    """Write a module and name its file."""

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_the_shapes_world_is_a_checker():
    checker = load_checker(SHAPES)
    assert (checker.learned, checker.retained) == ("style", "shapes") and checker.has_roles
    assert [checker.metrics[name].measured_on for name in ("shapes", "style")] == ["both", "dataset"]
    chalk, filled = (draw(parse(CAPTION), 0, style) for style in ("chalk", "filled"))
    assert checker.scores(chalk, CAPTION) == {"shapes": 1, "style": 1}
    assert checker.values("style", [chalk, filled], ["a cat", CAPTION]).tolist() == [1, 0]
    assert checker.values("shapes", [filled], [CAPTION.replace("red", "blue")]).tolist() == [0]


def test_captions_that_it_cannot_judge_are_named():
    checker = load_checker(SHAPES)
    checker.check([CAPTION])
    assert list(checker.strange([CAPTION, "a cat", "a dog", "a cat"])) == ["a cat", "a dog"]
    with pytest.raises(EvaluationError, match="a cat"):
        checker.check([CAPTION, "a cat"])
    with pytest.raises(EvaluationError, match="no shapes for a cat"):
        checker.values("shapes", [Image.new("RGB", (64, 64))], ["a cat"])


def test_a_file_with_two_names_is_enough(written):
    checker = load_checker(written(REDNESS))
    assert checker.scores(Image.new("RGB", (8, 8), "red"), "anything") == {"red": 1}
    checker.check(["anything"])
    assert dataset_metrics(checker) == ("red", *dataset_metrics()) and list(table(checker)) == ["red", *METRICS]
    assert not checker.has_roles
    with pytest.raises(EvaluationError, match="retained"):
        retention_measure("checker", checker)


def test_another_content_is_another_checker(written):
    first, same = (load_checker(written(REDNESS)).facts for _ in range(2))
    other = load_checker(written(REDNESS + "\n")).facts
    assert first == same and first["checker"] == other["checker"] and first["sha256"] != other["sha256"]


@pytest.mark.parametrize(("text", "words"), [
    ("1 / 0", "ZeroDivisionError"), ("import nothing_of_this_name", "nothing_of_this_name"), ("", "METRICS"),
    ("", "scores(image, caption)"), (REDNESS.replace('"red": Metric', '"fid": Metric'), "'fid'"),
    (REDNESS.replace('"learned"', '"new"'), "'new'"),
    (REDNESS.replace('role="learned"', 'better="lower", role="learned"'), "higher must be better"),
    (REDNESS.replace('role="learned"', 'per="set"'), "per, network and needs_truth"),
    (REDNESS.replace("}\n", ', "b": Metric("b", "b", role="learned")}\n', 1), "2 metrics with the role learned"),
])  # fmt: skip
def test_what_is_wrong_with_a_module_is_said(text, words, written):
    with pytest.raises(EvaluationError) as problem:
        load_checker(written(text))
    assert words in str(problem.value) and "mine.py" in str(problem.value)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(EvaluationError, match="no_such"):
        load_checker("finetuning.no_such")


@pytest.mark.parametrize("returned", ['{"red": float("nan")}', '{"green": 1}', '{"red": "much"}', "None"])
def test_a_score_that_is_none_is_refused(returned, written):
    text = REDNESS[: REDNESS.index("    red,")] + f"    return {returned}\n"
    with pytest.raises(EvaluationError, match=r"mine\.py"):
        load_checker(written(text)).scores(Image.new("RGB", (8, 8)), CAPTION)


def test_words_of_learned_and_kept_are_those_of_its_metrics():
    measure = retention_measure("checker", load_checker(SHAPES))
    assert (measure.fit, measure.retain) == ("style", "shapes")
    assert "drawn in chalk" in measure.learned and "shape and colour" in measure.kept
    assert np.all([retention_measure(by) for by in ("clip", "loss")])


def test_the_checker_in_the_docs_works(root, written):
    text = (root / "docs/evaluation.md").read_text(encoding="utf-8")
    code = text.split("<!-- a test runs this -->")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    checker = load_checker(written(code))
    assert checker.has_roles
    image = draw(parse(CAPTION), 0)
    found = checker.scores(image, CAPTION)
    assert found["color"] == 1 and 0 < found["dark"] < 0.5
    assert checker.scores(image, CAPTION.replace("red", "blue"))["color"] == 0
    assert list(checker.strange([CAPTION, "a cat"])) == ["a cat"]
