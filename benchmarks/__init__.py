"""Speed and memory against named baselines: ``pytest benchmarks/ --benchmark-only`` (see README.md in this folder)."""
