"""The fifteen common corruptions of CIFAR-10-C as functions of arrays, from noise to compression.

Each takes images (B, C, H, W), float32 in [0, 1], a severity from 1 to 5 and one source of random numbers for each
image, and returns images (B, C, H, W) that need not lie in [0, 1] yet. No image's result depends on its neighbours in
the batch. Parameters are those of CIFAR-10-C for 32 × 32 pixels; on larger images lengths in pixels grow with the side,
so that a picture is corrupted as much as its 32 × 32 version would be.

Source: Hendrycks & Dietterich 2019, and the script that made CIFAR-10-C.
Deviations: `frost` has no photographs of frost and overlays a synthetic texture. Images that are not of 32 × 32 pixels
    have no published counterpart (ImageNet-C has parameters of its own). Values that are whole pixel levels but for
    rounding errors are not cut down to the level below, as they are at random in the published files.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.ndimage
import scipy.sparse
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

Images = NDArray[np.float32]
Draws = Sequence[np.random.Generator]
Distortion = Callable[[Images, int, Draws], Images]

SIDE = 32
"""Side of the images whose parameters these are."""
FROSTS = 5
LUMA = (0.299, 0.587, 0.114)
ICE = (0.86, 0.94, 1.0)


def _scale(images: Images) -> float:
    """By how much lengths grow; images smaller than CIFAR's keep its lengths, which are about a pixel already."""
    return max(1.0, min(images.shape[2:]) / SIDE)


def _each(draw: Callable[[np.random.Generator], NDArray[np.floating]], draws: Draws) -> Images:
    """One array of random numbers for each image, stacked, float32."""
    return np.stack([draw(source) for source in draws]).astype(np.float32)


def gaussian_noise(images: Images, severity: int, draws: Draws) -> Images:
    """The sum x + σ · N(0, 1), σ from 0.04 to 0.10."""
    sigma = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    shape = images.shape[1:]
    return images + np.float32(sigma) * np.stack([source.standard_normal(shape, np.float32) for source in draws])


def shot_noise(images: Images, severity: int, draws: Draws) -> Images:
    """Poisson(c · x) / c: x is a rate of photons, c from 500 to 50 of them at full brightness."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return np.stack(
        [source.poisson(image * photons) / photons for image, source in zip(images, draws, strict=True)]
    ).astype(np.float32)


def impulse_noise(images: Images, severity: int, draws: Draws) -> Images:
    """Salt and pepper: a share of all values, from 1 to 7 %, becomes 0 or 1."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    uniform = np.stack([source.random(images.shape[1:], np.float32) for source in draws])
    # One number decides both: below half of the share it is pepper, from there to the share salt.
    return np.where(uniform < share / 2, 0.0, np.where(uniform < share, 1.0, images)).astype(np.float32)


def defocus_blur(images: Images, severity: int, draws: Draws) -> Images:
    """Convolution with a disc, smoothed against steps at its rim."""
    radius, smooth = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    kernel = disc(radius * _scale(images), smooth * _scale(images), half=math.ceil(_scale(images)))
    return scipy.ndimage.correlate(images, kernel[None, None], mode="mirror").astype(np.float32)


def disc(radius: float, smooth: float, *, half: int) -> Images:
    """A disc as a kernel whose sum is 1.

    Args:
        radius: In pixels.
        smooth: Standard deviation of the Gaussian that smooths it, in pixels.
        half: That Gaussian reaches so many pixels to each side.

    Returns:
        The kernel (k, k), k odd.

    Example:
        >>> disc(0.3, 0.4, half=1)[1].round(3).tolist()
        [0.037, 0.845, 0.037]
    """
    reach = math.floor(radius) + half
    line = np.arange(-reach, reach + 1)
    inside = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).astype(np.float64)
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / smooth) ** 2)
    taps /= taps.sum()
    smoothed = scipy.ndimage.correlate1d(inside / inside.sum(), taps, axis=0, mode="constant")
    return scipy.ndimage.correlate1d(smoothed, taps, axis=1, mode="constant").astype(np.float32)


def glass_blur(images: Images, severity: int, draws: Draws) -> Images:
    """Pixels take the place of near ones, between two Gaussian blurs.

    Offsets are drawn from {−d, …, d − 1}, and margins stay (d + 1 pixels at the top and left, d − 1 at the others): so
    does the published loop, in which a pixel is overwritten rather than swapped, from below to above. With d = 1, its
    value on 32 × 32 pixels, that is the same as moving all of them at once, which is done here for every d.
    """
    sigma, turns = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    scale = _scale(images)
    far = round(scale)
    found = np.floor(255 * _gaussian(images, sigma * scale) + 1e-3) / np.float32(255)
    height, width = images.shape[2:]
    inner = slice(far + 1, height - far + 1), slice(far + 1, width - far + 1)
    rows, columns = np.mgrid[inner]
    for image, source in zip(found, draws, strict=True):
        for _ in range(turns):
            down, right = source.integers(-far, far, (2, *rows.shape))
            image[:, *inner] = image[:, rows + down, columns + right]
    return _gaussian(found, sigma * scale)


def _gaussian(images: Images, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> Images:
    over = (0.0,) * (images.ndim - 2) + (sigma, sigma)
    return scipy.ndimage.gaussian_filter(images, over, mode=mode, truncate=truncate).astype(np.float32)


def motion_blur(images: Images, severity: int, draws: Draws) -> Images:
    """A one-sided Gaussian trail in a direction between −45° and 45° from the horizontal."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    angles = [float(source.uniform(-45, 45)) for source in draws]
    return _trails(images, radius * _scale(images), sigma * _scale(images), angles)


def _trails(images: Images, radius: float, sigma: float, angles: Sequence[float]) -> Images:
    """Each image blurred along its own direction, in whole pixel levels, as ImageMagick's motion blur does it."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    steps, weights = steps[weights > 1e-6], weights[weights > 1e-6]
    reach = int(steps[-1])
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    found = np.zeros_like(images)
    for image, result, angle in zip(padded, found, np.radians(angles), strict=True):
        downs = np.ceil(steps * math.sin(angle) - 0.5).astype(int) + reach
        rights = np.ceil(steps * math.cos(angle) - 0.5).astype(int) + reach
        for weight, down, right in zip(weights.astype(np.float32), downs, rights, strict=True):
            result += weight * image[:, down : down + height, right : right + width]
    return (np.rint(255 * found) / 255).astype(np.float32)


def zoom_blur(images: Images, severity: int, draws: Draws) -> Images:
    """The mean of the image and of its enlargements by 1, 1.01, … up to 1.05 to 1.25."""
    last = (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1]
    count, channels, height, width = images.shape
    flat = images.reshape(count * channels, height * width)
    return np.ascontiguousarray((_zooms(height, width, last) @ flat.T).T, dtype=np.float32).reshape(images.shape)


@functools.lru_cache(maxsize=10)
def _zooms(height: int, width: int, last: float) -> scipy.sparse.csr_matrix:
    """The whole blur as one sparse matrix (H·W, H·W): it is linear, and has few entries in a row."""
    factors = np.arange(1, last, 0.01)
    total = scipy.sparse.identity(height * width, format="csr")
    for factor in factors:
        vertical, horizontal = (scipy.sparse.csr_matrix(enlarge(size, float(factor))) for size in (height, width))
        total = total + scipy.sparse.kron(vertical, horizontal, format="csr")
    return (total / (len(factors) + 1)).astype(np.float32)


def enlarge(size: int, factor: float) -> NDArray[np.float64]:
    """One axis of "crop the centre and enlarge it to the old size", linearly interpolated, as a matrix (size, size).

    Args:
        size: Pixels along the axis.
        factor: At least 1.

    Example:
        >>> enlarge(4, 2.0).tolist()[1]
        [0.0, 0.6666666666666667, 0.3333333333333333, 0.0]
    """
    kept = math.ceil(size / factor)
    start = (size - kept) // 2
    grown = round(kept * factor)
    at = np.arange(grown) * ((kept - 1) / max(grown - 1, 1))
    at = at[(grown - size) // 2 :][:size]
    low = np.clip(np.floor(at).astype(int), 0, max(kept - 2, 0))
    matrix = np.zeros((size, size))
    rows = np.arange(size)
    matrix[rows, start + low] += 1 - (at - low)
    matrix[rows, start + np.minimum(low + 1, kept - 1)] += at - low
    return matrix


def snow(images: Images, severity: int, draws: Draws) -> Images:
    """Flakes that fall in two directions, over an image that is whitened where it is dark."""
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    height, width = images.shape[2:]
    scale = _scale(images)
    flakes = mean + spread * _each(lambda source: source.standard_normal((height, width)), draws)
    # Flakes of a pixel grow with the image, as they do with `zoom`.
    vertical, horizontal = (enlarge(size, zoom * scale).astype(np.float32) for size in (height, width))
    flakes = np.stack([vertical @ layer @ horizontal.T for layer in flakes])
    flakes = np.floor(255 * np.clip(np.where(flakes < least, 0, flakes), 0, 1)) / np.float32(255)
    angles = [float(source.uniform(-135, -45)) for source in draws]
    falling = _trails(flakes[:, None], radius * scale, sigma * scale, angles)
    whitened = np.maximum(images, 1.5 * _grey(images) + 0.5)
    return keep * images + (1 - keep) * whitened + falling + falling[:, :, ::-1, ::-1]


def _grey(images: Images) -> Images:
    """Brightness (B, 1, H, W): of red, green and blue by their usual weights, else the mean of all channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdims=True)
    red, green, blue = LUMA
    return (red * images[:, :1] + green * images[:, 1:2] + blue * images[:, 2:]).astype(np.float32)


def frost(images: Images, severity: int, draws: Draws) -> Images:
    """Ice on a pane. A stand-in: the texture is synthetic, where CIFAR-10-C overlays photographs.

    Weights of image and ice are the published ones, and each image gets a random part of one of five textures.
    """
    kept, added = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    channels, height, width = images.shape[1:]
    size = 4 * _power(max(height, width))
    found = kept * images
    tint = np.array(ICE if channels == 3 else (1.0,) * channels, np.float32)[:, None, None]
    for image, source in zip(found, draws, strict=True):
        ice = ice_texture(int(source.integers(FROSTS)), size)
        top, left = source.integers(0, (size - height, size - width))
        image += added * tint * ice[top : top + height, left : left + width]
    return found


def _power(size: int) -> int:
    """The smallest power of two that is no smaller than `size`."""
    return 1 << max(size - 1, 0).bit_length()


@functools.lru_cache(maxsize=2 * FROSTS)
def ice_texture(number: int, size: int) -> Images:
    """A synthetic texture of ice: ridges of fractals, like the veins of crystals, on a cloudy ground.

    Args:
        number: Which of the textures.
        size: Its side, a power of two.

    Returns:
        Brightness (size, size) in [0, 1], always the same for the same arguments.
    """
    source = np.random.Generator(np.random.Philox(key=number))
    smooth, rough, fine = (plasma(size, decay, [source])[0] for decay in (2.2, 1.9, 1.6))
    veins = np.maximum(1 - 9 * np.abs(rough - np.median(rough)), 0) ** 2
    needles = np.maximum(1 - 12 * np.abs(fine - np.median(fine)), 0)
    return np.clip(0.15 + 0.45 * smooth + 0.45 * veins + 0.25 * needles * smooth, 0, 1).astype(np.float32)


def fog(images: Images, severity: int, draws: Draws) -> Images:
    """A fractal cloud is added, and the sum is brought back to the image's range."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    height, width = images.shape[2:]
    cloud = plasma(_power(max(height, width)), decay, draws)[:, None, :height, :width]
    highest = images.max((1, 2, 3), keepdims=True)
    return (images + amount * cloud) * (highest / (highest + amount))


def plasma(size: int, decay: float, draws: Draws) -> Images:
    """Fractal clouds by the diamond-square algorithm on a torus.

    Squares and diamonds of points in turn get the mean of their four corners and a uniform deviation, whose size is
    divided by decay² from one scale to the next. (The published code multiplies a factor with a range of the same
    size, hence the square.)

    Args:
        size: Side, a power of two.
        decay: Above 1; the larger, the smoother.
        draws: One source for each cloud.

    Returns:
        Clouds (B, size, size), each from exactly 0 to exactly 1.
    """
    deviations = _each(lambda source: source.uniform(-1, 1, size * size - 1), draws)
    found = np.zeros((len(draws), size, size), np.float32)
    used, step, reach = 0, size, 100.0**2

    def moved(total: Images) -> Images:
        nonlocal used
        count = total.shape[1] * total.shape[2]
        wobble = deviations[:, used : used + count].reshape(total.shape)
        used += count
        return total / 4 + np.float32(reach) * wobble

    while step >= 2:
        half = step // 2
        corners = found[:, ::step, ::step]
        sides = corners + np.roll(corners, -1, 1)
        centres = moved(sides + np.roll(sides, -1, 2))
        found[:, half::step, half::step] = centres
        across = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 2)
        found[:, ::step, half::step] = moved(across)
        along = centres + np.roll(centres, 1, 2) + corners + np.roll(corners, -1, 1)
        found[:, half::step, ::step] = moved(along)
        step, reach = half, reach / decay**2
    found -= found.min((1, 2), keepdims=True)
    return found / np.maximum(found.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)


def brightness(images: Images, severity: int, draws: Draws) -> Images:
    """The value of hue, saturation and value rises by 0.05 to 0.3; hue and saturation stay.

    The value is the largest channel, so all channels are multiplied by the ratio of the new value to the old.
    """
    rise = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = images.max(1, keepdims=True)
    raised = np.minimum(value + np.float32(rise), 1)
    return np.where(value > 0, images * (raised / np.where(value > 0, value, 1)), raised).astype(np.float32)


def contrast(images: Images, severity: int, draws: Draws) -> Images:
    """Each channel's deviation from its mean over the image is multiplied by 0.75 to 0.15."""
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = images.mean((2, 3), keepdims=True)
    return (images - means) * np.float32(kept) + means


def elastic_transform(images: Images, severity: int, draws: Draws) -> Images:
    """A random affine map of three points, then small smooth displacements of each pixel."""
    far, smooth, affine = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    height, width = images.shape[2:]
    side = min(height, width)
    moves = np.stack([source.uniform(-affine * side, affine * side, (3, 2)) for source in draws])
    column, row, third = height // 2, width // 2, side // 3
    before = np.array([[column + third, row + third], [column + third, row - third], [column - third, row - third]])
    # The result at p shows the image at the point that the map takes to p: the map is solved backwards.
    corners = np.concatenate([before + moves, np.ones((len(draws), 3, 1))], 2)
    back = np.linalg.solve(corners, np.broadcast_to(before.astype(float), moves.shape))
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    places = np.stack([columns, rows, np.ones_like(rows)], -1) @ back[:, None]
    found = _sampled(images, places[..., 0], places[..., 1], at_centres=True)
    if far == 0:
        return found
    noise = _each(lambda source: source.uniform(-1, 1, (2, height, width)), draws)
    shifts = far * side * _gaussian(noise, smooth * side, mode="reflect", truncate=3.0)
    return _sampled(found, columns + shifts[:, 0], rows + shifts[:, 1], at_centres=False)


def _sampled(images: Images, columns: NDArray[np.floating], rows: NDArray[np.floating], *, at_centres: bool) -> Images:
    """Images (B, C, H, W) at places (B, H, W), bilinearly; beyond the border they are mirrored.

    Args:
        images: What to look at.
        columns: In pixels.
        rows: In pixels.
        at_centres: Whether the mirror stands in the middle of the border's pixels, or at their outer edges.
    """
    height, width = images.shape[2:]
    pair = []
    for place, size in ((columns, width), (rows, height)):
        pair.append(2 * place / max(size - 1, 1) - 1 if at_centres else (2 * place + 1) / size - 1)
    grid = torch.from_numpy(np.stack(pair, -1).astype(np.float32))
    found = F.grid_sample(
        torch.from_numpy(np.ascontiguousarray(images)),
        grid,
        mode="bilinear",
        padding_mode="reflection",
        align_corners=at_centres,
    )
    return found.numpy()


def pixelate(images: Images, severity: int, draws: Draws) -> Images:
    """Made smaller to 95 to 65 % of the side and larger again, both by boxes."""
    kept = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[2:]
    small = (max(int(width * kept), 1), max(int(height * kept), 1))

    def coarse(picture: Image.Image) -> Image.Image:
        box = Image.Resampling.BOX
        return picture.resize(small, box).resize((width, height), box)

    return _pictured(images, coarse)


def jpeg_compression(images: Images, severity: int, draws: Draws) -> Images:
    """JPEG of quality 80 to 40."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compressed(picture: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _pictured(images, compressed)


def _pictured(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    """Applies a change of pictures: of three channels as RGB, else of each channel as a grey picture."""
    levels = np.rint(255 * images).astype(np.uint8)
    if images.shape[1] == 3:
        pictures = levels.transpose(0, 2, 3, 1)
        found = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures]).transpose(0, 3, 1, 2)
    else:
        found = np.stack([[np.asarray(change(Image.fromarray(part))) for part in image] for image in levels])
    return found.astype(np.float32) / np.float32(255)


DISTORTIONS: dict[str, Distortion] = {
    distortion.__name__: distortion
    for distortion in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
"""By the name of the file in CIFAR-10-C, in its order: noise, blur, weather, digital."""
