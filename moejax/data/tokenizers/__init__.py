"""Tokenizers: the contract, bytes, and the files of two libraries.

interface.py       what the others need of a tokenizer; what stands between documents
named.py           the file that `data.tokenizer` names, and what a Hugging Face folder adds
load.py            the tokenizer of a path
byte.py            every byte is a token
json_file.py       tokenizer.json of the Hugging Face library `tokenizers`
sentencepiece_file.py  the .model file of SentencePiece
bpe.py             training a byte-level BPE
"""
