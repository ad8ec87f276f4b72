"""The subjects of measurements: shapes and data, contenders, streams as the floor, networks."""
