"""What is measured: shapes and data, contenders, copies as the floor, networks."""
