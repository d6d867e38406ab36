"""The paper's experiments: `python -m bench.paper all`, or the names of some."""

from __future__ import annotations

from .command import command_line
from .experiments import SUITE

app = command_line(SUITE)

if __name__ == "__main__":
    app(prog_name="python -m bench.paper")
