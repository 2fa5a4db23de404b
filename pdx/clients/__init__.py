"""What stands on the engine: a chat, batch jobs, OpenAI's batch files."""
