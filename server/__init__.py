"""What only the coordinator runs: the Flower ServerApp, the strategy, checkpoint and resume."""
