"""How fast: explanations against plain inference and against other libraries.

`python -m bench.speed` measures, `python -m bench.speed report` puts the numbers into the README.
"""
