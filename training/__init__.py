"""How the reference model was trained. This package is not in the wheel."""
