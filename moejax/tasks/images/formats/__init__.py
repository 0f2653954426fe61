"""Labelled pictures as they are stored: folders, Parquet, WebDataset, IDX and CIFAR's own files."""
