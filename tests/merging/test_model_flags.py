"""The flags that name models: what is passed on to whom, and that all problems come together."""

from types import SimpleNamespace

import pytest

from finetuning.cli import read
from finetuning.merging import model_flags
from finetuning.merging.model_flags import TunedArgs, open_all


@pytest.fixture
def asked(monkeypatch):
    """{name: options} of every model that is opened; nothing is."""
    found = {}

    def opened(name, **options):
        found[name] = options
        return SimpleNamespace(given=name, components={})

    monkeypatch.setattr(model_flags, "open_source", opened)
    return found


def test_each_model_is_opened_with_the_flags_that_are_its_own(asked):
    words = """--base a --revision r --variant fp16 --tuned b c --tuned_revision t --tuned_variant non_ema
        --weights raw --layout_from l --cache_dir d"""
    args, problems = read(TunedArgs, "", words.split())
    assert problems == []
    assert [one.given for one in args.open_models("origin")] == ["a", "b", "c", "origin"]
    shared = {"base": "l", "cache_dir": "d", "relatives": True}
    assert asked["a"] == shared | {"revision": "r", "variant": "fp16"}
    tuned = shared | {"revision": "t", "variant": "non_ema", "weights": "raw"}
    assert asked["b"] == asked["c"] == asked["origin"] == tuned


def test_base_is_its_average_also_where_raw_tuned_weights_are_asked_for(tiny_model):
    args = TunedArgs(base=str(tiny_model), tuned=[str(tiny_model)], weights="raw")
    base, tuned = args.open_models()
    names = [source.files[0].name for source in (base, tuned)]
    assert names == ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"]


def test_other_errors_are_not_taken_for_problems_of_a_model():
    with pytest.raises(ZeroDivisionError):
        open_all([lambda: 1, lambda: 1 / 0])


@pytest.mark.parametrize("words", [["unet,vae"], ["unet", "vae"], ["unet,", ",vae"]])
@pytest.mark.parametrize("flag", ["--components", "--parts"])
def test_components_are_separated_by_commas_or_spaces_and_stay_as_they_were_given(tiny_model, flag, words):
    args, problems = read(TunedArgs, "", ["--base", str(tiny_model), "--tuned", str(tiny_model), flag, *words])
    assert problems == [] and args.components == words
    matches, _ = args.match(args.open_models())
    assert {one.component for one in matches if len(one.inputs) > 1} <= {"unet", "vae"}


@pytest.mark.parametrize("words", [["unet,clip"], [","]])
def test_components_that_are_none_are_named(words):
    _, problems = read(TunedArgs, "", ["--base", "a", "--tuned", "b", "--components", *words])
    assert len(problems) == 1 and problems[0].startswith("--components") and "text_encoder" in problems[0]
