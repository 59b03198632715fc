"""Step 4: write the profile, the summary, the figures and the page."""
