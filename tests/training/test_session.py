"""The events around a step: signals, steps that the loss scaler passes over, numbers that are none, dropout."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from finetuning.training.checkpoint import checkpoints_in
from finetuning.training.run import Run

LOUD = ("--learning_rate", "1e30", "--lr_scheduler", "constant", "--max_grad_norm", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
    training.assert_same(training.state(tmp_path), training.state(whole_run(script)))


class Scaler(SimpleNamespace):
    """The fp16 loss scaler of a GPU, as far as it is asked here."""

    def __init__(self, scale):
        super().__init__(get_scale=lambda: scale, state_dict=lambda: {"scale": scale}, load_state_dict=lambda _: None)


@pytest.fixture
def norms(monkeypatch):
    """Let the run measure these norms of the gradient at its first steps, with or without a loss scaler."""

    def install(*values, scaler=None):
        clip, left = Run.clip, list(values)
        measured = lambda run, parameters: torch.tensor(left.pop(0)) if left else clip(run, parameters)
        monkeypatch.setattr(Run, "clip", measured)
        monkeypatch.setattr(Run, "scaler", scaler)

    return install


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


def test_with_a_checkpoint_the_message_says_which_one_to_go_on_from(training, arguments, tmp_path, norms, capfd):
    norms(1.0, 1.0, float("nan"))
    assert training.run("train_lora", arguments, tmp_path) == 1
    message = capfd.readouterr().err
    assert "checkpoint-2" in message and "--resume_from_checkpoint latest" in message


def test_dropout_is_a_function_of_seed_step_and_process(training, arguments, tmp_path, monkeypatch):
    """torch's own dropout draws from torch's generator: it is seeded once for each step, so a resume repeats it."""
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", _noted(seeds, torch.manual_seed))

    def run(name, *more):
        seeds.clear()
        words = ("--lora_dropout", 0.5, "--max_train_steps", 3, "--checkpointing_steps", 1, *more)
        assert training.run("train_lora", arguments, tmp_path / name, *words) == 0
        return seeds[-3:], [line["train_loss"] for line in training.steps(tmp_path / name)]

    first = run("first")
    torch.rand(5)
    assert run("again") == first and len(set(first[0])) == 3
    assert run("other seed", "--seed", 4)[0] != first[0]
    plain = ("--lora_dropout", 0)
    assert run("plain", *plain)[1] != first[1]


def _noted(seeds, real):
    return lambda seed: (seeds.append(seed), real(seed))[1]
