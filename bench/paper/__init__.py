"""The paper's experiments, each run by one command: `python -m bench.paper NAME`.

An experiment is a dataclass of settings (`runner.Experiment`). It is cut into units of work, whose
results are kept in a work folder, and concludes from all of them with numbers, tables and claims of
the paper that hold or do not. `report` makes RESULTS.md of the JSON files, and nothing else does.
"""
