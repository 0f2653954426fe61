"""Training text that is read while it is trained on, for a corpus that memory cannot hold.

texts.py    documents of files, in units that can be read for themselves
hub.py      documents of a data set of the `datasets` library: ``hf://NAME``
encode.py   records to token ids, a few at a time
sides.py    which documents are held out, and those that an evaluation needs
blocks.py   the endless stream of tokens in blocks, from any place on
batches.py  training batches as a pure function of the step
"""
