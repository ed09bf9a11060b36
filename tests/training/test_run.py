"""What belongs to the process: precision, seed, logs, signals, bad numbers, and the upload."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from finetuning.cli import problems_of
from finetuning.families.model_args import ModelError
from finetuning.training.checkpoint import CheckpointArgs
from finetuning.training.optim import OptimArgs
from finetuning.training.run import HubUpload, NonFinite, Run, RunArgs


@dataclass
class Args(RunArgs, CheckpointArgs, OptimArgs):
    """The flags that a run reads."""

    pretrained_model_name_or_path: str = "some/base"
    dataset_name: str | None = None


@pytest.fixture
def start(tmp_path, fresh_accelerate, monkeypatch):
    """A Run on the CPU with these flags, without trackers."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def make(**flags):
        return Run(Args(**({"output_dir": str(tmp_path / "run"), "report_to": "none", "seed": 0} | flags)))

    return make


def logged(run):
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


# -- precision and seed ----------------------------------------------------------------------------------------------


def test_fp16_without_a_gpu_is_fp32_and_says_so(start, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as accelerate launch hands it over
    run = start()
    assert (run.accelerator.mixed_precision, run.weights_dtype, run.scaler) == ("no", torch.float32, None)
    assert "no GPU here: fp16 needs one" in capsys.readouterr().err


def test_the_flag_wins_over_accelerates_precision(start, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    run = start(mixed_precision="bf16")
    assert (run.accelerator.mixed_precision, run.weights_dtype) == ("bf16", torch.bfloat16)


def test_a_seed_that_is_not_given_is_drawn_and_written_down(start):
    runs = [start(seed=None) for _ in range(3)]
    assert all(0 <= run.args.seed < 2**31 for run in runs)
    assert len({run.args.seed for run in runs}) == 3
    runs[0].begin(0, 1)
    assert json.loads((runs[0].output_dir / "args.json").read_text())["seed"] == runs[0].args.seed


def test_a_resumed_run_keeps_the_seed_of_its_checkpoint(start, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training_state.json").write_text('{"args": {"seed": 7}}')
    assert start(seed=None, resume_from_checkpoint="latest").args.seed == 7
    assert start(seed=5, resume_from_checkpoint="latest").args.seed == 5
    assert start(seed=None).args.seed != 7


# -- the step --------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_weighted_loss(start):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    loss = start().backward(weight**2, torch.tensor([0.5, 0.25, 0.0]))
    assert loss.item() == 1.5 and not loss.requires_grad
    assert weight.grad.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("limit", "gradient"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_clip_returns_the_norm_before_and_0_only_measures(limit, gradient, start):
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert start(max_grad_norm=limit).clip([weight]).item() == 5.0
    assert weight.grad.tolist() == pytest.approx(gradient, rel=1e-5)


class Rows:
    def describe(self, rows):
        return f"rows {rows}"


def scaler(scale):
    return SimpleNamespace(get_scale=lambda: scale)


@pytest.mark.parametrize(
    ("loss", "norm", "scaler", "said"),
    [
        (float("nan"), 1.0, None, "the loss is nan"),
        (float("inf"), 1.0, None, "the loss is inf"),
        (float("nan"), 1.0, scaler(65536.0), "the loss is nan"),
        (1.0, float("nan"), None, "the gradient's norm is nan"),
        (1.0, float("inf"), None, "the gradient's norm is inf"),
        (1.0, float("inf"), scaler(0.5), "the gradient's norm is inf"),  # it has come down from 65536: no overflow
    ],
)
def test_numbers_that_are_none_stop_the_run_and_name_the_rows(loss, norm, scaler, said, start):
    run = start()
    run.accelerator.scaler = scaler
    with pytest.raises(NonFinite, match=rf"(?s){said}.*rows \[3, 1\].*--resume_from_checkpoint latest"):
        run.check_finite(loss, torch.tensor(norm), Rows(), [3, 1])


@pytest.mark.parametrize(("norm", "scaler"), [(1.0, None), (float("inf"), scaler(65536.0))])
def test_ordinary_numbers_and_ordinary_fp16_overflow_go_on(norm, scaler, start):
    run = start()
    run.accelerator.scaler = scaler
    run.check_finite(1.0, torch.tensor(norm), Rows(), [3, 1])


# -- logs ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_forgets_the_steps_that_it_will_write_again(start):
    first = start()
    first.begin(0, 10)
    for step in range(1, 6):
        first.log({"train_loss": 0.5 * step}, step)
        first.log({"validation_loss": 2.0}, step)
    with open(first.output_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train_lo')  # what a kill may leave
    resumed = start()
    resumed.begin(3, 10)
    # Of the step that it goes on from only the training is done; the validation comes again.
    kept = [(line["step"], "train_loss" in line) for line in logged(resumed)]
    assert kept == [(1, True), (1, False), (2, True), (2, False), (3, True)]
    resumed.log({"train_loss": 7.0}, 4)
    assert logged(resumed)[-1] == {"step": 4, "train_loss": 7.0}


def test_a_new_run_in_an_old_folder_starts_its_log_anew(start):
    first = start()
    first.begin(0, 10)
    first.log({"validation_loss": 1.0}, 0)
    first.log({"train_loss": 1.0}, 1)
    start().begin(0, 10)
    assert logged(first) == []


def test_args_json_holds_the_flags_and_no_token(start):
    run = start(hub_token="hf_secret", num_train_epochs=3)
    run.begin(0, 10)
    text = (run.output_dir / "args.json").read_text()
    facts = json.loads(text)
    assert (facts["num_train_epochs"], facts["seed"], facts["run"]["precision"]) == (3, 0, "no")
    assert facts["run"]["versions"]["diffusers"] == diffusers.__version__
    assert "hf_secret" not in text


def test_nothing_of_the_token_reaches_the_trackers(start):
    run = start(hub_token="hf_secret", report_to="tensorboard")
    run.begin(0, 10)
    run.log({"train_loss": 1.0}, 1)
    run.finish()
    logs = [path for path in (run.output_dir / "logs").rglob("*") if path.is_file()]
    assert logs and not any(b"hf_secret" in path.read_bytes() for path in logs)


def test_images_go_to_tensorboard_as_channels_first_bytes(start):
    from PIL import Image

    run, shown = start(), []
    writer = SimpleNamespace(add_image=lambda name, pixels, step: shown.append((name, tuple(pixels.shape), step)))
    run.accelerator.trackers = [SimpleNamespace(name="tensorboard", writer=writer)]
    run.log_images("validation", [Image.new("RGB", (6, 4))] * 2, 9)
    assert shown == [("validation/0", (3, 4, 6), 9), ("validation/1", (3, 4, 6), 9)]


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_checkpoint(number, start, capfd):
    run = start()
    run.begin(0, 10)
    assert not run.any(run.stop_signal is not None)
    os.kill(os.getpid(), number)
    assert run.stop_signal == number and run.any(run.stop_signal is not None)
    assert f"{signal.Signals(number).name}: stopping after this step, with a checkpoint" in capfd.readouterr().err


def test_ctrl_c_works_before_the_first_step_where_a_shell_had_it_ignored(start):
    """bash starts what it puts in the background with SIGINT ignored, and Python leaves that as it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_twice_stops_at_once_and_a_repeated_sigterm_does_not(start, monkeypatch):
    """Launchers pass on a SIGTERM that everybody already got: it must not cut the save short."""
    run, killed = start(), []
    run.begin(0, 10)
    monkeypatch.setattr(os, "kill", lambda pid, sent: killed.append((pid, sent, signal.getsignal(sent))))
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert killed == []
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert killed == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch):
    """A Hub that only notes what it is given: [(repository, files, token), ...]."""
    seen = []

    class FakeHub:
        def __init__(self, token):
            self.token = token

        def create_repo(self, name, exist_ok):
            assert exist_ok
            return huggingface_hub.RepoUrl(f"https://huggingface.co/somebody/{name.split('/')[-1]}")

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            files = [str(p.relative_to(folder_path)) for p in sorted(Path(folder_path).rglob("*")) if p.is_file()]
            kept = sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))
            seen.append((repo_id, kept, self.token))

    monkeypatch.setattr("finetuning.training.run.HfApi", FakeHub)
    return seen


@pytest.mark.parametrize("logging_dir", ["logs", "tb/here"])
def test_the_finished_pipeline_is_uploaded_and_nothing_of_the_run(logging_dir, start, uploads):
    run = start(hub_token="hf_secret", logging_dir=logging_dir)
    pipeline = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    others = ["checkpoint-5/optimizer.pt", "checkpoint-5/unet/diffusion_pytorch_model.safetensors",
              f"{logging_dir}/text2image-fine-tune/events", ".incomplete-checkpoint-6-1/unet/config.json"]  # fmt: skip
    for name in pipeline + others:
        (run.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run.output_dir / name).touch()
    HubUpload(run).push()
    assert uploads == [("somebody/run", ["README.md", *pipeline], "hf_secret")]
    assert "base_model: some/base" in (run.output_dir / "README.md").read_text()


def test_hub_model_id_names_the_repository(start, uploads):
    run = start(hub_model_id="somebody/chalk")
    run.output_dir.mkdir()
    HubUpload(run).push()
    assert uploads[0][0] == "somebody/chalk"


def test_a_hub_that_refuses_is_named_before_training(start, uploads, monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("finetuning.training.run.HfApi.create_repo", refuse)
    with pytest.raises(ModelError, match=r"--push_to_hub: no repository run to be had: 401 Unauthorized; log in"):
        HubUpload(start())


def test_the_token_is_written_nowhere(start, monkeypatch):
    for command in (["train.py", "--hub_token", "hf_secret"], ["train.py", "--hub_token=hf_secret"]):
        monkeypatch.setattr(sys, "argv", command)
        facts = json.dumps(start(hub_token="hf_secret")._facts())
        assert "hf_secret" not in facts and "HIDDEN" in facts


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"), [("num_train_epochs", 0), ("gradient_accumulation_steps", 0), ("max_train_steps", 0)]
)
def test_flags_that_cannot_work_are_named(flag, value):
    (problem,) = problems_of(RunArgs(**{flag: value, "report_to": "none"}))
    assert problem == f"--{flag} {value} must be at least 1"


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = RunArgs(report_to="wandb").problems()
    assert problem == "--report_to wandb: it is not installed: pip install wandb"


def test_an_output_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = RunArgs(report_to="none", output_dir=str(tmp_path / "file")).problems()
    assert problem == f"--output_dir {tmp_path / 'file'} is a file"
