"""Whole models: recipes, packing, reports, examination and shrinking."""
