"""Default weights of LCE's two terms that are not the paper's, by the number of classes: contrast, and pairs."""

from __future__ import annotations

from dataclasses import dataclass

from lce_dist.config import CompatConfig, Manner

_PAIR_SHARES: dict[Manner, float] = {"direct": 1.0 / 8.0, "backward": 1.0 / 4.0, "forward": 1.0 / 8.0}
CONTRAST_WEIGHT = 1.0  # beside the classification, which is the same softmax under the same scale


@dataclass(frozen=True)
class VectorWeights:
    """Weights of LCE's terms on new vectors that are not the paper's: against old centres, and the image's old vector."""

    contrast: float
    pair: float


def vector_weights_for(config: CompatConfig, scale: float, num_classes: int, dim: int) -> VectorWeights:
    """What the config says, and where it says nothing: pairs for few classes, the contrast for more, directly.

    dim: of the longer of the two models' vectors. Fewer centres than dimensions leave directions in which unseen people
    lie and nothing is aligned: there the images' own vectors say the rest. With more classes the centres say nearly all of
    it, and the old model need not run in every step (docs/study.md).
    """
    few, direct = num_classes < dim, config.manner == "direct"
    contrast, pair = config.contrast_weight, config.pair_weight
    if contrast is None:
        contrast = CONTRAST_WEIGHT if direct and not few else 0.0
    if pair is None:
        pair = scale * _PAIR_SHARES[config.manner] if few else 0.0
    return VectorWeights(contrast, pair)
