"""Step 1: measure the latency of passes and the sensitivity of every layer."""
