"""Train every cell of the grid: the loop, its measurements, several processes, progress and TensorBoard."""
