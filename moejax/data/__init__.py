"""Text in, batches out: corpora, tokenizers, batches by step, and n-gram baselines.

    documents.py  files as documents, the scan of a folder, reading in pieces
    containers.py files that are no text, refused by name and first bytes
    census.py     counts documents that do not look like text
    split.py      what is held out: by name, by a text of its own, or a share of the bytes
    duplicates.py near copies among documents, what two sides of a split share
    builtin.py    the source of the running Python's standard library, the default corpus
    tokenizer.py  bytes as tokens, Hugging Face tokenizer files, training a byte-level BPE
    corpus.py     documents to token arrays with a fingerprint: `load(config.data)`
    shards.py     the on-disk form of a tokenised corpus (index.json, train.bin, heldout.bin, ...)
    prepare.py    tokenise once, read many times: `prepare(path, tokenizer, out_dir)`
    batches.py    batches as a pure function of the global step; evaluation batches; prefetching
    tables.py     rows for several tasks: features and targets, batches of them by step
    synthetic_tables.py  correlated tasks, groups of tasks that share experts
    recommender.py       a generated recommender of known structure
    table_files.py       CSV, Parquet and MovieLens; table_columns.py makes columns numbers
    domains.py    code, comment, docstring or English, for every byte of Python source
    baselines.py  loss of bigram and trigram models on the evaluated rows

Nothing here needs an accelerator or a network. Importing the package is light; grain and
tokenizers are imported by the functions that use them.
"""
