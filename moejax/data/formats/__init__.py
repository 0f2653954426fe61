"""Files that hold documents, one module per format; `table.py` lists them."""
