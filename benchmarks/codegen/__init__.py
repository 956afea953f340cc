"""What the Triton kernels compile to, on a machine without a GPU."""
