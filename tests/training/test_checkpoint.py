"""Checkpoints: whole or not there, found again, and refused where the run has become another one."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from finetuning import files
from finetuning.cli import UserError, flag
from finetuning.training import checkpoint
from finetuning.training.checkpoint import (
    CheckpointArgs,
    Checkpointer,
    CheckpointError,
    NonFinite,
    checkpoints_in,
    harmless_flags,
    seed_of_resumed_run,
)
from finetuning.training.ema import AveragedWeights, EMAArgs, NoAverage
from finetuning.training.optim import OptimArgs


@dataclass
class Args(CheckpointArgs, EMAArgs, OptimArgs):
    """The flags that a checkpoint compares."""

    output_dir: str = flag("out", affects_result=False)
    seed: int = flag(3)
    max_train_steps: int | None = flag(None)
    center_crop: bool = flag(False)


class FakeModel:
    """One weight, in the place of a model."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def trained_parameters(self):
        return {"unet.w": self.weight}

    def save_trained(self, folder, weights, suffix=""):
        (folder / f"unet{suffix}").mkdir()
        torch.save(weights["unet.w"].detach(), folder / f"unet{suffix}/w.pt")

    def load_trained(self, folder, ema):
        with torch.no_grad():
            self.weight.copy_(torch.load(folder / "unet/w.pt", weights_only=True))
        return {"unet.w": torch.load(folder / "unet_ema/w.pt", weights_only=True)} if ema else None


@pytest.fixture
def start(tmp_path, fake_run):
    """A Checkpointer in the one output folder of the test."""

    def make(fingerprint="rows", steps_per_epoch=3, run=None, **flags):
        args = Args(output_dir=str(tmp_path / "out"), **flags)
        model = FakeModel()
        ema = AveragedWeights(model.trained_parameters(), 0.5, "warm") if args.use_ema else NoAverage()
        optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.1)
        data = SimpleNamespace(
            batch_sampler=SimpleNamespace(steps_per_epoch=steps_per_epoch),
            training=SimpleNamespace(fingerprint=lambda: fingerprint),
        )
        return Checkpointer(args, model, ema, optimizer, run or fake_run(), data)

    return make


@pytest.fixture
def left(start):
    """A run that has saved after each of these steps; the weight is the number of the step."""

    def make(*steps, **flags):
        one = start(**flags)
        one.resume(100)
        for step in steps:
            with torch.no_grad():
                one.model.weight.fill_(step)
            one.save(step)
        return one

    return make


def names(one):
    return [path.name for _, path in checkpoints_in(one.folder)]


def resume(one, total_steps=100):
    """(step, weight, what was said)."""
    step = one.resume(total_steps)
    one.load()
    return step, one.model.weight[0].item(), "\n".join(one.run.said)


# -- when, and how many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ({"checkpointing_steps": 4}, [4, 8]),
        ({"checkpointing_steps": 0}, []),
        ({"checkpointing_steps": 0, "checkpointing_epochs": 2}, [6]),
        ({"checkpointing_steps": 5, "checkpointing_epochs": 1}, [3, 5, 6, 9]),
        ({"checkpointing_steps": 0, "checkpointing_minutes": 1e-9}, list(range(1, 10))),
        ({"checkpointing_steps": 0, "checkpointing_minutes": 10.0}, []),
        ({"checkpointing_steps": 0, "checkpointing_epochs": 1, "steps_per_epoch": None}, []),  # a stream has no epochs
    ],
)
def test_a_checkpoint_is_due_by_steps_epochs_and_the_clock(flags, due, start):
    one = start(**flags)
    assert [step for step in range(1, 10) if one.due(step)] == due


@pytest.mark.parametrize(("limit", "kept"), [(2, [3, 10]), (None, [1, 2, 3, 10])])
def test_the_limit_keeps_the_newest_and_other_folders_are_nobodys(limit, kept, left, tmp_path):
    (tmp_path / "out/checkpoint-best").mkdir(parents=True)
    assert names(left(1, 2, 3, 10, checkpoints_total_limit=limit)) == [f"checkpoint-{step}" for step in kept]
    assert (tmp_path / "out/checkpoint-best").is_dir()


# -- whole or not there ------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_is_needed_and_its_hashes(left):
    folder = left(4, use_ema=True).folder / "checkpoint-4"
    files.check_manifest(folder)
    assert {path.name for path in folder.iterdir()} == {
        "unet", "unet_ema", "optimizer.pt", "training_state.json", "manifest.json",
    }  # fmt: skip
    state = json.loads((folder / "training_state.json").read_text())
    assert (state["step"], state["dataset"], state["args"]["seed"]) == (4, "rows", 3)
    assert torch.load(folder / "optimizer.pt", weights_only=True).keys() == {"optimizer", "scaler"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_save_that_is_cut_leaves_nothing_and_the_older_one_as_it_was(left, start, monkeypatch, error):
    one = left(1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        one.save(2)
    assert [path.name for path in one.folder.iterdir()] == ["checkpoint-1"]


def test_what_a_kill_leaves_is_cleared_away_by_the_next_run(left, start):
    one = left(1)
    (one.folder / f"{files.INCOMPLETE}checkpoint-2-77").mkdir()
    start()
    assert [path.name for path in one.folder.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("before", "number", "advice"),
    [
        ((1,), torch.nan, "checkpoint-1 is complete: --resume_from_checkpoint latest"),
        ((), torch.inf, "no checkpoint yet"),
    ],
)
def test_weights_that_are_not_finite_reach_no_checkpoint(left, before, number, advice):
    one = left(*before)
    with torch.no_grad():
        one.model.weight[2] = number
    with pytest.raises(NonFinite, match=r"unet\.w") as problem:
        one.save(2)
    assert advice in str(problem.value) and ("--resume_from_checkpoint" in str(problem.value)) is bool(before)
    assert names(one) == [f"checkpoint-{step}" for step in before]


# -- going on ----------------------------------------------------------------------------------------------------------


def test_latest_is_the_newest_with_weights_average_and_optimizer(left, start):
    before = left(2, 10, use_ema=True)
    before.model.weight.grad = torch.ones(4)
    before.optimizer.step()
    before.ema.update()
    before.save(11)
    after = start(use_ema=True, resume_from_checkpoint="latest")
    assert resume(after)[0] == 11
    assert torch.equal(after.model.weight, before.model.weight)
    assert torch.equal(after.ema.shadow["unet.w"], before.ema.shadow["unet.w"]) and after.ema.updates == 1
    one, other = (value.optimizer.state_dict()["state"][0] for value in (before, after))
    assert torch.equal(one["exp_avg"], other["exp_avg"])


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(start):
    step, _, said = resume(start(resume_from_checkpoint="latest"))
    assert step == 0 and "starting afresh" in said


@pytest.mark.parametrize("damage", ["cut", "gone", "changed", "no manifest"])
def test_latest_names_a_broken_checkpoint_and_takes_the_one_before(left, start, damage):
    path = left(1, 2).folder / "checkpoint-2/unet/w.pt"
    if damage == "no manifest":
        (path.parents[1] / "manifest.json").unlink()
    elif damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-10] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    step, weight, said = resume(start(resume_from_checkpoint="latest"))
    assert (step, weight) == (1, 1.0)
    assert "checkpoint-2" in said and ("w.pt" in said or "manifest.json" in said)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        start(resume_from_checkpoint="checkpoint-2").resume(100)


def test_a_named_checkpoint_may_be_a_path_and_one_that_is_not_there_lists_those_that_are(left, start):
    folder = left(1, 2).folder
    assert resume(start(resume_from_checkpoint=f"{folder}/checkpoint-1/"))[0] == 1
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        start(resume_from_checkpoint="checkpoint-99").resume(100)


@pytest.mark.parametrize(("resumed", "refused"), [("run/checkpoint-1", True), ("run", True), ("other", False)])
def test_a_checkpoint_that_is_read_is_not_written_into(resumed, refused, tmp_path, problems_of):
    output = tmp_path / "run/checkpoint-1/new"
    (tmp_path / "other").mkdir()
    output.mkdir(parents=True)
    found = problems_of(Args, output_dir=output, resume_from_checkpoint=tmp_path / resumed)
    assert [problem.startswith(f"--output_dir {output} lies in") for problem in found] == [True] * refused
    (output / "checkpoint-2").mkdir()
    assert problems_of(Args, output_dir=output, resume_from_checkpoint=output / "checkpoint-2") == []
    assert problems_of(Args, output_dir=output, resume_from_checkpoint="latest") == []


def test_an_older_one_sets_the_later_ones_aside(left, start):
    """Else latest would go back to the branch that was left, and the limit would delete the new checkpoints first."""
    folder = left(1, 2, 3).folder
    one = start(resume_from_checkpoint="checkpoint-1", checkpoints_total_limit=2)
    assert resume(one)[:2] == (1, 1.0)
    one.save(2)
    assert names(one) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name.rsplit("-", 1)[0] for path in folder.glob("abandoned-*")) == [
        "abandoned-checkpoint-2",
        "abandoned-checkpoint-3",
    ]


def test_a_checkpoint_that_was_just_loaded_is_not_written_again(left, start, monkeypatch):
    left(4)
    one = start(resume_from_checkpoint="latest")
    one.resume(4)
    one.load()
    monkeypatch.setattr(one, "_write", lambda step: pytest.fail("written"))
    one.save(4)


# -- what is refused, and what is named --------------------------------------------------------------------------------


def test_an_output_dir_with_checkpoints_is_not_trained_over(left, start):
    left(7)
    with pytest.raises(CheckpointError, match=r"checkpoint-7.*--resume_from_checkpoint latest"):
        start().resume(100)


def test_a_run_that_is_already_longer_is_refused(left, start):
    folder = left(8).folder
    with pytest.raises(CheckpointError, match="--max_train_steps"):
        start(resume_from_checkpoint="latest").resume(5)
    assert (folder / "checkpoint-8").is_dir()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"use_8bit_adam": True}, "optimizer"),
        ({"optimizer": "adafactor"}, "optimizer"),
        ({"use_ema": True}, "use_ema"),
    ],
)
def test_another_optimizer_and_an_average_that_never_was_are_refused(left, start, flags, named):
    left(1)
    with pytest.raises(CheckpointError, match=f"--{named}"):
        start(resume_from_checkpoint="latest", **flags).resume(100)


def test_the_moments_of_other_weights_are_refused(left, start):
    left(1)
    other = start(resume_from_checkpoint="latest")
    other.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(CheckpointError, match="optimizer of other weights"):
        resume(other)


@pytest.mark.parametrize("flags", [{"use_8bit_adam": True}, {"optimizer": "adamw8bit"}])
def test_either_name_of_8_bit_adam_goes_on_with_the_other(left, start, flags):
    left(1, **flags)
    other = {"optimizer": "adamw8bit"} if "use_8bit_adam" in flags else {"use_8bit_adam": True}
    assert resume(start(resume_from_checkpoint="latest", **other))[:2] == (1, 1.0)


@pytest.mark.parametrize(("flags", "kind"), [({"use_ema": True}, "warm"), ({}, None)])
def test_a_checkpoint_says_where_its_average_started(left, flags, kind):
    folder = left(1, **flags).folder / "checkpoint-1"
    assert json.loads((folder / "training_state.json").read_text())["ema_start"] == kind


def changes(one):
    _, _, said = resume(one)
    return said.split("have changed", 1)[1] if "have changed" in said else ""


def test_what_changes_the_result_is_named(left, start, monkeypatch, fake_run):
    left(1)
    monkeypatch.setattr(checkpoint.torch, "__version__", "9.9")
    flags = {"adam_weight_decay": 0.5, "learning_rate": 0.0, "max_train_steps": 9, "checkpointing_steps": 1}
    run = fake_run()
    run.accelerator.num_processes = 2
    said = changes(start(resume_from_checkpoint="latest", fingerprint="others", run=run, **flags))
    for words in (
        "--adam_weight_decay 0.01 -> 0.5",
        "--learning_rate 0.0001 -> 0.0",
        "dataset",
        "torch",
        "processes 1 -> 2",
    ):
        assert words in said
    assert "checkpointing_steps" not in said
    assert "max_train_steps" not in said  # the constant schedule does not depend on it


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ({"lr_scheduler": "cosine", "max_train_steps": 4}, {"max_train_steps": 9}, "--max_train_steps 4 -> 9"),
        ({}, {"checkpoints_total_limit": 5}, ""),
    ],
)
def test_a_longer_run_is_a_change_where_the_schedule_depends_on_it(left, start, before, now, change):
    left(1, **before)
    said = changes(start(resume_from_checkpoint="latest", **before | now))
    assert (change in said) if change else not said


@pytest.mark.parametrize(("center_crop", "named"), [(False, True), (True, False)])
def test_a_run_of_an_older_version_is_told_that_its_crops_are_drawn_anew(left, start, center_crop, named):
    path = left(1, center_crop=center_crop).folder / "checkpoint-1/training_state.json"
    state = json.loads(path.read_text())
    del state["draws"]
    path.write_text(json.dumps(state))
    files.write_manifest(path.parent)
    assert ("crops" in changes(start(resume_from_checkpoint="latest", center_crop=center_crop))) is named


@pytest.mark.parametrize("change", [{"step": "x"}, {"args": [1]}, {"versions": None}, None], ids=str)
def test_a_state_that_no_run_has_written_is_named(left, start, change):
    path = left(1).folder / "checkpoint-1/training_state.json"
    path.write_text("[1]" if change is None else json.dumps(json.loads(path.read_text()) | change))
    files.write_manifest(path.parent)
    with pytest.raises(UserError, match=f"training_state.json.*{next(iter(change or ['']))}"):
        start(resume_from_checkpoint="latest").resume(10)


def test_the_seed_that_a_run_drew_is_found_again(left, tmp_path):
    left(1, 2, seed=77)
    args = lambda wanted: SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(tmp_path / "out"))
    assert [seed_of_resumed_run(args(wanted)) for wanted in ("latest", "checkpoint-1", None)] == [77, 77, None]


def test_flags_that_change_nothing_are_declared_and_not_listed():
    harmless = harmless_flags()
    assert {"output_dir", "checkpointing_steps", "validation_prompts", "evaluate_every", "save_kohya"} <= harmless
    assert not harmless & {"learning_rate", "seed", "rank", "resolution", "train_batch_size", "max_train_steps"}
