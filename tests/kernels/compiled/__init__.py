"""What the kernels compile to, seen on a machine without a GPU."""
