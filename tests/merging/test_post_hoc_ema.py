"""Post-hoc EMA: profiles are what averages do, the reconstruction comes close, and files hold what was planned."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_checkpoints
from finetuning.cli import read
from finetuning.families.model_args import ModelError
from finetuning.files import write_json
from finetuning.merging.post_hoc_ema import (
    WIDEST,
    PostHocArgs,
    ema_profile,
    gamma_of,
    misfit_of,
    plan,
    power_profile,
    raw_profile,
    snapshots,
    solve,
)
from finetuning.training.ema import AveragedWeights


def padded(profiles, steps):
    """The profiles as rows of one matrix [snapshots, steps + 1]."""
    return np.stack([np.pad(profile, (0, steps + 1 - len(profile))) for profile in profiles])


def random_walk(steps, size=64):
    """Weights at each step of a simulated training, float64 [steps + 1, size]."""
    return np.random.default_rng(0).standard_normal((steps + 1, size)).cumsum(0)


# -- widths and profiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.2, 0.28, WIDEST])
def test_exponent_has_the_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)
    assert gamma >= 0
    assert round(gamma, 2) == {0.05: 16.97, 0.1: 6.94}.get(sigma_rel, round(gamma, 2))  # as published


def test_power_profile_is_what_the_papers_update_gives():
    """Section 3.1: average <- b_t average + (1 - b_t) weights, with b_t = (1 - 1/t)^(gamma + 1)."""
    gamma, path = gamma_of(0.1), random_walk(60)
    average = path[0]
    for step in range(1, 61):
        decay = (1 - 1 / step) ** (gamma + 1)
        average = decay * average + (1 - decay) * path[step]
    np.testing.assert_allclose(power_profile(gamma, 60) @ path, average)


def test_widest_average_is_the_plain_mean():
    np.testing.assert_allclose(power_profile(gamma_of(WIDEST), 50), [0] + [1 / 50] * 50, atol=1e-9)


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["warm", "ramp"])
def test_ema_profile_is_what_the_runs_average_does(kind, decay):
    """Each step trains a weight of its own, so the shadow is the profile."""
    steps = 40
    weights = torch.nn.Parameter(torch.eye(steps + 1)[0])
    average = AveragedWeights({"w": weights}, decay, kind)
    for step in range(1, steps + 1):
        with torch.no_grad():
            weights.copy_(torch.eye(steps + 1)[step])
        average.update()
    np.testing.assert_allclose(ema_profile(decay, kind, steps), average.shadow["w"].numpy(), rtol=1e-5, atol=1e-7)


# -- the fit ---------------------------------------------------------------------------------------------------------


def test_misfit_is_the_way_that_the_mass_has_to_go():
    late, early = raw_profile(100), np.pad(raw_profile(90), (0, 10))
    for profile, misfit in ((late, 0), (early, 0.1), (0.5 * early + 0.5 * late, 0.05)):
        assert misfit_of(profile, late) == pytest.approx(misfit)
    assert misfit_of(np.eye(101)[0], np.eye(101)[1]) == pytest.approx(1)  # the start is a whole run away


@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_snapshots_own_profile_is_that_snapshot(index):
    steps = range(100, 401, 100)
    averages = [ema_profile(0.99, "ramp", step) for step in steps]
    profiles = padded([*averages, *(raw_profile(step) for step in steps)], 400)
    weights, misfit = solve(profiles, profiles[index])
    np.testing.assert_allclose(weights, np.eye(8)[index], atol=1e-4)
    assert misfit < 1e-4


def test_the_average_between_two_averages_has_a_negative_weight():
    """warm: E_200 - d^100 E_100 holds steps 101 to 200 alone, and nothing of the start."""
    profiles = padded([ema_profile(0.99, "warm", step) for step in (100, 200)], 200)
    left = 0.99**100
    wanted = (profiles[1] - left * profiles[0]) / (1 - left)
    weights, misfit = solve(profiles, wanted)
    np.testing.assert_allclose(weights, [-left / (1 - left), 1 / (1 - left)], rtol=1e-4)
    assert misfit < 1e-6 and abs(weights @ profiles[:, 0]) < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(("kind", "decay"), [("ramp", 0.995), ("warm", 0.995), ("raw", None)])
def test_reconstruction_comes_close_to_the_true_average_and_closer_with_more_snapshots(kind, decay, sigma_rel):
    steps, errors, misfits = 1000, [], []
    path = random_walk(steps)
    wanted = power_profile(gamma_of(sigma_rel), steps)
    true = wanted @ path
    for every in (250, 100, 25):
        at = range(every, steps + 1, every)
        own = [raw_profile(step) if kind == "raw" else ema_profile(decay, kind, step) for step in at]
        kept = [profile @ path[: len(profile)] for profile in own]  # what the checkpoints' files hold
        weights, misfit = solve(padded(own, steps), wanted)
        assert weights.sum() == pytest.approx(1)
        errors.append(np.linalg.norm(weights @ np.stack(kept) - true) / np.linalg.norm(path[-1] - true))
        misfits.append(misfit)
    assert errors[0] > errors[1] > errors[2] and misfits[0] > misfits[1] > misfits[2]
    assert errors[2] < 0.2 and misfits[2] < 0.3 * sigma_rel


def test_nearly_equal_snapshots_share_the_weight():
    """Their difference is rounding, and a plain least squares would divide by it."""
    one = ema_profile(0.999, "warm", 1000)
    generator = np.random.default_rng(0)
    noisy = [one * (1 + 1e-9 * generator.standard_normal(one.shape)) for _ in range(4)]
    weights, _ = solve(np.stack([*noisy, raw_profile(1000)]), power_profile(gamma_of(0.05), 1000))
    assert np.abs(weights).sum() < 2 and np.ptp(weights[:4]) < 0.01


def test_snapshots_without_weight_are_left_out():
    profiles = padded([raw_profile(step) for step in (10, 600, 1000)], 1000)
    weights, _ = solve(profiles, power_profile(gamma_of(0.02), 1000))
    assert weights[0] == 0 and weights[1:].all() and weights.sum() == pytest.approx(1)


# -- the checkpoints of a run ----------------------------------------------------------------------------------------


def state_of(step, **args):
    """training_state.json after `step` steps, as far as it is read."""
    own = {"seed": 7, "use_ema": True, "ema_decay": 0.99, "ema_start": None, "non_ema_revision": None}
    own |= {"non_ema_variant": None, "max_train_steps": 400, "output_dir": "runs/a"}
    return {"step": step, "ema_updates": step, "dataset": "d0", "args": own | args}


def add_checkpoint(run, state, components=("unet", "unet_ema"), name=None):
    folder = run / (name or f"checkpoint-{state['step']}")
    for component in components:
        (folder / component).mkdir(parents=True)
    write_json(folder / "training_state.json", state)
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 400 steps; the order of its checkpoints' names is not that of their steps."""
    for step in (50, 100, 200, 300, 400):
        add_checkpoint(tmp_path / "run", state_of(step))
    return tmp_path / "run"


def change(folder, **changes):
    path = folder / "training_state.json"
    state = json.loads(path.read_text())
    changes["args"] = state["args"] | changes.get("args", {})
    write_json(path, state | changes)


@pytest.mark.parametrize(("weights", "kinds"), [("both", ["raw", "ema"]), ("raw", ["raw"]), ("ema", ["ema"])])
def test_snapshots_are_read_in_step_order_and_without_what_is_not_whole(run, weights, kinds):
    add_checkpoint(run, state_of(500), name=".incomplete-checkpoint-500-99")
    add_checkpoint(run, state_of(500), name="abandoned-checkpoint-500-1")
    found = snapshots(run, weights)
    assert list(found) == [(run / f"checkpoint-{s}", k) for s in (50, 100, 200, 300, 400) for k in kinds]
    assert all(folder.name == f"checkpoint-{len(profile) - 1}" for (folder, _), profile in found.items())


@pytest.mark.parametrize(("args", "said", "kind"), [
    ({}, None, "ramp"), ({"non_ema_revision": "non-ema"}, None, "warm"), ({"non_ema_variant": "non_ema"}, None, "warm"),
    ({"non_ema_variant": "non_ema", "ema_start": "ramp"}, None, "ramp"), ({"ema_start": "warm"}, None, "warm"),
    ({"ema_start": "ramp"}, "warm", "warm"),  # what the checkpoint itself says goes before the flags
])  # fmt: skip
def test_how_the_average_started_is_read_as_the_run_chose_it(run, args, said, kind):
    for folder in run.iterdir():
        change(folder, ema_start=said, args=args)
    for (folder, _), profile in snapshots(run, "ema").items():
        step = int(folder.name.removeprefix("checkpoint-"))
        np.testing.assert_array_equal(profile, ema_profile(0.99, kind, step))


def test_a_run_that_was_resumed_to_go_on_for_longer_is_one_run(run):
    change(run / "checkpoint-400", args={"max_train_steps": 800, "output_dir": "runs/b"})
    assert len(snapshots(run)) == 10


@pytest.mark.parametrize(("changes", "named"), [
    ({"args": {"ema_decay": 0.9, "seed": 8}}, "checkpoint-200 .*checkpoint-400, --ema_decay, --seed"),
    ({"dataset": "d1"}, "checkpoint-200 .*the dataset"),
    ({"ema_updates": 3}, "3 updates after 200 steps.*--weights raw"), ({"step": 250}, "checkpoint-250"),
])  # fmt: skip
def test_checkpoints_that_are_not_of_one_run_are_named(run, changes, named):
    change(run / "checkpoint-200", **changes)
    with pytest.raises(ModelError, match=named):
        snapshots(run)
    if "ema_updates" in changes:
        assert len(snapshots(run, "raw")) == 5


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_two_checkpoints_are_refused(run, left):
    for folder in sorted(run.iterdir())[left:]:
        shutil.rmtree(folder)
    with pytest.raises(ModelError, match="--checkpointing_steps"):
        snapshots(run)


def test_lora_runs_are_refused_with_what_to_do(tmp_path):
    for step in (1, 2):
        add_checkpoint(tmp_path, state_of(step), components=("lora", "lora_ema"))
    with pytest.raises(ModelError, match="combine"):
        snapshots(tmp_path)


def test_weights_that_are_not_there_are_named(run):
    shutil.rmtree(run / "checkpoint-300/unet_ema")
    with pytest.raises(ModelError, match=r"unet_ema/ .*--use_ema.* in .*checkpoint-300"):
        snapshots(run, "ema")
    assert len(snapshots(run)) == 9
    shutil.rmtree(run / "checkpoint-300/unet")
    with pytest.raises(ModelError, match=r"no unet/ in .*checkpoint-300"):
        snapshots(run)


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 200}'])
def test_unreadable_state_is_named(run, content):
    (run / "checkpoint-200/training_state.json").write_text(content)
    with pytest.raises(ModelError, match=r"checkpoint-200 has no readable training_state\.json"):
        snapshots(run)


# -- the plan --------------------------------------------------------------------------------------------------------


def test_plan_gives_weights_for_what_the_checkpoints_hold(run):
    """The weights that it hands over, put on the profiles of the snapshots, have the misfit that it says."""
    found = plan(PostHocArgs(run_dir=str(run), sigma_rel=[0.05, 0.1, 0.2]))
    assert [one.sigma_rel for one in found] == [0.05, 0.1, 0.2]
    for one in found:
        assert sum(one.weights.values()) == pytest.approx(1) and all(one.weights.values())
        total = sum(
            weight * np.pad(snapshots(run)[snapshot], (0, 400 - int(snapshot[0].name.split("-")[1])))
            for snapshot, weight in one.weights.items()
        )
        assert misfit_of(total, power_profile(one.gamma, 400)) == pytest.approx(one.misfit)
        assert one.misfit < 0.3 * one.sigma_rel


@pytest.mark.parametrize("at", [100, 300])
def test_an_average_at_an_earlier_step_is_that_of_the_run_until_then(run, at):
    early = plan(PostHocArgs(run_dir=str(run), at=at))
    for folder in list(run.iterdir()):
        if int(folder.name.removeprefix("checkpoint-")) > at:
            shutil.rmtree(folder)
    assert early == plan(PostHocArgs(run_dir=str(run)))


@pytest.mark.parametrize(("at", "named"), [(150, "50, 100, 200, 300, 400"), (50, "after the first")])
def test_an_average_cannot_end_where_there_are_not_two_checkpoints(run, at, named):
    with pytest.raises(ModelError, match=f"--at {at}.*{named}"):
        plan(PostHocArgs(run_dir=str(run), at=at))


@pytest.mark.parametrize(("words", "named"), [
    (["nowhere"], "RUN_DIR nowhere"), ([".", "--sigma_rel", "0.3"], "--sigma_rel 0.3"),
    ([".", "--sigma_rel", "0.1", "0"], "--sigma_rel 0"), ([".", "--sigma_rel", "0.1", "0.1"], "--sigma_rel 0.1 0.1"),
    ([".", "--at", "0"], "--at 0"),
])  # fmt: skip
def test_flags_that_cannot_work_are_named(words, named):
    (problem,) = read(PostHocArgs, "", [*words, "--output_dir", "new"])[1]
    assert problem.startswith(named)


# -- the files -------------------------------------------------------------------------------------------------------


FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """The folder of a run: three checkpoints with raw and averaged UNets that all differ. Never write to it."""
    folder = tmp_path_factory.mktemp("trained")
    base = load_file(tiny_model / "unet" / FILE)
    generator = torch.Generator().manual_seed(0)
    for step in (100, 200, 300):
        args = {"pretrained_model_name_or_path": str(tiny_model), "prediction_type": None, "ema_start": "ramp"}
        checkpoint = add_checkpoint(folder, state_of(step, **args))
        for component in ("unet", "unet_ema"):
            shutil.copyfile(tiny_model / "unet/config.json", checkpoint / component / "config.json")
            moved = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
            save_file(moved, checkpoint / component / FILE, metadata={"format": "pt"})
    return folder


def average(run, out, *words):
    assert merge_checkpoints.main(["ema", str(run), *map(str, words), "--output_dir", str(out)]) == 0


def flat(path):
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def expected(run, **flags):
    """The UNet of each width in float64, by the plan's own numbers."""
    folders = {"raw": "unet", "ema": "unet_ema"}
    return [
        sum(weight * flat(folder / folders[kind] / FILE) for (folder, kind), weight in one.weights.items())
        for one in plan(PostHocArgs(run_dir=str(run), **flags))
    ]


def test_each_width_is_a_pipeline_of_the_sum_that_was_planned(trained, tiny_model, tmp_path):
    average(trained, tmp_path / "out", "--sigma_rel", 0.05, 0.2)
    first, second = expected(trained, sigma_rel=[0.05, 0.2])
    for width, wanted in ((0.05, first), (0.2, second)):
        folder = tmp_path / f"out/sigma_rel-{width:g}"
        torch.testing.assert_close(flat(folder / "unet" / FILE), wanted, rtol=1e-6, atol=1e-7)
        for part in ("text_encoder/model.safetensors", f"vae/{FILE}", "model_index.json"):
            assert (folder / part).read_bytes() == (tiny_model / part).read_bytes(), part
    assert not torch.allclose(first, second)


def test_one_width_goes_into_the_folder_itself_and_one_kind_of_weights_can_be_chosen(trained, tmp_path):
    average(trained, tmp_path / "out", "--sigma_rel", 0.1, "--weights", "raw", "--at", 200)
    (wanted,) = expected(trained, sigma_rel=[0.1], weights="raw", at=200)
    torch.testing.assert_close(flat(tmp_path / "out/unet" / FILE), wanted, rtol=1e-6, atol=1e-7)
    recipe = json.loads((tmp_path / "out/merge.json").read_text())
    assert {one["given"] for one in recipe["run"]["inputs"]} <= {str(trained / f"checkpoint-{n}") for n in (100, 200)}


def test_the_recipe_makes_the_same_bytes_again(trained, tmp_path):
    average(trained, tmp_path / "out", "--sigma_rel", 0.1)
    words = ["replay", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]
    assert merge_checkpoints.main(words) == 0
    assert (tmp_path / "again/unet" / FILE).read_bytes() == (tmp_path / "out/unet" / FILE).read_bytes()


def test_a_run_whose_base_is_gone_is_refused_by_name(trained, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(trained, moved)
    for path in moved.rglob("training_state.json"):
        state = json.loads(path.read_text())
        state["args"]["pretrained_model_name_or_path"] = str(tmp_path / "gone")
        write_json(path, state)
    words = ["ema", str(moved), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "out")]
    assert merge_checkpoints.main(words) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "gone") in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["", "average", "checkpoint-100/average"])
def test_an_average_is_not_written_into_its_run(trained, capsys, place):
    words = ["ema", str(trained), "--sigma_rel", "0.1", "--output_dir", str(trained / place)]
    before = sorted(trained.rglob("*"))
    assert merge_checkpoints.main(words) == 1
    assert "--output_dir" in capsys.readouterr().err and sorted(trained.rglob("*")) == before
