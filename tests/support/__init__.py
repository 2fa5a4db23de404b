"""Helpers of the tests: tiny models, files, histories, references, and the import rule."""
