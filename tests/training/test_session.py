"""The events around a step: signals, steps that the loss scaler passes over, numbers that are none, dropout."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from finetuning.families.family import Denoiser
from finetuning.training.checkpoint import checkpoints_in
from finetuning.training.run import Run
from finetuning.training.session import Session

FULL, LORA = "train_text_to_image", "train_lora"  # which have the same Session
LOUD = ("--learning_rate", "1e30", "--lr_scheduler", "constant", "--max_grad_norm", 0)


@pytest.mark.parametrize(("script", "number"), [(FULL, signal.SIGTERM), (LORA, signal.SIGINT)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_its_own_status(
    script, training, arguments, whole_run, tmp_path, number, monkeypatch, capfd
):
    tick = Run.tick

    def signalled(run, **shown):
        tick(run, **shown)
        if run.bar.n == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "tick", signalled)
        assert training.run(script, arguments, tmp_path, "--checkpointing_steps", 0) == 128 + number
    assert [step for step, _ in checkpoints_in(tmp_path)] == [3]
    assert "--resume_from_checkpoint latest" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "model_index.json").exists()
    assert training.run(script, arguments, tmp_path, "--resume_from_checkpoint", "latest") == 0
    training.assert_same(tmp_path, whole_run(script))


class Scaler(SimpleNamespace):
    """The fp16 loss scaler of a GPU, as far as it is asked here."""

    def __init__(self, scale):
        super().__init__(
            scale=lambda tensor: scale * tensor, state_dict=lambda: {"scale": scale}, load_state_dict=lambda _: None
        )


@pytest.fixture
def norms(monkeypatch):
    """Let the run measure these norms of the gradient at its first steps, with or without a loss scaler."""

    def install(*values, scaler=None):
        clip, left = Run.clip, list(values)
        measured = lambda run, parameters: torch.tensor(left.pop(0)) if left else clip(run, parameters)
        monkeypatch.setattr(Run, "clip", measured)
        monkeypatch.setattr(Run, "scaler", scaler)

    return install


@pytest.fixture(params=[0, 1], ids=["at once", "a step later"])
def lag(request, monkeypatch):
    """When loss and norm are looked at: at once as on a CPU, or a step later as on a GPU."""
    monkeypatch.setattr(Run, "lag", request.param)


@pytest.mark.usefixtures("lag")
def test_a_step_that_overflows_is_logged_as_skipped_and_the_log_stays_json(training, arguments, tmp_path, norms):
    norms(1.0, float("inf"), float("nan"), scaler=Scaler(65536.0))
    assert training.run("train_lora", arguments, tmp_path, "--max_train_steps", 4) == 0
    lines = training.steps(tmp_path)  # refuses Infinity and NaN
    assert [(line["grad_norm"] is None, line.get("skipped")) for line in lines] == [
        (False, None), (True, 1), (True, 1), (False, None),
    ]  # fmt: skip
    assert all(line["train_loss"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("norm", "scaler"),
    [(float("nan"), None), (float("inf"), None), (float("inf"), Scaler(0.5))],  # 0.5: come down from 65536, no overflow
)
def test_a_gradient_that_is_no_number_ends_the_run(training, arguments, tmp_path, norms, norm, scaler, capfd):
    norms(1.0, norm, scaler=scaler)
    assert training.run("train_lora", arguments, tmp_path) == 1
    assert "gradient" in capfd.readouterr().err and len(training.steps(tmp_path)) == 1


@pytest.mark.usefixtures("lag")
@pytest.mark.parametrize(
    "more", [(), ("--fused_backward_pass", "--gradient_accumulation_steps", 1, "--train_batch_size", 4)]
)
def test_a_loss_that_is_no_number_names_the_rows_and_reaches_no_checkpoint(
    script, more, training, arguments, tmp_path, capfd
):
    assert training.run(script, arguments, tmp_path, *LOUD, "--checkpointing_steps", 100, *more) == 1
    message = capfd.readouterr().err.split("error: ")[1]
    assert message.count("metadata.jsonl line") in (3, 4)  # the rows of one step, and of no other
    assert "loss is" in message or "not finite" in message or "norm is" in message
    assert "--resume_from_checkpoint" not in message  # there is none to go on from
    assert "Traceback" not in message
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize(("broken", "rows"), [(3, 3), (4, 4)], ids=["before a save", "of a save"])
def test_a_step_looked_at_later_is_named_by_its_own_rows_and_what_came_of_it_is_not_saved(
    broken, rows, training, arguments, tmp_path, norms, capfd, monkeypatch
):
    messages, folder = [], tmp_path / "run"
    for lag in (0, 1):
        norms(*[1.0] * (broken - 1), float("nan"))  # and every second step saves
        monkeypatch.setattr(Run, "lag", lag)
        assert training.run("train_lora", arguments, folder) == 1
        messages.append(capfd.readouterr().err.split("error: ")[1].split("goes on")[0])
        assert [step for step, _ in checkpoints_in(folder)] == [2] and len(training.steps(folder)) == broken - 1
        folder.rename(tmp_path / str(lag))
    assert messages[0] == messages[1] and messages[0].count("metadata.jsonl line") == rows
    assert "checkpoint-2 is complete: --resume_from_checkpoint latest" in messages[0]


@pytest.mark.parametrize(("script", "resumed"), [(LORA, False), (FULL, True)])
def test_what_a_gpu_does_besides_changes_nothing(
    script, resumed, training, arguments, whole_run, tmp_path, capfd, monkeypatch
):
    """It looks at its steps later, and rehearses."""
    whole_run(script)
    capfd.readouterr()
    monkeypatch.setattr(Run, "lag", 1)
    monkeypatch.setattr(Session, "rehearses", True)
    resuming = ("--resume_from_checkpoint", "checkpoint-4") if resumed else ()
    if resumed:
        shutil.copytree(whole_run(script), tmp_path, dirs_exist_ok=True)
    assert training.run(script, arguments, tmp_path, *resuming) == 0
    training.assert_same(tmp_path, whole_run(script))
    assert capfd.readouterr().err.count("rehearsal: a step of 4 rows takes") == 1


# -- preflight, and too little memory ----------------------------------------------------------------------------------


def test_a_preflight_tries_the_largest_step_and_writes_nothing(script, training, arguments, tmp_path, capfd):
    assert training.run(script, arguments, tmp_path / "run", "--preflight") == 0
    said = capfd.readouterr().err
    assert "rehearsal: a step of 4 rows" in said and "6 steps take" in said and "finished" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("at", "more"), [(1, ["--preflight"]), (2, ["--preflight"]), (2, [])])
def test_too_little_memory_is_one_message_with_what_would_help(
    at, more, training, arguments, tmp_path, capfd, monkeypatch
):
    """At the first forward pass, and at a later one; the flags set already are not among the advice."""
    forward, calls = Denoiser.forward, []

    def too_large(self, *args, **conditioning):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nIf reserved but ...")
        return forward(self, *args, **conditioning)

    monkeypatch.setattr(Denoiser, "forward", too_large)
    assert training.run("train_lora", arguments, tmp_path / "run", "--validation_loss_rows", 0, *more) == 1
    message = capfd.readouterr().err.split("error: ")[1]
    assert message.startswith(
        "the GPU has too little memory: CUDA out of memory. Tried to allocate 2.00 GiB.\nWhat makes"
    )
    assert "--train_batch_size 1 --gradient_accumulation_steps 4" in message and "Traceback" not in message
    assert message.index("--use_8bit_adam") < message.index("--gradient_checkpointing")


def test_dropout_draws_from_a_generator_that_is_seeded_by_seed_and_step(training, arguments, tmp_path, monkeypatch):
    """torch's own: so a resume repeats it, which test_train_lora.py compares."""
    seeds, of_steps, real = [], [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), real(seed))[1])
    for seed in (3, 4):
        words = ("--lora_dropout", 0.5, "--max_train_steps", 2, "--validation_loss_rows", 0, "--seed", seed)
        assert training.run("train_lora", arguments, tmp_path / str(seed), *words) == 0
        of_steps += seeds[-2:]
    assert len(set(of_steps)) == 4
