"""The command line: a file a group of commands. A command parses, calls and prints."""
