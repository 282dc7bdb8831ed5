"""OpenAI's HTTP API: what may be asked, how it is answered, and the server. Needs the extra `serve`."""
