"""Other servers, measured beside this one with the same bundle, texts and load."""
