"""Text in, batches out: corpora, tokenizers, n-gram baselines, and batches for every task.

    documents.py  files as documents, the scan of a folder, reading in pieces
    containers.py contents of a file by name and first bytes; those that are not read are refused
    formats/      files that hold many documents: JSON lines, Parquet, compressed files, ...
    census.py     counts of documents that do not look like text
    split.py      held-out text: by name, a text of its own, or a share of the bytes
    duplicates.py near copies among documents, overlap of the two sides of a split
    builtin.py    the source of the running Python's standard library, the default corpus
    tokenizers/   bytes as tokens, Hugging Face and SentencePiece files, training a byte-level BPE
    formats/      JSON lines, Parquet, Arrow, ArrayRecord, compressed files as documents
    arrays/       token arrays of other programs
    paths.py      files, folders, globs and lists of them
    units.py      documents as units of work, each on a side or to be put on one by its hash
    encode.py     units to tokens, lengths and digests, a chunk at a time
    assemble.py   exact copies left out, sides settled, streams joined
    load.py       text, shards or token arrays as a corpus: `load(config.data)`
    corpus.py     two streams of tokens with a fingerprint, and facts about the text
    shards.py     the on-disk form of a tokenised corpus (index.json, train.bin, heldout.bin, ...)
    prepare.py    tokenise once, read many times: `prepare(path, tokenizer, out_dir)`
    chunks.py, workers.py, unfinished.py  its files, processes and folder on the way there
    survey.py     what is in data, and what would be refused: `survey(path)`
    survey_text.py  the same for people
    domains.py    code, comment, docstring or English, for every byte of Python source
    baselines.py  loss of bigram and trigram models on the evaluated rows
    source.py     the contract between data and the training loop
    batches.py    training batches as a pure function of the step, held-out batches
    prefetch.py   results of a function of the step, computed ahead

Nothing here needs an accelerator or a network. Importing the package is light; grain,
tokenizers and sentencepiece are imported by the functions that use them.
"""
