"""Post-hoc EMA: averages of any length, made after the run from its checkpoints.

EDM2 (arXiv 2312.02696, section 3 and appendix C) averages the weights of all steps with a weight that grows as
step^gamma, and writes the width of that profile as sigma_rel, its standard deviation as a share of the run. A profile
is what each step of the run contributes to an average: numbers for step 0 (its start), 1, ... that sum to 1.

A checkpoint holds the raw weights (all of the profile on one step) and, with --use_ema, an exponential average. Both
profiles are known, so the wanted one is put together from them by least squares; what cannot be met is the misfit.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from finetuning.cli import REQUIRED, as_dict, first_few, flag
from finetuning.families.model_args import ModelError
from finetuning.families.opening import open_source
from finetuning.merging.methods import linear_combination
from finetuning.merging.model_flags import open_all
from finetuning.merging.model_writer import MergeOutput, OutputArgs, output_folder, write_models
from finetuning.merging.tensor_matching import match

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all steps
RIDGE = 1e-4  # weights of norm 10 cost as much as sums that are off by 0.001 at every step
NEGLIGIBLE = 1e-6  # a snapshot of less weight is not worth reading


@dataclass
class PostHocArgs(OutputArgs):
    """Averages after the run (post-hoc EMA)"""

    run_dir: str = flag(REQUIRED, "folder of a run of train_text_to_image.py, with its checkpoint-N", positional=True)
    sigma_rel: list[float] = flag(
        [0.05, 0.1], "widths of the averages as shares of the run, one model each; the largest is the plain mean of "
        "all steps", above=0, max=WIDEST,
    )  # fmt: skip
    weights: str = flag("both", "which weights of the checkpoints are put together", choices=("both", "ema", "raw"))
    at: int | None = flag(None, "step of the checkpoint at which the average ends (none: the last)", min=1)

    def problems(self):
        if not Path(self.run_dir).is_dir():
            yield f"RUN_DIR {self.run_dir}: there is no such folder"
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            yield f"--sigma_rel {' '.join(map(str, self.sigma_rel))}: name each width once"

    def open_sources(self, plans=None):
        """Every checkpoint and kind of weights that one of the averages takes something from, the newest first."""
        used = _used(plans or plan(self))
        return open_all([partial(open_source, folder, weights=weights) for folder, weights in used])


@dataclass(frozen=True)
class Reconstruction:
    """A power-function average as a linear combination of what checkpoints hold."""

    sigma_rel: float
    gamma: float
    weights: dict[tuple[Path, str], float]  # {(checkpoint folder, "raw" | "ema"): weight}, which sum to 1
    misfit: float  # see `misfit_of`; to be held against sigma_rel, which has the same unit


def average(args: PostHocArgs):
    """Write the average of each --sigma_rel, in one pass over the checkpoints. Returns lines. Raises ModelError."""
    plans = plan(args)
    used, sources = _used(plans), args.open_sources(plans)
    if sources[0].folder is None:
        why = "; ".join(sources[0].warnings)
        raise ModelError(f"{args.run_dir}: the model that the run started from cannot be opened: {why}")
    matches, _ = match(sources)
    outputs = []
    for one in plans:
        others = [one.weights.get(snapshot, 0.0) for snapshot in used[1:]]
        compute = partial(linear_combination, weights=others) if others else 0
        target = output_folder(args.output_dir, f"sigma_rel-{one.sigma_rel:g}", args.sigma_rel)
        flags = as_dict(args) | {"sigma_rel": [one.sigma_rel]}
        outputs.append(MergeOutput(target, lambda _, compute=compute: compute, flags))
    lines = [
        f"sigma_rel {one.sigma_rel:g} (gamma {one.gamma:.2f}) from {len(one.weights)} snapshots; its profile is off by "
        f"{one.misfit:.3f} of the run"
        for one in plans
    ]
    return [*lines, *write_models("ema", outputs, sources, matches, args, also_read=[args.run_dir])]


# -- profiles ------------------------------------------------------------------------------------------------------


def gamma_of(sigma_rel):
    """The exponent, 0 or more, whose profile t^gamma on [0, 1] has this standard deviation (EDM2, section 3.1).

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.
    """
    scale = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - scale, 12 - scale]).real.max()))


def power_profile(gamma, steps):
    """EDM2's average after `steps` steps, float64 [steps + 1].

    Step t has (t/steps)^(gamma + 1) - ((t - 1)/steps)^(gamma + 1), as the update with decay (1 - 1/t)^(gamma + 1) gives
    it (section 3.1); nothing is left of the start.
    """
    return np.diff((np.arange(steps + 1) / steps) ** (gamma + 1), prepend=0.0)


def ema_profile(decay, start_kind, steps):
    """The average of finetuning/training/ema.py after `steps` steps, float64 [steps + 1].

    Step t has (1 - decay_t) decay_(t+1) ... decay_steps; what is left of the start stands at 0 ("ramp" leaves nothing).
    """
    from finetuning.training.ema import AveragedWeights

    average = AveragedWeights({}, decay, start_kind)
    decays = np.array([0.0, *(average.decay_at(update) for update in range(1, steps + 1))])
    kept = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # kept[t]: share of the average after t that is left
    return (1 - decays) * kept


def raw_profile(step):
    """Weights as they are after `step` steps, float64 [step + 1]: all on the last one."""
    return np.append(np.zeros(step), 1.0)


# -- the fit -------------------------------------------------------------------------------------------------------


def misfit_of(profile, wanted):
    """How far the mass of `profile` [steps + 1] has to be moved to give `wanted`, as a share of the run's length.

    Weights change little in a step, so profiles are compared by their sums up to each step (Wasserstein-1 distance
    where no mass is negative), and the averages of a path of weights differ by at most misfit * steps * its longest
    step. What an average started from may be other weights, so step 0 counts as a whole run before step 1.
    """
    difference, gaps = _differences(profile - wanted)
    return float((np.abs(difference) * gaps).sum())


def solve(profiles, wanted):
    """(weights [snapshots], misfit): the combination of `profiles` [snapshots, steps + 1] nearest to `wanted`.

    Least squares over the sums up to each step, with weights that sum to 1: the smallest expected error for a path of
    independent moves. Weights may be negative: the difference of two averages is the average between them. RIDGE keeps
    snapshots that are nearly equal from getting huge weights of opposite sign.
    """
    profiles = np.asarray(profiles, dtype=np.float64)
    count = len(profiles)
    differences, gaps = _differences(profiles - wanted)  # [snapshots, steps]
    differences = (differences * np.sqrt(gaps)).T
    basis, last = np.vstack([np.eye(count - 1), -np.ones(count - 1)]), np.eye(count)[-1]
    system = np.vstack([differences, RIDGE * np.eye(count)])
    free = np.linalg.lstsq(system @ basis, -system @ last, rcond=None)[0]
    weights = last + basis @ free  # which sum to 1 whatever `free` is
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    weights /= weights.sum()
    return weights, misfit_of(weights @ profiles, wanted)


def _differences(profiles):
    """Sums up to each step but the last, where all agree; and the gap to the next step as a share of the run."""
    steps = profiles.shape[-1] - 1
    return profiles.cumsum(-1)[..., :-1], np.append(1.0, np.full(steps - 1, 1 / steps))


# -- the checkpoints of a run --------------------------------------------------------------------------------------


def plan(args: PostHocArgs):
    """[Reconstruction, ...], one for each --sigma_rel. Raises ModelError."""
    found = snapshots(args.run_dir, args.weights)
    steps = sorted({_step(folder) for folder, _ in found})
    end = args.at or steps[-1]
    if end not in steps[1:]:
        raise ModelError(
            f"--at {end}: an average ends at a checkpoint after the first. {args.run_dir} has those of steps "
            f"{first_few(steps, 12)}"
        )
    found = {one: np.pad(own, (0, end + 1 - len(own))) for one, own in found.items() if len(own) <= end + 1}
    plans = []
    for sigma_rel in args.sigma_rel:
        gamma = gamma_of(sigma_rel)
        weights, misfit = solve(list(found.values()), power_profile(gamma, end))
        used = {one: float(weight) for one, weight in zip(found, weights, strict=True) if weight}
        plans.append(Reconstruction(sigma_rel, gamma, used, misfit))
    return plans


def _used(plans):
    """[(checkpoint folder, "raw" | "ema"), ...] that any of the plans takes something from, the newest first."""
    used = dict.fromkeys(snapshot for one in plans for snapshot in one.weights)
    return sorted(used, key=lambda one: (-_step(one[0]), one[1]))


def snapshots(run_folder, weights="both"):
    """{(checkpoint folder, "raw" | "ema"): profile [step + 1]} of a run, in step order, raw before averaged.

    weights: "raw", "ema" or "both". Raises ModelError where there are fewer than two checkpoints, where they are of
    several runs or of a LoRA run, or where one does not hold these weights.
    """
    from finetuning.training.checkpoint import checkpoints_in

    folders = [path for _, path in checkpoints_in(Path(run_folder))]
    if adapters := [path.name for path in folders if (path / "lora").is_dir()]:
        raise ModelError(
            f"{run_folder} is a LoRA run ({first_few(adapters)}): the mean of two adapters' factors is not the mean of "
            "what they do. merge_checkpoints.py combine puts LoRAs together"
        )
    if len(folders) < 2:
        raise ModelError(
            f"{run_folder} must hold two or more checkpoint-N folders, and has {first_few(folders) or 'none'}: train "
            "with --checkpointing_steps, and without --checkpoints_total_limit"
        )
    states = {path: _state(path) for path in folders}
    _check_one_run(states)
    found, lacking = {}, []
    for path, state in states.items():
        held = {"raw": (path / "unet").is_dir(), "ema": (path / "unet_ema").is_dir()}
        kinds = [kind for kind in held if held[kind] and weights in (kind, "both")]
        lacking += [] if kinds else [path]
        found |= {
            (path, kind): raw_profile(_step(path)) if kind == "raw" else _average_in(path, state) for kind in kinds
        }
    if lacking:
        needed = "unet_ema/ (train with --use_ema)" if weights == "ema" else "unet/"
        raise ModelError(f"there is no {needed} in {first_few(lacking)}")
    return found


def _step(folder):
    return int(folder.name.removeprefix("checkpoint-"))


def _state(folder):
    try:
        state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        step, *_ = state["step"], state["ema_updates"], state["dataset"], state["args"]["use_ema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} has no readable training_state.json: {error!r}") from error
    if step != _step(folder):
        raise ModelError(f"{folder} was written after step {step}: give it back its name, checkpoint-{step}")
    return state


def _average_in(folder, state):
    """The profile of the exponential average that a checkpoint holds."""
    args, step = state["args"], _step(folder)
    if state["ema_updates"] != step:
        raise ModelError(
            f"{folder}: its average has {state['ema_updates']} updates after {step} steps, so what it is made of is "
            "not known: take --weights raw"
        )
    loaded_apart = args.get("non_ema_revision") or args.get("non_ema_variant")
    chosen = args["ema_start"] or ("warm" if loaded_apart else "ramp")  # by build_ema, where no checkpoint says it
    return ema_profile(args["ema_decay"], state.get("ema_start") or chosen, step)


def _check_one_run(states):
    """A run that was resumed to go on for longer is still one run."""
    from finetuning.training.checkpoint import harmless_flags

    harmless = harmless_flags() | {"max_train_steps", "num_train_epochs"}
    settings = {
        path: {f"--{name}": value for name, value in state["args"].items() if name not in harmless}
        | {"the dataset": state["dataset"]}
        for path, state in states.items()
    }
    newest, last = list(settings.items())[-1]
    for path, own in settings.items():
        if names := sorted(name for name in own.keys() | last.keys() if own.get(name) != last.get(name)):
            raise ModelError(f"{path} is not of one run with {newest.name}, {first_few(names)} differ: move it away")
