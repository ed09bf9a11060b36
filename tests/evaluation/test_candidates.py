"""Curves of checkpoints and ratios: every run has its own."""

from finetuning.evaluation.candidates import Candidate, curves


def test_every_run_has_a_curve_of_its_own_and_a_second_seed_is_on_none():
    models = [
        Candidate("start", "full/checkpoint-5"),
        Candidate("a", "full/checkpoint-20"),
        Candidate("b", "full/checkpoint-10"),
        Candidate("c", "full/checkpoint-5", lora="lora/checkpoint-30"),
        Candidate("d", "full/checkpoint-5", lora="lora/checkpoint-40"),
        Candidate("alone", "other/checkpoint-1"),
        Candidate("start, seed 1", "full/checkpoint-5", is_noise_floor=True),
    ]
    one = {"value": 0.5, "low": 0.4, "high": 0.6}
    known = {what: {other.label: one for other in models[1:]} for what in ("learned", "kept")}
    found = curves(known, models)
    assert [[point["x"] for point in curve["lines"][0]["points"]] for curve in found] == [[5, 10, 20], [5, 30, 40]]
    assert "of full," in found[0]["title"] and "of lora," in found[1]["title"]
    assert found[0]["lines"][1]["points"][1] == {"x": 10, "y": 0.5, "low": 0.4, "high": 0.6}
