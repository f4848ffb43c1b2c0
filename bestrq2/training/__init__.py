"""What the training loop of ``bestrq2.train`` is made of."""
