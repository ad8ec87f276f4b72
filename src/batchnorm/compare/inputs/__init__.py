"""Everything that a user chooses, checked: settings, data, networks, normalizations, batches and learning rates."""
