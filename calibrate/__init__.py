"""Profile how much each global attention layer bears, and search a schedule under a budget."""
