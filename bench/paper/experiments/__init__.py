"""One module per experiment of the paper, and the list of them in the paper's order."""

from __future__ import annotations

from ..runner import Experiment
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

EXPERIMENTS: dict[str, type[Experiment]] = {
    cls.name: cls
    for cls in (
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
    )
}
