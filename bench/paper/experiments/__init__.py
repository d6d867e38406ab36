"""One module per experiment of the paper, and the list of them in the paper's order."""

from __future__ import annotations

from pathlib import Path

from ..report import Suite
from .adversarial import Adversarial
from .coherence import Coherence
from .feature_map_occlusion import FeatureMapOcclusion
from .feature_maps import FeatureMaps
from .layer_wise import LayerWise
from .noise_level import NoiseLevel
from .propagation_rules import PropagationRules
from .roar import Roar
from .side_by_side import SideBySide
from .threshold_sweep import ThresholdSweep
from .training_occlusion import TrainingOcclusion

SUITE = Suite(
    folder=Path(__file__).parents[1],
    title="The paper's experiments, reproduced",
    introduction=(
        "Kim et al. 2019, *Why are Saliency Maps Noisy? Cause of and Solution to Noisy Saliency "
        "Maps*."
    ),
    origin="in the paper",
    claimant="Paper",
    members=(
        SideBySide,
        TrainingOcclusion,
        FeatureMapOcclusion,
        FeatureMaps,
        ThresholdSweep,
        Coherence,
        Adversarial,
        LayerWise,
        NoiseLevel,
        PropagationRules,
        Roar,
    ),
    critics="sanity",
)
