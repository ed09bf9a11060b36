"""Where adapters go on one model, with which rank and alpha, and what is refused."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetuning.cli import read
from finetuning.families.lora_files import Layer, Lora, adaptable
from finetuning.families.model import load_model
from finetuning.families.model_args import ModelArgs
from finetuning.families.stable_diffusion import StableDiffusion
from finetuning.training.adapters import add_adapters
from finetuning.training.lora_layout import Layout, LoraArgs
from finetuning.training.optim import OptimArgs

MID = "mid_block.attentions.0.transformer_blocks.0"


@dataclass
class Args(LoraArgs, OptimArgs, ModelArgs):
    """The flags that say what is adapted."""

    seed: int = 0


@pytest.fixture(scope="module")
def parts(tiny_model):
    """Attention of width 8 in two blocks and 16 in the middle, over text of width 16."""
    found = load_model(ModelArgs(pretrained_model_name_or_path=str(tiny_model))).components
    return {name: found[name] for name in ("unet", "text_encoder")}


@pytest.fixture
def layout(parts):
    """The Layout of these flags."""

    def make(*targets, **flags):
        args = Args(**({"lora_target_modules": list(targets)} if targets else {}), **flags)
        return Layout(args, StableDiffusion(), parts if args.train_text_encoder else {"unet": parts["unet"]})

    return make


@pytest.fixture
def adapt(tiny_model):
    """{layer name: PEFT's module} of adapters with these flags."""

    def make(**flags):
        args = Args(pretrained_model_name_or_path=str(tiny_model), **flags)
        run = SimpleNamespace(device=torch.device("cpu"), weights_dtype=torch.float32, is_sharded=False, zero_stage=0)
        run.say = print
        return add_adapters(args, load_model(args), run).adapters

    return make


def rank_of(module):
    """As PEFT has it, which the shapes have to agree with."""
    assert module.lora_A["default"].weight.shape[0] == module.lora_B["default"].weight.shape[1] == module.r["default"]
    return module.r["default"]


def scalings(modules):
    return {name: module.scaling["default"] for name, module in modules.items()}


# -- which layers ----------------------------------------------------------------------------------------------------


def test_attention_means_the_four_projections_of_every_attention_layer(layout):
    names = layout("attention").ranks["unet"]
    ends = [name.split(".transformer_blocks.0.")[1] for name in names]
    assert sorted(set(ends)) == [f"attn{n}.to_{what}" for n in (1, 2) for what in ("k", "out.0", "q", "v")]
    assert len(ends) == 32  # four transformers
    assert layout().ranks == layout("attention").ranks


def test_all_linear_and_conv_mean_every_layer_of_their_kind_within_the_blocks(layout, parts):
    kinds = {name.removeprefix("unet."): type(module) for name, module in adaptable({"unet": parts["unet"]}).items()}
    linear, conv = layout("all-linear").ranks["unet"], layout("conv").ranks["unet"]
    assert linear.keys() == {name for name, kind in kinds.items() if kind is torch.nn.Linear} and len(linear) == 50
    assert {kinds[name] for name in conv} == {torch.nn.Conv2d} and len(conv) == 31
    assert kinds.keys() - linear.keys() - conv.keys() == {"conv_in", "conv_out"}
    assert layout("all-linear", "conv").ranks["unet"].keys() == linear.keys() | conv.keys()


@pytest.mark.parametrize(
    ("ending", "layers"),
    [("to_q", 8), ("attn2.to_q", 4), ("to_out.0", 8), ("ff.net.2", 4), (f"{MID}.attn1.to_k", 1), ("conv_in", 1)],
)
def test_another_word_means_the_modules_whose_names_end_in_it(ending, layers, layout):
    names = layout(ending).ranks["unet"]
    assert len(names) == layers and all(f".{name}".endswith(f".{ending}") for name in names)


def test_the_text_encoder_gets_adapters_on_its_attention_whatever_the_unets_targets(layout):
    attention = [f"encoder.layers.0.self_attn.{name}_proj" for name in ("k", "out", "q", "v")]
    for targets in (("attention",), ("to_q",), ("conv",)):
        assert list(layout(*targets, train_text_encoder=True).ranks["text_encoder"]) == attention
    more = layout("all-linear", train_text_encoder=True).ranks["text_encoder"]
    assert list(more) == ["encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc2", *attention]
    assert list(layout(train_text_encoder=True).ranks["text_encoder"]) == attention  # no list has grown
    assert "text_encoder" not in layout("all-linear").ranks


def test_peft_adapts_just_the_layers_of_the_layout(layout, adapt):
    flags = {"lora_target_modules": ["to_k", "conv", "time_embedding.linear_1"], "train_text_encoder": True}
    ranks = layout(**flags).ranks
    assert adapt(**flags).keys() == {f"{part}.{module}" for part, own in ranks.items() for module in own}


# -- which rank and alpha --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "scaling"),
    [
        ({"rank": 5}, 1), ({"rank": 5, "lora_alpha": 2.5}, 0.5), ({"rank": 4, "lora_alpha": 6, "use_rslora": True}, 3),
        ({"rank": 7, "lora_alpha": 6.0, "use_rslora": True}, 6 / 7**0.5),
    ],
)  # fmt: skip
def test_alpha_is_the_rank_unless_given_and_divided_by_it_or_its_root(flags, scaling, adapt):
    assert scalings(adapt(**flags)) == {name: pytest.approx(scaling) for name in adapt(**flags)}


def test_the_text_encoder_may_have_a_rank_of_its_own(adapt):
    modules = adapt(rank=4, train_text_encoder=True, text_encoder_rank=6)
    assert {(name.split(".")[0], rank_of(module)) for name, module in modules.items()} == {
        ("unet", 4), ("text_encoder", 6),
    }  # fmt: skip
    assert set(scalings(modules).values()) == {1.0}
    assert {rank_of(module) for module in adapt(rank=3, train_text_encoder=True).values()} == {3}


def test_patterns_are_ends_of_names_or_regular_expressions_and_the_first_that_fits_counts(adapt, layout):
    flags = {
        "rank": 4, "train_text_encoder": True, "text_encoder_rank": 5, "lora_alpha": 7,
        "lora_rank_pattern": ["attn2.to_k=6", "mid_block.*=3", "q_proj=2"],
        "lora_alpha_pattern": ["to_v=2", r".*attn1\.to_(q|k)=1.5", "out_proj=8"],
    }  # fmt: skip

    def rank(name):
        usual = 5 if name.startswith("text") else 4
        return 6 if name.endswith(".attn2.to_k") else 3 if "mid_block" in name else 2 if "q_proj" in name else usual

    def alpha(name):
        within = name.endswith((".attn1.to_q", ".attn1.to_k"))
        return 2 if name.endswith(".to_v") else 1.5 if within else 8 if "out_proj" in name else 7

    modules = adapt(**flags)
    assert {name: rank_of(module) for name, module in modules.items()} == {name: rank(name) for name in modules}
    assert scalings(modules) == {name: alpha(name) / rank(name) for name in modules}
    ranks = layout(**flags).ranks
    assert {f"{part}.{name}": r for part, own in ranks.items() for name, r in own.items()} == {
        name: rank(name) for name in modules
    }


def test_without_an_alpha_a_layer_of_another_rank_acts_in_full(adapt):
    """Not at 4 / 16, which would scale down what was meant to be larger."""
    modules = adapt(rank=4, lora_rank_pattern=["to_q=8", "to_v=8"], lora_alpha_pattern=["to_v=2"])
    expected = {name: 0.25 if name.endswith("to_v") else 1.0 for name in modules}
    assert scalings(modules) == expected


def test_a_pattern_is_matched_from_a_dot_to_the_end(adapt):
    modules = adapt(lora_rank_pattern=["to_q|to_k=2", ".*attentions.1.*=3"])
    for name, module in modules.items():
        expected = 2 if name.endswith(("to_q", "to_k")) else 3 if "attentions.1." in name else 4
        assert rank_of(module) == expected


# -- what does not fit the model -------------------------------------------------------------------------------------


def test_targets_that_match_nothing_are_named_with_the_names_there_are(layout):
    (problem,) = layout("to_q", "q_proj", "q", "_q").problems()
    assert problem.startswith("--lora_target_modules q_proj q _q ")
    ends = problem.split("end in: ")[1].split(", ")
    assert {"to_out.0", "net.2", "proj_in", "linear_1", "conv_out"} <= set(ends)
    assert ends == sorted(ends) and all(layout(end).ranks["unet"] for end in ends)


@pytest.mark.parametrize("pattern", ["to_z", "o_q", "mid_block", "ff.net.2", "q_proj", "attn2.to"])
def test_patterns_that_match_no_adapter_are_named(pattern, layout):
    rank, alpha = layout(lora_rank_pattern=["to_q=2", f"{pattern}=3"], lora_alpha_pattern=[f"{pattern}=2"]).problems()
    assert rank.startswith(f"--lora_rank_pattern {pattern} ") and alpha.startswith(f"--lora_alpha_pattern {pattern} ")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"rank": 8}, []),
        ({"rank": 9}, ["rank 9 is above the width 8 of 24 layers"]),
        ({"rank": 17}, ["rank 17 is above the width 8 of 24 layers", "rank 17 is above the width 16 of 8 layers"]),
        (
            {"lora_rank_pattern": ["to_q=12"], "train_text_encoder": True, "text_encoder_rank": 20},
            ["rank 12 is above the width 8 of 6 layers", "rank 20 is above the width 16 of 4 layers"],
        ),
        ({"lora_target_modules": ["conv_out"], "rank": 4}, []),  # [4, 8, 3, 3]: the inputs are the kernel's entries too
        ({"lora_target_modules": ["conv_in"], "rank": 8}, []),  # [8, 4, 3, 3]
        ({"lora_target_modules": ["conv_in", "conv_out"], "rank": 8}, ["rank 8 is above the width 4 of 1 layers"]),
    ],
)
def test_a_rank_above_a_layers_smaller_side_is_refused(layout, flags, named):
    problems = list(layout(**flags).problems())
    assert [problem.split(",")[0] for problem in problems] == named


# -- what does not fit a LoRA to start from --------------------------------------------------------------------------


def lora(*ranks, dora=False, name="to_q"):
    """A Lora with one layer for each rank; the numbers in it do not matter."""
    layers = {}
    for block, rank in zip((f"unet.{MID}.attn1", f"unet.{MID}.attn2"), ranks, strict=False):
        layers[f"{block}.{name}"] = Layer(
            torch.zeros(rank, 16), torch.zeros(16, rank), 1.0, torch.ones(16) if dora else None
        )
    return Lora(Path("old.safetensors"), layers, {})


def test_a_lora_of_at_most_these_ranks_can_be_started_from(layout):
    assert not list(layout(rank=4).problems_with_start(lora(4, 2)))
    assert not list(layout(rank=4, use_dora=True).problems_with_start(lora(4, dora=True)))
    assert not list(layout(rank=4, lora_rank_pattern=["to_q=6"]).problems_with_start(lora(6, 6)))


@pytest.mark.parametrize(
    ("flags", "start", "named"),
    [
        (
            {"lora_target_modules": ["to_k"]},
            lora(2, 2),
            f"2 layers that get no adapter here, e.g. unet.{MID}",
        ),
        ({"rank": 4}, lora(4, 6), f"rank 6 at unet.{MID}.attn2.to_q and the flags ask for 4 (1 such layers)"),
        ({}, lora(2, dora=True), "add --use_dora"),
        ({"use_dora": True}, lora(2), "leave out --use_dora"),
    ],
)
def test_a_lora_that_does_not_fit_is_not_started_from(flags, start, named, layout):
    (problem,) = layout(**flags).problems_with_start(start)
    assert problem.startswith("--init_lora old.safetensors ") and named in problem


def test_a_text_encoders_layers_need_train_text_encoder(layout):
    layers = {"text_encoder.encoder.layers.0.self_attn.q_proj": Layer(torch.zeros(2, 16), torch.zeros(16, 2), 1.0)}
    start = Lora(Path("old.safetensors"), layers, {})
    (problem,) = layout().problems_with_start(start)
    assert "--train_text_encoder" in problem
    assert not list(layout(train_text_encoder=True).problems_with_start(start))


# -- what cannot be meant --------------------------------------------------------------------------------------------


def problems_of(*words):
    return read(Args, "", ["--pretrained_model_name_or_path", "base", *words])[1]


@pytest.mark.parametrize(
    "words",
    [
        "--rank 0", "--text_encoder_rank 0 --train_text_encoder", "--text_encoder_rank 2", "--lora_alpha 0",
        "--lora_dropout 1", "--lora_rank_pattern to_q", "--lora_rank_pattern to_q=", "--lora_rank_pattern =4",
        "--lora_rank_pattern to_q=0", "--lora_rank_pattern to_q=-2", "--lora_rank_pattern to_q=1.5",
        "--lora_rank_pattern (to_q=4", "--lora_alpha_pattern to_q=x", "--lora_alpha_pattern to_q=nan",
        "--lora_alpha_pattern to_q=0", "--lora_alpha_pattern [a=4", "--save_kohya --use_dora", "--base_precision int4",
        "--enable_xformers_memory_efficient_attention --base_precision nf4",
    ],
)  # fmt: skip
def test_flags_that_cannot_work_are_named(words):
    (problem,) = problems_of(*words.split())
    assert problem.startswith(words.split()[0] + " ")


def test_every_such_flag_is_named_at_once():
    words = "--rank 0 --lora_alpha 0 --lora_dropout 1 --text_encoder_rank 2 --lora_rank_pattern a b=1 (=2"
    assert len(problems_of(*words.split())) == 6


def test_flags_that_work_have_no_problem():
    words = "--rank 1 --lora_alpha 0.5 --lora_dropout 0 --train_text_encoder --text_encoder_rank 1"
    patterns = ["--lora_rank_pattern", "a|b=3", "mid_block.*=16", "--lora_alpha_pattern", "to_q=2.5", "x=1."]
    assert problems_of(*words.split(), *patterns) == []
