"""Plans: graphs compiled ahead of time by TensorRT, and what is verified before they are opened."""
