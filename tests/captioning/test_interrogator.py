"""Terms are chosen by CLIP's similarity, one after the other, as long as they help and fit."""

import json

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import caption_images
from finetuning.captioning.interrogator import TERMS, Interrogator, InterrogatorArgs
from finetuning.families.model_args import ModelError

SIZE = {"height": 16, "width": 16}
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CPU = (torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def clip_folder(words_tokenizer, tmp_path_factory):
    """A CLIP of random weights that reads 20 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = words_tokenizer(["<s>", "<pad>", "<unused>", "<unk>", "</s>"], eos_token="</s>")  # CLIP reads 2 apart
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"special_tokens": [("<s>", 0), ("</s>", 4)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", **ends)
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": 4, "pad_token_id": 1}
    sight = {**LAYERS, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=16))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size=SIZE, crop_size=SIZE), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def term_folder(tmp_path):
    (tmp_path / "colours.txt").write_text("red\nblue\n\ngreen \n")
    (tmp_path / "things.txt").write_text("small house\nstar\nred\nlarge tree\n")
    return tmp_path


def test_the_terms_that_come_along_are_many_and_clean():
    lines = [line for path in TERMS.glob("*.txt") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 300
    assert len(set(lines)) == len(lines)  # none in two files
    assert all(line == line.strip() and 0 < len(line) < 40 and "," not in line for line in lines)


def by_hand(interrogator, image, text, limit):
    """The greedy chain over all terms."""
    similarity = lambda t: (interrogator.embed_texts([t])[0] @ interrogator.embed_images([image])[0]).item()
    for _ in range(limit):
        tried = [f"{text}, {term}" for term in interrogator.terms if term not in text]
        best = max(tried, key=similarity, default=text)
        if similarity(best) <= similarity(text):
            return text
        text = best
    return text


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_chain_is_the_greedy_one(clip_folder, term_folder, images, limit):
    interrogator = Interrogator(InterrogatorArgs(str(clip_folder), str(term_folder), limit), *CPU)
    texts = interrogator(images, ["a dog"] * 4)
    assert texts == [by_hand(interrogator, image, "a dog", limit) for image in images]
    assert all(text.startswith("a dog") for text in texts)
    assert max(text.count(",") for text in texts) <= limit
    assert texts == [interrogator([image], ["a dog"])[0] for image in images]


def test_what_clip_cannot_read_is_not_added(clip_folder, term_folder, images):
    interrogator = Interrogator(InterrogatorArgs(str(clip_folder), str(term_folder), 6), *CPU)
    long = " ".join(["dog"] * 15)
    texts = interrogator(images, [long] * 4)
    assert all(len(ids) <= 20 for ids in interrogator.processor.tokenizer(texts).input_ids)
    endless = " ".join(["dog"] * 40)
    assert interrogator(images, [endless] * 4) == [endless] * 4


@pytest.mark.parametrize("term", ["f/2.8", "(red)", "C++"])
def test_a_term_is_said_once_whatever_letters_it_is_of(clip_folder, tmp_path, images, term):
    (tmp_path / "terms.txt").write_text(term)
    interrogator = Interrogator(InterrogatorArgs(str(clip_folder), str(tmp_path), 3), *CPU)
    assert interrogator(images, [f"a dog, {term}"] * 4) == [f"a dog, {term}"] * 4


def test_problems_are_named(tmp_path, tiny_captioner, problems_of):
    (problem,) = InterrogatorArgs(terms=str(tmp_path)).problems()
    assert "--terms" in problem
    with pytest.raises(ModelError, match="is a git model, not clip"):
        Interrogator(InterrogatorArgs(str(tiny_captioner("git"))), *CPU)
    (tmp_path / "terms.txt").write_bytes(b"gr\xf6\xdfer")
    (problem,) = problems_of(InterrogatorArgs, terms=tmp_path)
    assert "terms.txt is not UTF-8" in problem


@pytest.fixture
def interrogate(clip_folder, term_folder, tiny_captioner, images, tmp_path, fresh_accelerate):
    """Run the script over two images, of which the first has a caption; {file name: row}."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, image in zip("ab", images, strict=False):
        image.save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "my dog"}\n')

    def run(*flags, status=0):
        models = ("--clip_model", clip_folder, "--terms", term_folder, "--model", tiny_captioner("blip"))
        command = [folder, "--captioner", "clip-interrogator", "--max_length", 6, *models, *flags]
        assert caption_images.main([str(word) for word in command]) == status
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["file_name"]: row for row in map(json.loads, lines)}

    return run


def test_the_script_adds_terms_to_what_blip_says(interrogate, tiny_captioner):
    found = interrogate("--max_terms", 0)
    assert found["a.png"] == {"file_name": "a.png", "text": "my dog"}
    plain = found["b.png"]
    assert plain["text_origin"] == f"clip-interrogator:{tiny_captioner('blip').name}"
    longer = interrogate("--max_terms", 3, "--overwrite")["b.png"]["text"]
    assert longer.startswith(f"{plain['text']}, ")


def test_the_script_adds_terms_to_captions_that_are_there(interrogate, clip_folder, capsys):
    found = interrogate("--from_captions", "--add", status=1)
    assert list(found) == ["a.png"]
    assert found["a.png"]["text"][0] == "my dog" and found["a.png"]["text"][1].startswith("my dog, ")
    assert found["a.png"]["text_origin"] == ["given", f"clip-interrogator:{clip_folder.name}"]
    assert "without a caption to begin with (1): b.png" in capsys.readouterr().err
    interrogate()
    capsys.readouterr()
    interrogate("--from_captions", "--overwrite")  # now all of them have one
    assert capsys.readouterr().err.count("\n  x ") == 0
