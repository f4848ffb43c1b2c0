"""Chunked attention with relative positions on GPUs; ``launch`` imports triton, this package does not."""
