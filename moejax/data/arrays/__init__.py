"""Token arrays of other programs, read as they are.

array.py     one file of token ids, memory-mapped; the contract of a format
raw.py       ids without a header, as nanoGPT writes them: .bin
llmc.py      llm.c: a header of 1 KiB, then the ids: .bin
megatron.py  Megatron-LM: ids and an index of documents: .bin and .idx
npy.py       NumPy: .npy
table.py     the formats, and the arrays that a path names
joined.py    several arrays as one, without copying
sides.py     training and held-out arrays: by names, by a path of their own, or a share
scan.py      every id checked once; separators found
load.py      arrays to a corpus: `load_arrays`
"""
