"""Rules about the network: its layers, their weights and options, and how it is trained."""
