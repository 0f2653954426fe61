"""Text in, batches out: corpora, tokenizers, n-gram baselines, and batches for every task.

    documents.py  files as documents, the scan of a folder, reading in pieces
    containers.py contents of a file by name and first bytes; those that are not read are refused
    formats/      files that hold many documents: JSON lines, Parquet, compressed files, ...
    census.py     counts of documents that do not look like text
    split.py      held-out text: by name, a text of its own, or a share of the bytes
    duplicates.py near copies among documents, overlap of the two sides of a split
    builtin.py    the source of the running Python's standard library, the default corpus
    tokenizers/   bytes as tokens, Hugging Face and SentencePiece files, training a byte-level BPE
    tokenizer.py  documents as one stream of tokens
    corpus.py     documents to token arrays with a fingerprint: `load(config.data)`
    shards.py     the on-disk form of a tokenised corpus (index.json, train.bin, heldout.bin, ...)
    prepare.py    tokenise once, read many times: `prepare(path, tokenizer, out_dir)`
    domains.py    code, comment, docstring or English, for every byte of Python source
    baselines.py  loss of bigram and trigram models on the evaluated rows
    source.py     the contract between data and the training loop
    batches.py    training batches as a pure function of the step, held-out batches
    prefetch.py   results of a function of the step, computed ahead

Nothing here needs an accelerator or a network. Importing the package is light; grain,
tokenizers and sentencepiece are imported by the functions that use them.
"""
