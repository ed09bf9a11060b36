"""Flags from dataclasses: three sources of values, and every problem at once."""

import json
from dataclasses import dataclass

import pytest

from finetuning.cli import REQUIRED, as_dict, flag, flag_table, groups, parse, read, title
from finetuning.files import write_json


@dataclass
class DataFlags:
    """Dataset."""

    folder: str = flag(REQUIRED, "where the images are")
    resolution: int = flag(512, "side in pixels")
    columns: list[str] | None = flag(None, "names of columns")

    def problems(self):
        if self.resolution % 8:
            yield f"--resolution {self.resolution} must be a multiple of 8"


@dataclass
class OptimizerFlags:
    """Optimizer"""

    learning_rate: float = flag(1e-4, "step size")
    snr_gamma: float | None = flag(None, "min-SNR weighting; 5.0 | none is usual, in 95 % of runs")
    precision: str = flag("fp32", "of the activations", choices=("fp32", "fp16"))
    steps: list[int] = flag([25, 50], "sampling steps")
    sides: list[str] = flag(["left"], "which sides", choices=("left", "right"))
    use_ema: bool = flag(False, "average the weights")
    shuffle: bool = flag(True, "in a new order every epoch")
    note: str = flag("", "kept with the run")

    def problems(self):
        if self.learning_rate <= 0:
            yield f"--learning_rate {self.learning_rate} must be above 0"


@dataclass
class Args(OptimizerFlags, DataFlags):
    """Every flag, group by group."""

    untouched: int = 3  # a plain field: not a flag


def good(*argv):
    """The arguments of a command line in which nothing is wrong."""
    args, problems = read(Args, "", ["--folder", "data", *argv])
    assert problems == []
    return args


def wrong(*argv):
    """The problems of a command line."""
    return read(Args, "", ["--folder", "data", *argv])[1]


@pytest.fixture
def config(tmp_path):
    """Write a config file; the flags that read it."""

    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return ["--config", str(tmp_path / name)]

    return write


# Values


def test_defaults():
    assert as_dict(good()) == {
        "folder": "data", "resolution": 512, "columns": None, "learning_rate": 1e-4, "snr_gamma": None,
        "precision": "fp32", "steps": [25, 50], "sides": ["left"], "use_ema": False, "shuffle": True, "note": "",
    }  # fmt: skip
    assert good().untouched == 3


def test_values_have_the_types_of_their_fields():
    args = good(
        *("--resolution", "64", "--learning_rate", "2", "--snr_gamma", "5", "--steps", "1", "2", "--columns", "7"),
        *("--precision", "fp16", "--use_ema", "--note", "5"),
    )
    assert (args.resolution, args.learning_rate, args.snr_gamma, args.steps) == (64, 2.0, 5.0, [1, 2])
    assert (args.columns, args.precision, args.use_ema, args.note) == (["7"], "fp16", True, "5")
    assert isinstance(args.learning_rate, float)


def test_flag_with_an_equals_sign_and_negative_numbers():
    args = good("--note=a b", "--snr_gamma", "-1.5", "--steps", "-1", "3")
    assert (args.note, args.snr_gamma, args.steps) == ("a b", -1.5, [-1, 3])


def test_switches_can_be_turned_on_and_off():
    assert good("--use_ema", "--no-shuffle").use_ema is True
    assert good("--use_ema", "--no-shuffle").shuffle is False
    assert good("--no-use_ema").use_ema is False


def test_a_list_by_default_is_not_shared():
    good().steps.append(75)
    assert good().steps == [25, 50]


# Problems


def test_every_problem_is_reported_at_once():
    argv = ["--resolution", "big", "--learnin_rate", "1", "--precision", "fp8", "--steps", "1", "x", "--snr_gamma", "?"]
    _, problems = read(Args, "", argv)
    assert problems == [
        "unknown flag --learnin_rate; did you mean --learning_rate?",
        "--resolution big must be a whole number",
        "--precision fp8 must be one of fp32, fp16",
        "--steps 1 x must be a whole number",
        "--snr_gamma ? must be a number",
        "--folder is required: where the images are",
    ]


def test_problems_of_all_groups_are_reported_together():
    assert sorted(wrong("--resolution", "7", "--learning_rate", "0")) == [
        "--learning_rate 0.0 must be above 0",
        "--resolution 7 must be a multiple of 8",
    ]


def test_parse_prints_the_problems_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Args, "", ["--resolution", "7.5", "--bogus", "1"])
    assert caught.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].endswith(": 3 problem(s) with the arguments:")
    assert printed[1:] == [
        "  - unknown flag --bogus",
        "  - --resolution 7.5 must be a whole number",
        "  - --folder is required: where the images are",
    ]


def test_parse_returns_the_arguments_when_all_is_well():
    assert parse(Args, "", ["--folder", "x"]) == Args(folder="x")


@pytest.mark.parametrize("argv", [["--learning-rate", "1"], ["--learning-rate=1"], ["--learning_rates", "1"]])
def test_unknown_flag_suggests_the_nearest(argv):
    assert wrong(*argv) == [f"unknown flag {argv[0].split('=')[0]}; did you mean --learning_rate?"]


def test_a_shortened_flag_is_unknown():
    assert wrong("--learning", "1") == ["unknown flag --learning; did you mean --learning_rate?"]


def test_words_that_belong_to_no_flag_are_named():
    assert wrong("--note", "a", "small", "circle") == [
        "not understood: small circle (a value with spaces needs quotes)"
    ]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--resolution", "64.0"], "--resolution 64.0 must be a whole number"),
        (["--learning_rate", "fast"], "--learning_rate fast must be a number"),
        (["--sides", "left", "up"], "--sides up must be one of left, right"),
    ],
)
def test_wrong_values_are_named(argv, problem):
    assert wrong(*argv) == [problem]


def test_flag_without_its_value_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Args, "", ["--folder"])
    assert caught.value.code == 2
    assert "--folder" in capsys.readouterr().err


# The config file


def test_config_fills_flags_and_the_command_line_wins(config):
    flags = config("resolution: 64\nlearning_rate: 0.5\nsteps: [1, 2]\nuse_ema: true\nshuffle: false\n")
    args = good(*flags, "--resolution", "128", "--steps", "9", "--no-use_ema")
    assert (args.resolution, args.steps, args.use_ema) == (128, [9], False)
    assert (args.learning_rate, args.shuffle, args.precision) == (0.5, False, "fp32")


def test_required_flag_may_come_from_the_config(config):
    args, problems = read(Args, "", config("folder: elsewhere\n"))
    assert (args.folder, problems) == ("elsewhere", [])


def test_config_numbers_written_as_text_are_numbers(config):
    # YAML 1.1 reads 1e-5, without a point, as text.
    args = good(*config('learning_rate: 1e-5\nsnr_gamma: "5"\nresolution: "64"\nsteps: ["3", 4]\nnote: 5\n'))
    assert (args.learning_rate, args.snr_gamma, args.resolution, args.steps) == (1e-5, 5.0, 64, [3, 4])
    assert args.note == "5"


def test_config_single_value_for_a_list(config):
    assert good(*config("steps: 3\ncolumns: text\n")).steps == [3]
    assert good(*config("steps: 3\ncolumns: text\n")).columns == ["text"]


def test_config_null_is_none_where_none_is_allowed(config):
    assert good(*config("snr_gamma: null\n")).snr_gamma is None
    assert wrong(*config("resolution: null\n")) == ["--resolution needs a value"]


def test_config_problems_are_reported_with_those_of_the_command_line(config):
    flags = config("resolutoin: 64\nuse_ema: maybe\nresolution: 64.5\n")
    problems = wrong(*flags, "--learning_rate", "fast")
    assert sorted(problems) == [
        "--config " + flags[1] + ": unknown flag resolutoin; did you mean --resolution?",
        "--learning_rate fast must be a number",
        "--resolution 64.5 must be a whole number",
        "--use_ema maybe must be true or false",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("resolution: true", "--resolution True must be a whole number"),
        ("resolution: .inf", "--resolution inf must be a whole number"),
        ("learning_rate: [1, 2]", "--learning_rate 1 2 must be a number"),
        ("note: [a, b]", "--note a b must be one value, not a list"),
        ("note: no", "--note False must be text: put it in quotes"),
        ("use_ema: 1", "--use_ema 1 must be true or false"),
        ("precision: bf16", "--precision bf16 must be one of fp32, fp16"),
    ],
)
def test_config_values_of_the_wrong_type_are_named(config, line, problem):
    assert wrong(*config(line + "\n")) == [problem]


def test_config_as_json(config):
    assert good(*config('{"resolution": 64, "steps": [1]}', "run.json")).resolution == 64


def test_written_arguments_can_be_read_back(tmp_path):
    first = good("--resolution", "64", "--note", "größer", "--no-shuffle", "--columns", "a", "b")
    write_json(tmp_path / "args.json", as_dict(first))
    assert json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))["note"] == "größer"
    args, problems = read(Args, "", ["--config", str(tmp_path / "args.json")])
    assert (args, problems) == (first, [])


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words\n", "a: [1\n", b"note: \xff\n", None], ids=repr)
def test_config_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (problem,) = wrong("--config", str(path))
    assert problem.startswith(f"--config {path}: ")


def test_empty_config_changes_nothing(config):
    assert good(*config("# nothing yet\n")) == good()


# Help


def test_groups_and_titles_in_reading_order():
    assert [(title(group), fields[0].name) for group, fields in groups(Args)] == [
        ("Dataset", "folder"),
        ("Optimizer", "learning_rate"),
    ]


def test_help_shows_groups_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Args, "What it does.\n    as written", ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does.\n    as written" in shown
    words = " ".join(shown.split())
    for text in (
        "Dataset:", "Optimizer:", "where the images are (default: required)", "side in pixels (default: 512)",
        "in 95 % of runs (default: none)", "--precision {fp32,fp16}", "sampling steps (default: 25 50)",
        "--use_ema, --no-use_ema average the weights (default: off)", "every epoch (default: on)",
        "kept with the run (default: empty)", "--config FILE",
    ):  # fmt: skip
        assert text in words


def test_flag_table():
    assert (
        flag_table(Args)
        == """\
**Dataset**

| flag | default | meaning |
|---|---|---|
| `--folder` | required | where the images are |
| `--resolution` | 512 | side in pixels |
| `--columns` | none | names of columns |

**Optimizer**

| flag | default | meaning |
|---|---|---|
| `--learning_rate` | 0.0001 | step size |
| `--snr_gamma` | none | min-SNR weighting; 5.0 \\| none is usual, in 95 % of runs |
| `--precision` | fp32 | of the activations |
| `--steps` | 25 50 | sampling steps |
| `--sides` | left | which sides |
| `--use_ema` | off | average the weights |
| `--shuffle` | on | in a new order every epoch |
| `--note` | empty | kept with the run |
"""
    )
