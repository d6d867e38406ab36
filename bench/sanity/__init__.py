"""What the literature holds against modified backpropagation: `python -m bench.sanity NAME`.

The experiments are those of `bench.paper.runner`, with the same command line and the same report.
"""
