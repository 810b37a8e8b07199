"""Where a request runs: replica watch, placement, the atomic enqueue."""
