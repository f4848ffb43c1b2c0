"""Training under kills, dying ranks and malformed audio. Start with ``python benchmarks/endurance/run.py``."""
