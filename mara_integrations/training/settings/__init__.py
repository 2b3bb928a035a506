"""The settings of a training run: a class for each group of options that `mara-tools train --help` shows.

`training.config` puts them together as `TrainConfig`. What a setting does lives with the code that reads it.
"""
