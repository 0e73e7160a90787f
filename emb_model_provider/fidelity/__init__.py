"""How close a model's vectors are to those at fp32, and whether that is close enough."""
