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

import train_lora
from finetuning.cli import UserError, read
from finetuning.families.model_args import ModelError
from finetuning.training.checkpoint import CheckpointArgs
from finetuning.training.hub import build_upload
from finetuning.training.optim import OptimArgs
from finetuning.training.run import ENVIRONMENT_OF_OTHERS, Run, RunArgs, _check_processes


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


@pytest.mark.parametrize(("process", "own"), [(0, ["A", "C", "E"]), (1, ["B", "D"])])
def test_work_is_shared_out_and_every_process_has_all_results(process, own, start, monkeypatch):
    run = start()
    run.processes, run.process = 2, process
    computed = []
    monkeypatch.setattr(run, "gathered", lambda parts: (computed.extend(parts), [["A", "C", "E"], ["B", "D"]])[1])
    assert run.shared(list("abcde"), lambda items: [item.upper() for item in items]) == list("ABCDE")
    assert computed == [own]


def test_tf32_is_allowed_where_it_was_asked_for(start, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    start()
    start(allow_tf32=True)
    assert asked == ["high"]


def test_what_accelerate_reads_besides_the_flags_does_not_change_them(start, monkeypatch):
    for name in ENVIRONMENT_OF_OTHERS:
        monkeypatch.setenv(name, "4" if "STEPS" in name else "INDUCTOR")
    assert start().accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"), ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu"),
     ("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true"), ("ACCELERATE_MIXED_PRECISION", "fp8")],
)  # fmt: skip
def test_what_accelerate_is_set_to_and_is_not_done_here_is_named(name, value, start, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str("FSDP" in name))
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name}.*accelerate config"):
        start()


def test_one_process_has_nobody_to_shard_with(start, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not start().is_sharded


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--num_processes"):
        _check_processes(SimpleNamespace(num_processes=1))
    _check_processes(SimpleNamespace(num_processes=2))


def test_a_run_asks_whether_its_processes_know_each_other(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--num_processes"):
        start()


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


@pytest.mark.parametrize("content", [b"\x80\n", b"[1]\n", b"{}\n"])
def test_metrics_that_no_run_has_written_are_named(start, content):
    run = start()
    run.output_dir.mkdir()
    (run.output_dir / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        run.begin(3, 10)


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


def test_a_tracker_that_cannot_start_is_named(start, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no API key")  # wandb's errors are of its own class

    run = start(report_to="tensorboard")
    monkeypatch.setattr(run.accelerator, "init_trackers", refuse)
    with pytest.raises(UserError, match="--report_to tensorboard cannot start: no API key"):
        run.begin(0, 10)


# -- signals ---------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return seen


@pytest.mark.parametrize("logging_dir", ["logs", "tb/here"])
def test_the_finished_pipeline_is_uploaded_and_nothing_of_the_run(logging_dir, start, uploads):
    run = start(push_to_hub=True, hub_token="hf_secret", logging_dir=logging_dir)
    pipeline = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    others = ["checkpoint-5/optimizer.pt", "checkpoint-5/unet/diffusion_pytorch_model.safetensors",
              f"{logging_dir}/text2image-fine-tune/events", ".incomplete-checkpoint-6-1/unet/config.json"]  # fmt: skip
    for name in pipeline + others:
        (run.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run.output_dir / name).touch()
    assert build_upload(run, ("lora",)).push()
    assert uploads == [("somebody/run", ["README.md", *pipeline], "hf_secret")]
    card = (run.output_dir / "README.md").read_text()
    assert "base_model: some/base" in card and "tags: [lora]" in card


def test_hub_model_id_names_the_repository(start, uploads):
    run = start(push_to_hub=True, hub_model_id="somebody/chalk")
    run.output_dir.mkdir()
    assert build_upload(run, ("lora",)).push()
    assert uploads[0][0] == "somebody/chalk"


def test_a_hub_that_refuses_is_named_before_training(start, uploads, monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ModelError, match=r"--push_to_hub.*401 Unauthorized"):
        build_upload(start(push_to_hub=True))


def test_an_upload_that_fails_leaves_the_result_and_says_how_to_try_again(start, uploads, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("503")

    run = start(push_to_hub=True)
    run.output_dir.mkdir()
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    assert build_upload(run).push() is False
    assert "hf upload somebody/run" in capsys.readouterr().err
    assert build_upload(start()).push() is True  # nothing was asked for


def test_the_token_is_written_nowhere(start, monkeypatch):
    for command in (["train.py", "--hub_token", "hf_secret"], ["train.py", "--hub_token=hf_secret"]):
        monkeypatch.setattr(sys, "argv", command)
        facts = json.dumps(start(hub_token="hf_secret")._facts())
        assert "hf_secret" not in facts and "HIDDEN" in facts


# -- the flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [{"num_train_epochs": 0}, {"gradient_accumulation_steps": 0}, {"max_train_steps": 0}, {"hub_model_id": "me/x"},
     {"report_to": "wandb"}, {"output_dir": __file__}],
)  # fmt: skip
def test_flags_that_cannot_work_are_named(flags, monkeypatch, problems_of):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems_of(RunArgs, **{"report_to": "none", **flags})
    assert problem.startswith(f"--{next(iter(flags))} ")


@pytest.mark.parametrize("is_relative", [False, True])
def test_logs_do_not_go_into_what_is_read(tmp_path, is_relative):
    (tmp_path / "data").mkdir()
    words = ["--pretrained_model_name_or_path", tmp_path / "data", "--train_data_dir", tmp_path / "data"]
    words += ["--output_dir", tmp_path / "out", "--logging_dir"]
    logs = "../data/logs" if is_relative else tmp_path / "data/logs"
    _, problems = read(train_lora.Args, "", [*map(str, words), str(logs)])
    assert any(one.startswith(f"--logging_dir {tmp_path / 'data/logs'} lies in") for one in problems)
