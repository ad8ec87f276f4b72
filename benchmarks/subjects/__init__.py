"""The subjects of measurements: shapes and data, contenders, copies as the floor, networks."""
