"""Speed and privacy benchmarks."""
