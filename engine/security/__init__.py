"""Who calls, what he may, and which bundles may be opened."""
