"""Rendered scenes whose geometry is exact: what the reference model was trained on."""
