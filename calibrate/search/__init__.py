"""Step 2: search a schedule within the limit."""
