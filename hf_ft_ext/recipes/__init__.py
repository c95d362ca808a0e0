"""Recipes: YAML files of arguments, and tables of such with one row for each experiment."""
