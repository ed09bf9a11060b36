"""Images of a few subjects, each named by a rare token and its class: DreamBooth (github.com/google/dreambooth).

PATH/
    prompts_and_classes.txt     says the class of each subject: "dog6,dog"
    dog6/00.jpg, 01.jpg ...     or dataset/dog6/...; a folder of images alone is one subject without a class

These images have no captions of their own: all captions come from --instance_prompt. The prompt lists in
prompts_and_classes.txt are for judging a trained model ("a sks dog on the beach" describes none of the images), so
they are not read here. A subject has four to six images; all go to train/.
"""

from collections import defaultdict
from dataclasses import dataclass

from finetuning.cli import flag
from finetuning.conversion.caption_text import template_problems
from finetuning.data.findings import DatasetError
from finetuning.data.folders import existing_folder, is_image_name, walk
from finetuning.data.samples import Sample
from finetuning.files import read_text

CLASSES = "prompts_and_classes.txt"
HEADER = "subject_name,class"
TEMPLATE_WORDS = ("token", "class", "subject")


@dataclass
class DreamBoothArgs:
    """DreamBooth"""

    subject: list[str] | None = flag(None, "take only these subjects, by folder name (none: all)")
    instance_prompt: list[str] = flag(
        ["a photo of {token} {class}"], 'captions of every image; {token}, {class} and {subject} ("dog6") are filled in'
    )
    instance_token: str = flag("sks", "rare word that names the subject")

    def problems(self):
        yield from template_problems("--instance_prompt", self.instance_prompt, TEMPLATE_WORDS)


def read(path, args, findings):
    """The images of each subject, by name."""
    root = existing_folder(path)
    if not (root / CLASSES).is_file() and (root / "dataset" / CLASSES).is_file():
        root = root / "dataset"
    subjects = _subjects(root, args, findings)
    table = next((file for file in (root / CLASSES, root.parent / CLASSES) if file.is_file()), None)
    classes = _classes(table) if table else {}
    unknown = [name for name in subjects if name not in classes]
    if unknown and any("{class}" in prompt for prompt in args.instance_prompt):
        raise DatasetError(
            f"{table or root / CLASSES} says no class for {', '.join(unknown)}: write the class into the prompt "
            f'(--instance_prompt "a photo of {{token}} dog"), or add lines such as "{unknown[0]},dog" to that file'
        )
    named_so = defaultdict(list)
    for name, images in subjects.items():
        words = {"token": args.instance_token, "class": classes.get(name), "subject": name}
        captions = tuple(prompt.format(**words) for prompt in args.instance_prompt)
        named_so[captions].append(name)
        for inside, image in images.items():
            yield Sample(f"{name}/{inside}", image, captions, f"{name}/{inside}", "train")
    for names in named_so.values():
        if len(names) > 1:
            findings.warn("equal_captions", ", ".join(names))


def _subjects(root, args, findings):
    """{subject: {image relative to its folder: image}}, sorted. Raises DatasetError."""
    subjects, loose = defaultdict(dict), {}
    for folder, names in walk(root, args.allow_outside_paths, findings):
        for name in names:
            if is_image_name(name):
                subject, *inside = (folder / name).relative_to(root).parts
                (subjects[subject] if inside else loose)["/".join(inside) or name] = folder / name
    if loose and not subjects:
        subjects[root.resolve().name] = loose
    elif loose:
        for name in loose:
            findings.error("outside_subjects", name)
    if not subjects and not findings.errors:
        raise DatasetError(f"there are no images in {root} nor in folders below it")
    if subjects and (missing := [name for name in args.subject or [] if name not in subjects]):
        raise DatasetError(f"--subject {' '.join(missing)}: {root} has only {', '.join(subjects)}")
    return {name: subjects[name] for name in subjects if not args.subject or name in args.subject}


def _classes(path):
    """{subject: class} from the first part of prompts_and_classes.txt."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    if HEADER not in lines:
        raise DatasetError(f'{path} has no line "{HEADER}", which the classes stand under')
    lines = lines[lines.index(HEADER) + 1 :]
    rows = lines[: lines.index("Prompts")] if "Prompts" in lines else lines
    return {name.strip(): kind.strip() for name, _, kind in (row.partition(",") for row in rows) if kind.strip()}
