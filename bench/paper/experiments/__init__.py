"""One module per experiment of the paper, and the list of them in the paper's order."""

from __future__ import annotations

from ..runner import Experiment
from .feature_map_occlusion import FeatureMapOcclusion
from .feature_maps import FeatureMaps
from .layer_wise import LayerWise
from .noise_level import NoiseLevel
from .propagation_rules import PropagationRules
from .training_occlusion import TrainingOcclusion

EXPERIMENTS: dict[str, type[Experiment]] = {
    cls.name: cls
    for cls in (
        TrainingOcclusion,
        FeatureMapOcclusion,
        FeatureMaps,
        LayerWise,
        NoiseLevel,
        PropagationRules,
    )
}
