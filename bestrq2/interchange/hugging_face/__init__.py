"""The remote code that ``python -m bestrq2.export --hf`` puts beside the weights. Needs transformers."""
