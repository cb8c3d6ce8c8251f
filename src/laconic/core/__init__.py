"""The nouns that are plain data, the registry by file name, and the errors."""
