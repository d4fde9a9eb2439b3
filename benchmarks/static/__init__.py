"""Gates that need no GPU: exact numbers, compared with expected/static.json."""
