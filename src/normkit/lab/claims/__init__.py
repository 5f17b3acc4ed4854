"""Claims of the literature as experiments, one a file; each ends with its EXPERIMENT."""
