"""Looking at what a model learned: grids, metrics, forgetting, reports."""
