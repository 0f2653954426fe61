"""Language modelling: text as windows of tokens, a decoder, and the loss of the next token."""
