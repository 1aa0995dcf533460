"""What drives server and clients on one machine: the in-process grid, scenarios, comparisons."""
