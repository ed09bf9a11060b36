"""A checker: a judge of images that is a plug-in, named by a flag (--checker my_checker, or --checker my_checker.py).

It is a module with two names, and a third that may be left out:

    METRICS = {"likeness": Metric("likeness", "how much the face is the subject's, 0 to 1", role="learned")}

    def scores(image, caption):  # a PIL RGB image and its caption -> {metric: number}
        return {"likeness": ...}

    def check(caption):          # raises ValueError where scores() cannot judge such a caption
        ...

A metric with the role "learned" says how much of the new a model has learned, one with the role "retained" how much of
the old it can still do: higher is better for both, and "retained" is never below 0. With one of each the checker
measures "learned and kept" in a report, in a sweep of merges and while training. finetuning/shapes/checker.py is one;
docs/evaluation.md has another of twenty lines.
"""

import importlib
import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetuning.cli import first_few
from finetuning.evaluation.metrics import METRICS, EvaluationError, Metric
from finetuning.files import sha256

ROLES = ("learned", "retained", "quality")


class Checker:
    """A loaded checker.

    name      as it was named
    metrics   {name: Metric}; measured on the dataset and on the general prompts, "learned" on the dataset alone
    learned, retained  the names of the metrics with these roles, or None
    facts     what its scores depend on besides the images, ready for JSON
    """

    def __init__(self, name, module):
        self.name, self._module = name, module
        self.metrics = {
            key: replace(metric, measured_on="dataset" if metric.role == "learned" else "both")
            for key, metric in module.METRICS.items()
        }
        by_role = {metric.role: key for key, metric in self.metrics.items()}
        self.learned, self.retained = by_role.get("learned"), by_role.get("retained")
        self.facts = {"checker": name, "sha256": sha256(module.__file__)}

    def check(self, captions):
        """Raises EvaluationError that names the captions that it cannot judge."""
        if strange := self.strange(captions):
            raise EvaluationError(f"--checker {self.name} cannot judge {first_few(strange.values(), 3)}")

    def strange(self, captions):
        """{caption: why} of those that it cannot judge."""
        found = {}
        for caption in dict.fromkeys(captions) if hasattr(self._module, "check") else ():
            try:
                self._module.check(caption)
            except ValueError as problem:
                found[caption] = str(problem)
        return found

    def scores(self, image, caption):
        """{metric: float} of a PIL image. Raises EvaluationError where a score is no finite number or not known."""
        try:
            found = {name: float(value) for name, value in self._module.scores(image, caption).items()}
        except (ValueError, TypeError, AttributeError) as problem:
            raise EvaluationError(f"--checker {self.name} on {caption!r}: {problem}") from problem
        if unknown := found.keys() - self.metrics.keys():
            raise EvaluationError(f"--checker {self.name} gives {first_few(sorted(unknown))}, which METRICS lacks")
        if broken := [name for name, value in found.items() if not math.isfinite(value)]:
            raise EvaluationError(f"--checker {self.name} gives no finite number for {broken[0]} of {caption!r}")
        return found

    def values(self, metric, images, captions):
        """One metric of images and their captions, float64 [rows]. Raises EvaluationError where one has no score."""
        rows = [self.scores(*pair) for pair in zip(images, captions, strict=True)]
        if missing := [caption for caption, row in zip(captions, rows, strict=True) if metric not in row]:
            raise EvaluationError(f"--checker {self.name} gives no {metric} for {first_few(missing, 3)}")
        return np.array([row[metric] for row in rows], np.float64)

    @property
    def has_roles(self):
        """Whether "learned and kept" can be taken from it."""
        return None not in (self.learned, self.retained)

    def require_roles(self):
        """Raises EvaluationError unless "learned and kept" can be taken from it."""
        if missing := [role for role in ("learned", "retained") if not getattr(self, role)]:
            raise EvaluationError(
                f"--checker {self.name} has no metric with the role {' and none with '.join(missing)}: learned and "
                "kept cannot be taken from it"
            )


def load_checker(name):
    """The Checker of an importable module, or of a .py file. Raises EvaluationError with all that is wrong with it."""
    try:
        module = _import(name)
    except Exception as error:  # a user's module may raise anything
        raise EvaluationError(f"--checker {name} cannot be imported: {type(error).__name__}: {error}") from error
    problems = list(_problems(module))
    if problems:
        raise EvaluationError("\n".join(f"--checker {name}: {problem}" for problem in problems))
    return Checker(name, module)


def _import(name):
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"checker_{Path(name).stem}", name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _problems(module):
    """What keeps a module from being a checker."""
    if not callable(getattr(module, "scores", None)):
        yield "it has no function scores(image, caption)"
    metrics = getattr(module, "METRICS", None)
    if not isinstance(metrics, dict) or not metrics or not all(isinstance(one, Metric) for one in metrics.values()):
        yield "it has no METRICS, a dict of finetuning.evaluation.metrics.Metric"
        return
    roles = [metric.role for metric in metrics.values()]
    for role in ("learned", "retained"):
        if roles.count(role) > 1:
            yield f"METRICS has {roles.count(role)} metrics with the role {role}: one is enough"
    for key, metric in metrics.items():
        if key in METRICS:
            yield f"METRICS has {key!r}, which is the name of a metric of this project: call it otherwise"
        if metric.role not in ROLES:
            yield f"METRICS[{key!r}].role is {metric.role!r}, not one of {', '.join(ROLES)}"
        if metric.better not in ("higher", "lower"):
            yield f"METRICS[{key!r}].better is {metric.better!r}, not higher or lower"
        elif metric.role in ("learned", "retained") and metric.better == "lower":
            yield f"METRICS[{key!r}].better is lower: with the role {metric.role} higher must be better"
        if metric.per != "row" or metric.network or metric.needs_truth:
            yield f"METRICS[{key!r}] must leave per, network and needs_truth out: scores() sees one image at a time"
