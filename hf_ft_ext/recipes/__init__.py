"""Recipes: YAML files of arguments, or tables with one row for each experiment."""
