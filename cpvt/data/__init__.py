"""Files and formulas -> images and labels; knows nothing of models."""
