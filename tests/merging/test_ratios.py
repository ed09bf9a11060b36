"""Lists of ratios, curves, and ratios of blocks on the real names of Stable Diffusion 1.5."""

from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel

from finetuning.families.model_args import ModelError
from finetuning.families.original import unet_blocks
from finetuning.merging.ratios import CURVES, block_ratios, block_rules, parse_ratios
from finetuning.merging.tensor_matching import Match


@pytest.fixture(scope="module")
def names():
    """Canonical names of SD 1.5's UNet, whose config is diffusers' default, and two of a text encoder."""
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    text = ["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"]
    return {"unet": list(unet.state_dict()), "text_encoder": text}


@pytest.fixture(scope="module")
def matches(names):
    return [Match(component, key, ()) for component, keys in names.items() for key in keys]


@pytest.mark.parametrize(("words", "ratios"), [
    (["0.3"], [0.3]), (["0.7", "0.3", "1.2", "-0.1"], [0.7, 0.3, 1.2, -0.1]),
    (["0:1:0.1"], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), (["1:0:-0.5"], [1.0, 0.5, 0.0]),
    (["0.25", "0.5:1:0.25"], [0.25, 0.5, 0.75, 1.0]), (["0.5:0.5:0.1"], [0.5]), (["1e-1"], [0.1]),
])  # fmt: skip
def test_ratios_are_what_was_written(words, ratios):
    assert parse_ratios(words) == ratios


@pytest.mark.parametrize(("words", "told"), [
    (["half"], "half: must be a number"), (["nan"], "nan: must be a number"), (["inf"], "inf: must be a number"),
    (["0:1:nan"], "0:1:nan: must be a number"), (["0:1"], "0:1: a range is FROM:TO:STEP"),
    (["0:1:0.3"], "0:1:0.3: steps of 0.3 do not lead from 0 to 1"), (["0:1:0"], "steps of 0 do not lead"),
    (["0:1:-0.1"], "steps of -0.1 do not lead"), (["0:1:0.00001"], "100001 ratios are too many"),
    (["0.5", "0:1:0.5"], "0.5 is there twice"),
])  # fmt: skip
def test_ratios_that_cannot_be_meant_are_named(words, told):
    with pytest.raises(ValueError) as problem:
        parse_ratios(words)
    assert told in str(problem.value)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_curves_keep_the_ends_and_the_middle_and_only_rise(curve):
    assert [curve(ratio) for ratio in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    bent = [curve(step / 1000) for step in range(1001)]
    assert all(low < high for low, high in pairwise(bent))


@pytest.mark.parametrize(
    ("name", "quarter"), [("linear", 0.25), ("smoothstep", 0.15625), ("inverse_smoothstep", 0.326352)]
)
def test_curves_bend_as_they_say(name, quarter):
    assert CURVES[name](0.25) == pytest.approx(quarter, abs=1e-6)


def test_smoothstep_and_its_inverse_undo_each_other():
    forth, back = CURVES["smoothstep"], CURVES["inverse_smoothstep"]
    for ratio in (step / 64 for step in range(65)):
        assert forth(back(ratio)) == pytest.approx(ratio, abs=1e-14)
        assert back(forth(ratio)) == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize(("start", "block"), [
    ("conv_in", "IN00"), ("down_blocks.0.resnets.0", "IN01"), ("down_blocks.0.downsamplers.0", "IN03"),
    ("down_blocks.3.resnets.1", "IN11"), ("mid_block.attentions.0", "M00"), ("up_blocks.0.resnets.0", "OUT00"),
    ("up_blocks.0.upsamplers.0", "OUT02"), ("up_blocks.3.attentions.2", "OUT11"), ("time_embedding.linear_1", "BASE"),
    ("conv_out", "BASE"),
])  # fmt: skip
def test_tensors_are_in_the_block_that_the_original_layout_puts_them_in(names, start, block):
    found = {one for key, one in unet_blocks(names["unet"]).items() if key.startswith(f"{start}.")}
    assert found == {block}


def test_blocks_of_unets_with_other_numbers_of_layers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32), layers_per_block=(1, 3), cross_attention_dim=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    blocks = unet_blocks(unet.state_dict())
    assert blocks["down_blocks.0.downsamplers.0.conv.weight"] == "IN02"
    assert blocks["down_blocks.1.resnets.2.conv1.weight"] == "IN05"
    assert blocks["up_blocks.0.upsamplers.0.conv.weight"] == "OUT03"
    assert blocks["up_blocks.1.resnets.1.conv1.weight"] == "OUT05"
    assert len(set(blocks.values())) == 2 * 6 + 1 + 1


COMMUNITY = [i / 100 for i in range(25)]  # IN00 0, ..., IN11 0.11, M00 0.12, OUT00 0.13, ..., OUT11 0.24


@pytest.mark.parametrize("words", [[str(one) for one in COMMUNITY], [",".join(map(str, COMMUNITY))]])
def test_numbers_are_for_the_blocks_in_the_order_of_the_community(names, matches, words):
    ratios = block_ratios(words, matches)
    assert [ratio for _, given in block_rules(words) for ratio in given] == COMMUNITY
    wanted = {
        "conv_in.weight": 0.0,
        "down_blocks.3.resnets.1.conv2.bias": 0.11,
        "mid_block.attentions.0.norm.weight": 0.12,
        "up_blocks.0.resnets.0.conv1.weight": 0.13,
        "up_blocks.3.attentions.2.norm.weight": 0.24,
        "time_embedding.linear_1.weight": 0.9,
        "conv_out.bias": 0.9,
    }
    assert {key: ratios.get(f"unet.{key}", 0.9) for key in wanted} == wanted
    assert ratios.get(f"text_encoder.{names['text_encoder'][0]}", 0.9) == 0.9


def test_numbers_of_other_parts_are_not_those_of_the_unet(matches):
    vae = [Match("vae", key, ()) for key in ("conv_in.weight", "mid_block.x")]
    ratios = block_ratios([",".join(["0.1"] * 25)], [*matches, *vae])
    assert ratios.get("vae.conv_in.weight", 0.9) == 0.9 and ratios.get("unet.conv_in.weight", 0.9) == 0.1


def test_a_tensor_that_is_copied_has_no_ratio(matches):
    copied = Match("unet", "conv_in.extra", (), is_copy=True)
    assert "unet.conv_in.extra" not in block_ratios(["unet.conv_in.*=0.2"], [*matches, copied])


def test_later_words_win(matches):
    numbers = ",".join(["0.1"] * 25)
    key = "mid_block.attentions.0.norm.weight"
    for words, ratio in (
        ([numbers, "unet.mid_block.*=0.3"], 0.3),
        (["unet.mid_block.*=0.3", numbers], 0.1),
        (["unet.*=0.2", "unet.mid_block.*=0.3"], 0.3),
        (["unet.mid_block.*=0.3", "*.weight=0.4", "unet.conv_in.*=0"], 0.4),
    ):
        assert block_ratios(words, matches).get(f"unet.{key}", 0.9) == ratio


def test_patterns_are_for_full_names_in_every_part(matches):
    words = ["text_encoder.*=1.5", "unet.*.attentions.?.norm.*=0"]
    ratios = block_ratios(words, matches)
    assert ratios.get("text_encoder.encoder.layers.0.mlp.fc1.weight", 0.9) == 1.5
    assert ratios.get("unet.mid_block.attentions.0.norm.weight", 0.9) == 0
    assert ratios.get("unet.mid_block.resnets.0.norm1.weight", 0.9) == 0.9
    with pytest.raises(ModelError, match=r"UNET\.\*, mid_block\.\* matches none"):
        block_ratios([*words, "UNET.*=0.1", "mid_block.*=0.1"], matches)


def test_no_words_change_nothing(matches):
    assert block_ratios(None, matches) == block_ratios([], matches) == {}


@pytest.mark.parametrize(("count", "told"), [(24, "24 numbers"), (26, "BASE"), (1, "1 number")])
def test_another_number_of_blocks_is_refused_and_the_right_one_told(matches, count, told):
    with pytest.raises(ModelError, match=r"25 blocks \(IN00 to OUT11\)") as problem:
        block_ratios(["0.5"] * count, matches)
    assert told in str(problem.value)


def test_numbers_without_a_unet_are_refused(matches):
    with pytest.raises(ModelError, match="--components"):
        block_ratios(["0.5"] * 25, [one for one in matches if one.component == "text_encoder"])


def test_all_wrong_words_are_named_together():
    with pytest.raises(ValueError) as problem:
        block_rules(["0.1,half", "unet.*=", "0.5", "unet.*=nan", "inf"])
    told = str(problem.value)
    assert all(f"{word}: must be" in told for word in ("0.1,half", "unet.*=", "unet.*=nan", "inf"))
    assert "0.5:" not in told
