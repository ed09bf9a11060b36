"""Images in rows and columns with their labels, as one PNG."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

GAP = 6


def labelled_grid(rows, row_labels, column_labels, scale_to=None):
    """One image of a grid: `rows` is a list of lists of PIL images (None leaves a cell empty).

    Small images are enlarged to a side of `scale_to` pixels without smoothing, so that their pixels can be seen.
    """
    cell_width, cell_height = next(cell.size for row in rows for cell in row if cell is not None)
    if scale_to and max(cell_width, cell_height) < scale_to:
        factor = scale_to // max(cell_width, cell_height)
        cell_width, cell_height = cell_width * factor, cell_height * factor
    font = ImageFont.load_default(size=max(12, cell_width // 14))
    line_height = font.getbbox("Ag")[3] + 3
    label_width = min(max((font.getlength(label) for label in row_labels), default=0), 1.6 * cell_width)
    wrapped = [_wrap(label, font, label_width) for label in row_labels]
    headings = [_wrap(label, font, cell_width) for label in column_labels]
    top = GAP + line_height * max((len(lines) for lines in headings), default=0)
    left = int(label_width) + 2 * GAP if row_labels else GAP
    tallest = max((len(lines) for lines in wrapped), default=0) * line_height
    row_height = max(cell_height, tallest)
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (left + columns * (cell_width + GAP), top + GAP + len(rows) * (row_height + GAP)), (252, 252, 252)
    )
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        pen.text((left + column * (cell_width + GAP), GAP // 2), "\n".join(lines), fill=(20, 20, 20), font=font)
    for index, row in enumerate(rows):
        y = top + GAP + index * (row_height + GAP)
        if row_labels:
            pen.text((GAP, y), "\n".join(wrapped[index]), fill=(20, 20, 20), font=font)
        for column, cell in enumerate(row):
            if cell is not None:
                enlarged = cell.resize((cell_width, cell_height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left + column * (cell_width + GAP), y))
    return sheet


def _wrap(text, font, width):
    """The text in as few lines as fit the width, measured: letters differ in width by a factor of four."""
    for characters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, characters)
        if max(map(font.getlength, lines), default=0) <= width:
            return lines or [""]
    return textwrap.wrap(text, 1) or [""]
