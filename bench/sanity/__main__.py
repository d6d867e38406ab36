"""Sanity checks of every method: `python -m bench.sanity all`, or the names of some."""

from __future__ import annotations

from bench.paper.command import command_line

from .experiments import SUITE

app = command_line(SUITE)

if __name__ == "__main__":
    app(prog_name="python -m bench.sanity")
