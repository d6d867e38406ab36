"""The two networks of the paper: builders, training, export and published weights."""
