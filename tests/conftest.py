"""Shared fixtures: a tiny random Stable Diffusion, a tiny dataset, and runs of the scripts."""

import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores can be ten times slower than one

import pytest
import torch
import tqdm.auto
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
)

from finetuning.cli import read
from finetuning.files import write_json, xxh3
from finetuning.shapes.write_dataset import write as write_shapes
from finetuning.training.checkpoint import checkpoints_in
from models.make_start import MODEL_INDEX, vocabulary

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["a", "red", "green", "blue", "small", "large", "circle", "square", "star", "dog", "cat", "on", "table", "sky"]
torch.set_num_threads(1)
for bar in (tqdm.tqdm, tqdm.auto.tqdm):  # their own lock is shared with forked children: one that is killed may hold it
    bar.set_lock(threading.RLock())


def pytest_collection_modifyitems(items):
    """Mark what opens a model or starts a script as `run`: `make test-fast` leaves it out. These come first, so that at
    the end no worker waits for another's long file."""
    for item in items:
        if {"tiny_model", "tiny_sdxl", "run_script", "training"} & set(item.fixturenames):
            item.add_marker("run")
    items.sort(key=lambda item: item.get_closest_marker("run") is None)


def pytest_generate_tests(metafunc):
    """A test with an argument `script` is run with every training script, unless it names its own."""
    named = any("script" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "script" in metafunc.fixturenames and not named:
        metafunc.parametrize("script", sorted(path.stem for path in ROOT.glob("train_*.py")))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """The cache of all runs of the tests, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FINETUNING_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture
def problems_of():
    """A function (args_class, flag=value, ...) -> what the command line says of these flags."""

    def problems(args_class, **flags):
        return read(args_class, "", [word for name, value in flags.items() for word in (f"--{name}", str(value))])[1]

    return problems


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Stable Diffusion of random weights and a few thousand parameters, with a non_ema variant. Never write to it."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    torch.manual_seed(0)
    entries, merges = vocabulary()
    CLIPTokenizer(vocab=entries, merges=merges, model_max_length=16).save_pretrained(folder / "tokenizer")
    write_json(folder / "tokenizer/vocab.json", entries)
    merge_lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "tokenizer/merges.txt").write_text(merge_lines + "\n", encoding="utf-8")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(entries),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=len(entries) - 2,
            eos_token_id=len(entries) - 1,
        )
    )
    text_encoder.config.save_pretrained(folder / "text_encoder")
    prefixed = {f"text_model.{name}": value for name, value in text_encoder.state_dict().items()}
    save_file(prefixed, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    raw = {name: value + 0.01 * torch.randn_like(value) for name, value in unet.state_dict().items()}
    save_file(raw, folder / "unet/diffusion_pytorch_model.non_ema.safetensors", metadata={"format": "pt"})
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", MODEL_INDEX)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """An SDXL of random weights and a few thousand parameters. Never write to it."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    torch.manual_seed(0)
    entries, merges = vocabulary()
    tokenizers = [CLIPTokenizer(vocab=entries, merges=merges, model_max_length=16) for _ in range(2)]
    first, second = (  # of two widths: by these diffusers tells them in a single file
        CLIPTextConfig(
            vocab_size=len(entries), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=len(entries) - 2,
            eos_token_id=len(entries) - 1, projection_dim=width,
        )
        for width in (16, 24)
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16), cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=72, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=32, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(first), text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet=unet, scheduler=scheduler, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_git(tmp_path_factory):
    """A captioner, a GIT of random weights that knows a few words. Never write to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-git"
    torch.manual_seed(4)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate([*special, *WORDS])})
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GitConfig(
        vision_config={**layers, "image_size": 16, "patch_size": 8}, **layers, vocab_size=len(tokenizer),
        max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    git = GitForCausalLM(config)
    for parameter in git.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    git.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    GitProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def metric_weights(tiny_model, tmp_path_factory):
    """A folder of random weights for the metrics: inception.pth and .safetensors, alexnet.safetensors, clip/.

    CLIP reads 16 tokens and 16 pixels. Never write to it.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    from torchvision.models import alexnet

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        inception = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    trunk = alexnet().features
    for weights in [*inception.parameters(), *trunk.parameters()]:
        if weights.dim() > 1:  # so that the features neither vanish nor explode
            torch.nn.init.kaiming_normal_(weights, nonlinearity="relu")
    # torch-fidelity's kernels are float32: large features keep a KID of some size out of their rounding
    inception.Conv2d_1a_3x3.conv.weight.data *= 4
    torch.save(inception.state_dict(), folder / "inception.pth")  # for torch-fidelity itself
    save_file(inception.state_dict(), folder / "inception.safetensors")
    save_file(trunk.state_dict(prefix="features."), folder / "alexnet.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    text = {**layers, **words, "max_position_embeddings": 16}
    vision = {**layers, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder / "clip")
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """11 captioned images in train/ and 4 in validation/: 11 leaves a partial group in every epoch."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "train", 11, ["filled"], ("circle", "square"), 0.5, False, seed=0)
    write_shapes(folder / "validation", 4, ["filled"], ("circle", "square"), 0.5, True, seed=0)
    return folder


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path):
    """An object that makes a folder, its `path`, where it is unpickled."""
    return Bomb(tmp_path / "exploded")


@contextmanager
def accelerate_forgotten():
    """accelerate keeps its state in the process: forget it, and the signal handlers of a run, after the block."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def fresh_accelerate():
    """A test of its own process-wide accelerate."""
    with accelerate_forgotten():
        yield


class Training:
    """Runs of the training scripts in this process, and what they leave behind."""

    @staticmethod
    def run(script, arguments, output_dir, *more):
        """The exit status of `script` with these flags."""
        words = [*map(str, arguments), "--output_dir", str(output_dir), *map(str, more)]
        with accelerate_forgotten():
            return importlib.import_module(script).main(words)

    @classmethod
    def on_two_processes(cls, *run, **environment):
        """The exit statuses of run(...) in two forked children that torch takes for one group, as its launcher would
        start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

        def work(rank):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
            os.environ.update(group | ranks | environment)
            return cls.run(*run)

        children = [cls.in_child(lambda rank=rank: work(rank)) for rank in ("0", "1")]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    @staticmethod
    def in_child(work):
        """Start `work()` in a forked child, which needs no second import; returns its process id."""
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                torch.set_num_threads(1)  # renews torch's pool of threads; two threads at once have crashed in doing so
                status = work()
            finally:
                os._exit(status)
        return pid

    @staticmethod
    def metrics(folder):
        """The lines of metrics.jsonl; NaN and Infinity, which are not JSON, fail."""
        path = Path(folder) / "metrics.jsonl"
        if not path.is_file():
            return []
        return [json.loads(line, parse_constant=int) for line in path.read_text().splitlines()]

    @classmethod
    def steps(cls, folder):
        """The lines that training steps wrote; the evaluator writes others."""
        return [line for line in cls.metrics(folder) if "train_loss" in line]

    @classmethod
    def state(cls, folder):
        """All that a run computed, to the last bit: (weights by file, optimizer.pt of its last checkpoint, metrics)."""
        folder = Path(folder)
        step, _ = checkpoints_in(folder)[-1]
        weights = {
            str(path.relative_to(folder)): xxh3(path)
            for depth in ("*", "*/*", f"checkpoint-{step}/*/*")
            for path in folder.glob(f"{depth}.safetensors")
        }
        optimizer = torch.load(folder / f"checkpoint-{step}/optimizer.pt", weights_only=True)
        return weights, _exact(optimizer), cls.metrics(folder)

    @classmethod
    def assert_same(cls, first, second):
        """Two runs computed the same; compared part by part, so that a failure says what differs."""
        parts = zip(("weights", "optimizer", "metrics"), cls.state(first), cls.state(second), strict=True)
        for name, one, other in parts:
            assert one == other, f"{name} differ"
            assert one or name != "weights"

    @classmethod
    def assert_resumes_exactly(cls, script, arguments, whole, stopped_at, folder):
        """A run that goes on from a checkpoint of the run in `whole` computes the same. Both folders have one name
        where files say it."""
        name = f"checkpoint-{stopped_at}"
        shutil.copytree(whole / name, folder / name)
        shutil.copy(whole / "metrics.jsonl", folder)
        if (whole / "validation").is_dir():
            shutil.copytree(whole / "validation", folder / "validation")
        assert cls.run(script, arguments, folder, "--resume_from_checkpoint", "latest") == 0
        cls.assert_same(folder, whole)


def _exact(value):
    """Nested containers with every tensor as its exact bytes."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    return value


@pytest.fixture(scope="session")
def training():
    """Runs of the training scripts in this process, and what they leave behind."""
    return Training


@pytest.fixture(scope="session")
def arguments(tiny_model, shapes_folder):
    """11 rows in groups of 4: three steps an epoch, the last of 3 rows. Everything that draws is switched on."""
    return f"""
        --pretrained_model_name_or_path {tiny_model} --train_data_dir {shapes_folder} --resolution 32
        --train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps 6 --seed 3
        --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2 --use_ema --ema_decay 0.9 --train_text_encoder
        --random_flip --proportion_empty_prompts 0.3 --noise_offset 0.05 --input_perturbation 0.1 --snr_gamma 5
        --checkpointing_steps 2 --validation_epochs 0 --report_to none
    """.split()


@pytest.fixture(scope="session")
def whole_run(arguments, tmp_path_factory):
    """whole_run(script): a run of two epochs without interruption, with every checkpoint. Never write to it."""
    folders = {}

    def run(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp(script)
            assert Training.run(script, arguments, folders[script], "--checkpointing_steps", 1) == 0
        return folders[script]

    return run


@pytest.fixture
def run_script():
    """Run a script as a user does; returns the CompletedProcess with its text output. `check=False` for failures."""

    def run(name, *arguments, check=True, **options):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **options)
        if check and done.returncode:
            raise AssertionError(f"{name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def tensors():
    """Read all safetensors files below a folder: {relative path: {name: tensor}}."""

    def read(folder):
        folder = Path(folder)
        return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}

    return read


class PageReader(HTMLParser):
    """Checks that elements are closed in order, and gathers tags, attributes, text and the script."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.script = [], Counter(), [], "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, *item) for item in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.script += data if self.open[-1] == "script" else ""
        else:
            self.text += data


@pytest.fixture(scope="session")
def read_page():
    """The PageReader of an HTML page's text."""
    return PageReader


# -- files of a test ---------------------------------------------------------------------------------------------------


def content(value):
    """The bytes of a file: bytes, text, the red of an image of 4 x 4, an image, or a record for JSON."""
    if isinstance(value, int):
        value = Image.new("RGB", (4, 4), (value, 0, 0))
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue()
    if isinstance(value, dict | list):
        value = json.dumps(value)
    return value.encode() if isinstance(value, str) else value


@pytest.fixture(scope="session")
def lay():
    """Write {name: content} below a folder, which is returned; a list of names: an image each."""

    def lay(root, files):
        root.mkdir(parents=True, exist_ok=True)
        for name, value in (files if isinstance(files, dict) else dict.fromkeys(files, 0)).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content(value))
        return root

    return lay


@pytest.fixture(scope="session")
def pack():
    """Write a tar of {name: content}; its path."""

    def pack(path, files, mode="w", **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode, **options) as tar:
            for name, value in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content(value))
                tar.addfile(entry, io.BytesIO(content(value)))
        return path

    return pack


@pytest.fixture(scope="session")
def lines():
    """The records of a file of JSON lines."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
