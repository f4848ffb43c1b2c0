"""Parts of the training loop of ``bestrq2.train``."""
