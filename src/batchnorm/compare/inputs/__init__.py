"""What is compared: data, networks and normalizations, by name or from the user's own code."""
