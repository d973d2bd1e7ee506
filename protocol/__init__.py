"""What crosses a process border: wire types, errors, settings. Imports nothing of the other packages."""
