"""Privacy benchmarks: attacks and audits on the stack that runs."""
