"""Training text that is read while it is trained on, for a corpus that memory cannot hold.

    units.py    documents of files, in units that can be read for themselves
    encode.py   records to token ids, a few at a time
    sides.py    which documents are held out, and those that an evaluation needs
    blocks.py   the endless stream of tokens in blocks, from any place on
    batches.py  training batches as a pure function of the step

``moejax.data.hub`` has the documents of a data set of the library `datasets`, as units too.
"""
