"""Several targets per row of a table (MMoE).

tables.py     rows of features and targets, standardised
generated.py  generated tables of known structure
files.py      tables from CSV, Parquet and MovieLens
columns.py    columns of a file as numbers and categories
baselines.py  losses of the mean, of linear models and of the ideal prediction
mmoe.py       the layer: experts shared by several gates
dispatch.py   its experts on a mesh
"""
