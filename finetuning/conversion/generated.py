"""What generate_images.py has written: its images, each with the prompt that it was generated from.

PATH/
    images.json     [{file, prompt, ...}]; other files, grid.png among them, are not looked at
    000_a_photo_of_a_cat_....png
"""

from finetuning.conversion.download import read_json
from finetuning.data.findings import DatasetError
from finetuning.data.folders import existing_folder
from finetuning.data.samples import Sample


def read(path, args, findings):
    """The images, in the order in which they were generated."""
    table = existing_folder(path) / "images.json"
    if not table.is_file():
        raise DatasetError(f"{path} has no images.json: name an --output_dir of generate_images.py")
    try:
        found = read_json(table)
        images = {one["file"]: (table.parent / one["file"], one["prompt"].strip()) for one in found}
    except (AttributeError, KeyError, TypeError) as error:
        raise DatasetError(f"{table} is not what generate_images.py writes: {error!r}") from error
    for file, (image, prompt) in images.items():
        if image.parent != table.parent:
            findings.error("outside", file)
        elif not image.is_file():
            findings.error("image_missing", file)
        elif not prompt:
            findings.error("no_caption", file)
        else:
            yield Sample(file, image, (prompt,), file)
