"""Step 1: measure how long a model's passes take and how much each layer bears."""
