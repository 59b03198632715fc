"""Step 3: select a schedule, time it, correct the latency model, and run it on held-out clips."""
