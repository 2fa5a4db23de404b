"""Files and text, in and out: what a command reads and writes, tables, JSON."""
