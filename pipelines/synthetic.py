"""The embedded data set: faces drawn by arithmetic, each photo a function of (seed, identity, photo) alone.

An identity is some seventy continuous traits around an average face, so a network that learns to read them
can read people it never saw. A photo adds conditions (pose, light, expression, cover, camera), all scaled
by one number, ``difficulty``. Head units: the face reaches from y = -1 (crown) to about y = +1 (chin),
x to the right of the picture, z towards the camera; features lie on a half ellipsoid and turn with it.
"""

from __future__ import annotations

import functools
import io
import math
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from lce_dist.config import SyntheticConfig
from lce_dist.errors import ConfigError, RunError

Floats = npt.NDArray[np.float64]
Colour = tuple[float, float, float]

JPEG_QUALITY = 90


def _trait(centre: float, spread: float) -> Any:
    """A field drawn as ``centre + spread * bell``, with a bell of standard deviation 1 that ends at 3.5."""
    return field(metadata={"centre": centre, "spread": spread})


@dataclass(frozen=True)
class FaceIdentity:
    """What stays the same in all photos of one person; lengths in head units, angles in radians."""

    skin_depth: float = _trait(0.34, 0.12)
    skin_warmth: float = _trait(0.0, 0.30)
    head_width: float = _trait(0.75, 0.036)
    temple_width: float = _trait(0.90, 0.034)
    cheek_height: float = _trait(0.05, 0.06)
    jaw_width: float = _trait(0.76, 0.055)
    jaw_height: float = _trait(0.56, 0.040)
    chin_width: float = _trait(0.36, 0.055)
    chin_length: float = _trait(1.0, 0.042)
    ear_size: float = _trait(0.17, 0.022)
    ear_height: float = _trait(0.05, 0.05)
    ear_spread: float = _trait(0.03, 0.025)
    neck_width: float = _trait(0.44, 0.045)
    eye_spacing: float = _trait(0.330, 0.030)
    eye_height: float = _trait(-0.04, 0.040)
    eye_width: float = _trait(0.160, 0.018)
    eye_open: float = _trait(0.085, 0.016)
    eye_slant: float = _trait(0.06, 0.11)
    eye_skew: float = _trait(0.0, 0.22)
    eye_offset: float = _trait(0.0, 0.012)
    iris_size: float = _trait(0.074, 0.006)
    iris_dark: float = _trait(0.62, 0.16)
    iris_hue: float = _trait(0.0, 0.40)
    lid_weight: float = _trait(0.022, 0.007)
    lid_crease: float = _trait(0.055, 0.018)
    eye_bag: float = _trait(0.30, 0.30)
    socket_depth: float = _trait(0.45, 0.22)
    brow_height: float = _trait(0.235, 0.036)
    brow_width: float = _trait(0.205, 0.020)
    brow_thickness: float = _trait(0.034, 0.012)
    brow_arch: float = _trait(0.045, 0.028)
    brow_tilt: float = _trait(-0.02, 0.042)
    brow_spacing: float = _trait(0.02, 0.020)
    brow_taper: float = _trait(0.55, 0.16)
    brow_dark: float = _trait(0.70, 0.12)
    nose_length: float = _trait(0.33, 0.045)
    nose_width: float = _trait(0.155, 0.026)
    nose_bridge: float = _trait(0.065, 0.014)
    nose_lift: float = _trait(0.24, 0.040)
    nose_tip: float = _trait(0.080, 0.013)
    nose_bend: float = _trait(0.0, 0.014)
    nostril_size: float = _trait(0.034, 0.007)
    mouth_height: float = _trait(0.610, 0.036)
    mouth_width: float = _trait(0.265, 0.034)
    mouth_corner: float = _trait(0.0, 0.020)
    mouth_skew: float = _trait(0.0, 0.012)
    lip_upper: float = _trait(0.052, 0.017)
    lip_lower: float = _trait(0.075, 0.020)
    lip_bow: float = _trait(0.35, 0.17)
    lip_red: float = _trait(0.50, 0.18)
    cheek_hollow: float = _trait(0.30, 0.30)
    cheek_blush: float = _trait(0.0, 0.30)
    fold_depth: float = _trait(0.25, 0.25)
    chin_cleft: float = _trait(-0.1, 0.45)
    hair_dark: float = _trait(0.74, 0.13)
    hair_red: float = _trait(0.0, 0.35)
    hair_line: float = _trait(-0.62, 0.085)
    hair_volume: float = _trait(0.13, 0.048)
    hair_length: float = _trait(0.20, 0.50)
    hair_cover: float = _trait(0.05, 0.05)
    hair_part: float = _trait(0.0, 0.5)
    hair_sweep: float = _trait(0.0, 0.17)
    hair_peak: float = _trait(0.0, 0.050)
    hair_recess: float = _trait(0.05, 0.09)
    hair_curl: float = _trait(0.015, 0.014)
    hair_curl_pitch: float = _trait(11.0, 2.2)
    beard: float = _trait(-0.25, 0.35)
    beard_height: float = _trait(0.42, 0.07)
    moustache: float = _trait(-0.25, 0.40)
    freckles: float = _trait(-0.15, 0.30)
    scar: float = _trait(-0.25, 0.35)
    scar_x: float = _trait(0.0, 0.26)
    scar_y: float = _trait(0.15, 0.30)
    scar_angle_rad: float = _trait(0.0, 0.70)
    moles: tuple[tuple[float, float, float], ...] = ()  # (x, y, radius); a radius below zero is not drawn
    freckle_spots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class PhotoConditions:
    """What changes from photo to photo; every value is its resting one when the difficulty is 0."""

    yaw_rad: float = _trait(0.0, 0.248)
    pitch_rad: float = _trait(0.0, 0.147)
    roll_rad: float = _trait(0.0, 0.092)
    shift_x: float = _trait(0.0, 0.051)
    shift_y: float = _trait(0.0, 0.046)
    log_scale: float = _trait(0.0, 0.064)
    smile: float = _trait(0.0, 0.092)
    mouth_open: float = _trait(0.0, 0.101)
    brow_raise: float = _trait(0.0, 0.055)
    eye_close: float = _trait(0.0, 0.442)
    gaze_x: float = _trait(0.0, 0.45)
    gaze_y: float = _trait(0.0, 0.25)
    hair_change: float = _trait(0.0, 0.083)
    hair_fall: float = _trait(0.0, 0.322)
    light_x: float = _trait(0.0, 0.386)
    light_y: float = _trait(0.0, 0.276)
    shadow: float = _trait(0.0, 0.506)
    shadow_angle_rad: float = _trait(0.0, 3.0)
    shadow_edge: float = _trait(0.0, 0.60)
    exposure: float = _trait(0.0, 0.258)
    warmth: float = _trait(0.0, 0.175)
    tint: float = _trait(0.0, 0.092)
    contrast: float = _trait(0.0, 0.239)
    blur: float = _trait(0.0, 0.782)
    grain: float = _trait(0.012, 0.04)
    glasses: float = _trait(0.0, 1.0)
    sunglasses: float = _trait(0.0, 1.0)
    hat: float = _trait(0.0, 1.0)
    scarf: float = _trait(0.0, 1.0)
    hand: float = _trait(0.0, 1.0)
    hand_side: float = _trait(0.0, 1.0)
    hand_height: float = _trait(0.2, 0.35)


def _trait_table(kind: type[Any]) -> tuple[list[str], Floats, Floats]:
    drawn = [f for f in fields(kind) if "spread" in f.metadata]
    centres = np.array([f.metadata["centre"] for f in drawn])
    return [f.name for f in drawn], centres, np.array([f.metadata["spread"] for f in drawn])


_TRAIT_TABLES = {kind: _trait_table(kind) for kind in (FaceIdentity, PhotoConditions)}


def identity_key(number: int) -> str:
    """The name of one person, for example ``face-000012``; names sort as numbers do."""
    return f"face-{number:06d}" if number < 10**6 else f"face-m{number:012d}"  # letters sort after digits


def identity_of(seed: int, number: int) -> FaceIdentity:
    """The traits of one person, drawn from (seed, number) alone."""
    draws = _Draws(seed, 0, number)
    values = draws.traits(FaceIdentity, 1.0)
    mole_xyr = draws.bells(12).reshape(4, 3) * (0.30, 0.34, 0.012) + (0.0, 0.18, 0.002)
    spots = draws.uniform(36).reshape(18, 2) * (1.0, 0.34) + (-0.5, 0.02)
    moles = tuple((x, y, r) for x, y, r in mole_xyr.tolist())
    return FaceIdentity(**values, moles=moles, freckle_spots=tuple((x, y) for x, y in spots.tolist()))


def draw_photo(seed: int, identity: int, photo: int, size: int, difficulty: float) -> npt.NDArray[np.uint8]:
    """Draw one photo: RGB uint8 (size, size, 3).

    ``difficulty`` in [0, 1] scales the amplitude of every condition: 0 is a frontal, clean photo (only the
    camera's grain differs from photo to photo), 1 is extreme. The same arguments give the same bytes in
    any process and any order.
    """
    draws = _Draws(seed, 1, identity, photo)
    conditions = PhotoConditions(**draws.traits(PhotoConditions, difficulty))
    face = _person(seed, identity)
    scale = 4 if size <= 128 else 2
    scene = _scene(draws, difficulty)
    sketch = _Sketch(face, conditions)
    _draw_behind(sketch, scene)
    _draw_head(sketch)
    _draw_eyes(sketch)
    _draw_nose(sketch)
    _draw_mouth(sketch)
    _draw_hair(sketch)
    _draw_cover(sketch, scene)
    canvas, relief = sketch.paint(_background(scene, size, scale), scale)
    return _expose(canvas, relief, sketch, draws)


def photo_attributes(config: SyntheticConfig, identity: int, photo: int) -> dict[str, str]:
    """What a photo was drawn with, in words: what covers the face, how it is lit, how far it turns, how dark the skin is."""
    draws = _Draws(config.seed, 1, identity, photo)
    c = PhotoConditions(**draws.traits(PhotoConditions, config.difficulty))
    strengths = {"glasses": c.glasses + 0.2} | {
        name: getattr(c, name) for name in ("sunglasses", "hat", "scarf", "hand")
    }
    cover = max(strengths, key=lambda name: strengths[name])
    depth = _person(config.seed, identity).skin_depth
    return {
        "cover": cover if _cover(strengths[cover]) > 0 else "none",
        "light": "dark" if c.exposure < -0.2 else "bright" if c.exposure > 0.2 else "even",
        "pose": "turned" if abs(c.yaw_rad) > 0.2 else "frontal",
        "skin": "light" if depth < 0.28 else "dark" if depth > 0.40 else "medium",
    }


def photos(config: SyntheticConfig, num_processes: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield (identity key, image name, JPEG bytes) of the whole data set, ordered by identity, then photo.

    Order and bytes do not depend on ``num_processes``; 1 draws in this process, more start that many.
    Errors: ConfigError when num_processes < 1; RunError when a drawing process dies.
    **Memory**: at most four identities a process are held ahead of the reader.
    """
    if num_processes < 1:
        raise ConfigError(f"num_processes is {num_processes}; must be 1 (draw in this process) or more. Use 1.")
    return _photos(config, num_processes)


def _photos(config: SyntheticConfig, num_processes: int) -> Iterator[tuple[str, str, bytes]]:
    if num_processes == 1:
        for identity in range(config.identities):
            yield from _photos_of(config, identity)
        return
    # spawn: the caller may hold threads (torch, DALI, Ray), and a fork of those can lock up.
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), _leave_interrupt_to_parent)
    waiting: deque[Future[list[tuple[str, str, bytes]]]] = deque()
    try:
        for identity in range(config.identities):
            waiting.append(pool.submit(_photos_of, config, identity))
            if len(waiting) == 4 * num_processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            f"one of {num_processes} drawing processes died (out of memory, or killed); "
            f"draw with fewer processes: num_processes = {num_processes - 1}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _photos_of(config: SyntheticConfig, identity: int) -> list[tuple[str, str, bytes]]:
    rows = []
    for photo in range(config.photos_per_identity):
        pixels = draw_photo(config.seed, identity, photo, config.photo_size, config.difficulty)
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
        rows.append((identity_key(identity), f"{photo:04d}.jpg", jpeg.getvalue()))
    return rows


def _leave_interrupt_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- Chance -----------------------------------------------------------------------------------------------------


class _Draws:
    """Numbers from one Philox stream, keyed by what they are for.

    Only raw 64-bit words are taken from numpy: they are the part of numpy.random whose stream is promised
    not to change between versions (NEP 19).
    """

    def __init__(self, *key: int) -> None:
        self._stream = np.random.Philox(np.random.SeedSequence(key))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        words: npt.NDArray[np.uint64] = self._stream.random_raw(count)
        return words

    def uniform(self, count: int) -> Floats:
        """(count,) in [0, 1)."""
        high_bits = (self.words(count) >> np.uint64(11)).astype(np.float64)
        return high_bits * 2.0**-53

    def bells(self, count: int) -> Floats:
        """(count,) mean 0, deviation 1, bounded by 3.5: sums of four uniforms, so no face is a monster."""
        sums: Floats = self.uniform(4 * count).reshape(count, 4).sum(axis=1)
        return (sums - 2.0) * math.sqrt(3.0)

    def traits(self, kind: type[FaceIdentity] | type[PhotoConditions], amplitude: float) -> dict[str, Any]:
        names, centres, spreads = _TRAIT_TABLES[kind]
        values = centres + amplitude * spreads * self.bells(len(names))
        return dict(zip(names, values.tolist(), strict=True))


@functools.lru_cache(maxsize=64)
def _person(seed: int, number: int) -> FaceIdentity:
    return identity_of(seed, number)


@dataclass(frozen=True)
class _Scene:
    """Colours and shapes around the face; all grey and empty when the difficulty is 0."""

    backdrop: Colour
    clothes: Colour
    cloth: Colour  # of hat and scarf
    frame: Colour  # of glasses
    blobs: list[list[float]]  # x, y, width, height in [0, 1], red, green, blue offsets


def _scene(draws: _Draws, difficulty: float) -> _Scene:
    bells = draws.bells(12).reshape(4, 3) * difficulty
    blobs = draws.uniform(42).reshape(6, 7)
    blobs[:, 4:] = (blobs[:, 4:5] - 0.5 + 0.6 * (blobs[:, 4:] - 0.5)) * 170.0 * difficulty
    greys = np.array([[178.0], [96.0], [90.0], [50.0]])
    hues = bells.mean(axis=1, keepdims=True) * 1.2 + 0.5 * bells  # lean to grey, as rooms and clothes do
    backdrop, clothes, cloth, frame = (greys + hues * np.array([[52.0], [60.0], [66.0], [35.0]])).tolist()
    return _Scene(tuple(backdrop), tuple(clothes), tuple(cloth), tuple(frame), blobs.tolist())


# --- Geometry ---------------------------------------------------------------------------------------------------

_T = np.linspace(-1.0, 1.0, 11)
_T_THERE_AND_BACK = np.concatenate([_T, _T[::-1]])
_CAP = 1.0 - _T**2
_ANGLE = np.linspace(0.0, 2.0 * math.pi, 16, endpoint=False)
_CIRCLE_X, _CIRCLE_Y = np.cos(_ANGLE), np.sin(_ANGLE)
_DEPTH = 0.62  # of the half ellipsoid on which the features lie
_PICTURE_SCALE = 0.395  # picture widths in one head unit


@functools.cache
def _closed_spline(num_controls: int, per_span: int) -> Floats:
    """Weights (num_controls * per_span, num_controls) of a closed Catmull-Rom curve through its controls."""
    t = np.arange(per_span) / per_span
    blend = 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2])
    weights = np.zeros((num_controls, per_span, num_controls))
    for span in range(num_controls):
        for offset in range(4):
            weights[span, :, (span + offset - 1) % num_controls] += blend[offset]
    return weights.reshape(num_controls * per_span, num_controls)


def _mirrored_loop(right: list[tuple[float, float]], per_span: int) -> tuple[Floats, Floats]:
    """A closed curve through points given for x >= 0, first and last on the axis."""
    controls = np.array(right + [(-x, y) for x, y in right[-2:0:-1]])
    curve = _closed_spline(len(controls), per_span) @ controls
    return curve[:, 0], curve[:, 1]


def _shade(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)


class _Sketch:
    """Shapes of one photo in head units, collected first so that one rotation turns them all."""

    def __init__(self, face: FaceIdentity, conditions: PhotoConditions) -> None:
        self.face = face
        self.conditions = conditions
        m, w = face.skin_depth, 14.0 * face.skin_warmth
        self.skin: Colour = (236 - 118 * m + w, 204 - 128 * m, 184 - 132 * m - w)
        h, r = _unit(face.hair_dark), 30.0 * max(0.0, face.hair_red)
        self.hair: Colour = (198 - 172 * h + r, 160 - 142 * h - 0.2 * r, 116 - 98 * h - 0.6 * r)
        self.gap = max(0.0, conditions.mouth_open)
        self.centre = (0.5 + conditions.shift_x, 0.525 + conditions.shift_y)
        self.zoom = _PICTURE_SCALE * math.exp(conditions.log_scale)
        self._xs: list[Floats] = []
        self._ys: list[Floats] = []
        self._lifts: list[float] = []
        self._rims: list[bool] = []
        self._inks: list[tuple[str, Any, float]] = []  # what to do with the points: kind, colour, line width

    def fill(
        self, x: Floats, y: Floats, colour: Colour, alpha: float = 1.0, lift: float = 0.0, rim: bool = False
    ) -> None:
        """A filled outline; ``rim`` marks silhouettes, which keep their width when the head turns."""
        ink = (int(colour[0]), int(colour[1]), int(colour[2]), int(255 * _unit(alpha)))
        self._add(x, y, lift, rim, ("fill", ink, 0.0))

    def line(self, x: Floats, y: Floats, colour: Colour, width: float, alpha: float = 1.0, lift: float = 0.0) -> None:
        ink = (int(colour[0]), int(colour[1]), int(colour[2]), int(255 * _unit(alpha)))
        self._add(x, y, lift, False, ("line", ink, width))

    def relief(self, x: Floats, y: Floats, strength: float, lift: float = 0.0) -> None:
        """A soft change of brightness: strength -1 is black, +1 twice as bright."""
        self._add(x, y, lift, False, ("relief", int(128 * (1.0 + min(max(strength, -1.0), 0.99))), 0.0))

    def _add(self, x: Floats, y: Floats, lift: float, rim: bool, ink: tuple[str, Any, float]) -> None:
        self._xs.append(x)
        self._ys.append(y)
        self._lifts.append(lift)
        self._rims.append(rim)
        self._inks.append(ink)

    def paint(self, canvas: Image.Image, scale: int) -> tuple[Image.Image, Image.Image]:
        """Turn all shapes with the head and draw them; returns colours and relief, both at 1 / scale."""
        c = self.conditions
        lengths = [len(x) for x in self._xs]
        x, y = np.concatenate(self._xs), np.concatenate(self._ys)
        lift, rim = np.repeat(self._lifts, lengths), np.repeat(self._rims, lengths)
        inside = 1.0 - (x / (1.06 * self.face.head_width)) ** 2 - ((y - 0.08) / 1.16) ** 2
        z = _DEPTH * np.sqrt(np.maximum(inside, 0.0)) + lift
        yaw, pitch, roll = math.tanh(c.yaw_rad), math.tanh(c.pitch_rad), c.roll_rad
        x = np.where(rim, x / math.cos(yaw), x)
        x, z = x * math.cos(yaw) + z * math.sin(yaw), z * math.cos(yaw) - x * math.sin(yaw)
        y = y * math.cos(pitch) - z * math.sin(pitch)
        x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
        unit = canvas.width * self.zoom
        points = np.empty((len(x), 2))
        points[:, 0] = x * unit + canvas.width * self.centre[0]
        points[:, 1] = y * unit + canvas.width * self.centre[1]
        flat = points.ravel().tolist()
        relief = Image.new("L", canvas.size, 128)
        pen, soft = ImageDraw.Draw(canvas, "RGBA"), ImageDraw.Draw(relief)
        start = 0
        for length, (kind, ink, width) in zip(lengths, self._inks, strict=True):
            shape = flat[2 * start : 2 * (start + length)]
            start += length
            if kind == "fill":
                pen.polygon(shape, fill=ink)
            elif kind == "line":
                pen.line(shape, fill=ink, width=max(1, round(width * unit)), joint="curve")
            else:
                soft.polygon(shape, fill=ink)
        blurred = relief.reduce(scale).filter(ImageFilter.GaussianBlur(0.055 * self.zoom * canvas.width / scale))
        return canvas.reduce(scale), blurred


# --- The face, from back to front -------------------------------------------------------------------------------


def _hair_outline(sketch: _Sketch) -> tuple[Floats, Floats]:
    """The outer edge of the hair as a closed loop that starts at the crown and runs to the right."""
    face, change = sketch.face, sketch.conditions.hair_change
    volume = max(0.03, face.hair_volume + 0.4 * change)
    length = max(-0.15, face.hair_length + change)
    width = face.head_width
    right = [
        (0.0, -1.0 - volume),
        (0.62 * width + 0.5 * volume, -0.86 - 0.7 * volume),
        (width * 0.96 + volume, -0.42),
        (width * 0.96 + 0.9 * volume, 0.5 * length - 0.05),
        (width * 0.80 + 0.8 * volume, length),
        (0.0, length + 0.05),
    ]
    x, y = _mirrored_loop(right, 5)
    ripple = 1.0 + max(0.0, face.hair_curl) * np.sin(face.hair_curl_pitch * np.arctan2(x, -y))
    return x * ripple, y * ripple


def _draw_behind(sketch: _Sketch, scene: _Scene) -> None:
    face = sketch.face
    x, y = _hair_outline(sketch)
    sketch.fill(x, y, _shade(sketch.hair, 0.72), lift=-0.35, rim=True)
    neck = np.array([-1.0, 1.0, 1.12, -1.12]) * face.neck_width
    sketch.fill(neck, np.array([0.45, 0.45, 1.8, 1.8]), _shade(sketch.skin, 0.80), lift=-0.25, rim=True)
    shoulders_x = np.array([-0.95, -1.0, -0.55, 0.0, 0.55, 1.0, 0.95]) * (1.1 + face.neck_width)
    shoulders_y = np.array([2.2, 1.55, 1.24, 1.36, 1.24, 1.55, 2.2])
    sketch.fill(shoulders_x, shoulders_y, scene.clothes, lift=-0.3, rim=True)
    for side in (-1.0, 1.0):
        ear_x = side * (face.head_width + face.ear_spread) + 0.55 * face.ear_size * _CIRCLE_X
        ear_y = face.ear_height + face.ear_size * _CIRCLE_Y
        sketch.fill(ear_x, ear_y, _shade(sketch.skin, 0.90), lift=-0.12, rim=True)
        inner = side * (face.head_width + face.ear_spread) + 0.28 * face.ear_size * _CIRCLE_X
        sketch.fill(
            inner, face.ear_height + 0.6 * face.ear_size * _CIRCLE_Y, _shade(sketch.skin, 0.74), lift=-0.12, rim=True
        )


def _draw_head(sketch: _Sketch) -> None:
    face, skin = sketch.face, sketch.skin
    width, jaw = face.head_width, face.head_width * face.jaw_width
    chin = face.chin_length + 0.55 * sketch.gap
    right = [
        (0.0, -1.0),
        (0.60 * width, -0.86),
        (width * face.temple_width, -0.45),
        (width, face.cheek_height),
        (jaw, face.jaw_height + 0.2 * sketch.gap),
        (width * face.chin_width, chin - 0.10),
        (0.0, chin),
    ]
    x, y = _mirrored_loop(right, 5)
    sketch.fill(x, y, skin, rim=True)
    # A beard is the lower part of the same outline, so its edge follows the jaw.
    if face.beard > 0:
        edge = face.beard_height + 0.16 * (1.0 - np.abs(x) / width)
        sketch.fill(0.99 * x, np.maximum(y, edge), _mix(skin, sketch.hair, 0.8), min(0.9, 1.3 * face.beard), rim=True)
    for side in (-1.0, 1.0):
        cheek_x, cheek_y = side * 0.62 * width + 0.13 * _CIRCLE_X, 0.42 + 0.22 * _CIRCLE_Y
        sketch.relief(cheek_x, cheek_y, -0.22 * max(0.0, face.cheek_hollow))
        sketch.relief(side * 0.55 * width + 0.14 * _CIRCLE_X, 0.20 + 0.09 * _CIRCLE_Y, 0.10)
        if face.cheek_blush > 0:
            red = _mix(skin, (205.0, 70.0, 70.0), 0.5)
            sketch.fill(side * 0.48 * width + 0.15 * _CIRCLE_X, 0.27 + 0.11 * _CIRCLE_Y, red, 0.5 * face.cheek_blush)
    if face.chin_cleft > 0:
        sketch.relief(0.02 * _CIRCLE_X, chin - 0.13 + 0.06 * _CIRCLE_Y, -0.6 * face.chin_cleft)
    sketch.relief(0.24 * _CIRCLE_X, face.mouth_height + 0.19 + 0.7 * sketch.gap + 0.035 * _CIRCLE_Y, -0.12)
    if face.freckles > 0:
        for spot_x, spot_y in face.freckle_spots:
            sketch.fill(
                spot_x + 0.018 * _CIRCLE_X[::3],
                spot_y + 0.018 * _CIRCLE_Y[::3],
                _shade(skin, 0.62),
                1.4 * face.freckles,
            )
    for mole_x, mole_y, radius in face.moles:
        if radius > 0:
            sketch.fill(mole_x + radius * _CIRCLE_X[::2], mole_y + radius * _CIRCLE_Y[::2], _shade(skin, 0.45), 0.85)
    if face.scar > 0:
        dx, dy = 0.11 * math.cos(face.scar_angle_rad), 0.11 * math.sin(face.scar_angle_rad)
        scar_x, scar_y = face.scar_x + dx * _T[::5], face.scar_y + dy * _T[::5]
        sketch.line(scar_x, scar_y, _mix(skin, (250.0, 210.0, 205.0), 0.8), 0.028, 1.6 * face.scar)


def _draw_eyes(sketch: _Sketch) -> None:
    face, c, skin = sketch.face, sketch.conditions, sketch.skin
    squint = max(0.0, c.smile)
    closed = _unit(c.eye_close - 0.12)
    wide = 1.0 + 0.35 * _unit(-c.eye_close)
    dark = _unit(face.iris_dark)
    iris = _mix((120.0 - 30 * face.iris_hue, 150.0, 165.0 + 60 * face.iris_hue), (52.0, 34.0, 24.0), dark)
    line = _mix(_shade(skin, 0.35), (24.0, 16.0, 14.0), 0.6)
    brow_colour = _mix(skin, _shade(sketch.hair, 0.7), min(0.95, face.brow_dark))
    for side in (-1.0, 1.0):
        middle_x = side * face.eye_spacing
        middle_y = face.eye_height + side * face.eye_offset
        slope = -math.tan(face.eye_slant) * face.eye_width * _T
        upper_open = -wide * face.eye_open * _CAP * (1.0 + face.eye_skew * _T)
        lower = (0.62 * face.eye_open - 0.25 * squint) * _CAP
        upper = upper_open + (0.85 * lower - upper_open) * closed
        eye_x = middle_x + side * face.eye_width * _T
        top, bottom = middle_y + slope + upper, middle_y + slope + lower
        socket_y = middle_y - 0.05
        sketch.relief(
            middle_x + 1.15 * face.eye_width * _CIRCLE_X,
            socket_y + 0.13 * _CIRCLE_Y,
            -0.34 * max(0.0, face.socket_depth),
        )
        bag = face.eye_bag * 0.35
        if bag > 0:
            sketch.relief(middle_x + 0.8 * face.eye_width * _CIRCLE_X, middle_y + 0.13 + 0.03 * _CIRCLE_Y, -bag)
        loop_x = np.concatenate([eye_x, eye_x[::-1]])
        sketch.fill(loop_x, np.concatenate([top, bottom[::-1]]), (232.0, 228.0, 222.0))
        gaze_x = middle_x + c.gaze_x * 0.07
        gaze_y = middle_y - 0.012 + 0.05 * c.gaze_y
        for radius, colour in ((face.iris_size, iris), (0.45 * face.iris_size, (14.0, 12.0, 12.0))):
            ring_x = gaze_x + radius * _CIRCLE_X
            order = slice(None) if side > 0 else slice(None, None, -1)  # np.interp wants rising x
            ring_top = np.interp(ring_x, eye_x[order], top[order])
            ring_bottom = np.interp(ring_x, eye_x[order], bottom[order])
            ring_y = np.minimum(np.maximum(gaze_y + radius * _CIRCLE_Y, ring_top), ring_bottom)
            sketch.fill(ring_x, ring_y, colour)
        if closed < 0.5:
            glint = 0.016 * _CIRCLE_X[::4], 0.016 * _CIRCLE_Y[::4]
            sketch.fill(gaze_x - 0.025 + glint[0], gaze_y - 0.025 + glint[1], (250.0, 250.0, 250.0), 0.8)
        sketch.line(eye_x, top, line, max(0.012, face.lid_weight))
        sketch.line(eye_x[2:], bottom[2:], _shade(skin, 0.62), 0.012, 0.8)
        crease = top - max(0.012, face.lid_crease) * (0.35 + 0.65 * _CAP)
        sketch.line(eye_x, crease, _shade(skin, 0.68), 0.014, 0.8)
        lift = c.brow_raise - 0.03 * closed
        brow_middle = middle_y - face.brow_height - lift - 0.4 * side * face.eye_offset
        brow_x = side * (face.eye_spacing + face.brow_spacing + face.brow_width * _T)
        ridge = brow_middle - face.brow_arch * _CAP + (face.brow_tilt + 0.3 * lift) * _T
        thick = (
            max(0.010, face.brow_thickness)
            * (1.0 - _unit(face.brow_taper) * 0.5 * (_T + 1.0))
            * (0.55 + 0.45 * np.sqrt(_CAP))
        )
        brow_y = np.concatenate([ridge - thick, (ridge + thick)[::-1]])
        sketch.fill(np.concatenate([brow_x, brow_x[::-1]]), brow_y, brow_colour, 0.92, lift=0.03)


def _draw_nose(sketch: _Sketch) -> None:
    face, skin = sketch.face, sketch.skin
    root_y, tip_y = face.eye_height - 0.02, face.eye_height + face.nose_length
    half, lift = face.nose_width, face.nose_lift
    bend = face.nose_bend
    for side in (-1.0, 1.0):
        edge_x = side * np.array([face.nose_bridge + 0.035, face.nose_bridge, 0.75 * half, 1.15 * half]) + bend
        edge_y = np.array([root_y - 0.08, root_y + 0.14, tip_y - 0.04, tip_y - 0.02])
        sketch.relief(edge_x, edge_y, -0.26, lift=0.5 * lift)
        wing_x, wing_y = side * 0.72 * half + bend + 0.36 * half * _CIRCLE_X, tip_y + 0.055 * _CIRCLE_Y
        sketch.fill(wing_x, wing_y, _shade(skin, 0.90), lift=0.55 * lift)
        sketch.line(
            side * (half * np.array([0.86, 1.08, 1.0, 0.72])) + bend,
            tip_y + np.array([-0.06, 0.0, 0.045, 0.06]),
            _shade(skin, 0.60), 0.018, 0.85, lift=0.5 * lift,
        )  # fmt: skip
        fold_x = side * np.array([1.15 * half, 1.5 * half, face.mouth_width + 0.08, face.mouth_width + 0.05])
        fold_y = np.array([tip_y, tip_y + 0.07, face.mouth_height - 0.03, face.mouth_height + 0.04])
        depth = face.fold_depth + 1.8 * max(0.0, sketch.conditions.smile)
        if depth > 0:
            sketch.line(fold_x, fold_y, _shade(skin, 0.70), 0.016, min(0.85, depth))
    sketch.relief(
        bend + 0.45 * face.nose_bridge * _CIRCLE_X, 0.5 * (root_y + tip_y) + 0.16 * _CIRCLE_Y, 0.16, lift=lift
    )
    sketch.fill(
        bend + face.nose_tip * _CIRCLE_X, tip_y + 0.01 + 0.8 * face.nose_tip * _CIRCLE_Y, _shade(skin, 1.02), lift=lift
    )
    sketch.relief(bend + 0.6 * face.nose_tip * _CIRCLE_X, tip_y - 0.01 + 0.035 * _CIRCLE_Y, 0.14, lift=lift)
    nostril = max(0.010, face.nostril_size)
    for side in (-1.0, 1.0):
        hole_x = bend + side * 0.50 * half + 1.15 * nostril * _CIRCLE_X[::2]
        sketch.fill(hole_x, tip_y + 0.062 + 0.6 * nostril * _CIRCLE_Y[::2], _shade(skin, 0.36), lift=0.7 * lift)
    sketch.relief(bend + half * _CIRCLE_X, tip_y + 0.11 + 0.04 * _CIRCLE_Y, -0.20, lift=0.2 * lift)


def _draw_mouth(sketch: _Sketch) -> None:
    face, c, gap = sketch.face, sketch.conditions, sketch.gap
    half = face.mouth_width * (1.0 + 0.9 * c.smile - 0.5 * gap)
    curve = face.mouth_corner + 0.55 * c.smile
    x = half * _T
    seam = face.mouth_height + curve * (0.4 - _T**2) + face.mouth_skew * _T
    round_cap = np.sqrt(_CAP)
    bow = 1.0 - _unit(face.lip_bow) * np.exp(-((_T / 0.16) ** 2))
    top = seam - max(0.012, face.lip_upper) * (0.5 * _CAP + 0.5 * round_cap) * bow
    inner = seam + gap * round_cap
    bottom = inner + max(0.02, face.lip_lower) * _CAP
    lip = _mix(_shade(sketch.skin, 0.80), (176.0, 62.0, 66.0), _unit(0.18 + 0.62 * face.lip_red))
    loop_x = half * _T_THERE_AND_BACK
    if face.moustache > 0:
        hair_y = np.concatenate([seam - 0.13 * (0.45 + 0.55 * _CAP), (seam + 0.01)[::-1]])
        sketch.fill(
            1.12 * loop_x, hair_y, _mix(sketch.skin, sketch.hair, 0.8), min(0.9, 1.3 * face.moustache), lift=0.03
        )
    sketch.fill(loop_x, np.concatenate([top, seam[::-1]]), _shade(lip, 0.88), lift=0.04)
    sketch.fill(loop_x, np.concatenate([inner, bottom[::-1]]), lip, lift=0.04)
    if gap > 0.01:
        sketch.fill(loop_x, np.concatenate([seam, inner[::-1]]), (58.0, 22.0, 24.0), lift=0.03)
        teeth = seam + np.minimum(0.45 * gap, 0.06) * round_cap
        sketch.fill(0.86 * loop_x, np.concatenate([seam, teeth[::-1]]), (226.0, 220.0, 208.0), lift=0.03)
    sketch.line(x, seam, _shade(lip, 0.42), 0.016, 0.9, lift=0.04)
    sketch.relief(0.6 * half * _CIRCLE_X, face.mouth_height + gap + face.lip_lower + 0.06 + 0.025 * _CIRCLE_Y, -0.16)


def _draw_hair(sketch: _Sketch) -> None:
    face, change = sketch.face, sketch.conditions.hair_change
    width, hair = face.head_width, sketch.hair
    fall = 0.6 * max(0.0, sketch.conditions.hair_fall - 0.25)
    part = math.tanh(face.hair_part)
    ripple = max(0.0, face.hair_curl) * np.sin(face.hair_curl_pitch * 1.7 * _HAIRLINE_T)
    line = (
        min(face.hair_line + 0.3 * change, -0.36)
        + 0.34 * np.abs(_HAIRLINE_T) ** 3
        - max(0.0, face.hair_recess) * np.exp(-(((np.abs(_HAIRLINE_T) - 0.55) / 0.22) ** 2))
        + face.hair_peak * np.exp(-((_HAIRLINE_T / 0.16) ** 2))
        + face.hair_sweep * (_HAIRLINE_T - part) * (1.0 - _HAIRLINE_T**2)
        + fall * np.exp(-(((_HAIRLINE_T - 0.5 * part) / 0.35) ** 2))
        - 0.06 * np.exp(-(((_HAIRLINE_T - part) / 0.12) ** 2))
        + ripple
    )
    outer_x, outer_y = _hair_outline(sketch)
    # The loop starts at the crown: five spans to the right temple and as many to the left one are the cap.
    cap = np.r_[len(outer_x) - 12 : len(outer_x), 0:13]
    sketch.fill(
        np.concatenate([outer_x[cap], 0.97 * width * _HAIRLINE_T[::-1]]),
        np.concatenate([outer_y[cap], line[::-1]]),
        hair,
        rim=True,
    )
    for share in (0.25, 0.5, 0.75):
        for side in (-1.0, 1.0):
            strand_x = np.array([part * 0.6 * width, side * share * width * 0.8, side * share * width * 1.15])
            strand_y = np.array([-1.02, -0.98 + 0.10 * share, -0.84 + 0.20 * share]) - 0.4 * face.hair_volume
            sketch.line(strand_x, strand_y, _shade(hair, 1.35), 0.03, 0.35, lift=-0.1)
    length = face.hair_length + change
    for side in (-1.0, 1.0):
        inner = width * (0.93 - max(0.0, face.hair_cover))
        down = max(-0.18, min(length, 1.3))
        lock_x = side * np.array([width * 0.9, width + 0.07, width + 0.10, width + 0.02, inner, inner + 0.02])
        lock_y = np.array([-0.5, -0.4, 0.5 * down, down, down - 0.06, -0.2])
        sketch.fill(lock_x, lock_y, _shade(hair, 0.92), rim=True)


_HAIRLINE_T = np.linspace(-1.0, 1.0, 25)


def _cover(strength: float) -> float:
    """How much of a cover shows: none for most photos, more the further the draw lies beyond 0.75."""
    return _unit((strength - 0.75) / 0.5)


def _draw_cover(sketch: _Sketch, scene: _Scene) -> None:
    face, c = sketch.face, sketch.conditions
    shades, frames = _cover(c.sunglasses), _cover(c.glasses + 0.2)
    for side in (-1.0, 1.0):
        lens_x = side * face.eye_spacing + 0.225 * np.sign(_CIRCLE_X) * np.abs(_CIRCLE_X) ** 0.7
        lens_y = face.eye_height + 0.02 + 0.165 * np.sign(_CIRCLE_Y) * np.abs(_CIRCLE_Y) ** 0.8
        if shades > 0:
            sketch.fill(lens_x, lens_y, _shade(scene.frame, 0.5), 0.55 + 0.42 * shades, lift=0.10)
        if frames > 0 or shades > 0:
            ring_x, ring_y = np.append(lens_x, lens_x[0]), np.append(lens_y, lens_y[0])
            sketch.line(ring_x, ring_y, scene.frame, 0.028, max(frames, shades), lift=0.10)
            arm_x = side * np.array([face.eye_spacing + 0.22, face.head_width])
            sketch.line(arm_x, np.full(2, face.eye_height - 0.02), scene.frame, 0.028, max(frames, shades))
    if frames > 0 or shades > 0:
        bridge_x = np.array([-1.0, 1.0]) * max(0.02, face.eye_spacing - 0.22)
        sketch.line(bridge_x, np.full(2, face.eye_height - 0.01), scene.frame, 0.028, max(frames, shades), lift=0.14)
    hat = _cover(c.hat)
    if hat > 0:
        brim = -0.86 + 0.42 * hat
        reach = 1.22 * face.head_width
        hat_x = np.concatenate([reach * _T, 0.98 * reach * _T[::-1]])
        hat_y = np.concatenate([brim + 0.06 * _CAP, -0.72 - 0.75 * np.sqrt(_CAP)])
        sketch.fill(hat_x, hat_y, scene.cloth, rim=True)
        sketch.line(reach * _T, brim + 0.06 * _CAP, _shade(scene.cloth, 0.7), 0.06)
    scarf = _cover(c.scarf)
    if scarf > 0:
        edge = 1.06 - 0.62 * scarf
        scarf_x = np.concatenate([1.12 * face.head_width * _T, np.array([1.0, -1.0])])
        scarf_y = np.concatenate([edge + 0.10 * _CAP - 0.05 * np.sin(9.0 * _T), np.array([1.7, 1.7])])
        sketch.fill(scarf_x, scarf_y, _shade(scene.cloth, 1.15), rim=True)
        sketch.line(1.1 * face.head_width * _T, edge + 0.22 + 0.16 * _CAP, _shade(scene.cloth, 0.85), 0.04)
    hand = _cover(c.hand)
    if hand > 0:
        side = 1.0 if c.hand_side >= 0 else -1.0
        reach = side * (1.05 - 0.85 * hand)
        for finger in range(4):
            y = c.hand_height + 0.165 * finger
            finger_x = np.array([reach + side * 0.05 * abs(finger - 1.2), side * 0.8, side * 1.5])
            finger_y = np.array([y, y + 0.05, y + 0.35])
            sketch.line(finger_x, finger_y, _shade(sketch.skin, 0.62), 0.17, lift=0.22)
            sketch.line(finger_x, finger_y, _shade(sketch.skin, 0.93), 0.14, lift=0.22)


# --- The camera -------------------------------------------------------------------------------------------------


def _background(scene: _Scene, size: int, scale: int) -> Image.Image:
    """Blurred clutter: rectangles and discs on 24 x 24 pixels, enlarged smoothly."""
    side = 24
    red, green, blue = scene.backdrop
    small = Image.new("RGB", (side, side), (int(red), int(green), int(blue)))
    pen = ImageDraw.Draw(small)
    for number, (x, y, width, height, dr, dg, db) in enumerate(scene.blobs):
        box = (
            side * (x - 0.45 * width),
            side * (y - 0.45 * height),
            side * (x + 0.45 * width),
            side * (y + 0.45 * height),
        )
        colour = tuple(int(min(max(v, 0.0), 255.0)) for v in (red + dr, green + dg, blue + db))
        if number % 2:
            pen.rectangle(box, fill=colour)
        else:
            pen.ellipse(box, fill=colour)
    smooth = small.resize((size, size), Image.Resampling.BILINEAR)
    return smooth.resize((size * scale, size * scale), Image.Resampling.NEAREST)  # half the cost of one step


def _expose(canvas: Image.Image, relief: Image.Image, sketch: _Sketch, draws: _Draws) -> npt.NDArray[np.uint8]:
    """Light, colour cast, contrast, blur and grain, in that order."""
    c = sketch.conditions
    size = canvas.width
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = ((axis - sketch.centre[0]) / sketch.zoom / 0.85)[None, :]
    y = ((axis - sketch.centre[1]) / sketch.zoom / 1.1)[:, None]
    tilt = np.tanh(c.light_x * x + (c.light_y - 0.12) * y)
    edge = math.cos(c.shadow_angle_rad) * x + math.sin(c.shadow_angle_rad) * y - c.shadow_edge
    shadow = 0.8 * math.tanh(max(0.0, c.shadow)) * 0.5 * (1.0 + np.tanh(5.0 * edge))
    light = (1.0 + 0.75 * tilt) * (1.0 - shadow) * math.exp(c.exposure)
    gains = np.exp(np.array([c.warmth, c.tint - 0.1 * c.warmth, -c.warmth], dtype=np.float32))
    field_of_light = light.astype(np.float32) * (np.asarray(relief, dtype=np.float32) / 128.0)
    pixels = np.asarray(canvas, dtype=np.float32) * field_of_light[:, :, None] * gains
    pixels = 118.0 + (pixels - 118.0) * math.exp(c.contrast)
    if c.blur > 0:
        smooth = Image.fromarray(np.clip(pixels, 0.0, 255.0).astype(np.uint8))
        pixels = np.asarray(smooth.filter(ImageFilter.GaussianBlur(c.blur * size / 64.0)), dtype=np.float32)
    count = size * size * 3
    byte_pairs = draws.words(-(-count // 4)).view(np.uint8)[: 2 * count].reshape(2, size, size, 3)
    grain = byte_pairs[0].astype(np.float32) - byte_pairs[1]  # triangular, deviation 104
    pixels = pixels + grain * (abs(c.grain) * 255.0 / 104.0)
    return np.clip(pixels + 0.5, 0.0, 255.0).astype(np.uint8)
