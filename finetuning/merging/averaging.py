"""Other averages of a run that is over, written from its checkpoints (see post_hoc.py)."""

from dataclasses import dataclass
from functools import partial

from finetuning.cli import as_dict
from finetuning.families.model_args import ModelError
from finetuning.merging.matching import match
from finetuning.merging.methods import linear_combination
from finetuning.merging.models import opened
from finetuning.merging.post_hoc import PostHocArgs, plan
from finetuning.merging.sources import open_source
from finetuning.merging.writing import OutputArgs, Product, place, write_models


@dataclass
class AveragingArgs(OutputArgs, PostHocArgs):
    """Average again"""

    def open_sources(self):
        """Every checkpoint and kind of weights that one of the averages takes something from, the newest first."""
        return self._planned()[1]

    def _planned(self):
        found = plan(self)
        used = dict.fromkeys(snapshot[:2] for one in found for snapshot in one.weights)
        used = sorted(used, key=lambda one: (-int(one[0].name.removeprefix("checkpoint-")), one[1]))
        sources = opened([partial(open_source, folder, weights=weights) for folder, weights in used])
        return found, sources, used


def average(args):
    """Write the average of each --sigma_rel, in one pass over the checkpoints. Returns lines. Raises ModelError."""
    found, sources, used = args._planned()
    if "text_encoder" not in sources[0].parts:
        told = "; ".join(sources[0].notes)
        raise ModelError(f"{args.run_dir}: the model that the run started from is not to be had: {told}")
    matches, _ = match(sources)

    def made(one):
        weights = {snapshot[:2]: snapshot[2] for snapshot in one.weights}
        others = [weights.get(snapshot, 0.0) for snapshot in used[1:]]
        target = place(args.output_dir, f"sigma_rel-{one.sigma_rel:g}", args.sigma_rel)
        compute = partial(linear_combination, weights=others) if len(used) > 1 else 0
        return Product(target, lambda _: compute, as_dict(args) | {"sigma_rel": [one.sigma_rel]})

    lines = [
        f"sigma_rel {one.sigma_rel:g} (gamma {one.gamma:.2f}) from {len(one.weights)} snapshots; its profile is off by "
        f"{one.misfit:.3f} of the run"
        for one in found
    ]
    return [*lines, *write_models("ema", [made(one) for one in found], sources, matches, args)]
