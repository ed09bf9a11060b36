"""Post-hoc EMA: averages of any length, made after the run from its checkpoints.

EDM2 ("Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3 and appendix C)
averages the weights of all steps with a weight that grows as step^gamma, and writes the width of that profile as
sigma_rel, its standard deviation as a share of the run. A profile is what each step of the run contributes to an
average: numbers for step 0 (what the average started from), 1, ... that sum to 1.

Our runs keep no power-function averages. A checkpoint holds the raw weights (all of the profile on one step) and, with
--use_ema, an exponential average. Both profiles are known to the last digit from training_state.json, so the wanted
one is put together from them by least squares, and what cannot be met is reported as the misfit.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetuning.cli import REQUIRED, flag
from finetuning.families.model_args import ModelError
from finetuning.training.checkpoint import checkpoints_in, harmless_flags
from finetuning.training.ema import AveragedWeights

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all steps
RIDGE = 1e-4  # weights of norm 10 cost as much as sums that are off by 0.001 at every step
NEGLIGIBLE = 1e-6  # a snapshot of less weight is not worth reading


@dataclass
class PostHocArgs:
    """Averages after the run (post-hoc EMA)"""

    run_dir: str = flag(
        REQUIRED, "folder of a run of train_text_to_image.py, with its checkpoint-N folders", positional=True
    )
    sigma_rel: list[float] = flag(
        [0.05, 0.1], "widths of the averages as shares of the run, one model each: above 0, at most 0.2886 (the plain "
        "mean of all steps)",
    )  # fmt: skip
    weights: str = flag(
        "both", "which weights of the checkpoints are put together; both: those that are there",
        choices=("both", "ema", "raw"),
    )  # fmt: skip
    at: int | None = flag(None, "step of the checkpoint at which the average ends; none: the last")
    dtype: str | None = flag(None, "type of what is written; none: the files' own", choices=("fp16", "bf16", "fp32"))

    def problems(self):
        if not Path(self.run_dir).is_dir():
            yield f"RUN_DIR {self.run_dir}: there is no such folder"
        for value in self.sigma_rel:
            if not 0 < value <= WIDEST:
                yield (
                    f"--sigma_rel {value} must be above 0 and at most {WIDEST:.6f}: that is the mean of all steps, "
                    "wider ones would weigh the first steps most"
                )
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            yield f"--sigma_rel {' '.join(map(str, self.sigma_rel))}: name each width once"
        if self.at is not None and self.at < 1:
            yield f"--at {self.at} must be the step of a checkpoint"


@dataclass(frozen=True)
class Snapshot:
    """Weights that a checkpoint holds, and how they came to be."""

    folder: Path
    weights: str  # "raw" (unet/) or "ema" (unet_ema/)
    step: int
    decay: float | None = None  # of the average
    start_kind: str | None = None

    def profile(self):
        """What each step contributed, float64 [step + 1]."""
        return raw_profile(self.step) if self.weights == "raw" else ema_profile(self.decay, self.start_kind, self.step)


@dataclass(frozen=True)
class Reconstruction:
    """A power-function average as a linear combination of snapshots.

    weights   ((checkpoint folder, "raw" | "ema", weight), ...), in step order; the weights sum to 1
    misfit    how far from its step the profile's mass lies, as a share of the run (see `misfit_of`); to be held against
              sigma_rel, which has the same unit
    """

    sigma_rel: float
    gamma: float
    weights: tuple[tuple[Path, str, float], ...]
    misfit: float


# -- profiles --------------------------------------------------------------------------------------------------------


def sigma_rel_of(gamma):
    """Standard deviation of the profile t^gamma on [0, 1]: sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).

    EDM2, section 3.1.
    """
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(sigma_rel):
    """The exponent, 0 or more, whose profile has this width. Raises ValueError outside (0, 12^-0.5].

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel {sigma_rel} must be above 0 and at most {WIDEST:.6f}")
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
    average = AveragedWeights({}, decay, start_kind)
    decays = np.array([0.0, *(average.decay_at(update) for update in range(1, steps + 1))])
    kept = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # kept[t]: share of the average after t that is left
    return (1 - decays) * kept


def raw_profile(step):
    """Weights as they are after `step` steps, float64 [step + 1]: all on the last one."""
    return np.append(np.zeros(step), 1.0)


# -- the fit ---------------------------------------------------------------------------------------------------------


def misfit_of(profile, wanted):
    """How far the mass of `profile` [steps + 1] has to be moved to give `wanted`, as a share of the run's length.

    Profiles are compared by their sums up to each step, not step by step. Weights change little in a step, so mass on
    the step beside the right one does no harm, though step by step it would count as wholly wrong: raw weights touch
    single steps only. With C the sum up to a step, the averages of a path w_0, w_1, ... differ by the sum over t of
    (C(t) - C_wanted(t)) (w_t - w_(t+1)): at most misfit * steps * the path's longest step. The sum of
    |C - C_wanted| is the Wasserstein-1 distance where no mass is negative.

    What an average started from may be other weights than those that were trained, so step 0 counts as a whole run
    before step 1.
    """
    difference, gaps = _differences(profile - wanted)
    return float((np.abs(difference) * gaps).sum())


def solve(profiles, wanted):
    """(weights [snapshots], misfit): the combination of `profiles` [snapshots, steps + 1] nearest to `wanted`.

    Least squares over the sums up to each step (see `misfit_of`), with weights that sum to 1. For a path of independent
    moves this is the smallest expected error of the averaged weights; EDM2's step by step fit is that for weights which
    are independent from step to step.

    Weights may be negative: the difference of two averages is the average between them. A small ridge (RIDGE) keeps
    snapshots that are nearly dependent from getting huge weights of opposite sign, which would enlarge the rounding of
    the files; where snapshots are equal it shares the weight among them.
    """
    profiles = np.asarray(profiles, dtype=np.float64)
    count = len(profiles)
    differences, gaps = _differences(profiles - wanted)  # [snapshots, steps]
    differences = (differences * np.sqrt(gaps)).T
    # weights = last + basis @ free sum to 1 whatever `free` is
    basis = np.vstack([np.eye(count - 1), -np.ones(count - 1)])
    last = np.eye(count)[-1]
    system = np.vstack([differences, RIDGE * np.eye(count)])
    free = np.linalg.lstsq(system @ basis, -system @ last, rcond=None)[0]
    weights = last + basis @ free
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    weights /= weights.sum()
    return weights, misfit_of(weights @ profiles, wanted)


def _differences(profiles):
    """Sums up to each step but the last, where all agree; and the gap to the next step as a share of the run."""
    steps = profiles.shape[-1] - 1
    return profiles.cumsum(-1)[..., :-1], np.append(1.0, np.full(steps - 1, 1 / steps))


# -- the checkpoints of a run ----------------------------------------------------------------------------------------


def snapshots(run_folder, weights="both"):
    """The weights that the checkpoints of a run hold, [Snapshot, ...] in step order, raw before averaged.

    weights: "raw", "ema" or "both". Raises ModelError where there are fewer than two checkpoints, where they are of
    several runs or of a LoRA run, or where none holds these weights.
    """
    run_folder = Path(run_folder)
    folders = [path for _, path in checkpoints_in(run_folder)]
    if len(folders) < 2:
        there = f"only {folders[0].name}" if folders else "none"
        raise ModelError(
            f"{run_folder} must hold two or more checkpoint-N folders, and there is {there}: train with "
            "--checkpointing_steps, and without --checkpoints_total_limit"
        )
    adapters = [path.name for path in folders if (path / "lora").is_dir()]
    if adapters:
        raise ModelError(
            f"{run_folder} is a LoRA run ({', '.join(adapters)}): the mean of two adapters' factors is not the mean of "
            "what they do. merge_checkpoints.py combine puts LoRAs together"
        )
    states = [_state(path) for path in folders]
    _check_one_run(folders, states)
    found = [snapshot for path, state in zip(folders, states, strict=True) for snapshot in _held(path, state, weights)]
    missing = [path for path in folders if path not in {snapshot.folder for snapshot in found}]
    if missing:
        why = ": the run was made without --use_ema" if weights == "ema" else ", which holds no whole model"
        folder = "unet_ema/" if weights == "ema" else "unet/"
        raise ModelError(f"there is no {folder} in {', '.join(map(str, missing))}{why}")
    return found


def plan(args: PostHocArgs):
    """[Reconstruction, ...], one for each --sigma_rel. Raises ModelError."""
    found = snapshots(args.run_dir, args.weights)
    steps = sorted({snapshot.step for snapshot in found})
    end = args.at or steps[-1]
    if end not in steps:
        raise ModelError(f"--at {end}: {args.run_dir} has no checkpoint of that step, but of {_listed(steps)}")
    found = [snapshot for snapshot in found if snapshot.step <= end]
    if end == steps[0]:
        raise ModelError(f"--at {end} is the first checkpoint of {args.run_dir}: an average needs two or more")
    profiles = np.zeros((len(found), end + 1))
    for row, snapshot in zip(profiles, found, strict=True):
        row[: snapshot.step + 1] = snapshot.profile()
    return [_reconstruction(sigma_rel, found, profiles, end) for sigma_rel in args.sigma_rel]


def _reconstruction(sigma_rel, found, profiles, end):
    gamma = gamma_of(sigma_rel)
    weights, misfit = solve(profiles, power_profile(gamma, end))
    used = [(one.folder, one.weights, float(w)) for one, w in zip(found, weights, strict=True) if w]
    return Reconstruction(sigma_rel, gamma, tuple(used), misfit)


def _state(folder):
    try:
        state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        step = state["step"], state["ema_updates"], state["dataset"], state["args"]["use_ema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} has no readable training_state.json: {error!r}") from error
    if folder.name != f"checkpoint-{step[0]}":
        raise ModelError(f"{folder} was written after step {step[0]}: give it back its name, checkpoint-{step[0]}")
    return state


def _check_one_run(folders, states):
    """A run that was resumed to go on for longer is still one run."""
    harmless = harmless_flags() | {"max_train_steps", "num_train_epochs"}
    settings = [
        {f"--{name}": value for name, value in state["args"].items() if name not in harmless}
        | {"the dataset": state["dataset"]}
        for state in states
    ]
    last = settings[-1]
    different = [
        f"{folder.name} ({', '.join(names)})"
        for folder, own in zip(folders, settings, strict=True)
        if (names := sorted(name for name in own.keys() | last.keys() if own.get(name) != last.get(name)))
    ]
    if different:
        raise ModelError(
            f"the checkpoints of {folders[-1].parent} are not of one run: other settings than {folders[-1].name} in "
            f"{', '.join(different)}. Move those away"
        )


def _held(folder, state, weights):
    args, step = state["args"], state["step"]
    if weights != "ema" and (folder / "unet").is_dir():
        yield Snapshot(folder, "raw", step)
    if weights != "raw" and (folder / "unet_ema").is_dir():
        if state["ema_updates"] != step:
            raise ModelError(
                f"{folder}: its average has {state['ema_updates']} updates after {step} steps, so what it is made of "
                "is not known: take --weights raw"
            )
        loaded_apart = args.get("non_ema_revision") or args.get("non_ema_variant")
        start_kind = args["ema_start"] or ("warm" if loaded_apart else "ramp")  # as build_ema chooses
        yield Snapshot(folder, "ema", step, args["ema_decay"], start_kind)


def _listed(steps):
    return ", ".join(map(str, steps)) if len(steps) <= 12 else f"{steps[0]}, {steps[1]}, ... {steps[-1]}"
