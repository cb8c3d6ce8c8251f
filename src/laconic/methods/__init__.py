"""The methods: one file, one method; a name is its file."""
