"""How documents lie: files here or behind URLs, the Hub, formats and splits, cut into pieces that are read apart."""
