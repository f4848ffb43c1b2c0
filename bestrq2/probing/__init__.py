"""What frozen features know: probes, baselines, honest intervals."""
