"""The remote code that ``bestrq2 export --hf`` puts beside the weights. Needs transformers."""
