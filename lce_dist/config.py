"""One typed, frozen, strict config a run; unknown keys and wrong types are errors that name the key.

Sections are grouped by what they may change: those of ``TRAINING_SECTIONS`` the trained weights, ``evaluation`` the
reported numbers, the others neither.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lce_dist.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunConfig(_Section):
    """Who the run is and where it lives. Changes no result but for ``seed``."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = "quickstart"
    dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1


class SyntheticConfig(_Section):
    """The embedded data set: faces drawn by arithmetic (pipelines/synthetic.py)."""

    identities: Annotated[int, Field(ge=4)] = 600
    photos_per_identity: Annotated[int, Field(ge=2)] = 16
    photo_size: Annotated[int, Field(ge=32, le=512)] = 64
    difficulty: Fraction = 0.5
    seed: Annotated[int, Field(ge=0)] = 1


class DataConfig(_Section):
    """Which images, and which identities each model sees. Exactly one source is named.

    shards may be a URL (s3://, gs://, https://). split: the split.json of ``lce data split``, in place of heldout_identities,
    old_identities and split_seed. shuffle: over all samples ("global"), or within shuffle_window shards at a time of each of
    shuffle_lanes lines of shards ("blocks", by default where shards are at a URL). sampling: every image once an epoch ("uniform"), every identity as
    often ("balanced"), or images_per_identity of each that is in a batch ("pk").
    bad_images: one that cannot be decoded in training ends the run ("stop"), or another takes its place ("skip"), for as many as
    bad_images_limit of a model's training images, by what each rank meets.
    """

    synthetic: SyntheticConfig | None = None
    images: str | None = None
    shards: str | None = None
    image_size: Annotated[int, Field(ge=16, le=1024)] = 112
    heldout_identities: Annotated[int, Field(ge=2)] = 100
    old_identities: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    split_seed: Annotated[int, Field(ge=0)] = 1
    split: str | None = None
    shuffle: Literal["auto", "global", "blocks"] = "auto"
    shuffle_lanes: Count = 8
    shuffle_window: Count = 4
    sampling: Literal["uniform", "balanced", "pk"] = "uniform"
    images_per_identity: Count = 4
    bad_images: Literal["stop", "skip"] = "stop"
    bad_images_limit: Fraction = 0.001

    @model_validator(mode="after")
    def _one_way_to_sample(self) -> DataConfig:
        if self.sampling != "uniform" and self.shuffle == "blocks":
            raise ValueError(f"sampling is {self.sampling!r} and shuffle is 'blocks'; only 'uniform' reads by blocks")
        return self

    @model_validator(mode="after")
    def _no_secret_in_url(self) -> DataConfig:
        if self.shards is not None and "://" in self.shards and "@" in urlsplit(self.shards).netloc:
            raise ValueError(
                "shards holds a user or a password; give credentials by the environment (AWS_..., GOOGLE_...)"
            )
        return self

    @model_validator(mode="after")
    def _split_says_all(self) -> DataConfig:
        if self.split is not None and self.shards is None:
            raise ValueError(f"split is {self.split!r}; it names images of a packed data set. Name that with shards")
        for key in ("heldout_identities", "old_identities", "split_seed"):
            if self.split is not None and getattr(self, key) != DataConfig.model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)} and split is {self.split!r}, which says who sees what. Remove {key}"
                )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        named = [key for key in ("synthetic", "images", "shards") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError(
                f"names {len(named)} sources ({', '.join(named) or 'none'}); must name exactly one of "
                "synthetic, images (a folder or a .zip, one sub-folder an identity), shards (a packed data set)"
            )
        return self


class AugmentConfig(_Section):
    """Amplitudes of the training augmentation; zero switches a part off.

    low_resolution: scaled down to low_resolution_min_scale of its side at most, and up again. occlusion: one grey rectangle.
    jpeg: compressed anew, at a quality of jpeg_min_quality to 95.
    """

    flip: bool = True
    crop_min_area: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2
    saturation: Fraction = 0.2
    hue_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 6.0
    blur_probability: Fraction = 0.1
    blur_sigma_max_px: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    grey_probability: Fraction = 0.05
    low_resolution_probability: Fraction = 0.0
    low_resolution_min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    occlusion_probability: Fraction = 0.0
    occlusion_max_area: Annotated[float, Field(gt=0.0, le=0.9)] = 0.25
    jpeg_probability: Fraction = 0.0
    jpeg_min_quality: Annotated[int, Field(ge=1, le=100)] = 30


class NetConfig(_Section):
    """A network and how long it trains."""

    net: str
    embedding_dim: Count = 512
    epochs: Positive = 20.0


class InputConfig(_Section):
    """What a model from a file expects to see; the default is what our own networks get.

    size: pixels a side (None: data.image_size). mean, std: of pixel values 0 to 255, per channel in the order of
    ``channels``. flip_average: the vector is the mean of the unit vectors of image and mirror.
    """

    size: Annotated[int, Field(ge=16, le=1024)] | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[Positive, Positive, Positive] = (127.5, 127.5, 127.5)
    flip_average: bool = False

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _list_is_fine(cls, value: Any) -> Any:
        return tuple(float(v) if isinstance(v, int) else v for v in value) if isinstance(value, list) else value


class NewConfig(_Section):
    """The new model: a network that is trained here, or one from a file (``weights``, as those of the old model)."""

    net: str | None = None
    embedding_dim: Count = 512
    epochs: Positive = 20.0
    weights: str | None = None
    input: InputConfig = InputConfig()

    @model_validator(mode="after")
    def _net_or_file(self) -> NewConfig:
        if self.weights is None and self.net is None:
            raise ValueError("net and weights are missing; name a net to train, or weights that exist")
        if self.weights is None and self.input != InputConfig():
            raise ValueError("input is set; it is for a model from a file (weights). Remove it")
        return self

    @property
    def trained(self) -> NetConfig | None:
        """The network to train; None for a file that brings its own."""
        if self.net is None:
            return None
        return NetConfig(net=self.net, embedding_dim=self.embedding_dim, epochs=self.epochs)


class OldConfig(_Section):
    """The old model: a network that is trained here, one from a file (``weights``), or stored ``vectors`` alone.

    weights: safetensors or a torch state dict (with ``net``); TorchScript, torch.export or ONNX (without).
    vectors: Parquet, npz or npy, keyed by image or identity; beside ``weights`` they check the preprocessing.
    identities: a file of the identity keys that a given model was trained on, one a line, for compat.seen_only.
    """

    net: str | None = None
    embedding_dim: Count = 512
    epochs: Positive = 20.0
    weights: str | None = None
    vectors: str | None = None
    identities: str | None = None
    input: InputConfig = InputConfig()

    @property
    def is_given(self) -> bool:
        """Whether the model, or its vectors, comes from a file, so that no run knows who is in its training set."""
        return self.weights is not None or self.vectors is not None

    @model_validator(mode="after")
    def _net_or_file(self) -> OldConfig:
        if self.weights is None and self.vectors is None and self.net is None:
            raise ValueError("net and weights are missing; name a net to train, or weights or vectors that exist")
        if self.weights is None and self.vectors is not None and self.net is not None:
            raise ValueError(
                "net and vectors are set; vectors take the old model's place, or check weights. Remove one"
            )
        if self.weights is None and self.input != InputConfig():
            raise ValueError("input is set; it is for a model from a file (weights). Remove it")
        if self.identities is not None and not self.is_given:
            raise ValueError("identities is set; it is for a model from a file (weights, vectors). Remove it")
        return self


class HeadConfig(_Section):
    """The classification layer: its margin, its negatives, its optimizer, and how it is computed."""

    loss: Literal["softmax", "arcface", "cosface", "combined", "adaface", "magface", "curricularface"] = "cosface"
    scale: Annotated[float, Field(gt=0.0, le=80.0)] = 64.0
    margin_factor: Annotated[float, Field(ge=1.0, le=4.0)] | None = None
    margin_rad: Annotated[float, Field(ge=0.0, lt=3.14)] | None = None
    margin_cos: Annotated[float, Field(ge=0.0, lt=2.0)] | None = None
    margin_rad_upper: Annotated[float, Field(ge=0.0, lt=3.14)] | None = None
    norm_lower: Positive | None = None
    norm_upper: Positive | None = None
    norm_weight: Annotated[float, Field(ge=0.0)] | None = None
    straight_through: bool = False
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    sample_policy: Literal["freeze", "lazy", "dense"] = "lazy"
    conflict_cos: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    rows: Literal["fp32", "split"] = "fp32"
    state: Literal["fp32", "bf16"] = "fp32"
    implementation: Literal["auto", "dense", "chunked", "triton"] = "auto"
    exponentials: Literal["auto", "keep", "recompute"] = "auto"
    operands: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    chunk_classes: Count | None = None
    start_from: str | None = None

    @model_validator(mode="after")
    def _margin_fits_loss(self) -> HeadConfig:
        used = MARGIN_KEYS[self.loss]
        for key in ("margin_factor", "margin_rad", "margin_cos", "margin_rad_upper", *_NORM_KEYS):
            value = getattr(self, key)
            if key in used and value is None:
                raise ValueError(f"{key} is not set; loss = {self.loss!r} needs it")
            if key not in used and value is not None:
                raise ValueError(f"{key} is {value}; loss = {self.loss!r} does not use it. Remove it")
        if self.loss == "magface" and not (self.norm_lower or 0.0) < (self.norm_upper or 0.0):
            raise ValueError(f"norm_lower is {self.norm_lower}; must be below norm_upper ({self.norm_upper})")
        if self.sample_rate < 1.0 and self.sample_policy == "lazy" and self.optimizer == "adamw":
            raise ValueError(
                "sample_policy is 'lazy'; the steps that a row misses can be made up exactly for optimizer = 'sgd' "
                "only. Use 'freeze' or 'dense' with adamw"
            )
        if self.rows == "split" and self.operands == "fp16":
            raise ValueError("operands is 'fp16'; split rows are multiplied as their bf16 halves. Use 'bf16' or 'auto'")
        return self


_NORM_KEYS = ("norm_lower", "norm_upper", "norm_weight")
MARGIN_KEYS: dict[str, tuple[str, ...]] = {
    "softmax": (),
    "arcface": ("margin_rad",),
    "cosface": ("margin_cos",),
    "combined": ("margin_factor", "margin_rad", "margin_cos"),
    "adaface": ("margin_rad",),
    "magface": ("margin_rad", "margin_rad_upper", *_NORM_KEYS),
    "curricularface": ("margin_rad",),
}


Manner = Literal["direct", "backward", "forward"]
BridgeKind = Literal["auto", "stacked", "linear", "mlp", "orthogonal", "procrustes", "least_squares", "paper", "fct"]
MOST_MAPPED_CLASSES = 128  # of a step, over all ranks, unless align_share says otherwise; see docs/study.md, Cost


class CompatConfig(_Section):
    """How the new space is tied to the old one: what is trained, in which manner, by which method.

    mode: the new model is trained to be compatible (``training-``) or both exist and a map between them is fitted
    (``mapping-``); ``direct`` compares vectors as they are, ``backward`` maps new queries into the old space,
    ``forward`` maps the stored old vectors into the new one. ``preset`` gives keys that are not set other values.
    The weights that a config does not set follow ``head.scale`` (see ``weights_for``); here they are those of the direct manner at a scale of 64.
    """

    mode: Literal[
        "training-direct",
        "training-backward",
        "training-forward",
        "mapping-direct",
        "mapping-backward",
        "mapping-forward",
    ] = "training-direct"
    method: str = "lce"
    method_weight: Annotated[float, Field(ge=0.0)] | None = None
    preset: Literal["default", "paper", "reference-code"] = "default"
    align_weight: Annotated[float, Field(ge=0.0)] = 128.0
    boundary_weight: Annotated[float, Field(ge=0.0)] = 4.0
    contrast_weight: Annotated[float, Field(ge=0.0)] | None = None
    pair_weight: Annotated[float, Field(ge=0.0)] | None = None
    boundary: Literal["cos", "angle"] = "cos"
    boundary_policy: Literal["max", "percentile", "iqr"] = "max"
    boundary_percentile: Annotated[float, Field(gt=0.0, le=100.0)] = 95.0
    slack_rad: Annotated[float, Field(ge=0.0, lt=3.15)] = 0.0
    single_image: Literal["align_only", "slack"] = "align_only"
    seen_only: bool = False
    rows_from_old: bool = False
    centres: Literal["fp32", "fp16"] = "fp32"
    align_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    bridge: BridgeKind = "auto"
    bridge_heldout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2

    @model_validator(mode="after")
    def _slack_for_single_images(self) -> CompatConfig:
        if self.single_image == "slack" and self.slack_rad == 0.0:
            raise ValueError(
                "single_image is 'slack' and slack_rad is 0: classes of one image would have a boundary of no width. "
                "Set slack_rad, or single_image to 'align_only'"
            )
        return self

    @property
    def manner(self) -> Manner:
        """The second half of ``mode``."""
        return self.mode.partition("-")[2]  # type: ignore[return-value]

    @property
    def maps_only(self) -> bool:
        """Whether both models are frozen and a map alone is fitted."""
        return self.mode.startswith("mapping-")

    @property
    def joint_bridge(self) -> Literal["stacked", "linear", "mlp", "orthogonal", "paper"]:
        """The map that is trained with the network; closed forms cannot be, and are fitted afterwards."""
        kinds: dict[str, Literal["stacked", "mlp", "orthogonal", "paper"]]
        kinds = {"stacked": "stacked", "paper": "paper", "mlp": "mlp", "fct": "mlp", "orthogonal": "orthogonal"}
        return kinds.get(self.bridge, "linear")

    def align_period(self, num_classes: int) -> int:
        """In how many steps every class has its turn in an alignment through maps."""
        if self.align_share is not None:
            return max(1, round(1.0 / self.align_share))
        return -(-num_classes // MOST_MAPPED_CLASSES)


def weights_for(scale: float, mode: str) -> dict[str, object]:
    """Default weights of LCE under the head's scale: the slopes of the classification loss grow with it, so must theirs.

    Through maps a quarter of the alignment: more of it holds the new rows in the old space's dimensions, for nothing.
    Chosen by ``benchmarks.compatibility`` (docs/study.md). Where both models exist there is no such loss: equal weights.
    Those of contrast and pairs follow the number of classes, which no config knows: compat/vector_weights.py.
    """
    if mode.startswith("mapping-"):
        return {"align_weight": 1.0, "boundary_weight": 1.0, "contrast_weight": 0.0, "pair_weight": 0.0}
    align = 2.0 * scale if mode.endswith("-direct") else 0.5 * scale
    return {"align_weight": align, "boundary_weight": scale / 16.0}


_REFERENCE_MSE_WEIGHT = 100.0  # of a mean over elements of unit rows: (2 / dimension) * mean(1 - cos)
# What a preset says in place of the defaults; see docs/methods.md for where each differs from its source.
PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "paper": {
        "align_weight": 10.0,
        "boundary_weight": 10.0,
        "contrast_weight": 0.0,
        "pair_weight": 0.0,
        "boundary": "angle",
        "boundary_policy": "max",
        "bridge": "paper",
    },
    "reference-code": {
        "boundary": "cos",
        "boundary_policy": "max",
        "boundary_weight": 1.0,
        "contrast_weight": 0.0,
        "pair_weight": 0.0,
        "bridge": "paper",
    },
}


_OF_TRAINING = (
    "method_weight",
    "contrast_weight",
    "pair_weight",
    "align_share",
    "boundary_policy",
    "boundary_percentile",
    "slack_rad",
    "single_image",
    "seen_only",
    "rows_from_old",
    "centres",
)
_OF_CLASS_TERMS = ("align_weight", "boundary_weight", "boundary")


def _without_effect(compat: CompatConfig) -> dict[str, str]:
    """Keys that nothing reads in this mode, and why. What a method reads is its card's matter (compat/method.py)."""
    idle: dict[str, str] = {}
    if compat.maps_only:
        idle |= dict.fromkeys(_OF_TRAINING, f"compat.mode is {compat.mode!r}, in which no model is trained")
        if compat.bridge != "paper" or compat.manner == "direct":
            why = f"compat.mode is {compat.mode!r}, where the class terms train a map of compat.bridge 'paper' alone"
            idle |= dict.fromkeys(_OF_CLASS_TERMS, why)
    if compat.manner == "direct":
        idle["bridge"] = f"compat.mode is {compat.mode!r}, which has no map to choose"
    elif compat.contrast_weight != 0.0:  # 0 is what such a run has
        idle.setdefault(
            "contrast_weight",
            f"compat.mode is {compat.mode!r}; vectors are told apart by old centres in the direct manner",
        )
    if compat.mode == "training-direct":
        idle |= dict.fromkeys(("bridge_heldout", "align_share"), "compat.mode is 'training-direct', which has no map")
    if compat.boundary_policy != "percentile":
        idle.setdefault("boundary_percentile", f"compat.boundary_policy is {compat.boundary_policy!r}")
    return idle


def _filled(preset: str, mode: str, scale: float, new_dim: float) -> dict[str, object]:
    filled = weights_for(scale, mode) | PRESETS[preset]
    if preset == "reference-code":
        filled["align_weight"] = 2.0 * _REFERENCE_MSE_WEIGHT / new_dim
    return filled


def _number(section: Any, key: str, default: float) -> float:
    """A positive number from a section that nobody has checked yet."""
    value = section.get(key, default) if isinstance(section, dict) else default
    good = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if good else default


class OptimConfig(_Section):
    """SGD with momentum for the network and, on its own rows, for the head; ``clip_norm`` is the network's alone."""

    global_batch: Count = 512
    accumulation: Count = 1
    lr: Positive = 0.1
    head_lr: Positive | None = None
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4
    warmup_fraction: Fraction = 0.05
    clip_norm: Annotated[float, Field(ge=0.0)] = 5.0
    zero_stage: Literal[0, 1, 2] = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class EvaluationConfig(_Section):
    """All pairs of the held-out identities' images, and those of public pair files (``pairs``: lfw.bin, ...).

    attributes: a .csv or .parquet by whose columns the held-out images are grouped.
    """

    fars: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (1e-2, 1e-3)
    criterion_far: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-2
    attributes: str | None = None
    pairs: tuple[str, ...] = ()

    @field_validator("fars", "pairs", mode="before")
    @classmethod
    def _list_is_fine(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _criterion_is_reported(self) -> EvaluationConfig:
        if self.criterion_far not in self.fars:
            raise ValueError(f"criterion_far is {self.criterion_far}; must be one of fars {list(self.fars)}")
        return self


Off = Literal["off"]
Auto = Literal["auto"]


class GateConfig(_Section):
    """What an upgrade must reach before it is shipped (``lce gate``), all at evaluation.criterion_far; "off": not asked.

    What is asked and was not measured does not pass; "auto" asks the usual bound where it was measured.
    confidence: share of samples of identities in which M(n,o) > M(o,o). min_self_gain: of M(n,n) - M(o,o). min_self_ratio: of
    M(n,n) / M(*,*) (auto: 0.97). max_far_ratio: FAR reached when the old threshold is kept, over the wanted one.
    max_negative_flips: of all genuine pairs. min_slice_gain: of M(n,o) - M(o,o) in every group of at least min_slice_images
    images, within its interval (auto: -0.02).
    """

    confidence: Fraction | Off = 0.95
    min_self_gain: float | Off = 0.0
    min_self_ratio: Positive | Off | Auto = "auto"
    max_far_ratio: Positive | Off = "off"
    max_negative_flips: Fraction | Off = 0.1
    min_slice_gain: float | Off | Auto = "auto"
    min_slice_images: Count = 100


class CheckpointConfig(_Section):
    """How often a stage is saved: in steps; the measurement of the old space in rounds of 128 images a rank.

    evaluate: checkpoints of the new model are looked at while it trains, on processors that are free ("auto"), or on whatever is
    there at the lowest priority ("always"); each evaluate_every-th of them, over at most evaluate_images held-out images.
    grace_s: how long a run that was asked to stop (SIGTERM, Ctrl-C) may take to save; less than Kubernetes gives a pod.
    """

    every_steps: Count = 100
    every_rounds: Count = 2000
    keep: Annotated[int, Field(ge=2)] = 2
    evaluate: Literal["auto", "always", "off"] = "auto"
    evaluate_every: Count = 1
    evaluate_images: Annotated[int, Field(ge=20)] = 2000
    grace_s: Annotated[int, Field(ge=1)] = 25


class TrackingConfig(_Section):
    """MLflow. Without ``uri`` a SQLite store under run.dir is used; secrets come from the environment.

    model: under which name new models are registered (default: run.name).
    """

    uri: str | None = None
    experiment: str = "lce-dist"
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] | None = None
    every_steps: Count = 5

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).password or urlsplit(value).username):
            raise ValueError("holds a user or a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return value


class FaultsConfig(_Section):
    """What a run does when something goes wrong in it. May be changed when a stopped run goes on.

    non_finite: a step whose loss or gradient is not finite ends the run ("stop"), changes nothing ("skip"), or is answered
    by the last checkpoint, the steps since then left out ("roll_back"); a stage may lose non_finite_limit steps, or rolls, like that.
    stall_note_s: without a step for so long, the ranks that are waited for are named; collective_timeout_s: and after so long all of them
    start again from the last checkpoint. Workers tell every 5 s where they are and count as silent after 15, so sooner than after 20
    an innocent one could be named.
    """

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    non_finite_limit: Count = 10
    stall_note_s: Annotated[int, Field(ge=20)] = 60
    collective_timeout_s: Annotated[int, Field(ge=20)] = 600


class ClusterConfig(_Section):
    """Machines. cache_dir, cache_gib: where each node keeps shards that come from a URL, and how much of them.

    max_failures: how often workers are started again without a new checkpoint between; a run of weeks may lose more than that.
    """

    device: Literal["auto", "cpu", "gpu"] = "auto"
    max_failures: Annotated[int, Field(ge=0)] = 3
    reader_threads: Count = 1
    cache_dir: str | None = None
    cache_gib: Positive = 100.0


class Config(_Section):
    run: RunConfig = RunConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    old: OldConfig
    new: NewConfig
    head: HeadConfig
    compat: CompatConfig = CompatConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    faults: FaultsConfig = FaultsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_compat(cls, values: Any) -> Any:
        """What ``[compat]`` does not say: the preset, then the weights that the scale gives. Wrong types are told later."""
        if not isinstance(values, dict):
            return values
        compat = values.get("compat", {})
        preset = str(compat.get("preset", "default")) if isinstance(compat, dict) else ""
        if preset not in PRESETS:
            return values
        mode = str(compat.get("mode", CompatConfig.model_fields["mode"].default))
        scale, dim = _number(values.get("head"), "scale", 64.0), _number(values.get("new"), "embedding_dim", 512.0)
        return {**values, "compat": {**_filled(preset, mode, scale, dim), **compat}}

    def compat_unless_set(self) -> dict[str, Any]:
        """What ``[compat]`` holds where the config does not say otherwise."""
        filled = _filled(self.compat.preset, self.compat.mode, self.head.scale, float(self.new.embedding_dim))
        return CompatConfig().model_dump() | filled

    @model_validator(mode="after")
    def _no_key_without_effect(self) -> Config:
        """A key of ``[compat]`` that this run would not look at is refused, as a margin is that the loss does not use."""
        compat, unless_set = self.compat, self.compat_unless_set()
        for key, why in _without_effect(compat).items():
            value = getattr(compat, key)
            if value != unless_set[key]:
                raise ValueError(f"compat.{key} is {value}; {why}. Remove it")
        if (
            compat.bridge == "paper"
            and compat.manner != "direct"
            and not (compat.align_weight or compat.boundary_weight)
        ):
            raise ValueError(
                "compat.align_weight and boundary_weight are 0; compat.bridge 'paper' is trained by these terms alone. Set one"
            )
        return self

    @model_validator(mode="after")
    def _seen_is_known(self) -> Config:
        """Whom an old model from a file has seen is not for the run to guess."""
        if self.old.identities is not None and not self.compat.seen_only:
            raise ValueError("old.identities is set; compat.seen_only alone looks at it. Remove it, or set seen_only")
        if self.compat.seen_only and self.old.is_given and self.old.identities is None and self.data.split is None:
            raise ValueError(
                "compat.seen_only is true; whom an old model from a file was trained on has to be said. Set old.identities, "
                "a file of identity keys, one a line, or data.split, whose old part they are"
            )
        return self

    @model_validator(mode="after")
    def _identities_fill_batches(self) -> Config:
        if self.data.sampling == "pk" and self.optim.global_batch % self.data.images_per_identity:
            raise ValueError(
                f"optim.global_batch is {self.optim.global_batch}; must be a multiple of data.images_per_identity "
                f"({self.data.images_per_identity}) where data.sampling is 'pk'"
            )
        return self

    @model_validator(mode="after")
    def _skipping_needs_zero(self) -> Config:
        if self.faults.non_finite == "skip" and self.optim.zero_stage == 0:
            raise ValueError(
                "faults.non_finite is 'skip'; without ZeRO the network is updated before its gradient is known to be finite. "
                "Set optim.zero_stage to 1, or faults.non_finite to 'roll_back'"
            )
        return self

    @model_validator(mode="after")
    def _manner_fits_models(self) -> Config:
        if self.compat.manner == "direct" and self.old.embedding_dim != self.new.embedding_dim:
            raise ValueError(
                f"new.embedding_dim is {self.new.embedding_dim}; the direct manner compares new vectors with old ones, "
                f"so it must equal old.embedding_dim ({self.old.embedding_dim}). For other dimensions set compat.mode to "
                "'training-backward' or 'training-forward'"
            )
        if self.compat.rows_from_old and self.old.embedding_dim != self.new.embedding_dim:
            raise ValueError("compat.rows_from_old is true; old centres fit new class rows in equal dimensions only")
        if self.new.weights is not None and not self.compat.maps_only:
            raise ValueError(
                f"new.weights is set, and compat.mode is {self.compat.mode!r}, which trains the new model. Remove "
                "new.weights, or set compat.mode to 'mapping-backward', 'mapping-forward' or 'mapping-direct'"
            )
        if self.new.net is None and self.compat.mode == "mapping-direct":
            raise ValueError(
                "compat.mode is 'mapping-direct', whose rotation becomes part of the new model; new.weights brings its own "
                "network, which cannot be changed. Name weights of one of our nets (new.net), or use 'mapping-backward'"
            )
        return self

    @property
    def model_names(self) -> tuple[str, str]:
        """What people call the old and the new model: a network, or the place of a file."""
        return self.old.net or self.old.weights or self.old.vectors or "", self.new.net or self.new.weights or ""

    def training_values(self) -> dict[str, Any]:
        """The settings that can change the trained weights.

        Places do not count, what lies there does: a run adds the fingerprints of its data, given weights and first rows.
        """
        return {**self._values(TRAINING_SECTIONS), "seed": self.run.seed}

    def evaluation_values(self) -> dict[str, Any]:
        """The settings that can change the reported numbers of trained weights; a run adds what lies at their places."""
        return self._values(("evaluation",))

    def _values(self, sections: tuple[str, ...]) -> dict[str, Any]:
        values = self.model_dump(mode="json", include=set(sections))
        for section, key in PLACES:
            if section in values:
                value = values[section][key]
                values[section][key] = len(value) if isinstance(value, list) else value is not None
        return values

    def with_absolute_places(self) -> Config:
        """The same settings with every path as seen from here, for a job that starts in another directory."""
        values = self.model_dump(mode="json")
        for section, key in (("run", "dir"), *PLACES):
            value = values[section][key]
            if isinstance(value, list):
                values[section][key] = [_absolute(path) for path in value]
            elif value is not None:
                values[section][key] = _absolute(value)
        return Config.model_validate_json(json.dumps(values))

    def fingerprint(self) -> str:
        """16 hex digits over :meth:`training_values` and :meth:`evaluation_values`."""
        text = json.dumps({**self.training_values(), **self.evaluation_values()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class VectorFilesConfig(_Section):
    """Where the vectors of one upgrade lie, of the same images by old and new model; bridge: the map between the two."""

    old: str
    new: str
    independent: str | None = None
    bridge: str | None = None


class VectorsConfig(_Section):
    """A report over stored vectors (``lce evaluate upgrade``): what of a run's config there is without a run."""

    vectors: VectorFilesConfig
    run: RunConfig = RunConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def model_names(self) -> tuple[str, str]:
        """Files of the old and the new model's vectors."""
        return self.vectors.old, self.vectors.new


Judged = Config | VectorsConfig  # what a gate needs to know of whatever left a report


def _absolute(place: str) -> str:
    if "://" in place:
        return place
    absolute = str(Path(place).resolve())
    if any("\ud800" <= letter <= "\udfff" for letter in absolute):
        shown = (
            absolute.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode("ascii", "backslashreplace")
        )
        raise ConfigError(
            f"{shown.decode()} has letters that this process cannot name: file names are {sys.getfilesystemencoding()} here. "
            "Set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        )
    return absolute


# settings that name a file or a folder that is read
PLACES = (
    ("data", "images"),
    ("data", "shards"),
    ("data", "split"),
    ("old", "weights"),
    ("old", "vectors"),
    ("old", "identities"),
    ("new", "weights"),
    ("head", "start_from"),
    ("evaluation", "attributes"),
    ("evaluation", "pairs"),
)
TRAINING_SECTIONS = ("data", "augment", "old", "new", "head", "compat", "optim")


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply ``a.b=value`` overrides, validate.

    Errors: ConfigError naming file, key, value, rule and the nearest known key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"config {path} does not exist; name a TOML file, for example configs/quickstart.toml"
        ) from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from None
    return parse_config(with_overrides(values, overrides or []), str(path))


def with_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``values`` with each ``a.b=value`` in its place, changed where they are. Errors: ConfigError naming the override."""
    for override in overrides:
        _apply_override(values, override)
    return values


def parse_config(values: dict[str, Any], origin: str, json_mode: bool = False) -> Config:
    """Validate plain values (``json_mode``: as they come back from JSON); the first problem becomes a ConfigError."""
    try:
        return Config.model_validate_json(json.dumps(values)) if json_mode else Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_one_line(error)}") from None


def parse_vectors_config(values: dict[str, Any], origin: str) -> VectorsConfig:
    """As ``parse_config``, of a report over stored vectors, from values as they come back from JSON."""
    try:
        return VectorsConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_one_line(error, VectorsConfig)}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} is not KEY=VALUE; for example --set optim.lr=0.05")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    if value == "none":
        table.pop(last, None)
    else:
        table[last] = value


# what pydantic adds to the place of a value that may be a number or a word: a problem for each
_KINDS = ("constrained-float", "float", "literal[")


def _key_of(problem: Mapping[str, Any]) -> list[str]:
    return [str(part) for part in problem["loc"] if not str(part).startswith(_KINDS)]


def _one_line(error: ValidationError, model: type[BaseModel] = Config) -> str:
    problems = error.errors(include_url=False)
    problem = problems[0]
    location = _key_of(problem)
    key = ".".join(location)
    others = [one for one in problems if _key_of(one) != location]
    more = f" (and {len(others)} more)" if others else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"unknown key {key!r}; {hint}{more}"
    if problem["type"] == "missing":
        return f"{key} is missing; it has no default. Add it.{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # says itself what matters; a secret is not repeated
        return f"{key}: {message}.{more}" if key else f"{message}.{more}"
    words = "".join(
        f" or {one['ctx']['expected']}" for one in problems if one["type"] == "literal_error" and one not in others
    )
    allowed = message if problem["type"] == "literal_error" else message + words
    return f"{key or 'all of it'} is {problem['input']!r}; {allowed[0].lower()}{allowed[1:]}.{more}"


def _known_keys(location: list[str], model: Any) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def parse_synthetic(values: dict[str, Any]) -> SyntheticConfig:
    """The synthetic data set's section alone, for commands that have no config file."""
    try:
        return SyntheticConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{problem['loc'][0]} is {problem['input']!r}; {problem['msg'].lower()}") from None
