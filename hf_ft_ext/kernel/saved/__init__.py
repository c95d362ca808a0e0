"""A solved kernel in a folder: `record` reads and writes the files, `training_data` and `model` their parts.

`loading` reads the folder for a trainer, and `predictor` makes a plain object that predicts from it.
"""
