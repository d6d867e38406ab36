"""What the site needs besides mkdocs.yml: pages from outside this folder, formulas, and the demo.

Files of the repository that are pages of the site too stay where they are, and are never copied. A
fence ``math`` holds a formula in LaTeX, as forges show it; here it becomes MathML, which browsers
render by themselves. The demo's page loads onnxruntime-web from a content delivery network, unless
the environment variable ORT_WEB_DIST names the folder `dist` of that npm package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ELSEWHERE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/**/*.md",
    "bench/**/results/*.png",
    "examples/**/*.py",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fence = {"name": "math", "class": "math", "format": _mathml}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for pattern in ELSEWHERE:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """On the site, what lies above this folder in the repository lies beside its pages."""
    if Path(page.file.abs_src_path).is_relative_to(Path(__file__).parent):
        ups = "../" * (page.file.src_uri.count("/") + 1)
        return markdown.replace(f"]({ups}", f"]({ups.removesuffix('../')}")
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    command = [sys.executable, Path(__file__).parent / "demo/build.py", f"{config.site_dir}/demo"]
    if runtime := os.environ.get("ORT_WEB_DIST"):
        command += ["--runtime", runtime]
    subprocess.run(command, check=True)


def _mathml(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'
