"""Check the user's choices: settings, data, networks, normalizations, batches and learning rates."""
