"""Train every choice of a comparison, on one process or several."""
