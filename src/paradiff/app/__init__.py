"""The command line: options, pictures, files, runs."""
