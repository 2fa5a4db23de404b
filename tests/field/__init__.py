"""What users of systems like this one report, as tests: a file a kind."""
