"""How bytes lie: safetensors, Orbax arrays, torch's files and folders, pickles, folders that appear whole, the Hub."""
