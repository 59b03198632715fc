"""Step 3: choose a schedule, time it, correct once, and run it on held-out clips."""
