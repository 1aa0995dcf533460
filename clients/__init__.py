"""What only a site runs: the Flower ClientApp, private data, the resident trainer."""
