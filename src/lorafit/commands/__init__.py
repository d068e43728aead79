"""One file per command: the Python function, and beside it the command-line function that calls and prints it."""
