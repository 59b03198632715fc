"""Step 4: export the profile, and report the result as text, pictures and a page."""
