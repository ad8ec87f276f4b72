"""How times and rows are taken: rounds, options, results as CSV files, load of other processes."""
