"""Measurements of GloBE against its rivals and of the claims it makes: `python -m benchmarks.quality` and others."""
