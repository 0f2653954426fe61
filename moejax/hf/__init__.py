"""Models of Hugging Face, in and out: folders of tensors, families, conversion.

tensors.py   folders of safetensors files: read in slices, written in shards
families/    one table per family: keys of its config, names and layouts of its tensors
keys.py      the rules of a table for the config
rows.py      the rows of a table for the tensors
layout.py    the plan of a conversion
fields.py    our config in a family's terms, and the family that can express it
imported.py  a folder becomes a workdir
exported.py  a workdir becomes a folder
"""
