"""From CSV files to tables, pictures and verdicts on targets."""
