"""Fidelity: how close the vectors of a model are to those of the same model at fp32."""
