"""Flags from dataclasses: three sources of values, and every problem at once."""

import io
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from finetuning.cli import (
    REQUIRED,
    SEEDS,
    UserError,
    as_dict,
    flag,
    flag_table,
    flags_of,
    flags_without_effect,
    groups,
    parse,
    read,
    run_commands,
    run_script,
    size_text,
)
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
    seed: int = flag(0, "of everything random", **SEEDS)

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
        "seed": 0,
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
    both = good("--use_ema", "--no-shuffle")
    assert (both.use_ema, both.shuffle, good("--no-use_ema").use_ema) == (True, False, False)


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
    assert printed[0].endswith(": 3 problems with the flags:")
    assert printed[1:] == [
        "  - unknown flag --bogus",
        "  - --resolution 7.5 must be a whole number",
        "  - --folder is required: where the images are",
    ]


@pytest.mark.parametrize("argv", [
    ["--learning-rate", "1"], ["--learning-rate=1"], ["--learning", "1"], ["\N{EN DASH}-learning_rate", "1"],
])  # fmt: skip
def test_unknown_flag_suggests_the_nearest(argv):
    assert wrong(*argv) == [f"unknown flag {argv[0].split('=')[0]}; did you mean --learning_rate?"]


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
        (["--seed", "-1"], f"--seed -1 must be at least 0 and at most {2**64 - 1}"),
        (["--seed", "1" * 400], f"--seed {'1' * 400} must be at least 0 and at most {2**64 - 1}"),
    ],
)
def test_wrong_values_are_named(argv, problem):
    assert wrong(*argv) == [problem]


# What is declared at the flag


@dataclass
class AverageFlags:
    """Average"""

    use_ema: bool = flag(False, "average the weights")
    decay: float = flag(0.999, "of the average", min=0, below=1, requires="use_ema", was=("ema_rate", "rate"))
    every: int | None = flag(None, "update every N steps", above=0, max=10, requires=("use_ema", "decay=0.5"))
    loss: str = flag("l2", "kind of loss", choices=lambda: ("l1", "l2", "huber"))
    huber_c: float = flag(0.1, "of the Huber loss", requires="loss=huber")
    sizes: list[int] = flag([8], "several", min=1)
    names: list[str] = flag([], "may be given several times", repeated=True)
    left: int = flag(0, "one way", conflicts="right")
    right: int = flag(0, "the other way")
    log: str = flag("log.txt", "where it is logged", affects_result=False)
    cache: str = flag("auto", "whether to keep it", choices=("auto", "on", "off"))

    def problems(self):
        if self.sizes == [3]:
            yield "--sizes 3 does not go with --loss"


@dataclass
class OtherDefaults(AverageFlags):
    """The same flags"""

    decay: float = flag(0.5)
    log: str = flag("other.txt", "somewhere else")


def problems_of(*argv, args_class=AverageFlags):
    return read(args_class, "", list(argv))[1]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("--decay 1 --use_ema", "--decay 1 must be at least 0 and below 1"),
        ("--decay -0.1 --use_ema", "--decay -0.1 must be at least 0 and below 1"),
        ("--decay nan --use_ema", "--decay nan must be a finite number, at least 0 and below 1"),
        ("--huber_c inf --loss huber", "--huber_c inf must be a finite number"),
        ("--every 0 --use_ema", "--every 0 must be above 0 and at most 10"),
        ("--every 11 --use_ema", "--every 11 must be above 0 and at most 10"),
        ("--sizes 4 0 5", "--sizes 0 must be at least 1"),
        ("--loss l3", "--loss l3 must be one of l1, l2, huber"),
        ("--decay 0.9", "--decay does nothing without --use_ema"),
        ("--every 2", "--every does nothing without --use_ema or --decay 0.5"),
        ("--huber_c 1", "--huber_c does nothing without --loss huber"),
        ("--left 1 --right 1", "--left and --right cannot be given together"),
        ("--sizes 1 --sizes 2", "--sizes is given twice: put all its values after one --sizes"),
        ("--sizes 3", "--sizes 3 does not go with --loss"),
        ("--sizes --use_ema", "--sizes needs a value"),
        ("--no-loss", "unknown flag --no-loss; did you mean --loss?"),
        ("--use_ema=maybe", "--use_ema maybe must be true or false"),
        ("--cache maybe", "--cache maybe must be one of auto, on, off"),
        ("--no-cache maybe", "not understood: maybe (a value with spaces needs quotes)"),
    ],
)
def test_what_breaks_a_declaration_is_named(argv, problem):
    assert problems_of(*argv.split()) == [problem]


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ("", "auto"), ("--cache", "on"), ("--cache --use_ema", "on"), ("--no-cache", "off"), ("--cache=off", "off"),
        ("--cache auto", "auto"), ("--cache yes", "on"), ("--cache False", "off"), ("--cache --no-cache", "off"),
    ],
)  # fmt: skip
def test_a_choice_of_on_and_off_and_more_is_given_like_a_switch(argv, value, config):
    args, problems = read(AverageFlags, "", argv.split())
    assert problems == [] and args.cache == value
    for text in ("cache: true", "cache: on"):  # what older versions wrote into args.json, and YAML's own words
        assert read(AverageFlags, "", config(text))[0].cache == "on"
    assert read(AverageFlags, "", config("cache: no"))[0].cache == "off"


@pytest.mark.parametrize(
    "argv",
    [
        "--decay 0 --use_ema", "--every 10 --use_ema", "--every 2 --use_ema --decay 0.5", "--decay 0.999",
        "--huber_c 1 --loss huber", "--left 1 --right 0", "--names a --names b c",
    ],
)  # fmt: skip
def test_what_keeps_to_the_declarations(argv):
    assert problems_of(*argv.split()) == []


def test_what_relates_flags_is_only_reported_once_all_of_them_can_be_read():
    assert problems_of("--loss", "l3", "--decay", "2", "--bogus", "1", "--sizes", "3", "--every", "2") == [
        "unknown flag --bogus",
        "--loss l3 must be one of l1, l2, huber",
        "--decay 2 must be at least 0 and below 1",
    ]
    assert problems_of("--use_em", "--decay", "0.9") == ["unknown flag --use_em; did you mean --use_ema?"]


def test_values_of_a_repeated_flag_add_up():
    assert read(AverageFlags, "", ["--names", "a", "--names", "b", "c"])[0].names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("words", "value"),
    [("true yes on True", True), ("false no off False", False)],
)
def test_a_switch_understands_a_word_after_it(words, value):
    for word in words.split():
        for argv in (["--shuffle", word], [f"--shuffle={word}"]):
            assert good(*argv).shuffle is value


def test_numbers_with_a_minus_are_values():
    assert good("--snr_gamma", "-1e-3", "--note", "- a cat").snr_gamma == -1e-3


def test_older_names_go_on_working_with_a_notice(tmp_path, capsys):
    (tmp_path / "old.json").write_text('{"ema_rate": 0.25, "use_ema": "yes"}')
    for argv in (
        ["--rate", "0.25", "--use_ema"],
        ["--ema_rate=0.25", "--use_ema"],
        ["--config", f"{tmp_path}/old.json"],
    ):
        args, problems = read(AverageFlags, "", argv)
        assert (args.decay, args.use_ema, problems) == (0.25, True, [])
        notice = capsys.readouterr().err.splitlines()
        assert len(notice) == 1 and "--decay" in notice[0]


def test_choices_that_are_a_function_are_not_computed_without_need():
    @dataclass
    class Expensive:
        kind: str = flag("a", "of many", metavar="KIND", choices=lambda: pytest.fail("computed"))

    assert read(Expensive, "", [])[1] == []
    with pytest.raises(SystemExit):
        read(Expensive, "", ["--help"])


def test_flags_without_effect_and_redeclared_flags():
    assert flags_without_effect(AverageFlags) == flags_without_effect(OtherDefaults) == {"log"}
    again = flags_of(OtherDefaults)
    assert (again["decay"].default, again["decay"].help, again["decay"].below) == (0.5, "of the average", 1)
    assert (again["log"].default, again["log"].help) == ("other.txt", "somewhere else")
    assert [group for group, _ in groups(OtherDefaults)] == [AverageFlags]
    assert problems_of("--use_ema", "--rate", "7", args_class=OtherDefaults) != []


# A script


def failing(error):
    def function(args):
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a.png: cut off"), 1, "error: a.png: cut off"),
        (OSError(28, "No space left on device", "out/x.png"), 1, "error: out/x.png: No space left on device"),
        (PermissionError(13, "Permission denied", b"out"), 1, "error: out: Permission denied"),
        (OSError("no such model\n  on the Hub"), 1, "error: no such model on the Hub"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "CUDA out of memory"),
        (torch.OutOfMemoryError(), 1, "memory"),
        (
            torch.AcceleratorError("CUDA error: out of memory\nSearch for"),
            1,
            "too little memory: CUDA error: out of",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), 1, "too little memory: CUDA error"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
    ],
)
def test_a_script_ends_with_one_message_and_a_status(capsys, error, status, message):
    assert run_script(AverageFlags, "", failing(error), []) == status
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1


def test_a_terminal_that_lacks_a_letter_shows_its_code(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run_script(AverageFlags, "", lambda args: print("caf\xe9"), []) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9\n"


def test_a_script_may_be_called_in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_script, AverageFlags, "", lambda args: 7, []).result() == 7


def test_errors_of_the_code_keep_their_traceback():
    for error in (KeyError("x"), RuntimeError("x"), ValueError("x")):
        with pytest.raises(type(error)):
            run_script(AverageFlags, "", failing(error), [])


def test_a_script_returns_what_its_function_returns():
    assert run_script(AverageFlags, "", lambda args: None, []) == 0
    assert run_script(AverageFlags, "", lambda args: args.left, ["--left", "143"]) == 143


def test_other_processes_leave_the_message_to_the_first(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_script(AverageFlags, "", failing(UserError("there is no launcher")), []) == 1
    assert capsys.readouterr().err == "error: there is no launcher\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_script(AverageFlags, "", failing(UserError("all meet this")), []) == 1
    with pytest.raises(SystemExit):
        run_script(AverageFlags, "", failing(None), ["--bogus"])
    assert capsys.readouterr().err == ""
    assert run_script(AverageFlags, "", failing(OSError(28, "full", "one/may/meet/this")), []) == 1
    assert capsys.readouterr().err == "[process 1] error: one/may/meet/this: full\n"


def test_commands(capsys):
    commands = {"count": (AverageFlags, lambda args: args.left), "fuse": lambda: (AverageFlags, lambda args: 7)}
    run = lambda *argv: run_commands(commands, "What it does.", list(argv), was={"fold": "fuse"}, usual="count")
    assert (run("count", "--left", "3"), run("--left", "4"), run("fuse")) == (3, 4, 7)
    assert run("fold") == 7
    assert "fuse" in capsys.readouterr().err
    for argv, status in ((["--help"], 0), (["cuont"], 2), ([], 2), (["count", "--bogus"], 2)):
        with pytest.raises(SystemExit) as caught:
            run(*argv)
        assert caught.value.code == status
    printed = capsys.readouterr()
    assert "What it does." in printed.out and "did you mean count?" in printed.err


# The config file


def test_config_fills_flags_and_the_command_line_wins(config):
    flags = config("resolution: 64\nlearning_rate: 0.5\nsteps: [1, 2]\nuse_ema: true\nshuffle: false\n")
    args = good(*flags, "--resolution", "128", "--steps", "9", "--no-use_ema")
    assert (args.resolution, args.steps, args.use_ema) == (128, [9], False)
    assert (args.learning_rate, args.shuffle, args.precision) == (0.5, False, "fp32")


def test_config_numbers_written_as_text_are_numbers(config):
    # YAML 1.1 reads 1e-5, without a point, as text.
    args = good(*config('learning_rate: 1e-5\nsnr_gamma: "5"\nresolution: "64"\nsteps: ["3", 4]\nnote: 5\n'))
    assert (args.learning_rate, args.snr_gamma, args.resolution, args.steps) == (1e-5, 5.0, 64, [3, 4])
    assert args.note == "5"


def test_config_single_value_is_a_list_and_null_is_none_where_none_is_allowed(config):
    args = good(*config("steps: 3\ncolumns: text\nsnr_gamma: null\n"))
    assert (args.steps, args.columns, args.snr_gamma) == ([3], ["text"], None)
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


def test_a_text_of_another_encoding_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "encoding" in read(Args, "", ["--folder", "caf\udce9"])[1][0]
    (tmp_path / "caf\udce9").mkdir()
    assert read(Args, "", ["--folder", "caf\udce9"])[1] == []


def test_a_path_that_is_required_is_not_empty():
    """A shell's variable that is not set."""
    assert read(Args, "", ["--folder", ""])[1] == ['--folder "" must not be empty']
    assert good("--note", "").note == ""


def test_written_arguments_can_be_read_back(tmp_path):
    first = good("--resolution", "64", "--note", "größer", "--no-shuffle", "--columns", "a", "b")
    write_json(tmp_path / "args.json", as_dict(first))
    assert json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))["note"] == "größer"
    args, problems = read(Args, "", ["--config", str(tmp_path / "args.json")])
    assert (args, problems) == (first, [])


@pytest.mark.parametrize(
    "content", ["- a\n- b\n", "just words\n", "a: [1\n", "note: a\nnote: b\n", b"note: \xff\n", None], ids=repr
)
def test_config_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (problem,) = wrong("--config", str(path))
    assert problem.startswith(f"--config {path}: ")


def test_a_config_may_be_empty_and_may_hold_what_is_required(config):
    assert good(*config("# nothing yet\n")) == good()
    args, problems = read(Args, "", config("folder: elsewhere\n"))
    assert (args.folder, problems) == ("elsewhere", [])


# Help


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


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MB"), (26_540_000, "26.5 MB"), (1_250_000_000, "1.2 GB")])
def test_a_size_is_never_nothing_of_a_unit_that_is_too_large(count, text):
    assert size_text(count) == text


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
| `--seed` | 0 | of everything random; at least 0 and at most 18446744073709551615 |
"""
    )


def test_a_rank_that_a_shell_has_kept_is_nobodys(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_script(AverageFlags, "", lambda args: "LOCAL_RANK" in os.environ, []) == 0
