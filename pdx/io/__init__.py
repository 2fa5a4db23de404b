"""Reading and writing the files of commands, tables of text, and strict JSON."""
