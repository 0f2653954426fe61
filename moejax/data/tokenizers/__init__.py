"""Tokenizers: the contract, bytes, and the files of two libraries.

interface.py       the contract; the tokens before and between documents
named.py           the file that `data.tokenizer` names, and its Hugging Face folder
load.py            the tokenizer of a path
byte.py            every byte is a token
json_file.py       tokenizer.json of the Hugging Face library `tokenizers`
sentencepiece_file.py  the .model file of SentencePiece
bpe.py             training a byte-level BPE
"""
