"""Where the work of virtual nodes runs: this process, processes, threads, clusters."""
