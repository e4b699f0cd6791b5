"""What a layer does: the backend, its metadata, and the work on CUDA and on the CPU."""
