"""What lies on the disk, looked at: counts, statistics, checksums, damaged files, and a picture to judge by eye."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from instar.data.catalogue import SPLITS, DatasetInfo
from instar.data.checksums import ARRAYS_SHA256, FILES_MD5, file_sum
from instar.data.indexed import Images, as_float
from instar.data.sources import LAYOUTS, canonical, find, load, resolve_root
from instar.errors import UserError
from instar.storage import write_atomically

_CHUNK = 1000
_MOST_PROBLEMS = 10
# Official statistics are stated to four digits or more; another preprocessing shifts them by far more than this.
_MEAN_TOLERANCE = 1e-3
_CONVENTIONAL = ("imagenette",)  # whose catalogue statistics are ImageNet's and not its own


@dataclass(frozen=True)
class SplitReport:
    """One split, counted and measured.

    Attributes:
        split: ``"train"`` or ``"test"``.
        count: Images.
        per_class: Images of each class.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel over all pixels, in [0, 1].
        images_sha256: Of the pixels, uint8 (N, C, H, W).
        labels_sha256: Of the labels, as int64 little-endian, or as bytes where there are 256 classes or fewer.
        verified: Whether both sums are the registered ones; None if none are registered.
    """

    split: str
    count: int
    per_class: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images_sha256: str
    labels_sha256: str
    verified: bool | None


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        info: The data set.
        place: Where it was read from.
        form: Official form, for example ``"python version"``.
        splits: One report a split.
        files: Name of each file with a published checksum → whether it has it.
        notes: What is worth knowing and no mistake.
        problems: One line for everything that is wrong; empty when all is well.
    """

    info: DatasetInfo
    place: str
    form: str
    splits: tuple[SplitReport, ...]
    files: dict[str, bool]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(name: str | Path, root: Path | str | None = None, *, size: int | None = None) -> Report:
    """Read every image of a data set, once, and say what is there.

    Args:
        name: A registered name, or the path of an image folder.
        root: Folder with the data sets; None means `default_root`.
        size: Height and width for pictures that are scaled when they are read.

    Returns:
        Counts, statistics, checksums and problems. Damaged pictures are problems of the report; a file without which
        nothing can be read raises.

    Raises:
        UserError: as `load`.

    Example:
        >>> report = check("digits")
        >>> report.ok, [part.count for part in report.splits], report.splits[0].verified
        (True, [1437, 360], True)
    """
    known = canonical(name)
    problems: list[str] = []
    notes: list[str] = []
    loaded = {split: load(name, split=split, root=root, size=size) for split in SPLITS}
    info = loaded["train"].info
    reports, keys = [], {}
    for split, images in loaded.items():
        report, keys[split] = _measure(images, split, known, problems)
        reports.append(report)
        problems += [
            f"{split}: class {info.classes[label]!r} has no image"
            for label, count in enumerate(report.per_class)
            if count == 0
        ]
        if known is not None and report.verified is False:
            problems.append(f"{split}: pixels or labels are not those of the official {info.title} (SHA-256 differs)")
    if known is not None and known not in _CONVENTIONAL and report_is_far(reports[0], info):
        problems.append(
            f"train: expected channel means {_rounded(info.mean)}; got {_rounded(reports[0].mean)}. Are these other "
            "images, or a rescaled copy?"
        )
    shared = len(keys["train"] & keys["test"])
    if shared:
        line = f"{shared} test image{'s are' if shared > 1 else ' is'} also in the training set, pixel by pixel"
        (notes if known is not None else problems).append(line)
    repeated = reports[0].count - len(keys["train"])
    if repeated:
        notes.append(f"{repeated} training image{'s are copies' if repeated > 1 else ' is a copy'} of another one")
    files: dict[str, bool] = {}
    place, form = str(name), "image folder"
    if known is not None and known in LAYOUTS:
        layout, folder = find(known, root=resolve_root(root), split="train")
        place, form = str(folder), layout.title
        published = FILES_MD5[known]
        for path in [path for split in SPLITS for path in layout.paths(folder, split)]:
            if path.name in published:
                files[path.name] = file_sum(path) == published[path.name]
        problems += [
            f"{folder / each}: MD5 differs from the published one" for each, right in files.items() if not right
        ]
    elif known is not None:
        place = "scikit-learn" if known == "digits" else str(resolve_root(root))
        form = "bundled with the library" if known == "digits" else "official folders"
    return Report(info, place, form, tuple(reports), files, tuple(notes), tuple(problems))


def report_is_far(report: SplitReport, info: DatasetInfo) -> bool:
    """Whether the measured channel means are further from the official ones than rounding explains.

    Example:
        >>> report = check("digits")
        >>> report_is_far(report.splits[0], report.info)
        False
    """
    return max(abs(got - stated) for got, stated in zip(report.mean, info.mean, strict=True)) > _MEAN_TOLERANCE


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _measure(images: Images, split: str, known: str | None, problems: list[str]) -> tuple[SplitReport, set[bytes]]:
    """One pass over all images: exact statistics from histograms, checksums, and a short hash of each image."""
    channels = images.shape[0]
    histogram = np.zeros((channels, 256), np.int64)
    pixels = hashlib.sha256()
    keys: set[bytes] = set()
    damaged = 0
    for positions in torch.split(torch.arange(len(images)), _CHUNK):
        try:
            chunk = images.fetch(positions)
        except UserError:
            readable = []
            for position in positions:
                try:
                    readable.append(images.fetch(position[None]))
                except UserError as error:
                    damaged += 1
                    if damaged <= _MOST_PROBLEMS:
                        problems.append(f"{split}: {error}")
            if not readable:
                continue
            chunk = torch.cat(readable)
        array = np.ascontiguousarray(chunk.numpy())
        for channel in range(channels):
            histogram[channel] += np.bincount(array[:, channel].ravel(), minlength=256)
        pixels.update(array.data)
        keys.update(hashlib.blake2b(image, digest_size=16).digest() for image in array)
    if damaged > _MOST_PROBLEMS:
        problems.append(f"{split}: {damaged - _MOST_PROBLEMS} more pictures cannot be read")
    values = np.arange(256) / 255
    totals = np.maximum(histogram.sum(1), 1)
    mean = histogram @ values / totals
    std = np.sqrt(np.maximum(histogram @ values**2 / totals - mean**2, 0))
    labels = images.labels.numpy()
    narrow = labels.astype(np.uint8 if len(images.classes) <= 256 else "<i8")
    sums = pixels.hexdigest(), hashlib.sha256(narrow.data).hexdigest()
    registered = ARRAYS_SHA256.get((known, split)) if known is not None else None
    counts = np.bincount(labels, minlength=len(images.classes))
    return SplitReport(
        split=split,
        count=len(images),
        per_class=tuple(int(count) for count in counts),
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        images_sha256=sums[0],
        labels_sha256=sums[1],
        verified=None if registered is None else registered == sums,
    ), keys


# Colours of the contact sheet: ink on paper, and a grey for what is secondary.
_LONGEST_NAME = 28
_PAPER, _INK, _GREY = (255, 255, 255), (28, 30, 34), (120, 124, 132)


def contact_sheet(
    images: Images, path: Path | str, *, columns: int = 12, most_classes: int = 20, tile: int | None = None
) -> Path:
    """A PNG with one row a class: its name and its first images in official order, so that wrong labels show.

    Args:
        images: What to show.
        path: Where to write the PNG; replaced atomically.
        columns: Images of each class.
        most_classes: Rows at most; of more classes, that many are shown, evenly spread.
        tile: Side of one image on the sheet in pixels; None means 64, or the image's own size up to 96.

    Returns:
        The path.

    Raises:
        UserError: `columns`, `most_classes` or `tile` is not positive, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> contact_sheet(load("digits"), Path(folder.name, "digits.png")).name
        'digits.png'
        >>> folder.cleanup()
    """
    if columns < 1 or most_classes < 1 or (tile is not None and tile < 1):
        raise UserError(f"columns, most_classes and tile must be positive; got {columns}, {most_classes} and {tile}")
    info = images.info
    total = len(info.classes)
    shown = sorted(
        {round(row * (total - 1) / max(1, min(most_classes, total) - 1)) for row in range(min(most_classes, total))}
    )
    channels, height, width = images.shape
    side = tile or min(96, max(64, height, width))
    gap, margin, heading = max(2, side // 16), 24, 64
    name_font, title_font, small_font = (_font(points) for points in (max(13, min(16, side // 5)), 22, 13))
    named = [_short(info.classes[label]) for label in shown]
    counts = torch.bincount(images.labels, minlength=total)
    name_width = max(
        [round(name_font.getlength(name)) for name in named]
        + [round(small_font.getlength(_amount(int(counts[label])))) for label in shown]
    )
    left = margin + name_width + 16
    sheet = Image.new(
        "RGB",
        (left + columns * (side + gap) - gap + margin, heading + len(shown) * (side + gap) - gap + margin),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 16), info.title, fill=_INK, font=title_font)
    facts = f"{len(images):,} images · {height}×{width} · {total} classes"
    facts += f", {len(shown)} of them shown" if len(shown) < total else ""
    split = getattr(images, "split", None)
    facts = f"{split} · {facts}" if split else facts
    draw.text((margin + title_font.getlength(info.title) + 14, 24), facts, fill=_GREY, font=small_font)
    for row, label in enumerate(shown):
        top = heading + row * (side + gap)
        text = (left - 16, top + side // 2)
        draw.text((text[0], text[1] - 2), named[row], fill=_INK, font=name_font, anchor="rs")
        draw.text((text[0], text[1] + 4), _amount(int(counts[label])), fill=_GREY, font=small_font, anchor="rt")
        positions = (images.labels == label).nonzero().flatten()[:columns]
        if not len(positions):
            continue
        for column, pixels in enumerate(as_float(images.fetch(positions)).mul(255).round().to(torch.uint8)):
            array = pixels.numpy()
            picture = Image.fromarray(array[0] if channels == 1 else np.ascontiguousarray(array[:3].transpose(1, 2, 0)))
            # enlarged without smoothing: one should see the pixels that the model sees
            enlarge = side >= max(height, width)
            method = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
            scale = side / max(height, width)
            fitted = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), method)
            offset = ((side - fitted.width) // 2, (side - fitted.height) // 2)
            sheet.paste(fitted.convert("RGB"), (left + column * (side + gap) + offset[0], top + offset[1]))
    return _write_png(sheet, Path(path))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _amount(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from matplotlib import font_manager  # here, because importing it takes a third of a second

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), points)


def _write_png(sheet: Image.Image, path: Path) -> Path:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    write_atomically(path, buffer.getvalue())
    return path
