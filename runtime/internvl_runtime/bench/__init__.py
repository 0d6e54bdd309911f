"""The load tool: measures any server of the OpenAI API, pictures included."""
