"""Augmentation: one affine warp and additive noise, or a mirror; reproducible for each (seed, epoch, sample)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from partialfc.data.permutation import mix
from partialfc.errors import ConfigError

Pixels = npt.NDArray[np.float32]  # [channels, height, width], in [-1, 1]


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random numbers of one sample in one epoch, the same on any rank and in any worker.

    Philox is counter-based: a generator costs a few microseconds, and different keys give independent streams.
    """
    return np.random.Generator(np.random.Philox(key=(mix(seed, epoch) << 64) | mix(index)))


def to_pixels(image: Image.Image) -> Pixels:
    """Return a grey (L) or RGB image as float32 [channels, height, width] in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return pixels * np.float32(1 / 127.5) - np.float32(1)


@dataclass(frozen=True)
class Augment:
    """Random affine warp about the image's centre, then Gaussian noise. Each range is symmetric about "no change".

    Args:
        rotate_degrees: largest rotation in either direction.
        scale: largest relative change of size, 0.1 meaning 0.9 to 1.1.
        shear: largest horizontal shear, as a tangent.
        translate: largest shift in each direction, as a fraction of the image's width and height.
        noise: largest standard deviation of the noise; black is -1, white is 1.
        flip: mirror half of the images, left to right.
    """

    rotate_degrees: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    noise: float = 0.0
    flip: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Pixels:
        """Augment a grey (L) or RGB image; return float32 [channels, height, width] in [-1, 1]."""
        # Always six draws, so that no parameter changes another's random numbers.
        rotate, scale, shear, shift_x, shift_y, noise = rng.random(6).tolist()
        if self.rotate_degrees or self.scale or self.shear or self.translate:
            image = self._warp(image, *(2 * x - 1 for x in (rotate, scale, shear, shift_x, shift_y)))
        pixels = to_pixels(image)
        if self.noise:
            pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(self.noise * noise)
            np.clip(pixels, -1, 1, out=pixels)
        if self.flip and rng.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        return pixels

    def _warp(
        self, image: Image.Image, rotate: float, scale: float, shear: float, shift_x: float, shift_y: float
    ) -> Image.Image:
        width, height = image.size
        angle = math.radians(self.rotate_degrees * rotate)
        zoom = 1 / (1 + self.scale * scale)
        cos, sin, tan = math.cos(angle) * zoom, math.sin(angle) * zoom, self.shear * shear
        # PIL takes the inverse map: output pixel (x, y) comes from (a x + b y + c, d x + e y + f).
        a, b, d, e = cos, cos * tan - sin, sin, sin * tan + cos
        center_x, center_y = width / 2, height / 2
        c = center_x - a * center_x - b * center_y + self.translate * shift_x * width
        f = center_y - d * center_x - e * center_y + self.translate * shift_y * height
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            resample=Image.Resampling.BILINEAR,
            fillcolor=background(image),
        )


def background(image: Image.Image) -> float | tuple[int, ...]:
    """Return the colour for the area that the warp uncovers: the median of the corners, per channel."""
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(xy) for xy in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    channels = zip(*(corner if isinstance(corner, tuple) else (corner,) for corner in corners), strict=True)
    middle = tuple(int(sum(sorted(channel)[1:3])) // 2 for channel in channels)  # of four: the mean of the middle two
    return middle if len(middle) > 1 else middle[0]


NONE = Augment()
LIGHT = Augment(rotate_degrees=8.0, scale=0.12, shear=0.12, translate=0.06, noise=0.15)
FLIP = Augment(flip=True)
_PRESETS = {"none": NONE, "light": LIGHT, "flip": FLIP}


def augment_by_name(name: str) -> Augment:
    """Return the preset of this name: ``none``, ``light`` or ``flip``."""
    if name not in _PRESETS:
        raise ConfigError(f"augment must be one of {', '.join(_PRESETS)}, got {name!r}")
    return _PRESETS[name]
