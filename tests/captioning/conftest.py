"""Every kind of captioner with random weights and a vocabulary of a few words."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

WORDS = """a photo of the red green blue small large circle square star dog cat on in with and table sky tree house
    white black write short description for image . describe this one sentence what does ? detail is shown""".split()  # noqa: SIM905
SIZE = {"height": 16, "width": 16}
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT = {**LAYERS, "image_size": 16, "patch_size": 8}
TEMPLATE = """{% for message in messages %}<user>{% for part in message.content %}{% if part.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}{% endfor %} {% endfor %}<bot>"""


@pytest.fixture(scope="session")
def images():
    """Four RGB images of different sizes."""
    sizes = ((24, 20), (16, 16), (60, 20), (20, 40))
    noise = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    return [Image.fromarray(one) for one in noise]


@pytest.fixture(scope="session")
def words_tokenizer():
    """Build a tokenizer of whole words: `special` ones first, whose first are bos, pad, eos and unk."""

    def build(special, **names):
        bos, _, eos, unk = special[:4]
        vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
        roles = {"bos_token": bos, "pad_token": special[1], "eos_token": eos, "unk_token": unk, **names}
        extra = {"additional_special_tokens": special[4:]} if special[4:] else {}
        return PreTrainedTokenizerFast(tokenizer_object=inner, **roles, **extra)

    return build


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory, words_tokenizer):
    """A function: the folder of a model of that name. Never write to it."""
    builders = {
        "blip": _blip, "blip2": _blip2, "blip2-t5": _blip2_t5, "instructblip": _instructblip, "git": _git,
        "florence2": _florence2, "image-text-to-text": _qwen,
    }  # fmt: skip
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(4)
            model, processor = builders[name](words_tokenizer)
            for parameter in model.parameters():
                if parameter.dim() > 1:  # strong enough for an image to change the words
                    torch.nn.init.normal_(parameter, std=1.0)
            model.save_pretrained(made[name])
            processor.save_pretrained(made[name])
        return made[name]

    return folder


def _bert():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]")


def _blip(_):
    tokenizer = _bert()
    text = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": 16}
    config = BlipConfig(
        text_config={**LAYERS, **text, "vocab_size": len(tokenizer), "max_position_embeddings": 64}, vision_config=SIGHT
    )
    return BlipForConditionalGeneration(config), BlipProcessor(BlipImageProcessor(size=SIZE), tokenizer)


def _git(_):
    tokenizer = _bert()
    config = GitConfig(
        vision_config=SIGHT, **LAYERS, vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=2,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    images = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    return GitForCausalLM(config), GitProcessor(images, tokenizer)


def _opt(tokenizer):
    return {
        "model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip


def _t5(tokenizer):
    return {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 1,
        "vocab_size": len(tokenizer), "eos_token_id": 2, "decoder_start_token_id": 1, "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _queries(words_tokenizer, language, config_class, model_class, **qformer):
    tokenizer = words_tokenizer(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = config_class(
        vision_config=SIGHT,
        qformer_config={**LAYERS, "encoder_hidden_size": 16, "cross_attention_frequency": 1, **qformer},
        text_config=language(tokenizer),
        num_query_tokens=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return model_class(config), BlipImageProcessor(size=SIZE), tokenizer


def _blip2(words_tokenizer, language=_opt):
    model, images, tokenizer = _queries(words_tokenizer, language, Blip2Config, Blip2ForConditionalGeneration)
    return model, Blip2Processor(images, tokenizer, num_query_tokens=4)


def _blip2_t5(words_tokenizer):
    return _blip2(words_tokenizer, _t5)


def _instructblip(words_tokenizer):
    model, images, tokenizer = _queries(
        words_tokenizer, _opt, InstructBlipConfig, InstructBlipForConditionalGeneration, vocab_size=len(_bert())
    )
    return model, InstructBlipProcessor(images, tokenizer, _bert(), num_query_tokens=4)


def _florence2(words_tokenizer):
    tokenizer = words_tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", "<image>"], extra_special_tokens={"image_token": "<image>"}
    )
    text = {
        "model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": len(tokenizer),
        "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    }  # fmt: skip
    sight = {
        "depths": (1,), "patch_size": (7,), "patch_stride": (4,), "patch_padding": (3,), "patch_prenorm": (False,),
        "embed_dim": (16,), "num_heads": (2,), "num_groups": (2,), "window_size": 4, "projection_dim": 16,
    }  # fmt: skip
    config = Florence2Config(
        text_config=text, vision_config=sight, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    images = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    images.image_seq_length = 17  # 4 x 4 patches and their mean
    return Florence2ForConditionalGeneration(config), Florence2Processor(images, tokenizer)


def _qwen(words_tokenizer):
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<user>", "<bot>"]
    tokenizer = words_tokenizer(["<s>", "<pad>", "</s>", "<unk>", *marks])
    number = tokenizer.convert_tokens_to_ids
    text = {
        **LAYERS, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "window_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=sight, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"), vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    options = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    videos = Qwen2VLVideoProcessor(patch_size=4, temporal_patch_size=1, merge_size=2)
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**options), tokenizer, videos, chat_template=TEMPLATE)
    return Qwen2_5_VLForConditionalGeneration(config), processor
