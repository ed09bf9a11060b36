"""Post-hoc EMA: the profiles are what the averages do, and the reconstruction comes close to the true average."""

import json
import shutil

import numpy as np
import pytest
import torch

from finetuning.cli import parse
from finetuning.families.model_args import ModelError
from finetuning.files import write_json
from finetuning.merging.post_hoc import (
    WIDEST,
    PostHocArgs,
    ema_profile,
    gamma_of,
    misfit_of,
    plan,
    power_profile,
    raw_profile,
    sigma_rel_of,
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


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_published_pairs(sigma_rel, gamma):
    assert round(gamma_of(sigma_rel), 2) == gamma


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.2, 0.28, WIDEST])
def test_width_and_exponent_invert_each_other(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
    assert gamma_of(sigma_rel) >= 0


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, 1.0])
def test_widths_without_an_exponent_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.288675"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_sigma_rel_is_the_spread_of_the_profile(sigma_rel):
    profile = power_profile(gamma_of(sigma_rel), 5000)
    place = np.arange(5001) / 5000
    mean = (profile * place).sum()
    assert np.sqrt((profile * (place - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)


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


def test_what_is_left_of_the_start_is_known():
    assert ema_profile(0.9999, "warm", 1000)[0] == pytest.approx(0.9999**1000)
    assert ema_profile(0.9999, "ramp", 1000)[0] == 0


@pytest.mark.parametrize(
    "profile",
    [ema_profile(0.99, "warm", 200), ema_profile(0.99, "ramp", 200), power_profile(7, 200), raw_profile(200)],
)
def test_profiles_have_a_place_for_each_step_and_sum_to_one(profile):
    assert profile.shape == (201,) and profile.sum() == pytest.approx(1) and (profile >= 0).all()


# -- the fit ---------------------------------------------------------------------------------------------------------


def test_misfit_is_the_way_that_the_mass_has_to_go():
    late, early = raw_profile(100), np.pad(raw_profile(90), (0, 10))
    assert misfit_of(late, late) == 0
    assert misfit_of(early, late) == pytest.approx(0.1)
    assert misfit_of(0.5 * early + 0.5 * late, late) == pytest.approx(0.05)


def test_misfit_of_the_start_is_a_whole_run_more():
    start, first = np.eye(101)[0], np.eye(101)[1]
    assert misfit_of(start, first) == pytest.approx(1)


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


def test_misfit_bounds_the_error_of_the_weights():
    steps = 500
    path = np.random.default_rng(1).uniform(-1, 1, steps + 1).cumsum()
    wanted = power_profile(gamma_of(0.1), steps)
    profiles = padded([raw_profile(step) for step in (300, 400, 450, 500)], steps)
    weights, misfit = solve(profiles, wanted)
    error = abs(weights @ profiles @ path - wanted @ path)
    assert 0 < error <= misfit * steps * np.abs(np.diff(path)).max()


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


def add_checkpoint(run, state, parts=("unet", "unet_ema"), name=None):
    folder = run / (name or f"checkpoint-{state['step']}")
    for part in parts:
        (folder / part).mkdir(parents=True)
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
    assert [(one.step, one.weights) for one in found] == [(s, k) for s in (50, 100, 200, 300, 400) for k in kinds]
    assert all(one.folder == run / f"checkpoint-{one.step}" for one in found)


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ({}, "ramp"),
        ({"non_ema_revision": "non-ema"}, "warm"),
        ({"non_ema_variant": "non_ema"}, "warm"),
        ({"non_ema_variant": "non_ema", "ema_start": "ramp"}, "ramp"),
        ({"ema_start": "warm"}, "warm"),
    ],
)
def test_how_the_average_started_is_read_as_the_run_chose_it(run, args, kind):
    for folder in run.iterdir():
        change(folder, args=args)
    assert {(one.decay, one.start_kind) for one in snapshots(run, "ema")} == {(0.99, kind)}
    last = snapshots(run, "ema")[-1]
    np.testing.assert_array_equal(last.profile(), ema_profile(0.99, kind, 400))


def test_a_run_that_was_resumed_to_go_on_for_longer_is_one_run(run):
    change(run / "checkpoint-400", args={"max_train_steps": 800, "output_dir": "runs/b"})
    assert len(snapshots(run)) == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"args": {"seed": 8}}, r"not of one run.*checkpoint-200 \(--seed\)"),
        ({"args": {"ema_decay": 0.9, "seed": 8}}, r"checkpoint-200 \(--ema_decay, --seed\)"),
        ({"dataset": "d1"}, r"checkpoint-200 \(the dataset\)"),
        ({"ema_updates": 3}, "3 updates after 200 steps.*--weights raw"),
        ({"step": 250}, "give it back its name, checkpoint-250"),
    ],
)
def test_checkpoints_that_are_not_of_one_run_are_named(run, changes, said):
    change(run / "checkpoint-200", **changes)
    with pytest.raises(ModelError, match=said):
        snapshots(run)


def test_an_average_of_unknown_making_does_not_stop_the_raw_weights(run):
    change(run / "checkpoint-200", ema_updates=3)
    assert len(snapshots(run, "raw")) == 5


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_two_checkpoints_are_refused(run, left):
    for folder in sorted(run.iterdir())[left:]:
        shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"two or more checkpoint-N.*--checkpointing_steps"):
        snapshots(run)


def test_lora_runs_are_told_what_to_do(tmp_path):
    for step in (1, 2):
        add_checkpoint(tmp_path, state_of(step), parts=("lora", "lora_ema"))
    with pytest.raises(ModelError, match=r"LoRA run \(checkpoint-1, checkpoint-2\).*combine"):
        snapshots(tmp_path)


def test_weights_that_are_not_there_are_named(run):
    shutil.rmtree(run / "checkpoint-300/unet_ema")
    with pytest.raises(ModelError, match=r"no unet_ema/ in .*checkpoint-300: .*without --use_ema"):
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
    args = PostHocArgs(run_dir=str(run), sigma_rel=[0.05, 0.1, 0.2])
    found = plan(args)
    assert [one.sigma_rel for one in found] == [0.05, 0.1, 0.2]
    for one in found:
        assert one.gamma == gamma_of(one.sigma_rel)
        assert sum(weight for _, _, weight in one.weights) == pytest.approx(1)
        total = np.zeros(401)
        for folder, kind, weight in one.weights:
            step = int(folder.name.removeprefix("checkpoint-"))
            total[: step + 1] += weight * (raw_profile(step) if kind == "raw" else ema_profile(0.99, "ramp", step))
        assert misfit_of(total, power_profile(one.gamma, 400)) == pytest.approx(one.misfit)
        assert one.misfit < 0.3 * one.sigma_rel
    assert all(isinstance(weight, float) and weight for one in found for *_, weight in one.weights)


@pytest.mark.parametrize("at", [100, 300])
def test_an_average_at_an_earlier_step_is_that_of_the_run_until_then(run, at):
    early = plan(PostHocArgs(run_dir=str(run), at=at))
    for folder in list(run.iterdir()):
        if int(folder.name.removeprefix("checkpoint-")) > at:
            shutil.rmtree(folder)
    assert early == plan(PostHocArgs(run_dir=str(run)))


@pytest.mark.parametrize(
    ("at", "said"),
    [(150, "no checkpoint of that step, but of 50, 100, 200, 300, 400"), (50, "is the first checkpoint")],
)
def test_an_average_cannot_end_where_there_are_not_two_checkpoints(run, at, said):
    with pytest.raises(ModelError, match=said):
        plan(PostHocArgs(run_dir=str(run), at=at))


def test_flags_are_read_from_the_command_line(run):
    args = parse(PostHocArgs, "", [str(run), "--sigma_rel", "0.02", "0.28", "--weights", "ema"])
    assert (args.run_dir, args.sigma_rel, args.weights, args.at) == (str(run), [0.02, 0.28], "ema", None)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"run_dir": "nowhere"}, "RUN_DIR nowhere"),
        ({"sigma_rel": [0.3]}, "--sigma_rel 0.3 must be above 0 and at most 0.288675"),
        ({"sigma_rel": [0.1, 0.0]}, "--sigma_rel 0.0"),
        ({"sigma_rel": [0.1, 0.1]}, "--sigma_rel 0.1 0.1: name each width once"),
        ({"at": 0}, "--at 0"),
    ],
)
def test_flags_that_cannot_work_are_named(tmp_path, flags, named):
    (problem,) = PostHocArgs(**({"run_dir": str(tmp_path)} | flags)).problems()
    assert problem.startswith(named)
