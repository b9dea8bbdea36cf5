"""A contact sheet: one row of photos a person, with names and a title, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lce_dist.errors import DataError

_PAPER = (250, 250, 248)
_INK = (34, 36, 40)
_FAINT = (128, 132, 138)
_RULE = (226, 226, 222)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[npt.NDArray[np.uint8]]]], tile: int, title: str | None
) -> Image.Image:
    """Lay out photos, one row a label, each shown in ``tile`` x ``tile`` pixels.

    rows: (label, photos); a photo is RGB uint8 (H, W, 3) of any size, drawn whole and centred in its tile.
    Errors: DataError when there is no photo or one is not RGB uint8.
    """
    columns = max((len(photos) for _, photos in rows), default=0)
    if columns == 0:
        raise DataError(f"contact sheet has {len(rows)} rows and no photo; must show at least one. Name some images.")
    text, small, heading = _font(tile * 0.14), _font(tile * 0.11), _font(tile * 0.22)
    gap, margin = max(2, tile // 20), max(8, tile // 4)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_width = max(int(pen.textlength(label, text)) for label, _ in rows) + 2 * gap + tile // 10
    title_width = 0 if title is None else int(pen.textlength(title, heading))
    top = margin if title is None else margin + int(heading.size * 1.9)
    width = max(label_width + columns * (tile + gap) - gap, title_width) + 2 * margin
    height = top + len(rows) * (tile + gap) - gap + margin
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title is not None:
        pen.text((margin, margin), title, fill=_INK, font=heading, anchor="lt")
        rule_y = top - max(2, int(heading.size * 0.5))
        pen.line([(margin, rule_y), (width - margin, rule_y)], fill=_RULE, width=max(1, tile // 64))
    for number, (label, photos) in enumerate(rows):
        y = top + number * (tile + gap)
        pen.text((margin, y + tile // 2), label, fill=_INK, font=text, anchor="ls")
        count = f"{len(photos)} photo" + ("" if len(photos) == 1 else "s")
        pen.text((margin, y + tile // 2 + gap), count, fill=_FAINT, font=small, anchor="lt")
        for column, photo in enumerate(photos):
            picture = _fitted(photo, tile, label)
            x = margin + label_width + column * (tile + gap)
            sheet.paste(picture, (x + (tile - picture.width) // 2, y + (tile - picture.height) // 2))
    return sheet


def _fitted(photo: npt.NDArray[np.uint8], tile: int, label: str) -> Image.Image:
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or photo.size == 0:
        raise DataError(
            f"a photo of {label} has shape {photo.shape} and type {photo.dtype}; "
            "must be RGB uint8 (H, W, 3). Convert it."
        )
    factor = tile / max(photo.shape[:2])
    size = (max(1, round(photo.shape[1] * factor)), max(1, round(photo.shape[0] * factor)))
    return Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)


def _font(size: float) -> ImageFont.FreeTypeFont:
    # Pillow carries this font itself, so a sheet looks the same on every machine.
    font = ImageFont.load_default(max(10.0, size))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
