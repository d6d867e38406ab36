"""Write the demo as a static site: the page, and explainers of the CIFAR-10 network.

    python docs/demo/build.py SITE
    python -m http.server -d SITE

The page fetches onnxruntime-web from a content delivery network, unless `--runtime` names the
folder `dist` of the npm package, which is then copied. All explainers share one file of weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import onnx

from rectgrad_ref.exporter import explainer_model
from rectgrad_ref.methods import METHODS, make_method
from rectgrad_ref.onnx_models import published
from rectgrad_ref.onnx_models.cifar10 import CLASS_NAMES

HERE = Path(__file__).parent
WEIGHTS = "weights.bin"
LARGE = 2**16  # bytes, that only weights have
PERCENTILES = (50.0, 80.0, 90.0, 95.0, 98.0)
OTHERS = ("saliency", "input_x_gradient", "guided_backprop", "deconvolution", "epsilon_lrp",
          "deeplift", "integrated_gradients")  # fmt: skip
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build(site: Path, runtime: Path | None = None) -> None:
    """Write everything that the page needs into the folder `site`."""
    site.mkdir(parents=True, exist_ok=True)
    explainers = [_explainer(site, "rectgrad", q) for q in PERCENTILES]
    explainers += [_explainer(site, method) for method in OTHERS]
    facts = {
        "weights": WEIGHTS,
        "labels": list(CLASS_NAMES),
        "preprocessing": "x/127.5 − 1",
        "explainers": explainers,
    }
    (site / "explainers.json").write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    for name in ("page.js", "explainer.js"):
        shutil.copy(HERE / name, site)
    (site / WEIGHTS).chmod(0o644)  # onnx lets only its writer read it
    page = (HERE / "index.html").read_text("utf-8")
    if runtime is not None:
        start = page.index("https://cdn")
        end = page.index(RUNTIME[0])
        page = page[:start] + "./runtime/" + page[end:]
        (site / "runtime").mkdir(exist_ok=True)
        for name in RUNTIME:
            shutil.copy(runtime / name, site / "runtime")
    (site / "index.html").write_text(page, "utf-8")


def _explainer(site: Path, method: str, q: float | None = None) -> dict[str, object]:
    chosen = make_method(method, **({} if q is None else {"q": q}))
    proto = explainer_model(published.get("cifar10_cnn"), chosen)
    file = f"{method}.onnx" if q is None else f"{method}_{q:g}.onnx"
    # onnx appends to the file of weights, which is the same for all.
    (site / WEIGHTS).unlink(missing_ok=True)
    onnx.save(
        proto, site / file, save_as_external_data=True, location=WEIGHTS, size_threshold=LARGE
    )
    return {"file": file, "method": method, "label": METHODS[method].label, "q": q}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--runtime", type=Path, help="The folder dist of onnxruntime-web.")
    arguments = parser.parse_args()
    build(arguments.site, arguments.runtime)
