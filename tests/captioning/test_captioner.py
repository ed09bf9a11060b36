"""Every kind of captioner, run with random weights: the batch does not matter, the prompt is not repeated."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetuning.captioning.captioner import Captioner, SeededNucleus, without_prompt
from finetuning.captioning.kinds import CAPTIONERS, GenerationArgs
from finetuning.data.findings import Findings
from finetuning.families.model_args import ModelError
from finetuning.files import write_json
from finetuning.rng import torch_generator

NAMES = ["train/a.png", "train/b.png", "train/c.png", "train/d.png"]
FOLDERS = ["blip", "blip2", "blip2-t5", "instructblip", "git", "florence2", "image-text-to-text"]
WAYS = {"beams": {"num_beams": 3}, "greedy": {"num_beams": 1}, "nucleus": {"top_p": 0.9}}


def opened(folder, name, findings=None, **settings):
    """The captioner of that name in a folder."""
    args = GenerationArgs(**{"max_length": 8, "min_length": 3, **settings})
    kind = CAPTIONERS[name.removesuffix("-t5")]
    return Captioner(kind, args, findings or Findings(), str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_says_what_single_images_say(tiny_captioner, images, name, way):
    captioner = opened(tiny_captioner(name), name, **WAYS[way])
    together = captioner(images, NAMES)
    assert together == [captioner([image], [key])[0] for image, key in zip(images, NAMES, strict=True)]
    assert len(set(together)) > 1 and all(together)


@pytest.mark.parametrize("name", ["blip", "blip2", "blip2-t5", "instructblip", "git", "image-text-to-text"])
def test_of_the_output_only_the_new_tokens_are_taken(tiny_captioner, images, name):
    """With a fixed number of new words the caption has just as many, whatever the model repeats before them.

    A prompt of one word, which is not looked for in the text.
    """
    captioner = opened(tiny_captioner(name), name, prompt="table", num_beams=1, min_length=6, max_length=6)
    said = []
    generate = captioner.model.generate
    captioner.model.generate = lambda **given: said.append(generate(**given)) or said[-1]
    texts = captioner(images, NAMES)
    decode = captioner.processor.tokenizer.batch_decode
    assert texts == [" ".join(text.split()) for text in decode(said[0][:, -6:], skip_special_tokens=True)]
    repeats = all(text.startswith("table") for text in decode(said[0], skip_special_tokens=True))
    assert repeats == (name != "blip2-t5")


@pytest.mark.parametrize("name", ["blip", "blip2", "instructblip", "git", "image-text-to-text"])
def test_a_prompt_changes_what_is_said(tiny_captioner, images, name):
    captioner, said = opened(tiny_captioner(name), name), []
    for captioner.prompt in ("a dog", "the sky"):
        said.append(captioner(images[:1], NAMES[:1]))
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("text", "prompt", "left"),
    [
        ("a photo of a dog", "a photo of", "a dog"),
        ("A Photo of a dog", "a photo of", "a dog"),
        ("a photograph of a dog", "a photo of", "a photograph of a dog"),
        ("a dog", "a", "a dog"),
        ("a dog", "", "a dog"),
        ("a photo", "a photo of", "a photo"),
    ],
)
def test_a_prompt_in_the_caption_is_cut_off_in_whole_words(text, prompt, left):
    assert without_prompt(text, prompt) == left


@pytest.mark.parametrize("name", FOLDERS)
def test_captions_that_may_be_cut_short_are_named(tiny_captioner, images, name):
    """The end token is made the likeliest of all or impossible; Florence-2 forces one onto the last place."""
    findings = Findings()
    captioner = opened(tiny_captioner(name), name, findings, num_beams=1, min_length=2, max_length=5)
    ends = captioner.processor.tokenizer.convert_tokens_to_ids("[SEP]" if name in ("blip", "git") else "</s>")
    generate, likely = captioner.model.generate, {}

    def steered(**given):
        held_back = lambda scores: scores[:, [ends]].isinf()  # by min_length
        steer = lambda _, scores: torch.where(
            held_back(scores), scores, scores.index_fill(1, torch.tensor([ends]), likely["end"])
        )
        return generate(**given, logits_processor=[steer])

    captioner.model.generate = steered
    likely["end"] = 1e9
    captioner(images, NAMES)
    likely["end"] = -1e9
    assert not findings.warnings
    captioner(images, NAMES)
    assert findings.as_dict()["warnings"] == {"perhaps_cut": NAMES}


def test_a_nucleus_draw_depends_on_the_seed_and_the_name(tiny_captioner, images):
    captioner = opened(tiny_captioner("blip"), "blip", top_p=1.0, temperature=3.0)
    first = captioner(images, NAMES)
    assert first == captioner(images, NAMES)
    assert first != captioner(images, [f"other/{name}" for name in NAMES])
    captioner.args.seed = 1
    assert first != captioner(images, NAMES)


def test_seeded_draws_follow_the_nucleus():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampling = SeededNucleus(0.9, 1.0, [torch_generator(0, "caption", row) for row in range(4000)])
    chosen = sampling(None, probabilities.log().expand(4000, 4)).argmax(1)
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.03)


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
@pytest.mark.parametrize("has_room", [True, False])
def test_an_old_checkpoint_without_an_image_token_is_completed(tiny_captioner, images, tmp_path, name, has_room):
    """Of before 2024: neither the processor nor the model says how an image stands in the text."""
    old = tmp_path / "old"
    shutil.copytree(tiny_captioner(name), old)
    config, processor = (json.loads((old / file).read_text()) for file in ("config.json", "processor_config.json"))
    token = config.pop("image_token_index")
    processor.pop("num_query_tokens")
    weights = load_file(old / "model.safetensors")
    if not has_room:
        config["text_config"]["vocab_size"] = token
        weights |= {key: value[:token].clone() for key, value in weights.items() if len(value) == token + 1}
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    write_json(old / "config.json", config)
    write_json(old / "processor_config.json", processor)
    torch.manual_seed(0)  # of the row that is added for the image's token
    said = [opened(folder, name, num_beams=1)(images, NAMES) for folder in (old, tiny_captioner(name))]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("name", "of", "said"),
    [
        ("blip", "git", "is a git model, not blip"),
        ("git", "blip", "is a blip model, not git"),
        ("clip-interrogator", "git", "is a git model, not blip"),
    ],
)
def test_a_model_of_another_kind_is_refused(tiny_captioner, name, of, said):
    with pytest.raises(ModelError, match=said):
        opened(tiny_captioner(of), name)


def spoil(folder, how):
    weights = folder / "model.safetensors"
    if how == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    elif how == "lacking":
        kept = {k: v for k, v in load_file(weights).items() if "projector" not in k}
        save_file(kept, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        (folder / "tokenizer_config.json").unlink()
    elif how == "none":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [("pickle", "weights_only=True"), ("cut", "model.safetensors is damaged"), ("lacking", "lacks .* of its weights"),
     ("no tokenizer", "cannot be opened"), ("none", "there is no such folder")],
)  # fmt: skip
def test_a_model_that_is_not_whole_is_refused(tiny_captioner, tmp_path, how, said):
    shutil.copytree(tiny_captioner("florence2"), tmp_path / "model")
    spoil(tmp_path / "model", how)
    with pytest.raises(ModelError, match=said):
        opened(tmp_path / "model", "florence2")


def test_a_model_without_a_chat_template_is_named(tiny_captioner, images):
    captioner = opened(tiny_captioner("image-text-to-text"), "image-text-to-text")
    captioner.processor.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        captioner(images, NAMES)
