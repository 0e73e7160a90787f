"""From a model's name to complete, verified files: one module for each hub."""
