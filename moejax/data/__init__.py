"""Text in, batches out: corpora, tokenizers, n-gram baselines, and batches for every task.

Files and documents:

    paths.py      the files that a path names: a file, a folder, a glob, a list
    containers.py contents of a file by name and first bytes; those that are not read are refused
    formats/      files that hold many documents: JSON lines, Parquet, compressed files, ...
    documents.py  documents of plain text, and documents in pieces
    census.py     counts of documents that do not look like text
    builtin.py    the source of the running Python's standard library, the default corpus
    survey.py     a look at data before training; survey_text.py puts it into words

Text to tokens:

    tokenizers/   bytes as tokens, Hugging Face and SentencePiece files, training a byte-level BPE
    units.py      a corpus in units of work, and the rule that splits it
    split.py      held-out text: by name, a text of its own, or a share of the bytes
    encode.py     units of work to chunks of tokens
    assemble.py   exact copies left out, sides chosen, documents joined
    load.py       all of this in memory: `load(config.data)` makes a `corpus.Corpus`
    prepare.py    all of this in processes, to shards (shards.py); chunks.py, unfinished.py and
                  workers.py are its files and processes
    arrays/       token arrays of nanoGPT, llm.c, Megatron and NumPy as a corpus
    stream/       text that is read while it is trained on; hub.py has the library `datasets`
    text_stream.py documents of plain text as one stream

Facts about a corpus:

    duplicates.py near copies among documents, overlap of the two sides of a split
    token_overlap.py overlap of sides whose documents are gone
    domains.py    code, comment, docstring or English, for every byte of Python source
    baselines.py  loss of bigram and trigram models on the evaluated rows

Batches, for every task:

    source.py     the contract between data and the training loop
    batches.py    training batches as a pure function of the step, held-out batches
    shares.py     rows of several sources in given shares
    prefetch.py   results of a function of the step, computed ahead

Nothing here needs an accelerator or a network. Importing the package is light; grain,
tokenizers and sentencepiece are imported by the functions that use them.
"""
