"""What an exported explainer costs beside its model."""
