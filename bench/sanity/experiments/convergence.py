"""Convergence of the backward pass (Sixt et al. 2020): does it forget where it began?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.paper import plots
from bench.paper.evidence import Conclusion, medians_table
from bench.paper.experiments.subjects import PLOTTED, OnSubjects, Subject, titles
from bench.paper.maps import all_methods, similarity
from bench.paper.runner import Arrays, Results, Unit, of_networks
from bench.paper.sources import Sources
from rectgrad_ref.explainer import Explainer

from ..networks import with_random_outputs
from .modified import more_alike

_COVERED = "ε-LRP"


@dataclass(frozen=True, kw_only=True)
class Convergence(OnSubjects):
    """Cosine, layer by layer, of two backward passes that begin with orthogonal random vectors.

    Attributes
    ----------
    draws
        Of pairs of vectors.
    """

    name = "convergence"
    title = "Convergence of the backward pass"
    figures = "Sixt et al. 2020"
    paper = (
        "Rules that let only positive relevance through multiply matrices of one sign, whose "
        "product tends to rank one: whatever vector the backward pass of Guided BP, Deconvolution "
        "or RectGrad begins with at the logits, much the same arrives at the input. A gradient "
        "does not converge."
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 50, "photos": 2, "draws": 1}

    images: int = 200
    photos: int = 12
    draws: int = 3

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        methods = {name: m for name, m in all_methods(sources.seed).items() if m.walks_once}
        del methods["Gradient × input"]  # Saliency's backward pass

        def cosines(subject: Subject, x: np.ndarray, draw: int) -> Arrays:
            rng = np.random.default_rng([sources.seed, draw])
            model = with_random_outputs(subject.path, 2, rng)
            explainer = Explainer(model, backend=sources.backend)
            result = {}
            for name, method in methods.items():
                first, second = (
                    explainer.explain(x, method=method, target=k, trace=True).layers()
                    for k in range(2)
                )
                for depth, (layer, trace) in enumerate(reversed(list(first.items()))):
                    result[f"{depth:02d} {layer}, {name}"] = similarity(
                        trace.R_out, second[layer].R_out
                    )
            return result

        return {
            f"{draw}-{key}": partial(cosines, subject, x, draw)
            for subject in self.subjects(sources)
            for key, x, _ in subject.batches()
            for draw in range(self.draws)
        }

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        claims, tables, scale, numbers = [], [], [], {}
        for subject, title in titles(sources).items():
            values = of_networks(found, self.draws, f"{subject}-")
            stages = sorted({name.rpartition(", ")[0] for name in values})
            methods = dict.fromkeys(name.rpartition(", ")[2] for name in values)
            last = {method: values[f"{stages[-1]}, {method}"] for method in methods}
            words = stages[-1].partition(" ")[2]
            text = f"{title}: at {words}, {{method}}'s two passes are more alike than a gradient's"
            claims += more_alike(last, text, "pairs")
            scale.append(f"{last['Saliency'].shape[1]} images on {title}")
            samples = {m: [values[f"{stage}, {m}"] for stage in stages] for m in methods}
            chosen = np.unique(np.rint(np.linspace(0, len(stages) - 1, 8)).astype(int))
            tables.append(
                medians_table(
                    [stages[i].partition(" ")[2] for i in chosen],
                    {m: [parts[i] for i in chosen] for m, parts in samples.items()},
                    f"{title}: median cosine of what arrives at a layer's output in two passes.",
                )
            )
            numbers[subject] = {
                m: [float(np.median(part)) for part in parts] for m, parts in samples.items()
            }
        return Conclusion(
            scale=f"{' and '.join(scale)}; {self.draws} pairs of orthogonal random vectors.",
            numbers=numbers,
            tables=tables,
            claims=claims,
            remarks=[
                "Of methods that walk back once. Gradient × input has Saliency's backward pass, "
                f"and {_COVERED} with its small ε nearly so: in the plot it would cover Saliency."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        from matplotlib.ticker import MaxNLocator

        figure, axes = plots.figure(len(conclusion.numbers), width=3.6, height=2.8)
        for ax, (subject, lines) in zip(axes, conclusion.numbers.items(), strict=True):
            count = len(lines["Saliency"])
            plots.curves(
                ax,
                range(1, count + 1),
                {m: np.array(medians) for m, medians in lines.items() if m != _COVERED},
                xlabel="activation, from the output down",
                ylabel="cosine of two passes" if ax is axes[0] else "",
                title=PLOTTED[subject],
                legend=False,
            )
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_ylim(min(0, *(min(line) for line in lines.values())) - 0.05, 1.02)
        plots.shared_legend(figure, axes[0])
        return [plots.save(figure, folder, self.name)]
