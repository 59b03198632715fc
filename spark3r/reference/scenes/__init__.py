"""Rendered scenes with exact geometry, on which the reference model was trained."""
