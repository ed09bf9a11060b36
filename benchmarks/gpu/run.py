"""Everything on a GPU, in one command: does it compute the right thing, how fast, and what fits.

    python3 benchmarks/gpu/run.py [--parts right fast fits more compile] [--only NAME ...] [--seconds N] [--output DIR]

Runs the scripts by their command lines, each case in a process of its own. A case that fails is a result. Writes
RESULTS/CARD-DATE.json again after every case, and beside it, in a folder of that name, the end of every case's output
and the profiles. --small, and a machine without a GPU, runs everything in miniature, one case after the other.
README.md says what the cases are and how to read them.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CHILD = [sys.executable, "benchmarks/gpu/child.py"]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "xformers", "triton")
PROMPT = "a large red circle on a white background"

# How far a GPU's losses may be from the CPU's fp32, as a share of the mean loss: the mean over the steps.
FP32 = 1e-3  # the same sums in another order, which Adam's first steps, all of one size, amplify
HALF = 0.03  # activations of 8 (bf16) or 11 (fp16) bits: about half a per cent a layer, partly cancelling
TREND = 0.15  # quantised bases and random dropout compute something else: only where the loss goes can agree

# Counted multiply-adds x 2 of SD 1.5 at 512 pixels, in TFLOP an image.
STEP, STEP_CHECKPOINTED, ENCODE, TEXT = 2.41, 3.21, 1.12, 0.013
STEP_LORA = STEP * 2 / 3  # the frozen weights have no gradient
T4, RTX3090, A6000 = 14.5, 23, 46  # GB that PyTorch may take on a card of 16, of 24 and of 48 GB


@dataclass
class Case:
    """One process, or a few in a row, and what is asked of the outcome."""

    name: str
    commands: list
    check: callable = lambda result: {}
    env: dict = field(default_factory=dict)
    needs: tuple = ()  # cases that have to be done before this one starts
    against: tuple = ()  # cases that have to be done before the outcome is looked at
    limit: int = 150
    status: int = 0  # exit status that is wanted


class Failed(Exception):
    """What was asked of a case is not so."""


class Check:
    """Runs cases, keeps their results, writes them down."""

    def __init__(self, args, scratch):
        self.args, self.scratch, self.start = args, scratch, time.time()
        self.cases, self.lock = {}, threading.Lock()
        self.running, self.interrupted = set(), False
        self.facts = {"card": "unknown"}
        self.path = None

    # -- results ---------------------------------------------------------------------------------------------------

    def begin(self):
        """Ask for the card and the versions; name the result."""
        found = subprocess.run([sys.executable, HERE / "sd15.py", "card"], capture_output=True, text=True, cwd=ROOT)
        if found.returncode:
            sys.exit(f"PyTorch does not run here:\n{found.stderr[-2000:]}")
        self.facts = json.loads(found.stdout.splitlines()[-1])
        self.on_gpu = self.facts["card"] != "CPU"
        if not self.on_gpu and not self.args.small:
            print("no GPU here: everything in miniature, which shows that it runs", flush=True)
            self.args.small = True
        if shutil.which("nvidia-smi"):
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            self.facts["driver"] = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        self.facts["versions"] = {name: installed(name) for name in PACKAGES}
        self.facts["command"] = " ".join(sys.argv)
        self.facts["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
        card = re.sub(r"[^A-Za-z0-9]+", "-", self.facts["card"]).strip("-").lower()
        self.path = self.args.output / f"{card}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        self.logs = self.path.with_suffix("")
        self.logs.mkdir(parents=True)
        self.write()
        print(f"{self.facts['card']}, matrices {self.facts.get('matmul_tflops')} TFLOP/s -> {self.path}", flush=True)

    def write(self):
        """All results so far; the file is whole at every moment."""
        whole = self.path.with_suffix(".incomplete")
        whole.write_text(json.dumps({**self.facts, "cases": self.cases}, indent=1) + "\n", encoding="utf-8")
        os.replace(whole, self.path)

    def keep(self, name, result):
        """Note and print one case's result."""
        with self.lock:
            self.cases[name] = result
            self.write()
            print(f"{time.time() - self.start:5.0f} s  {line(name, result)}", flush=True)

    def time_is_up(self):
        """No new case is started after --seconds."""
        return self.interrupted or time.time() - self.start > self.args.seconds

    # -- cases -----------------------------------------------------------------------------------------------------

    def side_by_side(self, most, gigabytes=None):
        """How many cases run at a time, at most `most`: each wants two cores, and its gigabytes of the card."""
        rooms = [most, len(os.sched_getaffinity(0)) // 2]
        if gigabytes:
            rooms.append(int(self.facts.get("gb", 0) // gigabytes))
        return max(1, min(rooms))

    def run_all(self, cases, at_once):
        """Each case once those that it needs are done; `at_once` of them side by side."""
        done = {case.name: threading.Event() for case in cases}

        def wait(names):
            for name in names:
                if name in done:
                    done[name].wait()

        def one(case):
            wait(case.needs)
            try:
                if not self.time_is_up():
                    result = self.run(case, wait)
                    if not self.interrupted:
                        self.keep(case.name, result)
            finally:
                done[case.name].set()

        with ThreadPoolExecutor(1 if self.args.small else at_once) as pool:
            try:
                for future in [pool.submit(one, case) for case in cases]:
                    future.result()
            except BaseException:  # Ctrl-C, SIGTERM: nothing begins any more, and what runs ends
                self.interrupted = True
                for started in list(self.running):
                    _kill_group(started)
                raise

    def run(self, case, wait):
        """The result of one case: pass or fail, and what was found."""
        result, start = {"status": "pass"}, time.time()
        for number, command in enumerate(case.commands):
            report = self.scratch / f"{case.name}-{number}.report"
            env = {"GPU_CHECK_REPORT": str(report), **case.env}
            wanted = case.status
            if isinstance(command, tuple):
                command, extra, wanted = command
                env |= extra
            code, output = self.process(command, env, case.limit, case.name)
            if report.is_file():
                result |= speed(json.loads(report.read_text()))
            if code != wanted:
                result["status"] = "fail"
                result["why"] = (
                    "out of memory" if "out of memory" in output.lower() else f"exit status {code}, not {wanted}"
                )
                result["output"] = output.splitlines()[-15:]
                break
        else:
            wait(case.against)
            result |= attention(output)
            result["text"] = output
            try:
                result |= case.check(result) or {}
            except Exception as error:
                result |= {"status": "fail", "why": f"{type(error).__name__}: {error}"}
                result["output"] = output.splitlines()[-15:]
            del result["text"]
        result["whole_seconds"] = round(time.time() - start, 1)
        return result

    def process(self, command, env, limit, name):
        """(exit status, output) of one command; its whole group of processes ends with it."""
        threads = "1" if self.args.small else "2"  # more threads than idle cores wait for each other
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1",
               "FINETUNING_CACHE": self.scratch / "cache", **env}  # fmt: skip
        left = self.args.seconds + 20 - (time.time() - self.start)
        limit = 10 * limit if self.args.small else min(limit, left)
        log = self.logs / f"{name}.txt"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            file.flush()
            started = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
            )
            self.running.add(started)
            try:
                code = started.wait(0 if self.interrupted else limit)
            except subprocess.TimeoutExpired:
                code = f"none within {limit:.0f} s"
            _kill_group(started)
            started.wait()
            self.running.discard(started)
        text = log.read_text(encoding="utf-8", errors="replace")
        text = text[text.rindex("\n$ ") + 1 if "\n$ " in text else 0 :]
        return code, re.sub(r"[^\n]*\r", "", text)  # of a progress bar only its last state


def _kill_group(started):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)


def words(text):
    """A command line's words."""
    return text.split()


def make_three_shapes(folder):
    """Images of datasets/chalk, square, cut to landscape and cut to portrait, for the buckets."""
    from PIL import Image

    folder.mkdir()
    source = ROOT / "datasets/chalk/train"
    rows = [json.loads(text) for text in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:120]]
    for number, row in enumerate(rows):
        box = ((0, 0, 64, 64), (0, 8, 64, 56), (8, 0, 56, 64))[number % 3]
        Image.open(source / row["file_name"]).crop(box).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def make_loud(folder):
    """models/mini-sd with outputs 300 times too large: gradients overflow at the loss scaler's first scale of 65536."""
    shutil.copytree(ROOT / "models/mini-sd", folder)
    unet = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(unet)
    tensors["conv_out.weight"] = tensors["conv_out.weight"] * np.array(300, tensors["conv_out.weight"].dtype)
    save_file(tensors, unet, metadata={"format": "pt"})


def installed(name):
    """A package's version, or none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def speed(report):
    """What a child's report says, with its step times put together: warm steps only."""
    warm = report.pop("step_times")[4:]
    if warm:
        report["step_seconds"] = round(statistics.median(warm), 4)
        report["step_seconds_mean"] = round(statistics.mean(warm), 4)
    return report


def attention(output):
    """Milliseconds of xformers' attention and of PyTorch's, where a case says that it has compared them; it runs with
    the faster, whatever its name."""
    found = re.search(r"attention: xformers takes ([\d.e+-]+) ms and PyTorch ([\d.e+-]+),", output)
    return {"xformers_ms": float(found[1]), "pytorch_ms": float(found[2])} if found else {}


def line(name, result):
    """One case in one line."""
    hidden = ("status", "why", "output", "steps", "seconds", "step_seconds_mean", "losses")
    facts = "  ".join(f"{key} {value}" for key, value in result.items() if key not in hidden and value is not None)
    return f"{result['status']:4} {name:26} {result.get('why', '')}  {facts}"


# -- right: does it compute what the CPU computes -----------------------------------------------------------------


def right(check):
    """The cases of models/mini-sd on datasets/chalk."""
    small = check.args.small
    steps, batch = (4, 2) if small else (50, 8)
    common = words(
        f"""--pretrained_model_name_or_path models/mini-sd --train_data_dir datasets/chalk --resolution 64 --center_crop
        --train_batch_size {batch} --max_train_steps {steps} --seed 7 --report_to none --validation_epochs 0
        --validation_loss_rows 0 --no-cache_latents {"--max_train_samples 16" if small else ""}"""
    )
    full = ["train_text_to_image.py", *common, "--learning_rate", "1e-4"]
    lora = ["train_lora.py", *common, *words("--learning_rate 1e-3 --rank 8 --lora_target_modules all-linear conv")]
    shapes = f"--aspect_buckets --bucket_step 16 --train_data_dir {check.scratch}/three-shapes"
    sdxl = "--pretrained_model_name_or_path models/mini-sdxl"
    upscaler = "--pretrained_model_name_or_path models/mini-x4 --patch_size 32"
    fused = "--optimizer adafactor --fused_backward_pass --max_grad_norm 0"
    folder = lambda name: check.scratch / name

    def losses(name):
        lines = (folder(name) / "metrics.jsonl").read_text().splitlines()
        found = [one["train_loss"] for one in map(json.loads, lines) if "train_loss" in one]
        if len(found) != steps or not np.isfinite(found).all():
            raise Failed(f"{len(found)} losses of {steps}, finite: {np.isfinite(found).all()}")
        return np.array(found)

    def compare(name, reference, tolerance):
        def compared(_):
            mine, cpu = losses(name), losses(reference)
            if tolerance == TREND:
                off = abs(mine[-10:].mean() / cpu[-10:].mean() - 1)
                facts = {"difference_of_last_ten": f"{off:.2g}"}
            else:
                off = (abs(mine - cpu) / cpu.mean()).mean()
                facts = {"difference": f"{off:.2g}", "largest": f"{(abs(mine - cpu) / cpu.mean()).max():.2g}"}
            facts |= {"tolerance": tolerance, "losses": [round(float(one), 5) for one in mine]}
            return facts if off <= tolerance else facts | {"status": "fail", "why": "losses differ"}

        return compared

    def one(name, start, flags, reference=None, tolerance=HALF, precision="fp16", **env):
        command = [*CHILD, *start, *flags.split(), "--output_dir", folder(name), "--mixed_precision", precision]
        test = compare(name, reference, tolerance) if reference else lambda _: {"last": round(losses(name)[-1], 5)}
        return Case(name, [command], test, env, against=(reference,) if reference else ())

    cpu = {"precision": "no", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    cases = [
        one("cpu-full", full, "", **cpu),
        one("cpu-lora", lora, "", **cpu),
        one("fp16", full, "", "cpu-full"),
        one("compile", full, "--compile", "cpu-full"),
        one("fp32", full, "", "cpu-full", FP32, "no"),
        one("bf16", full, "", "cpu-full", precision="bf16"),
        one("lora-fp16", lora, "", "cpu-lora"),
        one("xformers", full, "--enable_xformers_memory_efficient_attention", "cpu-full"),
        one("fp16-again", full, "", "cpu-full"),
        one("8bit-adam", full, "--use_8bit_adam", "cpu-full"),
        one("checkpointing", full, "--gradient_checkpointing", "cpu-full"),
        one("ema", full, "--use_ema --ema_decay 0.9", "cpu-full"),
        one("ema-offloaded", full, "--use_ema --ema_decay 0.9 --offload_ema", "cpu-full"),
        one("cached", full, "--cache_latents", "cpu-full"),
        one("channels-last", full, "--channels_last", "cpu-full"),
        one("workers", full, "--dataloader_num_workers 2", "cpu-full"),
        one("text-encoder", full, "--train_text_encoder", "cpu-full", TREND),
        one("lora-bf16", lora, "", "cpu-lora", precision="bf16"),
        one("lora-fp32", lora, "", "cpu-lora", FP32, "no"),
        one("lora-nf4", lora, "--base_precision nf4", "cpu-lora", TREND),
        one("lora-int8", lora, "--base_precision int8", "cpu-lora", TREND),
        one("lora-dora", lora, "--use_dora", "cpu-lora", TREND),
        one("lora-dropout", lora, "--lora_dropout 0.1", "cpu-lora", TREND),
        one("cpu-buckets", full, shapes, **cpu),
        one("buckets", full, shapes, "cpu-buckets"),
        one("cpu-full-sdxl", full, sdxl, **cpu),
        one("full-sdxl", full, f"{sdxl} --cache_latents", "cpu-full-sdxl"),
        one("lora-sdxl", lora, f"{sdxl} --train_text_encoder --text_encoder_rank 4"),
        one("cpu-fused", full, fused, **cpu),
        one("fused", full, fused, "cpu-fused", FP32, "no"),
        one("bf16-weights", full, f"{fused} --weights_precision bf16", "cpu-fused", TREND, "bf16"),
        one("cpu-upscaler", full, upscaler, **cpu),
        one("upscaler", full, upscaler, "cpu-upscaler"),
    ]

    def weights(name):
        return load_file(next((folder(name) / "unet").glob("diffusion_pytorch_model.safetensors")))

    def equal(a, b):
        def compared(_):
            one, other = weights(a), weights(b)
            worst = max(float(abs(one[key] - other[key]).max()) for key in one)
            return {"equal_to_the_last_bit": worst == 0, "largest_difference_of_weights": worst}

        return compared

    waits = lambda result: {"places_that_wait": len(re.findall("synchronizing CUDA operation", result["text"]))}
    command = [*CHILD, *full, "--cache_latents", "--output_dir", folder("waits"), "--mixed_precision", "fp16"]
    cases.append(Case("waits", [command], waits, {"GPU_CHECK_WAITS": "1", "GPU_CHECK_STOP_AFTER": str(steps)}))

    every = ["--checkpointing_steps", "1" if small else "10"]
    resumed = [*CHILD, *full, *every, "--output_dir", folder("resumed"), "--mixed_precision", "fp16"]
    killed = (resumed, {"GPU_CHECK_KILL_AT": "2" if small else "27"}, -signal.SIGKILL)
    goes_on = [*resumed, "--resume_from_checkpoint", "latest"]
    cases.append(Case("resumed", [killed, goes_on], equal("fp16", "resumed"), against=("fp16",)))
    cases.append(Case("twice", [["true"]], equal("fp16", "fp16-again"), needs=("fp16", "fp16-again")))

    def stopped(name):
        def checked(result):
            if not re.search(r"the (loss|gradient's norm) is -?(nan|inf)|weights are not finite", result["text"]):
                raise Failed("no message that says what is not finite")
            for path in folder(name).glob("checkpoint-*/**/*.safetensors"):
                broken = [key for key, value in load_file(path).items() if not np.isfinite(value).all()]
                if broken:
                    raise Failed(f"{path} has values that are not finite: {broken[:3]}")
            return {"checkpoints": len(list(folder(name).glob("checkpoint-*")))}

        return checked

    for precision in ("fp16", "bf16"):
        name = f"nan-{precision}"
        command = [*CHILD, *full, "--learning_rate", "1e30", "--checkpointing_steps", "1", "--checkpoints_total_limit"]
        command += ["2", "--output_dir", folder(name), "--mixed_precision", precision]
        cases.append(Case(name, [command], stopped(name), status=1))

    def skipped(_):
        lines = [json.loads(text) for text in (folder("overflow") / "metrics.jsonl").read_text().splitlines()]
        number = sum(one.get("skipped", 0) for one in lines)
        if check.on_gpu and not number:
            raise Failed("no step overflowed: the case does not show what it should")
        if not all(np.isfinite(value).all() for value in weights("overflow").values()):
            raise Failed("weights that are not finite")
        return {"skipped_steps": number, "last": losses("overflow")[-1]}

    command = [*CHILD, *full, "--pretrained_model_name_or_path", folder("loud-sd"), "--output_dir", folder("overflow")]
    cases.append(Case("overflow", [[*command, "--mixed_precision", "fp16"]], skipped))

    def there(*paths):
        def checked(_):
            missing = [str(path) for path in paths if not path.is_file()]
            if missing:
                raise Failed(f"not written: {', '.join(missing)}")

        return checked

    generate = [*CHILD, "generate_images.py", "--prompt", PROMPT, "--size", "64", "--num_inference_steps"]
    generate += ["2" if small else "20"]
    for name, what in {
        "generate": ["--model", f"base={ROOT / 'models/mini-sd'}", f"tuned={folder('fp16')}"],
        "generate-lora": ["--model", "models/mini-sd", "--lora", folder("lora-fp16"), "--lora_scale", "0", "1"],
    }.items():
        command = [*generate, *what, "--output_dir", folder(name)]
        cases.append(Case(name, [command], there(folder(name) / "grid.png"), needs=("fp16", "lora-fp16")))
    command = [*CHILD, "evaluate_model.py", "--model", "original=models/mini-sd", f"tuned={folder('fp16')}"]
    command += ["--dataset", "datasets/chalk", "--split", "validation", "--checker", "finetuning.shapes.checker"]
    command += ["--general_prompts", "datasets/left_out_of_chalk.txt", "--max_rows", "2" if small else "32"]
    command += ["--num_inference_steps", "2" if small else "20", "--output_dir", folder("evaluate")]
    cases.append(Case("evaluate", [command], there(folder("evaluate") / "report.json"), needs=("fp16",)))
    command = [*CHILD, "merge_checkpoints.py", "--base", "models/mini-sd", "--tuned", folder("fp16"), "--ratio", "0.5"]
    command += ["--output_dir", folder("merge")]
    cases.append(Case("merge", [command], there(folder("merge") / "model_index.json"), needs=("fp16",)))
    return cases


# -- fast: images a second on Stable Diffusion 1.5's shape ---------------------------------------------------------


def fast(check, which="fast"):
    """The cases of speed, of one process on the GPU at a time: the telling ones, `more` of them, and `compile`."""
    small = check.args.small
    model = check.scratch / "sd15"
    both = words(
        f"""--pretrained_model_name_or_path {model}/model --train_data_dir {model}/images --center_crop --random_flip
        --resolution {64 if small else 512} --max_train_steps 100000 --seed 7
        --dataloader_num_workers {0 if small else 8}"""
    )
    common = [*both, *words("--report_to none --validation_epochs 0 --validation_loss_rows 0 --checkpointing_steps 0")]
    common += ["--no-cache_latents"]  # a case that wants the cache says so behind it
    lock = {"GPU_CHECK_LOCK": check.scratch / "one-at-a-time"}

    def case(name, batch, command, limit=150):
        cached, again = "--cache_latents" in command, "--gradient_checkpointing" in command
        bare = "benchmarks/gpu/sd15.py" in command
        unet = STEP_CHECKPOINTED if again else STEP_LORA if "train_lora.py" in command else STEP
        flop = unet + (0 if bare else TEXT) + (0 if cached or bare else ENCODE)

        def rate(result):
            images = batch / result["step_seconds"]
            facts = {"images_per_second": round(images, 2)}
            if check.on_gpu:
                facts["tflops"] = round(images * flop, 1)
                facts["share_of_matmul"] = round(images * flop / check.facts["matmul_tflops"], 3)
            return facts

        stop = 8 if small else {1: 60, 4: 35}.get(batch, 25)
        env = {"GPU_CHECK_STOP_AFTER": str(stop), **lock}
        if "profile" in name:
            env["GPU_CHECK_PROFILE"] = str(check.logs / f"{name}-operations.txt")
        return Case(name, [[*CHILD, *command]], rate, env, limit=3 * limit)  # up to three wait for each other's turn

    def ours(name, batch, flags="", script="train_text_to_image.py", precision="fp16", limit=150):
        output = ["--output_dir", check.scratch / name, "--mixed_precision", precision]
        return case(name, batch, [script, *common, "--train_batch_size", batch, *flags.split(), *output], limit)

    def bare(name, batch, flags="", limit=150):
        command = ["benchmarks/gpu/sd15.py", "train", model, "--batch", batch, *flags.split()]
        return case(name, batch, command, limit)

    rank, script = f"--rank {4 if small else 16}", "train_lora.py"  # of layers that are 8 wide in miniature
    if which == "compile":
        return [
            ours("full-8-cached-compile", 8, "--cache_latents --compile", limit=300),
            bare("bare-8-compile", 8, "--compile", limit=300),
            ours("lora-8-cached-compile", 8, f"{rank} --cache_latents --compile", script, limit=300),
            bare("bare-8-channels-last-compile", 8, "--compile --channels_last", limit=300),
            bare("bare-4-compile", 4, "--compile", limit=300),
        ]
    cases = [
        ours("full-8", 8),
        bare("bare-8", 8),
        ours("full-8-cached", 8, "--cache_latents"),
        ours("profile-full-8-cached", 8, "--cache_latents"),
        ours("full-1", 1),
        ours("full-4", 4),
        ours("full-8-cached-channels-last", 8, "--cache_latents --channels_last"),
        bare("bare-8-channels-last", 8, "--channels_last"),
        ours("full-8-checkpointing", 8, "--gradient_checkpointing"),
        ours("full-8-xformers", 8, "--enable_xformers_memory_efficient_attention"),
        ours("lora-8", 8, rank, script),
        ours("lora-1", 1, rank, script),
        ours("lora-8-cached", 8, f"{rank} --cache_latents", script),
        ours("full-8-bf16", 8, precision="bf16"),
        ours("full-8-8bit-adam", 8, "--use_8bit_adam"),
        ours("full-8-ema", 8, "--use_ema"),
        bare("bare-4", 4),
    ]
    if check.args.official:
        theirs = ["--train_batch_size", "8", "--mixed_precision", "fp16", "--output_dir", check.scratch / "official"]
        cases.insert(1, case("official-8", 8, [check.args.official, *both, *theirs]))
    more = [
        bare("bare-4-channels-last", 4, "--channels_last"),
        bare("bare-1", 1),
        ours("full-1-cached", 1, "--cache_latents"),
        ours("lora-1-cached", 1, f"{rank} --cache_latents", script),
        ours("lora-4", 4, rank, script),
        ours("lora-4-cached", 4, f"{rank} --cache_latents", script),
        ours("full-4-cached", 4, "--cache_latents"),
        ours("profile-lora-1-cached", 1, f"{rank} --cache_latents", script),
    ]
    return more if which == "more" else cases


# -- fits: the presets of finetune.sh on the memory of their cards -------------------------------------------------


def fits(check):
    """finetune.sh itself with each preset, as it is but for its model, its data and where it ends."""
    small = ["--small"] * check.args.small
    cases = [Case("sdxl", [[sys.executable, "benchmarks/gpu/sdxl.py", check.scratch / "sdxl", *small]], limit=300)]
    limits = {"sd15-t4": T4, "sd15-lora-t4": T4, "sd15-locon-t4": T4, "sd14-a6000": A6000, "unsplash-lite": A6000}
    limits |= {"sdxl-lora-16gb": T4, "sdxl-lora-24gb": RTX3090, "sdxl-24gb": RTX3090, "sdxl-48gb": A6000}
    again = {f"{preset} PyTorch": gigabytes for preset, gigabytes in limits.items() if preset[-2:] in ("t4", "00")}
    for name, gigabytes in {**limits, **again}.items():
        preset, _, attention = name.partition(" ")
        name = "-".join(["fits", preset, *["pytorch-attention"] * bool(attention)])
        sdxl = preset.startswith("sdxl")
        shape = check.scratch / ("sdxl" if sdxl else "sd15")
        env = {
            "PRESET": preset, "MODEL_NAME": shape / "model", "TRAIN_DIR": shape / "images",
            "OUTPUT_DIR": check.scratch / name, "CHECKPOINTS_KEPT": "1", "CHECKPOINTING_STEPS": "100000",
            "VALIDATION_STEPS": "4", "NON_EMA_REVISION": "", "ACCELERATE_MIXED_PRECISION": "fp16",
            "REPORT_TO": "none", "LAUNCH": " ".join(CHILD),
            "GPU_CHECK_MEMORY_GB": str(gigabytes), "GPU_CHECK_STOP_AFTER": "8",
        }  # fmt: skip
        if attention:
            env["XFORMERS"] = ""
        if sdxl:
            env["MORE"] = f"--pretrained_vae_model_name_or_path {shape / 'model'}"  # the preset's is on the Hub
        if check.args.small:
            env |= {"RESOLUTION": "64", "GUIDANCE": "1", "PROMPTS": "a circle", "RANK": "4"}
        found = lambda result, limit=gigabytes: {"limit_gb": limit}
        env = {name: str(value) for name, value in env.items()}
        cases.append(Case(name, [["bash", "finetune.sh"]], found, env, ("sdxl",) * sdxl, limit=300 if sdxl else 150))
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("right", "fast", "fits", "more", "compile"))
    parser.add_argument("--only", nargs="+", default=[], help="names of cases; what they need is added")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=3600, help="no case is started after this time")
    parser.add_argument("--jobs", type=int, help="cases of `right` that run side by side (none: by cores, up to 7)")
    parser.add_argument("--small", action="store_true", help="everything in miniature, one case after the other")
    parser.add_argument("--official", type=Path, help="diffusers' own train_text_to_image.py, to compare with")
    args = parser.parse_args()
    args.output = args.output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    check = Check(args, scratch)
    try:
        check.begin()
        make_three_shapes(scratch / "three-shapes")
        make_loud(scratch / "loud-sd")
        plan = {
            "right": (right(check), args.jobs or check.side_by_side(7)),
            "fast": (fast(check), check.side_by_side(3)), "fits": (fits(check), check.side_by_side(3, A6000)),
            "more": (fast(check, "more"), check.side_by_side(3)),
            "compile": (fast(check, "compile"), check.side_by_side(2)),
        }  # fmt: skip
        everything = {case.name: case for cases, _ in plan.values() for case in cases}
        unknown = [name for name in args.only if name not in everything]
        if unknown:
            sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(everything)}")
        chosen = set(args.only)
        while missing := {n for name in chosen for n in everything[name].needs + everything[name].against} - chosen:
            chosen |= missing
        wanted = {part: [c for c in plan[part][0] if not chosen or c.name in chosen] for part in args.parts or plan}
        model = None
        if wanted.keys() - {"right"} and any(wanted[part] for part in wanted.keys() - {"right"}):
            command = [sys.executable, "benchmarks/gpu/sd15.py", "make", scratch / "sd15"] + ["--small"] * args.small
            model = subprocess.Popen(list(map(str, command)), cwd=ROOT)  # while the first cases run
        for part, cases in wanted.items():
            if cases and part != "right" and model.wait():
                check.keep(f"model for {part}", {"status": "fail", "why": "sd15.py could not make it"})
            else:
                check.run_all(cases, plan[part][1])
        print(f"\n{check.path}")
        for name in everything:
            if name in check.cases:
                print(line(name, check.cases[name]))
            elif not chosen or name in chosen:
                print(f"not run: {name}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
