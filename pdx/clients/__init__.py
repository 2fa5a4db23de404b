"""Programs that use the engine: the terminal chat, batch jobs, OpenAI's batch files."""
